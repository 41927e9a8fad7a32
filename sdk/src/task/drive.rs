//! Keeping one slot busy: tasks go out, answers come in, and what they mean is decided here.
//!
//! Invariants:
//! 1. As many tasks are under way as [`Pace`] says, and one more for each time that the slot says
//!    that all it has only wait.
//! 2. When the slot is gone, each task that was under way is pushed again or failed; never again if
//!    it was cancelled, however late its slot's answer or end comes.
//! 3. A slot of the pool's own is given back, a lent one only left.
//! 4. A slot that does not answer is given no more, and what has not begun in it goes back in line,
//!    for a slot that is idle or a new one.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use mobula_core::codec;
use mobula_core::error::{CallError, Executed};
use mobula_core::object::ObjectId;
use mobula_core::order::ActorAddress;
use mobula_host::client::{CallClient, CallRoute, OutgoingCall};
use mobula_host::pending::PendingCall;
use mobula_host::reply::CallResult;
use mobula_host::tasks::{END_METHOD, RETURN_METHOD, WATCH_METHOD};
use tokio::sync::watch;
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::items::{ItemSink, pump};
use super::lease::no_slot;
use super::lineage;
use super::pace::{IN_FLIGHT_MAX, Pace};
use super::pool::Pool;
use super::record::TaskRecord;
use super::tries::{Verdict, ends_slot};
use super::under_way::UnderWay;
use crate::cluster::Cluster;

/// How long a slot is kept without tasks: long enough for a program that submits one at a time,
/// short enough that others do not miss it.
const IDLE_MAX: Duration = Duration::from_secs(1);

/// The same for a slot beside another one that is idle: the next task has that one, and somebody else
/// may wait for this.
const SPARE_IDLE_MAX: Duration = Duration::from_millis(200);

/// A slot that has not answered for this long has a task that takes longer than expected. While
/// others wait behind it, or in line, it is asked whether its tasks only wait, and for those that
/// have not begun. Ten times what lies in front of a slot: one that is only busy answers.
const STALLED: Duration = Duration::from_millis(20);

/// Answers that are taken up before more is pushed: a slot must not run dry over them.
const JUDGED_AT_ONCE: usize = 16;

/// How long the head is asked why a slot ended, for the text of an error.
const REASON_WAIT: Duration = Duration::from_secs(3);

/// One task that is under way.
struct Flying {
    record: Option<TaskRecord>,
    pushed: Instant,
    call: Call,
}

/// Its call.
enum Call {
    /// It brings one value.
    Value(PendingCall),
    /// It brings several, which are handed on meanwhile.
    Items {
        pump: BoxFuture<'static, (CallResult, ItemSink)>,
        cancel: watch::Sender<bool>,
    },
}

impl Call {
    fn cancel(&self, forced: bool) {
        match self {
            Call::Value(call) => call.cancel(forced),
            // Nobody listens only if it has just ended.
            Call::Items { cancel, .. } => drop(cancel.send(forced)),
        }
    }
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
        let (result, items) = match &mut self.call {
            Call::Value(call) => (ready!(call.poll_answer(cx)), None),
            Call::Items { pump, .. } => {
                let (result, items) = ready!(pump.as_mut().poll(cx));
                (result, Some(items))
            }
        };
        let mut record = self.record.take().expect("answered once");
        record.items = items;
        Poll::Ready(Answered {
            record,
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
    let route = match CallRoute::new(&address) {
        Ok(route) => route,
        Err(error) => {
            pool.fail_waiting(&error);
            return None;
        }
    };
    let mut slot = Slot {
        route,
        pool,
        cluster,
        calls,
        address,
        back,
        flying: FuturesUnordered::new(),
        under_way: pool.enlist(),
        pace: Pace::new(),
        heard: Instant::now(),
        look: look_in(STALLED),
        waiting_in_slot: 0,
        watch: None,
        is_ahead: false,
        returning: None,
        has_word: false,
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
    /// The way there, looked up once.
    route: CallRoute,
    /// For a lent slot: when no more may begin in it.
    back: Option<CancellationToken>,
    flying: FuturesUnordered<Flying>,
    /// What it has, and what of that was cancelled.
    under_way: Arc<UnderWay>,
    pace: Pace,
    /// When it answered last, or was given something while it had nothing.
    heard: Instant,
    /// Comes around while tasks are behind another one.
    look: Interval,
    /// Tasks under way that are known to wait for objects, so that others may go beside them.
    waiting_in_slot: usize,
    watch: Option<BoxFuture<'static, CallResult>>,
    /// Something was pushed behind another task since it was last asked for what has not begun.
    is_ahead: bool,
    /// It was asked for that.
    returning: Option<BoxFuture<'static, CallResult>>,
    /// It has heard that there is work, and nobody else has heard that word.
    has_word: bool,
    is_gone: bool,
    /// To be pushed again, elsewhere.
    again: Vec<TaskRecord>,
    /// Failed with the slot: the head may know why.
    lost: Vec<(TaskRecord, CallError)>,
}

impl Slot<'_> {
    async fn run(&mut self) {
        loop {
            self.push_all().await;
            // What is in line still finds no room here, or is too late for a slot that is given back meanwhile. Somebody
            // else may be the one with room for it: an idle slot, or one that was lent.
            if std::mem::take(&mut self.has_word) && self.pool.waiting() > 0 {
                self.pool.work.notify_one();
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
        let depth = match self.is_stalled() {
            true => 1,
            false => self.pace.depth(name),
        };
        let depth = depth + self.waiting_in_slot;
        depth.min(IN_FLIGHT_MAX).saturating_sub(self.flying.len())
    }

    fn is_stalled(&self) -> bool {
        !self.flying.is_empty() && self.heard.elapsed() >= STALLED
    }

    /// Pushes until nothing is in line that has room here: meanwhile more may have come.
    async fn push_all(&mut self) {
        while self.has_room_for_next() {
            self.push().await;
        }
    }

    fn has_room_for_next(&self) -> bool {
        self.takes_more() && self.room() > 0
    }

    async fn push(&mut self) {
        let records = self.pool.take(self.room(), &self.under_way);
        let pushed = Instant::now();
        if self.flying.is_empty() {
            self.heard = pushed;
        }
        for mut record in records {
            self.is_ahead |= !self.flying.is_empty();
            let call =
                OutgoingCall::new(record.name(), record.payload()).with_deadline(record.deadline);
            let call = match record.items.take() {
                None => Call::Value(self.calls.start_on(&self.route, call).await),
                Some(items) => {
                    let calls = &self.calls;
                    let stream = calls.start_stream_on(&self.route, call, items.window).await;
                    let (cancel, cancelled) = watch::channel(false);
                    let pump = Box::pin(pump(stream, items, cancelled));
                    Call::Items { pump, cancel }
                }
            };
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
                biased;
                // First: a word that this one does not hear goes to the next.
                () = back.cancelled() => {}
                () = self.pool.work.notified() => self.has_word = true,
            }
            return true;
        }
        let kept = {
            let mut state = self.pool.state.lock();
            if state.waiting_count() > 0 {
                return true;
            }
            state.idle += 1;
            match state.idle {
                1 => IDLE_MAX,
                _ => SPARE_IDLE_MAX,
            }
        };
        let found = tokio::time::timeout(kept, self.pool.work.notified()).await;
        self.pool.state.lock().idle -= 1;
        self.has_word = found.is_ok();
        if self.has_word || self.pool.waiting() > 0 {
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
        let waiting = self.pool.waiting();
        // What stands in line found no room here: a word of more would find none either, and would be
        // passed on and heard again without an end. What came just now is found when it looks again.
        let listens = takes_more && waiting == 0 && self.flying.len() < IN_FLIGHT_MAX;
        let may_look = takes_more && (self.flying.len() > 1 || waiting > 0);
        tokio::select! {
            biased;
            Some(answered) = self.flying.next() => {
                self.judge(answered);
                // Answers come in bursts: what is there already needs no further round.
                for _ in 1..JUDGED_AT_ONCE {
                    match futures::poll!(self.flying.next()) {
                        Poll::Ready(Some(answered)) => self.judge(answered),
                        _ => break,
                    }
                }
            }
            (task, forced) = self.under_way.cancelled() => self.cancel(task, forced),
            watched = until_answered(&mut self.watch) => {
                self.watch = None;
                if watched.is_ok() {
                    self.waiting_in_slot = self.flying.len();
                }
            }
            _ = until_answered(&mut self.returning) => self.returning = None,
            () = self.pool.work.notified(), if listens => self.has_word = true,
            _ = self.look.tick(), if may_look => self.look_after().await,
        }
    }

    /// Asks a slot that does not answer whether more could be done.
    async fn look_after(&mut self) {
        if !self.is_stalled() {
            return;
        }
        if self.pool.waiting() > 0 && self.watch.is_none() {
            self.watch = Some(self.ask(WATCH_METHOD, Bytes::new()).await);
        }
        // One has begun at least; the slot knows how many. The others are better off in line: an
        // idle slot takes them, or another one is asked for.
        let behind = self.flying.len() - 1;
        if behind > 0 && self.returning.is_none() && std::mem::take(&mut self.is_ahead) {
            let count = codec::encode_plain(&u32::try_from(behind).unwrap_or(u32::MAX));
            self.returning = Some(self.ask(RETURN_METHOD, count.into()).await);
        }
    }

    async fn ask(
        &mut self,
        method: &'static str,
        arguments: Bytes,
    ) -> BoxFuture<'static, CallResult> {
        let question = OutgoingCall::new(method, arguments);
        Box::pin(self.calls.start_on(&self.route, question).await.answer())
    }

    fn cancel(&mut self, task: ObjectId, forced: bool) {
        let is_it = |record: &TaskRecord| record.object() == task;
        for flying in &mut self.flying {
            if let Some(record) = flying.record.as_mut().filter(|record| is_it(record)) {
                // Its slot may end before it has said anything about it.
                record.is_cancelled = true;
                return flying.call.cancel(forced);
            }
        }
        if let Some(place) = self.again.iter().position(is_it) {
            self.under_way.end(task);
            self.again.remove(place).fail_cancelled();
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
                self.heard = Instant::now();
                self.pace.answered(record.name(), pushed, self.heard);
                // Before its object has the value, which may be lost and be computed anew.
                self.under_way.end(record.object());
                let (pool, cluster) = (self.pool, self.cluster);
                return record
                    .complete(value, |task, tries| lineage::of(task, tries, pool, cluster));
            }
            Err(error) => error,
        };
        if error.executed() != Executed::No {
            self.heard = Instant::now();
        }
        let is_gone = ends_slot(&error);
        self.is_gone |= is_gone;
        let verdict = record.tries.judge(&error);
        let now = Instant::now();
        let may_go_on = is_gone || verdict == Verdict::Again;
        let is_given_up = may_go_on && !record.is_wanted(now);
        if verdict != Verdict::Again || is_given_up {
            self.under_way.end(record.object());
        }
        match verdict {
            // The error is not what the task itself came to, and whoever gave it up knows why.
            _ if is_given_up => record.fail_unwanted(now),
            Verdict::Again => {
                tracing::debug!(task = record.name(), %error, "a task is pushed again");
                self.again.push(record);
            }
            Verdict::Final if is_gone => self.lost.push((record, error)),
            Verdict::Final => record.fail(error, None),
        }
        if !self.is_gone {
            self.put_back();
        }
    }

    /// What is to be pushed again goes back in line.
    fn put_back(&mut self) {
        if self.again.is_empty() {
            return;
        }
        let again = std::mem::take(&mut self.again);
        self.pool.put_back(self.cluster, again, &self.under_way);
    }

    /// After the slot: what it left goes elsewhere, or fails with the reason of its end.
    async fn settle(mut self) {
        self.put_back();
        if self.lost.is_empty() {
            return;
        }
        let slot = &self.address;
        let asked = self
            .cluster
            .resolve_actor(slot.actor, slot.incarnation, REASON_WAIT);
        let end = match tokio::time::timeout(REASON_WAIT, asked).await {
            Ok(Ok(actor)) => Some(actor),
            // Then the error says what was seen from here.
            _ => None,
        };
        for (record, error) in self.lost {
            record.fail(error, end.as_ref());
        }
    }
}

fn look_in(interval: Duration) -> Interval {
    let mut look = tokio::time::interval_at(Instant::now() + interval, interval);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    look
}

/// The answer to a question that is under way; never, if there is none.
async fn until_answered(question: &mut Option<BoxFuture<'static, CallResult>>) -> CallResult {
    match question {
        Some(question) => question.await,
        None => std::future::pending().await,
    }
}
