//! Tasks that bring several values, one after another as they are made.
//!
//! ```text
//! slot ── items, as there is credit ──► pump ── a place each ──► ItemStream
//! ```
//!
//! Invariants:
//! 1. At most the window's number of values, and one, wait at the reader; beyond that the task waits,
//!    and its slot runs others meanwhile.
//! 2. The reader gets each value once and in order. When the task is executed again, as many values
//!    as it has got already are left out.
//! 3. The end, or why there is none, comes after the last value, by way of the task's object.
//! 4. Dropping the stream cancels the task.

use bytes::Bytes;
use futures::StreamExt;
use mobula_core::error::{CallError, Executed};
use mobula_host::client::{PendingStream, StreamEvent};
use mobula_host::reply::CallResult;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, watch};

use crate::call::decoded;
use crate::error::Result;
use crate::object::ObjectRef;
use crate::stream::ItemStream;
use crate::task::scope::waiting;

/// What a task brings that returns a stream of `T`: see `TaskBuilder<Items<T>>`.
#[derive(Debug)]
pub struct Items<T>(std::marker::PhantomData<fn() -> T>);

/// Where a task's values go.
pub(crate) struct ItemSink {
    sender: mpsc::Sender<Bytes>,
    /// Values that may wait for the reader.
    pub(super) window: u32,
    /// Values that it has got from earlier executions.
    delivered: u64,
}

impl ItemSink {
    /// A sink, and what it is read from.
    pub(super) fn new(window: u32) -> (Self, mpsc::Receiver<Bytes>) {
        // The window is kept by the call; here is only the value that is handed over.
        let (sender, receiver) = mpsc::channel(1);
        let sink = ItemSink {
            sender,
            window,
            delivered: 0,
        };
        (sink, receiver)
    }

    /// Whether nobody reads any more.
    pub(super) fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }
}

/// Hands a task's values on until it ends. `cancelled` says that it is to end, and whether by force.
pub(super) async fn pump(
    mut stream: PendingStream,
    mut sink: ItemSink,
    mut cancelled: watch::Receiver<bool>,
) -> (CallResult, ItemSink) {
    let mut seen = 0;
    let mut place = None;
    let mut is_closed = false;
    let result = loop {
        tokio::select! {
            biased;
            Ok(()) = cancelled.changed() => stream.cancel(*cancelled.borrow_and_update()),
            () = sink.sender.closed(), if !is_closed => {
                is_closed = true;
                stream.cancel(false);
            }
            // The place first: a value that is taken from the window can be handed on at once.
            Ok(free) = sink.sender.reserve(), if place.is_none() && !is_closed => place = Some(free),
            event = stream.next(), if place.is_some() || is_closed => match event {
                Some(StreamEvent::Item(item)) => {
                    seen += 1;
                    if seen > sink.delivered && let Some(place) = place.take() {
                        place.send(item);
                    }
                }
                Some(StreamEvent::End(result)) => break result,
                None => break Err(CallError::ActorUnavailable {
                    actor: String::new(),
                    reason: "its stream has ended".to_owned(),
                    executed: Executed::Unknown,
                }),
            },
        }
    };
    drop(place);
    sink.delivered = sink.delivered.max(seen);
    (result, sink)
}

/// The values that come by `receiver`, and then what `end` has come to.
pub(super) fn read<T>(
    name: &'static str,
    receiver: mpsc::Receiver<Bytes>,
    end: ObjectRef<()>,
) -> ItemStream<T>
where
    T: DeserializeOwned + Send + 'static,
{
    let open = Some((receiver, end));
    ItemStream::new(futures::stream::unfold(open, move |open| next(name, open)).boxed())
}

type Open = (mpsc::Receiver<Bytes>, ObjectRef<()>);

async fn next<T: DeserializeOwned>(
    name: &'static str,
    open: Option<Open>,
) -> Option<(Result<T>, Option<Open>)> {
    let (mut receiver, end) = open?;
    let Some(bytes) = waiting(receiver.recv()).await else {
        let error = end.get().await.err()?;
        return Some((Err(error), None));
    };
    let item = decoded(name, &bytes);
    let goes_on = item.is_ok();
    Some((item, goes_on.then_some((receiver, end))))
}
