//! One call from the beginning of its method to its answer: the same for every kind of actor.
//!
//! Invariants:
//! 1. A method is begun only within its deadline, and only if its caller still wants it.
//! 2. A method whose cancellation is forced is dropped at its next await, and what it saved but did
//!    not commit is taken back. An `exactly_once` call that has begun is not dropped: its answer
//!    must say what it did.
//! 3. What a method saved is committed before its caller hears the answer.

use bytes::Bytes;
use mobula_core::error::{CallError, Executed};
use mobula_wire::call::{CallKey, MethodName};
use tokio::time::Instant;

use crate::actor::{Dispatching, MethodCall};
use crate::answers::Known;
use crate::context::ActorContext;
use crate::mailbox::{Deadline, IncomingCall};
use crate::reply::{CallResult, CancelLevel, Cancellation, ItemSender, Reply, unavailable};
use crate::scope::CallScope;

/// A call whose method begins now.
pub(crate) struct Begun {
    method: MethodName,
    arguments: Bytes,
    deadline: Option<Deadline>,
    key: Option<CallKey>,
    cancellation: Cancellation,
    items: Option<ItemSender>,
}

impl Begun {
    /// Begins a call, unless it is too late for it or its caller has cancelled it; then it is
    /// answered.
    pub(crate) fn begin(context: &ActorContext, call: IncomingCall) -> Option<(Begun, Reply)> {
        let IncomingCall {
            method,
            arguments,
            deadline,
            key,
            reply,
        } = call;
        if let Some(deadline) = deadline.filter(|deadline| deadline.at <= Instant::now()) {
            reply.send(Err(deadline.error(context.actor(), Executed::No)));
            return None;
        }
        if !reply.begin() {
            return None;
        }
        let begun = Begun {
            method,
            arguments,
            deadline,
            key,
            cancellation: reply.cancellation(),
            items: reply.items(),
        };
        Some((begun, reply))
    }

    /// Runs the method that `dispatch` finds, and commits what it changed; the answer.
    pub(crate) async fn run<'a>(
        &'a mut self,
        context: &'a ActorContext,
        dispatch: impl FnOnce(MethodCall<'a>) -> Dispatching<'a>,
    ) -> CallResult {
        if let Some(key) = self.key
            && let Some(answer) = known(context, key)
        {
            return answer;
        }
        let call = MethodCall {
            method: &self.method,
            arguments: &self.arguments,
            context,
            items: self.items.take(),
        };
        let scope = CallScope::new(self.deadline, self.cancellation.clone());
        let method = scope.within(dispatch(call));
        let returned = match self.key {
            Some(_) => method.await,
            None => {
                tokio::select! {
                    biased;
                    returned = method => returned,
                    () = self.cancellation.reached(CancelLevel::Forced) => {
                        context.state().method_dropped();
                        return Err(CallError::Cancelled {
                            actor: context.actor().to_string(),
                            executed: Executed::Unknown,
                        });
                    }
                }
            }
        };
        let answer = returned.map_err(CallError::from);
        if !context.state().is_durable() {
            return answer.map(Bytes::from);
        }
        // What was not executed may be tried again under its key.
        let executed = !matches!(answer, Err(CallError::BadCall(_)));
        let key = self.key.filter(|_| executed).map(parts);
        match context.state().method_returned(key, &answer).await {
            Ok(()) => answer.map(Bytes::from),
            Err(error) => {
                // What the actor has in memory may be ahead of what is kept: start from that.
                let reason = error.to_string();
                context.fail(reason.clone());
                Err(unavailable(context.actor(), reason, Executed::Unknown))
            }
        }
    }
}

fn parts(key: CallKey) -> (u128, u64) {
    (key.caller.0, key.sequence)
}

/// The answer to an `exactly_once` call that must not run; `None` if it must.
fn known(context: &ActorContext, key: CallKey) -> Option<CallResult> {
    match context.state().begin_exactly_once(parts(key)) {
        Ok(Known::New) => None,
        Ok(Known::Answered(answer)) => Some(answer.map(Bytes::from)),
        Ok(Known::Forgotten) => Some(Err(CallError::Forgotten {
            actor: context.actor().to_string(),
            key: key.to_string(),
        })),
        Err(error) => Some(Err(CallError::BadCall(format!(
            "exactly_once is for durable actors: {error}"
        )))),
    }
}
