//! Keeping one slot busy: tasks go out, answers come in, and what they mean is decided here.
//!
//! Invariants:
//! 1. As many tasks are under way as [`Pace`] says, and one more for each time that the slot says
//!    that all it has only wait.
//! 2. When the slot is gone, each task that was under way is pushed again or failed.
//! 3. A slot of the pool's own is given back, a lent one only left.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use mobula_core::error::CallError;
use mobula_core::object::ObjectId;
use mobula_core::order::ActorAddress;
use mobula_host::client::{CallClient, OutgoingCall};
use mobula_host::pending::PendingCall;
use mobula_host::reply::CallResult;
use mobula_host::tasks::{END_METHOD, WATCH_METHOD};
use tokio::sync::broadcast;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::lease::no_slot;
use super::lineage::TaskLineage;
use super::pace::{IN_FLIGHT_MAX, Pace};
use super::pool::Pool;
use super::record::{TaskRecord, Verdict, ends_slot};
use crate::cluster::Cluster;

/// How long a slot is kept without tasks: long enough for a program that submits one at a time,
/// short enough that others do not miss it.
const IDLE_MAX: Duration = Duration::from_secs(1);

/// A slot that has not answered for this long while tasks wait is asked whether its tasks only wait.
const STALLED: Duration = Duration::from_millis(20);

/// How long the head is asked why a slot ended, for the text of an error.
const REASON_WAIT: Duration = Duration::from_secs(3);

/// One task that is under way.
struct Flying {
    record: Option<TaskRecord>,
    pushed: Instant,
    call: PendingCall,
}

/// The same, answered.
struct Answered {
    record: TaskRecord,
    pushed: Instant,
    result: CallResult,
}

impl Future for Flying {
    type Output = Answered;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Answered> {
        let result = ready!(self.call.poll_answer(cx));
        Poll::Ready(Answered {
            record: self.record.take().expect("answered once"),
            pushed: self.pushed,
            result,
        })
    }
}

/// Pushes the pool's tasks into the slot at `address` until it is gone or no longer needed.
pub(super) async fn drive(pool: &Arc<Pool>, cluster: &Cluster, address: ActorAddress) {
    let ended = drive_slot(pool, cluster, address, None).await;
    pool.state.lock().slots -= 1;
    if let Some(ended) = ended {
        ended.settle().await;
    }
}

/// Pushes the pool's tasks into a slot that a waiting task has lent, until it is given `back`.
pub(super) async fn drive_lent(
    pool: &Arc<Pool>,
    cluster: &Cluster,
    address: ActorAddress,
    back: CancellationToken,
) {
    if let Some(ended) = drive_slot(pool, cluster, address, Some(back)).await {
        ended.settle().await;
    }
}

async fn drive_slot<'a>(
    pool: &'a Arc<Pool>,
    cluster: &'a Cluster,
    address: ActorAddress,
    back: Option<CancellationToken>,
) -> Option<Slot<'a>> {
    let calls = match cluster.calls().await {
        Ok(calls) => calls,
        Err(error) => {
            tracing::warn!(%error, "tasks cannot be pushed from this process");
            pool.fail_waiting(&no_slot(&error));
            return None;
        }
    };
    let mut slot = Slot {
        pool,
        cluster,
        calls,
        address,
        back,
        flying: FuturesUnordered::new(),
        cancellations: pool.cancellations.subscribe(),
        pace: Pace::new(),
        waiting_in_slot: 0,
        watch: None,
        is_gone: false,
        again: Vec::new(),
        lost: Vec::new(),
    };
    slot.run().await;
    Some(slot)
}

struct Slot<'a> {
    pool: &'a Arc<Pool>,
    cluster: &'a Cluster,
    calls: CallClient,
    address: ActorAddress,
    /// For a lent slot: when no more may begin in it.
    back: Option<CancellationToken>,
    flying: FuturesUnordered<Flying>,
    cancellations: broadcast::Receiver<(ObjectId, bool)>,
    pace: Pace,
    /// Tasks under way that are known to wait for objects, so that others may go beside them.
    waiting_in_slot: usize,
    watch: Option<BoxFuture<'static, CallResult>>,
    is_gone: bool,
    /// To be pushed again, elsewhere.
    again: Vec<TaskRecord>,
    /// Failed with the slot: the head may know why.
    lost: Vec<(TaskRecord, CallError)>,
}

impl Slot<'_> {
    async fn run(&mut self) {
        loop {
            if self.takes_more() {
                self.push_all().await;
            }
            if self.flying.is_empty() {
                if !self.takes_more() || !self.wait_for_work().await {
                    return;
                }
            } else {
                self.wait_for_answer().await;
            }
        }
    }

    fn takes_more(&self) -> bool {
        !self.is_gone && !self.back.as_ref().is_some_and(|back| back.is_cancelled())
    }

    fn room(&self) -> usize {
        let Some(name) = self.pool.next_name() else {
            return 0;
        };
        let depth = self.pace.depth(name) + self.waiting_in_slot;
        depth.min(IN_FLIGHT_MAX).saturating_sub(self.flying.len())
    }

    async fn push_all(&mut self) {
        for _ in 0..self.room() {
            let Some(record) = self.pool.take() else {
                return;
            };
            let pushed = Instant::now();
            let call =
                OutgoingCall::new(record.name(), record.payload()).with_deadline(record.deadline);
            let call = self.calls.start(&self.address, call).await;
            self.flying.push(Flying {
                record: Some(record),
                pushed,
                call,
            });
        }
    }

    /// Waits until there may be something to do; false if the slot is to be given back.
    async fn wait_for_work(&mut self) -> bool {
        if let Some(back) = &self.back {
            tokio::select! {
                () = back.cancelled() => {}
                () = self.pool.work.notified() => {}
            }
            return true;
        }
        self.pool.state.lock().idle += 1;
        let found = tokio::time::timeout(IDLE_MAX, self.pool.work.notified()).await;
        self.pool.state.lock().idle -= 1;
        if found.is_ok() || self.pool.waiting() > 0 {
            return true;
        }
        // In vain is no harm: a slot that nobody uses ends by itself.
        let end = OutgoingCall::new(END_METHOD, Bytes::new());
        let ending = self.calls.call(&self.address, end);
        let _ = tokio::time::timeout(IDLE_MAX, ending).await;
        false
    }

    async fn wait_for_answer(&mut self) {
        let takes_more = self.takes_more();
        let has_room = takes_more && self.flying.len() < IN_FLIGHT_MAX;
        let may_watch = takes_more && self.watch.is_none() && self.pool.waiting() > 0;
        tokio::select! {
            biased;
            Some(answered) = self.flying.next() => self.judge(answered),
            Ok((task, forced)) = self.cancellations.recv() => self.cancel(task, forced),
            watched = until_watched(&mut self.watch) => {
                self.watch = None;
                if watched.is_ok() {
                    self.waiting_in_slot = self.flying.len();
                }
            }
            () = self.pool.work.notified(), if has_room => {
                // Somebody else may be the one with room for it.
                if self.room() == 0 && self.pool.state.lock().idle > 0 {
                    self.pool.work.notify_one();
                }
            }
            () = tokio::time::sleep(STALLED), if may_watch => {
                let watch = OutgoingCall::new(WATCH_METHOD, Bytes::new());
                let watch = self.calls.start(&self.address, watch).await;
                self.watch = Some(Box::pin(watch.answer()));
            }
        }
    }

    fn cancel(&self, task: ObjectId, forced: bool) {
        let is_it = |flying: &&Flying| {
            flying
                .record
                .as_ref()
                .is_some_and(|record| record.object() == task)
        };
        if let Some(flying) = self.flying.iter().find(is_it) {
            flying.call.cancel(forced);
        }
    }

    fn judge(&mut self, answered: Answered) {
        let Answered {
            mut record,
            pushed,
            result,
        } = answered;
        self.waiting_in_slot = self.waiting_in_slot.saturating_sub(1);
        let error = match result {
            Ok(value) => {
                self.pace.answered(record.name(), pushed, Instant::now());
                let (pool, cluster) = (self.pool, self.cluster);
                return record.complete(value, |task| TaskLineage::of(task, pool, cluster));
            }
            Err(error) => error,
        };
        let is_gone = ends_slot(&error);
        self.is_gone |= is_gone;
        match record.tries.judge(&error) {
            Verdict::Again => {
                tracing::debug!(task = record.name(), %error, "a task is pushed again");
                self.again.push(record);
            }
            Verdict::Final if is_gone => self.lost.push((record, error)),
            Verdict::Final => record.fail(error, None),
        }
        if !self.is_gone && !self.again.is_empty() {
            let again = std::mem::take(&mut self.again);
            self.pool.put_back(self.cluster, again);
        }
    }

    /// After the slot: what it left goes elsewhere, or fails with the reason of its end.
    async fn settle(self) {
        if !self.again.is_empty() {
            self.pool.put_back(self.cluster, self.again);
        }
        if self.lost.is_empty() {
            return;
        }
        let slot = &self.address;
        let asked = self
            .cluster
            .resolve_actor(slot.actor, slot.incarnation, REASON_WAIT);
        let reason = match tokio::time::timeout(REASON_WAIT, asked).await {
            Ok(Ok(actor)) => actor.exit_reason,
            // Then the error says what was seen from here.
            _ => None,
        };
        for (record, error) in self.lost {
            record.fail(error, reason.as_deref());
        }
    }
}

/// The answer to a question that is under way; never, if there is none.
async fn until_watched(watch: &mut Option<BoxFuture<'static, CallResult>>) -> CallResult {
    match watch {
        Some(watch) => watch.await,
        None => std::future::pending().await,
    }
}
