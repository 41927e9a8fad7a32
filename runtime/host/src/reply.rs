//! The duty to answer a call, and what its caller may still do about it: cancel it, take items.
//!
//! ```text
//! waiting ──begin──► begun ──► answered
//!    └── cancelled before it began ──┘
//! ```
//!
//! Invariants:
//! 1. A call is answered exactly once: whoever drops a [`Reply`] unanswered has it say what is
//!    known, and who cancels a call that has not begun answers it there and then.
//! 2. A call that was cancelled while it waited never begins: [`Reply::begin`] says so.
//! 3. No item leaves without credit from the caller, and none after the answer.

mod cancellation;
mod items;
mod local_call;

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Waker};

use bytes::Bytes;
use mobula_core::error::{CallError, Executed};
use mobula_core::id::ActorId;
use mobula_wire::call::{HEAD_BYTES_MAX, STREAM_WINDOW_MAX};
use mobula_wire::frame::FrameLimits;
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;

pub use self::cancellation::{CancelLevel, Cancellation};
pub use self::items::{ItemSender, SendItemError};
use self::local_call::LocalAnswer;
pub use self::local_call::LocalCall;
use crate::caller_stream::CallerStream;
use crate::metrics::CallTimer;

/// What a call brought.
pub type CallResult = Result<Bytes, CallError>;

/// The largest encoded arguments, value or item.
pub const VALUE_BYTES_MAX: usize = FrameLimits::CALL.payload_bytes_max as usize - HEAD_BYTES_MAX;

const WAITING: u8 = 0;
const BEGUN: u8 = 1;
const ANSWERED: u8 = 2;

/// One call that is not answered yet, shared by those who answer, cancel or feed it.
pub(crate) struct CallControl {
    actor: ActorId,
    phase: AtomicU8,
    cancel_level: AtomicU8,
    cancelled: Notify,
    /// Made when a method first asks for it.
    token: OnceLock<CancellationToken>,
    /// One permit for each item that the caller takes; absent where it takes none.
    credit: Option<Semaphore>,
    destination: Destination,
    timer: CallTimer,
}

enum Destination {
    SameProcess(Mutex<LocalAnswer>),
    Stream {
        stream: Arc<CallerStream>,
        call: u32,
    },
}

impl CallControl {
    fn new(actor: ActorId, window: Option<u32>, destination: Destination) -> Arc<Self> {
        let credit = window.map(|items| Semaphore::new(items.min(STREAM_WINDOW_MAX) as usize));
        Arc::new(CallControl {
            actor,
            phase: AtomicU8::new(WAITING),
            cancel_level: AtomicU8::new(CancelLevel::None as u8),
            cancelled: Notify::new(),
            token: OnceLock::new(),
            credit,
            destination,
            timer: CallTimer::begin(),
        })
    }

    fn level(&self) -> CancelLevel {
        match self.cancel_level.load(Ordering::Acquire) {
            0 => CancelLevel::None,
            1 => CancelLevel::Requested,
            _ => CancelLevel::Forced,
        }
    }

    /// Ends a call that has not begun; tells a method that runs. Repeating it is no harm.
    pub(crate) fn cancel(&self, level: CancelLevel) {
        self.cancel_level.fetch_max(level as u8, Ordering::AcqRel);
        if self.advance(WAITING, ANSWERED) {
            self.deliver(Err(CallError::Cancelled {
                actor: self.actor.to_string(),
                executed: Executed::No,
            }));
        }
        if let Some(credit) = &self.credit {
            credit.close();
        }
        self.cancelled.notify_waiters();
        if let Some(token) = self.token.get() {
            token.cancel();
        }
    }

    /// Nobody is to be answered: the request broke the protocol.
    pub(crate) fn disown(&self) {
        self.phase.store(ANSWERED, Ordering::Release);
    }

    pub(crate) fn takes_items(&self) -> bool {
        self.credit.is_some()
    }

    /// The caller takes `items` more; false if that is more than a caller may ask for.
    pub(crate) fn grant(&self, items: u32) -> bool {
        let Some(credit) = &self.credit else {
            return false;
        };
        if credit.available_permits() + items as usize > STREAM_WINDOW_MAX as usize {
            return false;
        }
        if !credit.is_closed() {
            credit.add_permits(items as usize);
        }
        true
    }

    fn advance(&self, from: u8, to: u8) -> bool {
        self.phase
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Answers, or gives the result back if nobody will get it.
    fn answer(&self, result: CallResult) -> Option<CallResult> {
        if self.phase.swap(ANSWERED, Ordering::AcqRel) == ANSWERED {
            return Some(result);
        }
        self.deliver(deliverable(result))
    }

    fn deliver(&self, result: CallResult) -> Option<CallResult> {
        self.timer.end(result.as_ref().map(|_| ()));
        match &self.destination {
            Destination::Stream { stream, call } => stream.answer(*call, result),
            Destination::SameProcess(answer) => {
                let waker = {
                    let mut answer = answer.lock();
                    answer.result = Some(result);
                    answer.waker.take()
                };
                // Who asked may have given up waiting: then there is nobody to wake.
                if let Some(waker) = waker {
                    waker.wake();
                }
                None
            }
        }
    }

    fn deliver_item(&self, sequence: u64, value: Bytes) -> bool {
        match &self.destination {
            Destination::Stream { stream, call } => stream.item(*call, sequence, value),
            Destination::SameProcess(answer) => {
                let waker = {
                    let mut answer = answer.lock();
                    if answer.result.is_some() {
                        return false;
                    }
                    answer.items.push_back(value);
                    answer.waker.take()
                };
                if let Some(waker) = waker {
                    waker.wake();
                }
                true
            }
        }
    }
}

/// A result that fits into a frame.
fn deliverable(result: CallResult) -> CallResult {
    let size_bytes = match &result {
        Ok(value) => value.len(),
        Err(CallError::User { payload, message }) => payload.len() + message.len(),
        Err(_) => 0,
    };
    if size_bytes <= VALUE_BYTES_MAX {
        return result;
    }
    Err(CallError::ResultLost(format!(
        "it has {size_bytes} bytes encoded, the limit is {VALUE_BYTES_MAX}: return it in parts, or \
         store it and return where it is"
    )))
}

/// The duty to answer one call.
pub struct Reply(Arc<CallControl>);

impl Reply {
    /// An answer within this process. With a `window` the caller takes items, so many ahead.
    #[must_use]
    pub fn same_process(actor: ActorId, window: Option<u32>) -> (Self, LocalCall) {
        let destination = Destination::SameProcess(Mutex::default());
        let control = CallControl::new(actor, window, destination);
        (Reply(Arc::clone(&control)), LocalCall(control))
    }

    /// An answer to call number `call` on `stream`, which has room for it.
    pub(crate) fn on_stream(
        actor: ActorId,
        window: Option<u32>,
        stream: Arc<CallerStream>,
        call: u32,
    ) -> (Self, Arc<CallControl>) {
        let control = CallControl::new(actor, window, Destination::Stream { stream, call });
        (Reply(Arc::clone(&control)), control)
    }

    /// Says that the method begins now. If this is false the call was cancelled while it waited:
    /// it is answered, and must not be executed.
    #[must_use = "a call that was cancelled must not be executed"]
    pub fn begin(&self) -> bool {
        self.0.advance(WAITING, BEGUN)
    }

    /// Answers; does nothing if the call is answered already.
    pub fn send(self, result: CallResult) {
        self.0.answer(result);
    }

    /// As [`send`](Reply::send); gives the result back where it is certain that nobody will ever get
    /// it: the call is answered already, or its caller is gone.
    #[must_use = "what it holds on to is nobody's any more"]
    pub(crate) fn try_send(self, result: CallResult) -> Option<CallResult> {
        self.0.answer(result)
    }

    /// What the caller says about ending the call early.
    #[must_use]
    pub fn cancellation(&self) -> Cancellation {
        Cancellation(Arc::clone(&self.0))
    }

    /// Whether the caller takes items before the answer.
    #[must_use]
    pub fn takes_items(&self) -> bool {
        self.0.takes_items()
    }

    /// Where items go, if the caller takes them. Ask once for a call: each sender counts from 0.
    #[must_use]
    pub fn items(&self) -> Option<ItemSender> {
        self.0.takes_items().then(|| ItemSender {
            control: Arc::clone(&self.0),
            sequence: 0,
        })
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        let (reason, executed) = match self.0.phase.load(Ordering::Acquire) {
            ANSWERED => return,
            BEGUN => ("it ended while the method ran", Executed::Unknown),
            _ => ("it ended before the method began", Executed::No),
        };
        self.0
            .answer(Err(unavailable(self.0.actor, reason, executed)));
    }
}

/// The actor cannot be reached: `reason` says what stands in the way.
pub(crate) fn unavailable(
    actor: ActorId,
    reason: impl Into<String>,
    executed: Executed,
) -> CallError {
    CallError::ActorUnavailable {
        actor: actor.to_string(),
        reason: reason.into(),
        executed,
    }
}

/// Keeps the waker of whoever looked last.
pub(crate) fn remember(slot: &mut Option<Waker>, context: &Context<'_>) {
    match slot {
        Some(waker) => waker.clone_from(context.waker()),
        None => *slot = Some(context.waker().clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    const ACTOR: ActorId = ActorId(1);

    #[tokio::test]
    async fn a_call_that_waits_is_cancelled_there_and_then_and_never_begins() {
        let (reply, call) = Reply::same_process(ACTOR, None);
        call.cancel(CancelLevel::Requested);
        assert!(!reply.begin());
        // Too late: the caller has been told.
        reply.send(Ok(Bytes::new()));
        assert_eq!(
            call.await,
            Err(CallError::Cancelled {
                actor: "actor-1".into(),
                executed: Executed::No
            })
        );
    }

    #[tokio::test]
    async fn a_method_that_runs_learns_how_much_it_is_not_wanted() {
        let (reply, call) = Reply::same_process(ACTOR, None);
        assert!(reply.begin());
        let cancellation = reply.cancellation();
        let token = cancellation.token();
        assert!(
            cancellation
                .reached(CancelLevel::Requested)
                .now_or_never()
                .is_none()
        );
        call.cancel(CancelLevel::Requested);
        cancellation.reached(CancelLevel::Requested).await;
        assert!(token.is_cancelled() && cancellation.token().is_cancelled());
        assert!(
            cancellation
                .reached(CancelLevel::Forced)
                .now_or_never()
                .is_none()
        );
        call.cancel(CancelLevel::Forced);
        cancellation.reached(CancelLevel::Forced).await;
        reply.send(Ok(Bytes::from_static(b"late")));
        assert_eq!(call.await.unwrap(), "late");
    }

    #[tokio::test]
    async fn a_dropped_reply_says_what_is_known() {
        for (begun, executed) in [(false, Executed::No), (true, Executed::Unknown)] {
            let (reply, call) = Reply::same_process(ACTOR, None);
            assert!(!begun || reply.begin());
            drop(reply);
            assert_eq!(call.await.unwrap_err().executed(), executed);
        }
    }

    #[tokio::test]
    async fn a_result_that_nobody_will_get_is_given_back() {
        let value = || Ok(Bytes::from_static(b"large"));
        let stream = Arc::new(CallerStream::default());
        let [first, second] = [0, 1].map(|call| {
            let (reply, control) = Reply::on_stream(ACTOR, None, Arc::clone(&stream), call);
            stream.enter(call, control).unwrap();
            assert!(reply.begin());
            reply
        });
        assert_eq!(first.try_send(value()), None);
        stream.end();
        assert_eq!(second.try_send(value()), Some(value()));
        let (reply, call) = Reply::same_process(ACTOR, None);
        call.cancel(CancelLevel::Requested);
        assert_eq!(reply.try_send(value()), Some(value()));
    }

    #[tokio::test]
    async fn items_wait_for_credit_and_stop_with_the_caller() {
        let (reply, call) = Reply::same_process(ACTOR, Some(2));
        assert!(reply.begin());
        let mut items = reply.items().unwrap();
        let item = |n: u8| Bytes::from(vec![n]);
        for n in 0..2 {
            items.send(item(n)).await.unwrap();
        }
        assert!(items.send(item(9)).now_or_never().is_none());
        let next = || std::future::poll_fn(|context| call.poll_item(context));
        assert_eq!(next().await.unwrap(), item(0));
        items.send(item(2)).await.unwrap();
        assert!(items.send(item(9)).now_or_never().is_none());
        call.cancel(CancelLevel::Requested);
        assert_eq!(items.send(item(9)).await, Err(SendItemError::Closed));
        reply.send(Ok(Bytes::new()));
        assert_eq!(next().await.unwrap(), item(1));
        assert_eq!(next().await.unwrap(), item(2));
        assert_eq!(next().await, Err(Ok(Bytes::new())));
    }

    #[test]
    fn a_result_that_fits_no_frame_is_said_to_be_lost() {
        let large = vec![0; VALUE_BYTES_MAX + 1];
        let error = CallError::User {
            payload: large.clone(),
            message: String::new(),
        };
        for result in [Ok(large.into()), Err(error)] {
            let error = deliverable(result).unwrap_err();
            assert!(matches!(error, CallError::ResultLost(_)), "{error}");
        }
    }
}
