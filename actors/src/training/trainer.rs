//! The trainer: a replica of the model as an actor.
//!
//! Invariants:
//! 1. What is meant for another start of this trainer is refused.
//! 2. A plan, or a state, of an earlier epoch than one that was seen is refused, and so is an order of an earlier driver to
//!    keep a state.
//! 3. Its computing is a task that ends with the actor.

use std::sync::Arc;
use std::time::Duration;

use mobula::{ActorContext, ContextExt};
use mobula_storage::blob::BlobError;
use mobula_storage::checkpoint::{CheckpointSource, CheckpointWriter, Piece};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::collective::cluster::Met;
use super::collective::parcel::Parcel;
use super::collective::runner::Runner;
use super::collective::segment::SegmentName;
use super::collective::{ClusterCollective, SharedMemory};
use super::data::Files;
use super::device::WatchedGpu;
use super::messages::{
    Admission, Epoch, Fetched, Greeting, Handover, Held, KeepOrder, News, TrainerError,
};
use super::meters::process_cpu_time;
use super::numerics::Probe;
use super::protocol::exchange::{Ask, Contribution, Refusal};
use super::protocol::leader::StateDigest;
use super::protocol::member::Member;
use super::protocol::plan::{MemberId, Plan};
use super::replica::{Kept, Replica};
use super::shape::{member_shape, state_bytes_max};
use super::snapshot::StateSnapshot;
use super::spec::TrainSpec;
use crate::kernels::memory::keep_freed_memory;
use crate::storage::open_blobs;
use arriving::Arriving;
use inner::{Inner, Running, Shown};
use pulling::GIVEN_AT_ONCE;

mod arriving;
mod inner;
mod pulling;

/// A trainer that has nothing to say says so after this: its silence would mean that it is lost.
const NEWS_EVERY: Duration = Duration::from_millis(100);

/// How long the state after a step is waited for that it has not taken yet, and how often it is looked for: the
/// driver's copy may be a moment ahead.
const KEPT_MAX: Duration = Duration::from_secs(5);
const KEPT_PAUSE: Duration = Duration::from_millis(20);

/// Computes shards of a training job, together with others; the job's coordinator says with whom.
pub struct Trainer {
    slot: u32,
    spec: TrainSpec,
    /// Uploads its share of checkpoints.
    writer: CheckpointWriter,
    gpu: WatchedGpu,
    /// One state is taken over at a time.
    turn: tokio::sync::Mutex<()>,
    /// For parts of a state that are read for others.
    giving: Semaphore,
    inner: Mutex<Inner>,
}

/// The name of trainer number `slot` of a job.
#[must_use]
pub fn trainer_name(slot: u32) -> String {
    format!("trainer-{slot}")
}

// As many calls at once as members may wait for sums, of all buckets.
#[mobula::actor(name = "mobula.trainer", max_concurrency = 4096)]
impl Trainer {
    /// Trainer number `slot` of the job that `spec` describes. Data is loaded when it is prepared, so
    /// that a missing file is an answer and not a crash that is tried again and again.
    pub fn new(ctx: &ActorContext, spec: TrainSpec, slot: u32) -> Result<Self, BlobError> {
        keep_freed_memory();
        let blobs = open_blobs(ctx.storage())?;
        let mut writer = CheckpointWriter::new(blobs.clone());
        if let Some(limit) = spec.checkpoints.upload_bytes_per_second {
            writer = writer.with_rate_limit(limit);
        }
        let files = Files::with_store(blobs, Handle::current());
        Ok(Trainer {
            slot,
            writer,
            gpu: WatchedGpu::of(spec.device),
            turn: tokio::sync::Mutex::default(),
            giving: Semaphore::new(GIVEN_AT_ONCE),
            inner: Mutex::new(Inner {
                epoch: Epoch::default(),
                replica: Arc::new(Mutex::new(Replica::reading(spec.clone(), files))),
                arriving: Arriving::default(),
                leaving: Vec::new(),
                keep_order: KeepOrder::default(),
                share_order: KeepOrder::default(),
                shared: None,
                handover: None,
                entries: 0,
                memory: None,
                running: None,
            }),
            spec,
        })
    }

    /// Who and where it is, and the state it holds. Answered at once, also while it computes.
    pub async fn greet(&self, ctx: &ActorContext) -> Greeting {
        Greeting {
            incarnation: ctx.incarnation().0,
            node_name: ctx.node_name().to_owned(),
            held: self.held(),
            notice_ms: ctx.notice().map(|notice| notice.deadline_ms),
        }
    }

    /// Takes a piece of a state that is about to be taken over; the first one begins at 0.
    pub async fn receive(
        &self,
        epoch: Epoch,
        offset: u64,
        piece: Vec<u8>,
    ) -> Result<(), TrainerError> {
        let mut inner = self.inner.lock();
        inner.admit(epoch)?;
        if offset == 0 {
            inner.arriving.clear();
        }
        let expected = inner.arriving.length();
        let limit = state_bytes_max(&self.spec);
        if offset != expected || expected + piece.len() as u64 > limit {
            let found = offset;
            return Err(TrainerError::Misplaced { found, expected });
        }
        inner.arriving.extend(&piece);
        Ok(())
    }

    /// Takes the next parts of a state, after `step`, from the trainers `from` that keep it for others; the first order
    /// begins at byte 0. Before the next one comes, the driver sends what is missing.
    pub async fn fetch(
        &self,
        ctx: &ActorContext,
        epoch: Epoch,
        step: u64,
        parts: Vec<Piece>,
        from: Vec<u32>,
    ) -> Result<Fetched, TrainerError> {
        self.pull(&ctx.cluster(), epoch, step, &parts, &from).await
    }

    /// Takes over the state that has arrived, of so many bytes, and follows `plan` from there. A trainer that
    /// was started again on the way has none of it, or a part; one whose machine does not compute `expected`, where
    /// that is asked for, takes no part.
    pub async fn prepare(
        &self,
        ctx: &ActorContext,
        plan: Plan,
        length_bytes: u64,
        expected: Option<Probe>,
    ) -> Result<Admission, TrainerError> {
        let _turn = self.turn.lock().await;
        let (bytes, old) = {
            let mut inner = self.inner.lock();
            inner.admit(plan.epoch)?;
            let bytes = inner.arriving.take();
            if bytes.len() as u64 != length_bytes {
                return Err(TrainerError::Misplaced {
                    found: length_bytes,
                    expected: bytes.len() as u64,
                });
            }
            (inner.running, inner.shared) = (None, None);
            (bytes, Arc::clone(&inner.replica))
        };
        let (replica, held, probe, value_count) = blocking(move || {
            let mut replica = old.lock().successor();
            let held = replica.prepare(Some(&bytes))?;
            let (probe, value_count) = (replica.probe()?, replica.value_count());
            Ok::<_, TrainerError>((Arc::new(Mutex::new(replica)), held, probe, value_count))
        })
        .await?;
        if let Some(expected) = expected.filter(|expected| *expected != probe) {
            let computes = probe;
            return Err(TrainerError::OtherBits { computes, expected });
        }
        let shape = member_shape(&self.spec, value_count);
        let mut inner = self.inner.lock();
        inner.admit(plan.epoch)?;
        inner.entries += 1;
        inner.replica = Arc::clone(&replica);
        let me = MemberId {
            slot: self.slot,
            incarnation: ctx.incarnation().0,
            entry: inner.entries,
        };
        let mut member = Member::new(me, shape, held.step, held.short());
        member
            .adopt(plan)
            .expect("a new member follows no plan yet");
        let memory = inner
            .memory
            .get_or_insert_with(|| Arc::new(SharedMemory::for_gradients(value_count)));
        let memory = Arc::clone(memory);
        let collective = ClusterCollective::new(&ctx.cluster(), Arc::clone(&memory));
        let (runner, handle, board) = Runner::new(member, held.clone(), replica, collective);
        let mut task = JoinSet::new();
        task.spawn(runner.run());
        inner.running = Some(Running {
            shown: Shown {
                member: me,
                memory,
                handle,
                board,
            },
            _task: task,
        });
        Ok(Admission {
            member: me,
            held,
            probe,
        })
    }

    /// Follows `plan` from now on.
    pub async fn adopt(&self, plan: Plan) -> Result<(), TrainerError> {
        let (epoch, shown) = {
            let mut inner = self.inner.lock();
            inner.admit(plan.epoch)?;
            (plan.epoch, inner.shown()?)
        };
        match shown.handle.adopt(plan).await {
            Some(Ok(())) => Ok(()),
            Some(Err(current)) => Err(TrainerError::Stale {
                found: epoch,
                current,
            }),
            None => Err(shown.ended()),
        }
    }

    /// What there is to say since news number `known`: at once, or within a bound also if it is nothing.
    /// A coordinator that was replaced is told so.
    pub async fn news(
        &self,
        ctx: &ActorContext,
        epoch: Epoch,
        known: u64,
    ) -> Result<News, TrainerError> {
        let mut shown = {
            let inner = self.inner.lock();
            let current = inner.epoch;
            if current.driver_incarnation() > epoch.driver_incarnation() {
                let found = epoch;
                return Err(TrainerError::Stale { found, current });
            }
            inner.shown()?
        };
        let mut notices = ctx.notices();
        let had_notice = notices.borrow_and_update().is_some();
        if !had_notice {
            let reported = shown.board.wait_for(|board| board.number > known);
            let something = async {
                tokio::select! {
                    _ = reported => {}
                    _ = notices.changed() => {}
                }
            };
            // Nothing is news too.
            let _ = tokio::time::timeout(NEWS_EVERY, something).await;
        }
        let board = shown.board.borrow().clone();
        if let Some(failed) = board.failed {
            return Err(failed);
        }
        if shown.board.has_changed().is_err() {
            return Err(shown.ended());
        }
        let new = board.reports.iter().filter(|(number, _)| *number > known);
        Ok(News {
            number: board.number,
            member: shown.member,
            step: board.step,
            spent: board.spent,
            cpu: process_cpu_time(),
            reports: new.map(|(_, report)| *report).collect(),
            notice_ms: ctx.notice().map(|notice| notice.deadline_ms),
            gpu_utilization: self.gpu.utilization(),
        })
    }

    /// Another process will exchange sums with this one: whether each can read the other's memory.
    pub async fn meet(
        &self,
        to: MemberId,
        memory: Option<SegmentName>,
    ) -> Result<Met, TrainerError> {
        let shown = self.shown_as(to)?;
        Ok(Met {
            reads: memory.is_some_and(|name| shown.memory.can_read(name)),
            memory: shown.memory.name(),
        })
    }

    /// Another member's sums, of the bucket and step that `at` names.
    pub async fn contribute(
        &self,
        to: MemberId,
        at: Ask,
        sums: Vec<Parcel>,
    ) -> Result<Result<(), Refusal>, TrainerError> {
        let shown = self.shown_as(to)?;
        let contribution = Contribution {
            from: at.from,
            step: at.step,
            digest: at.digest,
            bucket: at.bucket,
            partials: sums
                .into_iter()
                .map(|parcel| shown.memory.unpack(parcel))
                .collect::<Result<_, _>>()?,
        };
        let answer = shown.handle.contribute(contribution).await;
        answer.ok_or_else(|| shown.ended())
    }

    /// Another member asks for a sum; answered once it is there, `placed` in this process's memory if it can read that,
    /// or with [`Refusal::NotYet`].
    pub async fn ask(
        &self,
        to: MemberId,
        ask: Ask,
        placed: bool,
    ) -> Result<Result<Parcel, Refusal>, TrainerError> {
        let shown = self.shown_as(to)?;
        let answer = shown.handle.ask(ask).await.ok_or_else(|| shown.ended())?;
        Ok(answer.map(|sum| shown.memory.pack_answer(&ask, sum, placed)))
    }

    /// The first bytes of its state's digest before `step`, if it knows that still.
    pub async fn digest_before(&self, step: u64) -> Result<Option<StateDigest>, TrainerError> {
        let shown = self.inner.lock().shown()?;
        let answer = shown.handle.digest_before(step).await;
        answer.ok_or_else(|| shown.ended())
    }

    /// A piece of its state, for a driver that was started anew. The state is that of the step when the
    /// first piece was asked for; an empty piece is the end.
    pub async fn state(&self, offset: u64, length: u64) -> Result<Vec<u8>, TrainerError> {
        if offset == 0 {
            let replica = Arc::clone(&self.inner.lock().replica);
            let bytes = blocking(move || replica.lock().state()).await?;
            self.inner.lock().leaving = bytes;
        }
        let mut inner = self.inner.lock();
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|offset| inner.leaving.get(offset..))
            .unwrap_or_default();
        let piece = rest[..rest.len().min(length as usize)].to_vec();
        if piece.is_empty() {
            // All of it has left.
            inner.leaving = Vec::new();
        }
        Ok(piece)
    }

    /// Keeps what a driver that leaves knows, until another one leaves. One that was replaced is told so.
    pub async fn entrust(&self, epoch: Epoch, handover: Handover) -> Result<(), TrainerError> {
        let mut inner = self.inner.lock();
        inner.admit(epoch)?;
        inner.handover = Some(handover);
        Ok(())
    }

    /// What a driver that left has left here.
    pub async fn handover(&self) -> Option<Handover> {
        self.inner.lock().handover.clone()
    }

    /// Keeps the state as it is or will be after `step`, for a checkpoint that is uploaded together, and no other.
    /// Answers whether it can: it cannot where that step is over, or a later order came first.
    pub async fn keep(&self, order: KeepOrder, step: u64) -> Result<bool, TrainerError> {
        let admitted = self.inner.lock().admit_keep(order)?;
        let Some(replica) = admitted else {
            return Ok(false);
        };
        Ok(blocking(move || replica.lock().keep(order, step)).await)
    }

    /// Stores `pieces` of the state after `step`, each only if it is the one that was meant.
    pub async fn store(&self, step: u64, pieces: Vec<Piece>) -> Result<(), TrainerError> {
        let kept = self.kept(step, Replica::kept).await;
        let state: Arc<dyn CheckpointSource> = kept.ok_or(TrainerError::NotKept { step })?;
        let length = state.length_bytes();
        let is_inside = |piece: &Piece| {
            let end = piece.offset.checked_add(piece.chunk.length);
            end.is_some_and(|end| end <= length)
        };
        if !pieces.iter().all(is_inside) {
            let reason = format!("a piece of it ends behind the {length} bytes of the state here");
            return Err(TrainerError::NotStored { step, reason });
        }
        let stored = self.writer.upload(state, &pieces).await;
        stored.map_err(|error| TrainerError::NotStored {
            step,
            reason: error.to_string(),
        })
    }

    /// Keeps no more what `order` or one before it asked to keep for a checkpoint.
    pub async fn release(&self, order: KeepOrder) {
        let ended = self.inner.lock().end_keep(order);
        if let Some(replica) = ended {
            blocking(move || replica.lock().release(order)).await;
        }
    }

    /// Keeps the state as it is or will be after `step` for trainers that join, and no other. Answers whether it can: it
    /// cannot where that step is over, or a later order or the end of this one came first.
    pub async fn share(&self, order: KeepOrder, step: u64) -> Result<bool, TrainerError> {
        self.keep_for_others(order, step).await
    }

    /// A part of that state, for a trainer that joins.
    pub async fn part(&self, step: u64, part: Piece) -> Result<Vec<u8>, TrainerError> {
        self.give(step, part).await
    }

    /// Keeps no more what `order` or one before it asked to share.
    pub async fn unshare(&self, order: KeepOrder) {
        self.keep_no_more(order).await;
    }

    /// Leaves a node that was given notice: it is started elsewhere, without state.
    pub async fn leave(&self, ctx: &ActorContext) -> Result<(), mobula::Error> {
        ctx.yield_now().await
    }
}

impl Trainer {
    /// Under which name it exchanges sums, and the state after its last update: not asked of the replica, which is busy
    /// for as long as a shard takes. One whose work has ended in the middle is to be prepared anew, whatever it holds.
    fn held(&self) -> Option<(MemberId, Held)> {
        let shown = self.inner.lock().shown().ok()?;
        shown.board.has_changed().ok()?;
        let board = shown.board.borrow();
        let held = board.held.clone().filter(|_| board.failed.is_none());
        held.map(|held| (shown.member, held))
    }

    /// The state after `step`, as soon as it is there, if it is kept for what `look` looks for.
    async fn kept(&self, step: u64, look: fn(&Replica, u64) -> Kept) -> Option<Arc<StateSnapshot>> {
        let end = Instant::now() + KEPT_MAX;
        loop {
            let replica = Arc::clone(&self.inner.lock().replica);
            match blocking(move || look(&replica.lock(), step)).await {
                Kept::Here(state) => return Some(state),
                Kept::Coming if Instant::now() < end => tokio::time::sleep(KEPT_PAUSE).await,
                Kept::Coming | Kept::Never => return None,
            }
        }
    }

    /// What runs, if that is the member that was meant.
    fn shown_as(&self, meant: MemberId) -> Result<Shown, TrainerError> {
        let shown = self.inner.lock().shown()?;
        if shown.member == meant {
            Ok(shown)
        } else {
            Err(TrainerError::Other(meant))
        }
    }
}

/// Runs what computes, or waits for what does, beside the host's other tasks.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
#[path = "trainer_tests.rs"]
mod tests;
