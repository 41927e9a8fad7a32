//! Calls that bring several values, one after another as they are ready. Those of tasks come in the
//! same way (`crate::task::items`).
//!
//! Invariants:
//! 1. At most the window's number of values wait at the caller; beyond that the method waits.
//! 2. The values come in the order in which the method made them, then the end. An error is the
//!    last thing that comes.
//! 3. Dropping the stream cancels the call: the method is not asked for more.
//! 4. A call is sent again only before its first value, and only if it did not run.

use std::future::IntoFuture;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{BoxStream, Stream, StreamExt};
use mobula_host::client::StreamEvent;
use serde::de::DeserializeOwned;

use crate::call::{Prepared, decoded};
use crate::calling::OpenStream;
use crate::error::{Error, Result};

/// A stream of owned values that a method may return: `Box::pin(stream)` makes one.
pub type StreamOf<T> = BoxStream<'static, T>;

/// Values that wait at the caller by default: some, so that the network's delay does not show, and
/// few, so that a slow reader holds the method up soon.
pub const WINDOW_DEFAULT: u32 = 64;

/// A call of a method that returns a stream: await it for the stream.
#[must_use = "a call is made when it is awaited"]
pub struct StreamCall<T> {
    prepared: Prepared,
    window: u32,
    item: PhantomData<fn() -> T>,
}

impl<T> StreamCall<T> {
    pub(crate) fn new(prepared: Prepared) -> Self {
        StreamCall {
            prepared,
            window: WINDOW_DEFAULT,
            item: PhantomData,
        }
    }

    /// The time for the whole stream, from the first await to its end.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.prepared.options.timeout = Some(timeout);
        self
    }

    /// How many values may wait here until they are read (1 to 65 536, by default
    /// [`WINDOW_DEFAULT`]).
    pub fn window(mut self, values: u32) -> Self {
        self.window = values;
        self
    }
}

impl<T: DeserializeOwned + Send + 'static> IntoFuture for StreamCall<T> {
    type Output = Result<ItemStream<T>>;
    type IntoFuture = BoxFuture<'static, Self::Output>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let Prepared {
                target,
                method,
                arguments,
                options,
                objects,
            } = self.prepared;
            let open = target
                .open_stream(method, arguments?, options, self.window)
                .await?;
            let items = futures::stream::unfold(Some(open), move |open| {
                // Kept while there may be more: the method may still have to ask for them.
                let _ = &objects;
                next(method, open)
            });
            Ok(ItemStream::new(items.boxed()))
        })
    }
}

async fn next<T: DeserializeOwned>(
    method: &'static str,
    open: Option<OpenStream>,
) -> Option<(Result<T>, Option<OpenStream>)> {
    let mut open = open?;
    match open.next().await {
        Ok(Some(StreamEvent::Item(bytes))) => {
            let item = decoded(method, &bytes);
            let goes_on = item.is_ok();
            Some((item, goes_on.then_some(open)))
        }
        Ok(Some(StreamEvent::End(Ok(_))) | None) => None,
        Ok(Some(StreamEvent::End(Err(error)))) => Some((Err(Error::Call(error)), None)),
        Err(error) => Some((Err(error), None)),
    }
}

/// The values of a call or a task, as they come. Dropping it cancels the call or the task.
#[must_use = "dropping a stream cancels what brings its values"]
pub struct ItemStream<T> {
    items: BoxStream<'static, Result<T>>,
}

impl<T> ItemStream<T> {
    pub(crate) fn new(items: BoxStream<'static, Result<T>>) -> Self {
        ItemStream { items }
    }

    /// The next value; an error is the last thing that comes. Cancel safe.
    pub async fn next(&mut self) -> Option<Result<T>> {
        self.items.next().await
    }
}

impl<T> Stream for ItemStream<T> {
    type Item = Result<T>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<T>>> {
        self.items.poll_next_unpin(context)
    }
}

impl<T> std::fmt::Debug for ItemStream<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ItemStream").finish_non_exhaustive()
    }
}
