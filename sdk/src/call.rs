//! Calls: typed on the outside, bytes and a route inside.
//!
//! Invariants:
//! 1. A call begins when it is first awaited or started. Calls from one process to one actor reach
//!    it in the order in which they began, except that a call which must be sent again takes a new
//!    place.
//! 2. A call is sent again only when the answer says that it did not run, unless the caller asked
//!    for more: [`Call::max_retries`], [`Call::exactly_once`].
//! 3. A call that is made while a method runs ends with that method's own call.

use std::future::IntoFuture;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use mobula_core::codec::{self, EncodeError};
use mobula_core::error::{CallError, Executed};
use mobula_host::client::CallOrder;
use mobula_host::objects::Object;
use mobula_host::reply::CancelLevel;
use serde::de::DeserializeOwned;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use crate::calling::CallOptions;
use crate::error::{CallFailure, Error, Result};
use crate::reference::UntypedRef;

pub(crate) struct Prepared {
    pub(crate) target: UntypedRef,
    pub(crate) method: &'static str,
    pub(crate) arguments: Result<Bytes>,
    pub(crate) options: CallOptions,
    /// Objects that the arguments refer to, kept until the answer: the call may be sent again.
    pub(crate) objects: Vec<Object>,
}

impl Prepared {
    pub(crate) fn new(
        target: UntypedRef,
        method: &'static str,
        arguments: std::result::Result<Vec<u8>, EncodeError>,
    ) -> Self {
        let arguments = arguments.map(Bytes::from).map_err(|error| {
            Error::encoding(format!("arguments of `{method}`"), error, Executed::No)
        });
        Prepared {
            target,
            method,
            arguments,
            options: CallOptions::default(),
            objects: Vec::new(),
        }
    }

    pub(crate) fn keeping(mut self, objects: Vec<Object>) -> Self {
        self.objects = objects;
        self
    }

    async fn run(self) -> Result<Bytes> {
        self.target
            .call(self.method, self.arguments?, self.options)
            .await
    }

    /// Runs in a task of its own; returns when the call's place is taken.
    async fn start(mut self) -> Result<Running> {
        let (cancel, level) = watch::channel(CancelLevel::None);
        let (sent, begun) = oneshot::channel();
        self.options.cancel = Some(level);
        self.options.sent = Some(sent);
        let running = self.run();
        // Ends with its call, or when the handle is dropped.
        let task = tokio::spawn(match mobula_host::CallScope::current() {
            Some(scope) => scope.within(running).boxed(),
            None => running.boxed(),
        });
        // An error means that the call is over already, which awaiting the handle tells.
        let _ = begun.await;
        Ok(Running { cancel, task })
    }
}

/// A call under way in a task of its own.
struct Running {
    cancel: watch::Sender<CancelLevel>,
    task: JoinHandle<Result<Bytes>>,
}

impl Running {
    fn poll_outcome(&mut self, context: &mut Context<'_>) -> Poll<Result<Bytes>> {
        self.task.poll_unpin(context).map(|joined| {
            joined.unwrap_or_else(|error| {
                Err(Error::setup("a started call", error)) // Only if the runtime ends.
            })
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(crate) fn decoded<T: DeserializeOwned>(method: &str, bytes: &[u8]) -> Result<T> {
    codec::decode(bytes, bytes.len())
        .map_err(|error| Error::encoding(format!("value of `{method}`"), error, Executed::Yes))
}

/// What a call of a method that returns a `Result` brought.
fn outcome<T, E>(method: &str, result: Result<Bytes>) -> std::result::Result<T, CallFailure<E>>
where
    T: DeserializeOwned,
    E: DeserializeOwned,
{
    match result {
        Ok(bytes) => decoded(method, &bytes).map_err(CallFailure::System),
        Err(Error::Call(CallError::User { payload, message })) => {
            Err(match codec::decode(&payload, payload.len()) {
                Ok(error) => CallFailure::User(error),
                Err(reason) => CallFailure::System(Error::encoding(
                    format!("error of `{method}` ({message})"),
                    reason,
                    Executed::Yes,
                )),
            })
        }
        Err(error) => Err(CallFailure::System(error)),
    }
}

/// The options that both kinds of calls have.
macro_rules! call_options {
    () => {
        /// Gives up when there is no answer after `timeout`, which counts from the first await and
        /// includes finding a restarted actor. Within a method the time that its own caller gave
        /// is a limit as well. Without either a call waits until it is answered or its connection
        /// is lost.
        pub fn timeout(mut self, timeout: Duration) -> Self {
            self.prepared.options.timeout = Some(timeout);
            self
        }

        /// Sends the call again, up to so many times, when nobody knows whether it ran: its actor
        /// panicked or was lost while it was under way. It may then run more than once.
        pub fn max_retries(mut self, times: u32) -> Self {
            self.prepared.options.max_retries = times;
            self
        }

        /// Lets the call overtake others to the same process, and be overtaken. Between machines such calls share
        /// several connections that are made for large values, instead of the one that all others keep their order
        /// on: for arguments or answers of megabytes, of which many are under way.
        pub fn any_order(mut self) -> Self {
            self.prepared.options.order = CallOrder::Any;
            self
        }

        /// Has the call end when whoever awaits it is dropped before the answer, as
        /// [`RunningCall::cancel`] does. Without this a method that has begun runs to its end,
        /// though nobody waits for it.
        pub fn cancel_on_drop(mut self) -> Self {
            self.prepared.options.cancel_on_drop = true;
            self
        }

        /// Has a durable actor execute the call exactly once, however often it must be sent: its
        /// answer is kept with what it changed, and a repetition gets that answer. It is sent again
        /// until it is answered, its time is over, or its actor has ended for good.
        pub fn exactly_once(mut self) -> Self {
            self.prepared.options.exactly_once = true;
            self
        }
    };
}

/// A call of a method that always returns a value: await it.
#[must_use = "a call is made when it is awaited"]
pub struct Call<T> {
    prepared: Prepared,
    value: PhantomData<fn() -> T>,
}

impl<T> Call<T> {
    pub(crate) fn new(prepared: Prepared) -> Self {
        Call {
            prepared,
            value: PhantomData,
        }
    }

    call_options!();

    /// Makes the call, and returns when its place in the order of calls is taken. Await what this
    /// returns for the answer, or cancel it.
    pub async fn start(self) -> Result<RunningCall<T>> {
        Ok(RunningCall {
            method: self.prepared.method,
            running: self.prepared.start().await?,
            value: PhantomData,
        })
    }
}

impl<T: DeserializeOwned + Send + 'static> IntoFuture for Call<T> {
    type Output = Result<T>;
    type IntoFuture = BoxFuture<'static, Result<T>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let method = self.prepared.method;
            decoded(method, &self.prepared.run().await?)
        })
    }
}

/// A call of a method that returns a `Result<T, E>`: await it.
#[must_use = "a call is made when it is awaited"]
pub struct FallibleCall<T, E> {
    prepared: Prepared,
    outcome: PhantomData<fn() -> (T, E)>,
}

impl<T, E> FallibleCall<T, E> {
    pub(crate) fn new(prepared: Prepared) -> Self {
        FallibleCall {
            prepared,
            outcome: PhantomData,
        }
    }

    call_options!();

    /// As [`Call::start`].
    pub async fn start(self) -> Result<RunningFallibleCall<T, E>> {
        Ok(RunningFallibleCall {
            method: self.prepared.method,
            running: self.prepared.start().await?,
            outcome: PhantomData,
        })
    }
}

impl<T, E> IntoFuture for FallibleCall<T, E>
where
    T: DeserializeOwned + Send + 'static,
    E: DeserializeOwned + Send + 'static,
{
    type Output = std::result::Result<T, CallFailure<E>>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let method = self.prepared.method;
            outcome(method, self.prepared.run().await)
        })
    }
}

/// What both kinds of started calls can be told.
macro_rules! running_call {
    () => {
        /// Has the call end: one that has not begun is answered with [`CallError::Cancelled`] and
        /// does not run; a method that runs is dropped at its next await, and so are the calls
        /// that it waits for. What it has changed until then stays changed. Await the call to learn
        /// which it was.
        pub fn cancel(&self) {
            self.running.cancel.send_replace(CancelLevel::Forced);
        }

        /// The same, but a method that runs is only told so: see
        /// [`CallScope::cancelled`](crate::CallScope::cancelled).
        pub fn request_cancel(&self) {
            self.running.cancel.send_modify(|level| {
                *level = (*level).max(CancelLevel::Requested);
            });
        }
    };
}

/// A started call: await it for the answer. Dropping it gives up on the answer only.
#[must_use = "the outcome of a call is only known once it is answered"]
pub struct RunningCall<T> {
    method: &'static str,
    running: Running,
    value: PhantomData<fn() -> T>,
}

impl<T> RunningCall<T> {
    running_call!();
}

impl<T: DeserializeOwned> Future for RunningCall<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let method = self.method;
        self.running
            .poll_outcome(context)
            .map(|result| decoded(method, &result?))
    }
}

/// A started call of a method that returns a `Result`: await it for the answer.
#[must_use = "the outcome of a call is only known once it is answered"]
pub struct RunningFallibleCall<T, E> {
    method: &'static str,
    running: Running,
    outcome: PhantomData<fn() -> (T, E)>,
}

impl<T, E> RunningFallibleCall<T, E> {
    running_call!();
}

impl<T: DeserializeOwned, E: DeserializeOwned> Future for RunningFallibleCall<T, E> {
    type Output = std::result::Result<T, CallFailure<E>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let method = self.method;
        self.running
            .poll_outcome(context)
            .map(|result| outcome(method, result))
    }
}
