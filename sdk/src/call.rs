//! Calls: typed on the outside, bytes and a route inside.
//!
//! Invariants:
//! 1. A call begins when it is first awaited. Calls from one process to one actor reach it in the
//!    order in which they began, except that a call which must be sent again takes a new place.
//! 2. A call is sent again only when the answer says that it did not run.

use std::future::IntoFuture;
use std::marker::PhantomData;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use mobula_core::codec::{self, EncodeError};
use mobula_core::error::{CallError, Executed};
use serde::de::DeserializeOwned;

use crate::error::{CallFailure, Error, Result};
use crate::reference::UntypedRef;

struct Prepared {
    target: UntypedRef,
    method: &'static str,
    arguments: Result<Bytes>,
    timeout: Option<Duration>,
}

impl Prepared {
    fn new(
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
            timeout: None,
        }
    }

    async fn run(self) -> Result<Bytes> {
        self.target
            .call(self.method, self.arguments?, self.timeout)
            .await
    }
}

fn decoded<T: DeserializeOwned>(method: &str, bytes: &[u8]) -> Result<T> {
    codec::decode(bytes, bytes.len())
        .map_err(|error| Error::encoding(format!("value of `{method}`"), error, Executed::Yes))
}

/// A call of a method that always returns a value: await it.
#[must_use = "a call is made when it is awaited"]
pub struct Call<T> {
    prepared: Prepared,
    value: PhantomData<fn() -> T>,
}

impl<T> Call<T> {
    pub(crate) fn new(
        target: UntypedRef,
        method: &'static str,
        arguments: std::result::Result<Vec<u8>, EncodeError>,
    ) -> Self {
        Call {
            prepared: Prepared::new(target, method, arguments),
            value: PhantomData,
        }
    }

    /// Gives up when there is no answer after `timeout`, which counts from the first await and
    /// includes finding a restarted actor. Without one a call waits until it is answered or its
    /// connection is lost.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.prepared.timeout = Some(timeout);
        self
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
    pub(crate) fn new(
        target: UntypedRef,
        method: &'static str,
        arguments: std::result::Result<Vec<u8>, EncodeError>,
    ) -> Self {
        FallibleCall {
            prepared: Prepared::new(target, method, arguments),
            outcome: PhantomData,
        }
    }

    /// As [`Call::timeout`].
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.prepared.timeout = Some(timeout);
        self
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
            match self.prepared.run().await {
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
        })
    }
}
