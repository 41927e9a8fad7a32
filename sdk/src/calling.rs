//! One call from its first sending to its last: how long it is tried, and who may end it early.
//!
//! Invariants:
//! 1. A call is sent again only if it did not run, or if its caller accepts that it may run twice,
//!    or if it carries a key by which its actor knows it again.
//! 2. Whoever waits for a call waits no longer than its deadline, which is not later than that of
//!    the method in which it is made.
//! 3. When that method's call is cancelled, so is this one, also if its future is dropped by it.

use std::time::Duration;

use bytes::Bytes;
use mobula_core::error::{CallError, Executed};
use mobula_core::id::{ActorId, Incarnation};
use mobula_host::CallScope;
use mobula_host::client::{CallOrder, OutgoingCall, PendingCall, PendingStream, StreamEvent};
use mobula_host::mailbox::Deadline;
use mobula_host::reply::{CallResult, CancelLevel, Cancellation};
use tokio::sync::{oneshot, watch};
use tokio::time::Instant;

use crate::cluster::Cluster;
use crate::error::{Error, Result};
use crate::exactly_once::HeldKey;
use crate::reference::UntypedRef;

/// How long an actor that the head calls running may stay out of reach before a call without a
/// timeout gives up; a lost node is replaced well before.
const UNREACHABLE_MAX: Duration = Duration::from_secs(60);

/// What a caller asked for beyond the call itself.
#[derive(Default)]
pub(crate) struct CallOptions {
    pub(crate) timeout: Option<Duration>,
    /// How often it is sent again when its outcome is unknown.
    pub(crate) max_retries: u32,
    pub(crate) exactly_once: bool,
    pub(crate) order: CallOrder,
    /// Whether it ends when its future is dropped.
    pub(crate) cancel_on_drop: bool,
    /// What whoever started it says about ending it.
    pub(crate) cancel: Option<watch::Receiver<CancelLevel>>,
    /// Told when its place in the order of calls is taken.
    pub(crate) sent: Option<oneshot::Sender<()>>,
}

fn after(timeout: Duration) -> Option<Deadline> {
    let limit_ms = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
    Some(Deadline {
        at: Instant::now().checked_add(timeout)?,
        limit_ms,
    })
}

fn earlier(first: Option<Deadline>, second: Option<Deadline>) -> Option<Deadline> {
    match (first, second) {
        (Some(first), Some(second)) if second.at < first.at => Some(second),
        (first, second) => first.or(second),
    }
}

/// By when a call must be answered.
#[derive(Clone, Copy)]
struct Limit {
    actor: ActorId,
    deadline: Option<Deadline>,
}

impl Limit {
    /// Runs something that has no effect yet, so that giving up is harmless.
    async fn within<F: Future>(self, future: F) -> Result<F::Output> {
        let Some(deadline) = self.deadline else {
            return Ok(future.await);
        };
        tokio::time::timeout_at(deadline.at, future)
            .await
            .map_err(|_| {
                Error::Call(CallError::DeadlineExceeded {
                    actor: self.actor.to_string(),
                    limit_ms: deadline.limit_ms,
                    executed: Executed::No,
                })
            })
    }
}

/// Who may end a call early.
struct Interest {
    scope: Option<Cancellation>,
    handle: Option<watch::Receiver<CancelLevel>>,
    /// It ends with the future of whoever waits.
    ends_when_dropped: bool,
}

impl Interest {
    fn is_fixed(&self) -> bool {
        self.scope.is_none() && self.handle.is_none()
    }

    fn level(&self) -> CancelLevel {
        let of_scope = self.scope.as_ref().map(Cancellation::level);
        let of_handle = self.handle.as_ref().map(|handle| *handle.borrow());
        of_scope.max(of_handle).unwrap_or(CancelLevel::None)
    }

    /// Waits until the call is to end, at `level` at least.
    async fn ends(&mut self, level: CancelLevel) {
        let Interest { scope, handle, .. } = self;
        let of_scope = async {
            match scope {
                Some(scope) => scope.reached(level).await,
                None => std::future::pending().await,
            }
        };
        let of_handle = async {
            if let Some(handle) = handle
                && handle.wait_for(|wanted| *wanted >= level).await.is_ok()
            {
                return;
            }
            std::future::pending().await
        };
        tokio::select! {
            () = of_scope => {}
            () = of_handle => {}
        }
    }

    /// Runs something that has no effect yet; the error says that the call was cancelled instead.
    async fn unless_ended<F: Future>(&mut self, actor: ActorId, future: F) -> Result<F::Output> {
        if self.is_fixed() {
            return Ok(future.await);
        }
        tokio::select! {
            biased;
            () = self.ends(CancelLevel::Requested) => Err(Error::Call(CallError::Cancelled {
                actor: actor.to_string(),
                executed: Executed::No,
            })),
            output = future => Ok(output),
        }
    }

    /// Waits for the answer, and passes on that it is not wanted any more.
    async fn answer(&mut self, pending: PendingCall) -> CallResult {
        if self.is_fixed() && !self.ends_when_dropped {
            return pending.answer().await;
        }
        let mut waiting = Waiting {
            pending,
            scope: self.scope.clone(),
            ends_when_dropped: self.ends_when_dropped,
            answered: false,
        };
        let mut told = CancelLevel::None;
        loop {
            let next = match told {
                CancelLevel::None => CancelLevel::Requested,
                _ => CancelLevel::Forced,
            };
            tokio::select! {
                biased;
                result = waiting.pending.wait() => {
                    waiting.answered = true;
                    return result;
                }
                () = self.ends(next), if told < CancelLevel::Forced => {
                    told = self.level();
                    waiting.pending.cancel(told == CancelLevel::Forced);
                }
            }
        }
    }
}

/// Cancels the call when the method that waits for it is dropped because it was cancelled itself, or whoever waits for it is
/// dropped and has said that it is to end then.
struct Waiting {
    pending: PendingCall,
    scope: Option<Cancellation>,
    ends_when_dropped: bool,
    answered: bool,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let of_scope = self.scope.as_ref().map(Cancellation::level);
        let level = match self.ends_when_dropped {
            true => CancelLevel::Forced,
            false => of_scope.unwrap_or(CancelLevel::None),
        };
        if level > CancelLevel::None && !self.answered {
            self.pending.cancel(level == CancelLevel::Forced);
        }
    }
}

/// How long the same start of an actor has been out of reach.
#[derive(Default)]
struct Patience {
    unreachable_since: Option<(Incarnation, Instant)>,
}

impl Patience {
    /// One more failure; false when it is enough.
    fn goes_on(&mut self, start: Incarnation) -> bool {
        let since = match self.unreachable_since {
            Some((same, since)) if same == start => since,
            _ => Instant::now(),
        };
        self.unreachable_since = Some((start, since));
        since.elapsed() <= UNREACHABLE_MAX
    }
}

/// Whether the call was lost with its actor, so that another start may take it.
fn is_loss(error: &CallError) -> bool {
    matches!(
        error,
        CallError::ActorUnavailable { .. }
            | CallError::NodeLost { .. }
            | CallError::OutOfMemory { .. }
            | CallError::Panicked(_)
    )
}

impl UntypedRef {
    /// Makes a call, as often as it takes.
    pub(crate) async fn call(
        &self,
        method: &'static str,
        arguments: Bytes,
        options: CallOptions,
    ) -> Result<Bytes> {
        let mut may_have_run = false;
        let called = self.call_until_answered(method, arguments, options, &mut may_have_run);
        match called.await {
            // The last attempt did not take effect; an earlier one may have.
            Err(error) if may_have_run => Err(error.after_unknown()),
            answer => answer,
        }
    }

    /// Makes a call, as often as it takes; `may_have_run` is set when an attempt is followed by another without anybody
    /// knowing what became of it.
    async fn call_until_answered(
        &self,
        method: &'static str,
        arguments: Bytes,
        options: CallOptions,
        may_have_run: &mut bool,
    ) -> Result<Bytes> {
        let CallOptions {
            timeout,
            mut max_retries,
            exactly_once,
            order,
            cancel_on_drop,
            cancel,
            mut sent,
        } = options;
        let cluster = self.cluster()?;
        let scope = CallScope::current();
        let limit = Limit {
            actor: self.id(),
            deadline: earlier(
                timeout.and_then(after),
                scope.as_ref().and_then(CallScope::deadline),
            ),
        };
        let mut interest = Interest {
            scope: scope.map(|scope| scope.cancellation().clone()),
            handle: cancel,
            ends_when_dropped: cancel_on_drop,
        };
        let held = match exactly_once {
            true => Some(limit.within(HeldKey::take()).await?),
            false => None,
        };
        let call = OutgoingCall::new(method, arguments)
            .with_deadline(limit.deadline)
            .with_key(held.as_ref().map(HeldKey::key))
            .in_order(order);
        let mut patience = Patience::default();
        loop {
            let at_once = match interest.level() {
                CancelLevel::None => self.start_now(&cluster, &call),
                _ => None,
            };
            let (start, pending) = match at_once {
                Some(started) => started,
                None => {
                    // Apart, so that the future of an ordinary call stays small.
                    let starting = Box::pin(limit.within(self.start(&cluster, call.clone())));
                    interest.unless_ended(self.id(), starting).await???
                }
            };
            if let Some(sent) = sent.take() {
                // Whoever started it may be gone.
                let _ = sent.send(());
            }
            let error = match interest.answer(pending).await {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            if !is_loss(&error) {
                return Err(error.into());
            }
            self.note_failure(start, limit).await;
            let again = match (&error, error.executed()) {
                (_, Executed::No) => true,
                // Its method would panic again, and left nothing.
                (CallError::Panicked(_), _) if held.is_some() => false,
                (_, Executed::Unknown) if held.is_some() => true,
                (_, Executed::Unknown) if max_retries > 0 => {
                    max_retries -= 1;
                    true
                }
                _ => false,
            };
            if !again || !patience.goes_on(start) {
                return Err(error.into());
            }
            *may_have_run |= error.executed() == Executed::Unknown;
        }
    }

    /// Makes a call that brings several values.
    pub(crate) async fn open_stream(
        &self,
        method: &'static str,
        arguments: Bytes,
        options: CallOptions,
        window: u32,
    ) -> Result<OpenStream> {
        let cluster = self.cluster()?;
        let scope = CallScope::current().and_then(|scope| scope.deadline());
        let limit = Limit {
            actor: self.id(),
            deadline: earlier(options.timeout.and_then(after), scope),
        };
        let call = OutgoingCall::new(method, arguments).with_deadline(limit.deadline);
        let starting = self.start_stream(&cluster, call.clone(), window);
        let (start, pending) = limit.within(starting).await??;
        Ok(OpenStream {
            target: self.clone(),
            cluster,
            call,
            window,
            limit,
            start,
            pending,
            began: false,
            patience: Patience::default(),
        })
    }

    /// Has the next call look for a newer start of the actor.
    async fn note_failure(&self, start: Incarnation, limit: Limit) {
        // Another caller may hold the route for as long as the actor is pending; this call's own
        // time is not to be spent on that. In vain is no harm: the next call finds the failure by
        // itself.
        let _ = limit.within(self.mark_failed(start)).await;
    }
}

/// A call that brings several values, under way. Dropping it cancels the call.
pub(crate) struct OpenStream {
    target: UntypedRef,
    cluster: Cluster,
    call: OutgoingCall,
    window: u32,
    limit: Limit,
    start: Incarnation,
    pending: PendingStream,
    /// Whether a value has come: after that it is never sent again.
    began: bool,
    patience: Patience,
}

impl OpenStream {
    /// The next value or the end; `None` after the end.
    pub(crate) async fn next(&mut self) -> Result<Option<StreamEvent>> {
        loop {
            let event = self.pending.next().await;
            let Some(StreamEvent::End(Err(error))) = &event else {
                self.began = true;
                return Ok(event);
            };
            let not_run = is_loss(error) && error.executed() == Executed::No;
            if self.began || !not_run || !self.patience.goes_on(self.start) {
                return Ok(event);
            }
            self.target.note_failure(self.start, self.limit).await;
            let call = self.call.clone();
            let starting = self.target.start_stream(&self.cluster, call, self.window);
            (self.start, self.pending) = self.limit.within(starting).await??;
        }
    }
}
