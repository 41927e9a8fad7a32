//! What the macros' code calls. No promise is made about any of it.

use std::fmt::Display;

use futures::future::BoxFuture;
use futures::stream::{Stream, StreamExt};
use mobula_core::codec;
use mobula_core::error::Executed;
pub use mobula_host::actor::{
    Access, ActorBody, Concurrency, ConcurrentActor, Dispatching, DynActor, MethodCall, MethodError,
};
pub use mobula_host::inventory;
use mobula_host::objects::{brought, capture};
pub use mobula_host::registry::{ActorType, ConstructError};
use mobula_host::reply::{ItemSender, SendItemError};
use mobula_host::tasks::{EncodedValue, TaskContext, while_blocked};
pub use mobula_host::tasks::{TaskCall, TaskType};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::actor::{Actor, ActorRef, Init};
use crate::call::{Call, FallibleCall, Prepared};
use crate::error::Error;
pub use crate::main_end::{EndOfError, EndOfOther, EndOfReport, Returned};
use crate::plain;
use crate::stream::StreamCall;
use crate::task::Task;
pub use crate::task::{Items, TaskDefaults};

/// What a registered constructor returns.
pub type Constructing = BoxFuture<'static, Result<ActorBody, ConstructError>>;

/// What a hook returns.
pub type Hook<'a> = BoxFuture<'a, ()>;

/// Describes an actor by its constructor's arguments.
pub fn init<A: Actor, T: Serialize>(arguments: &T) -> Init<A> {
    Init::new(codec::encode(arguments).map_err(|error| {
        Error::encoding(
            format!("constructor arguments of {}", A::TYPE_NAME),
            error,
            Executed::No,
        )
    }))
}

/// Reads a constructor's arguments.
pub fn constructor_arguments<T: DeserializeOwned>(init: &[u8]) -> Result<T, ConstructError> {
    codec::decode(init, mobula_core::spec::INIT_LIMIT_BYTES)
        .map_err(|error| ConstructError::BadArguments(error.to_string()))
}

/// Turns a constructor's own error into text.
pub fn constructed<A, E: Display>(result: Result<A, E>) -> Result<A, ConstructError> {
    result.map_err(|error| ConstructError::Failed(error.to_string()))
}

/// Reads a method's arguments.
pub fn arguments<T: DeserializeOwned>(method: &str, bytes: &[u8]) -> Result<T, MethodError> {
    codec::decode(bytes, bytes.len())
        .map_err(|error| MethodError::BadCall(format!("arguments of `{method}`: {error}")))
}

/// Writes a method's value.
pub fn value<T: Serialize>(method: &str, value: &T) -> Result<Vec<u8>, MethodError> {
    codec::encode(value)
        .map_err(|error| MethodError::ResultLost(format!("value of `{method}`: {error}")))
}

/// Writes a method's value, or its own error.
pub fn outcome<T: Serialize, E: Serialize + Display>(
    method: &str,
    outcome: &Result<T, E>,
) -> Result<Vec<u8>, MethodError> {
    match outcome {
        Ok(returned) => value(method, returned),
        Err(error) => Err(user_error(method, error)),
    }
}

fn user_error<E: Serialize + Display>(method: &str, error: &E) -> MethodError {
    match codec::encode(error) {
        Ok(payload) => MethodError::User {
            payload,
            message: error.to_string(),
        },
        Err(reason) => MethodError::ResultLost(format!("error of `{method}` ({error}): {reason}")),
    }
}

/// No such method.
#[must_use]
pub fn unknown_method<A: Actor>(method: &str) -> MethodError {
    let name = A::TYPE_NAME;
    MethodError::BadCall(format!(
        "`{name}` has no method `{method}`; does the caller run another release of the program?"
    ))
}

/// A call of a method that always returns a value.
pub fn call<A: Actor, T, R>(actor: &ActorRef<A>, method: &'static str, arguments: &T) -> Call<R>
where
    T: Serialize,
    R: DeserializeOwned + Send + 'static,
{
    Call::new(prepared(actor, method, arguments))
}

/// A call of a method that returns a `Result`.
pub fn fallible_call<A: Actor, T, R, E>(
    actor: &ActorRef<A>,
    method: &'static str,
    arguments: &T,
) -> FallibleCall<R, E>
where
    T: Serialize,
    R: DeserializeOwned + Send + 'static,
    E: DeserializeOwned + Send + 'static,
{
    FallibleCall::new(prepared(actor, method, arguments))
}

/// A call of a method that returns a stream.
pub fn stream_call<A: Actor, T, R>(
    actor: &ActorRef<A>,
    method: &'static str,
    arguments: &T,
) -> StreamCall<R>
where
    T: Serialize,
    R: DeserializeOwned + Send + 'static,
{
    StreamCall::new(prepared(actor, method, arguments))
}

fn prepared<A: Actor, T: Serialize>(
    actor: &ActorRef<A>,
    method: &'static str,
    arguments: &T,
) -> Prepared {
    let (encoded, sent) = capture(|| codec::encode(arguments));
    Prepared::new(actor.untyped(), method, encoded).keeping(sent)
}

/// Sends a method's values as its caller takes them.
pub async fn send_items<T: Serialize>(
    method: &str,
    items: impl Stream<Item = T>,
    sender: Option<ItemSender>,
) -> Result<Vec<u8>, MethodError> {
    let Some(mut sender) = sender else {
        return Err(MethodError::BadCall(format!(
            "`{method}` brings several values, and the caller takes one; does it run another \
             release of the program?"
        )));
    };
    let mut items = std::pin::pin!(items);
    while let Some(item) = items.next().await {
        // Whoever reads slowly does not keep the slot of a task.
        match while_blocked(sender.send(value(method, &item)?.into())).await {
            Ok(()) => {}
            // Nobody reads on: that ends the method, and is no error.
            Err(SendItemError::Closed) => break,
            Err(error) => {
                return Err(MethodError::ResultLost(format!(
                    "value of `{method}`: {error}"
                )));
            }
        }
    }
    Ok(Vec::new())
}

/// What a registered task's function returns.
pub type Executing = BoxFuture<'static, Result<Vec<u8>, MethodError>>;

/// Describes a task by its arguments.
pub fn task<T, A: Serialize>(defaults: &'static TaskDefaults, arguments: &A) -> Task<T> {
    let (encoded, references) = capture(|| codec::encode(arguments));
    let encoded = encoded.map_err(|error| format!("its arguments: {error}"));
    Task::new(defaults, encoded, references)
}

/// Reads a task's arguments.
pub fn task_arguments<T: DeserializeOwned>(name: &str, call: &TaskCall) -> Result<T, MethodError> {
    brought(&call.values, || arguments(name, &call.arguments))
}

/// Writes a task's value.
pub fn task_value<T: Serialize + 'static>(
    context: &TaskContext,
    value: &T,
) -> impl Future<Output = Result<Vec<u8>, MethodError>> + Send {
    // Encoded before the first await, so that a value need not be `Sync`.
    let encoded = match plain::bytes_of(value) {
        Some((element, bytes)) => Ok(EncodedValue::plain(element, bytes)),
        None => EncodedValue::of(context, value),
    };
    async move { encoded?.into_outcome(context).await }
}

/// Sends the values of a task that brings several.
pub async fn task_items<T: Serialize>(
    context: &TaskContext,
    items: impl Stream<Item = T>,
    sender: Option<ItemSender>,
) -> Result<Vec<u8>, MethodError> {
    send_items(context.name(), items, sender).await?;
    task_value(context, &()).await
}

/// Writes a task's value, or its own error.
pub fn task_outcome<T: Serialize + 'static, E: Serialize + Display>(
    context: &TaskContext,
    outcome: &Result<T, E>,
) -> impl Future<Output = Result<Vec<u8>, MethodError>> + Send {
    let written = match outcome {
        Ok(returned) => Ok(task_value(context, returned)),
        Err(error) => Err(user_error(context.name(), error)),
    };
    async move { written?.await }
}
