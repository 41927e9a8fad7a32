//! One stream to a host, from its connection to its end.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use mobula_net::endpoint::{Connection, Endpoint, LaneClass, OpenError};
use mobula_net::identity::Role;
use mobula_net::lane::{FramedReceiver, FramedSender, FramedStream, ReceiveError};
use mobula_net::same_machine::{change_over, is_own_address};
use mobula_wire::call::CalleeMessage;
use mobula_wire::frame::{Frame, FrameKind};
use mobula_wire::frame_queue::FrameQueue;
use mobula_wire::hello::Lane;

use super::{CallPath, Paths, StreamKind};
use crate::host_stream::HostStream;

/// How long to look for the answer to a call before sleeping: as long as a small one takes whose host has to wake up.
const LOOK_FOR_ANSWER: Duration = Duration::from_micros(100);

/// Connects, then writes requests and reads answers until either side fails; answers why.
pub(super) async fn run(
    endpoint: &Endpoint,
    address: SocketAddr,
    kind: StreamKind,
    paths: Paths,
    stream: &HostStream,
) -> String {
    let lane = match kind {
        StreamKind::Ordered => Lane::Call,
        StreamKind::Large(_) => Lane::LargeCall,
    };
    let connection = match endpoint
        .connect(address, LaneClass::of(lane), Role::Host)
        .await
    {
        Ok(connection) => connection,
        Err(error) => return format!("its host {address} does not take the connection: {error}"),
    };
    let framed = match open(&connection, address, lane, paths).await {
        Ok((path, framed)) => {
            let _ = stream.path.set(path);
            framed
        }
        Err(error) => return format!("its host {address} does not open a call stream: {error}"),
    };
    let (sender, receiver) = framed.split();
    let reason = tokio::select! {
        // In this order: who reads sees what was written just before.
        biased;
        reason = write_requests(sender, stream) => reason,
        reason = read_answers(receiver, stream) => reason,
        // A Unix socket would not notice.
        lost = connection.closed() => lost.to_string(),
    };
    connection.close("the call stream ended");
    format!("the connection to its host {address} is lost: {reason}")
}

/// A Unix socket where that is possible, QUIC otherwise.
async fn open(
    connection: &Connection,
    address: SocketAddr,
    lane: Lane,
    paths: Paths,
) -> Result<(CallPath, FramedStream), OpenError> {
    if lane == Lane::Call && paths == Paths::Any && is_own_address(address.ip()) {
        match change_over(connection, lane).await {
            Ok(stream) => return Ok((CallPath::SameMachine, stream)),
            Err(error) => {
                tracing::debug!(%address, %error, "a host of this machine is called over QUIC");
            }
        }
    }
    Ok((CallPath::Network, connection.open(lane).await?))
}

async fn write_requests(mut sender: FramedSender, stream: &HostStream) -> String {
    let limits = sender.limits();
    let mut frames = FrameQueue::new();
    let mut batch = Vec::new();
    while poll_fn(|context| stream.poll_outgoing(context, &mut batch)).await {
        for message in batch.drain(..) {
            if let Err(error) = frames.push_message(limits, |head| message.encode_head(head)) {
                return error.to_string();
            }
        }
        if let Err(error) = sender.send_frames(&mut frames).await {
            return error.to_string();
        }
    }
    "the stream has ended".to_owned()
}

/// The next frame; none as soon as there are calls to be answered.
async fn receive_unless_owed(
    receiver: &mut FramedReceiver,
    stream: &HostStream,
) -> Option<Result<Option<Frame>, ReceiveError>> {
    let mut receiving = pin!(receiver.receive());
    let either = poll_fn(|context| match receiving.as_mut().poll(context) {
        Poll::Ready(received) => Poll::Ready(Some(received)),
        // Whoever makes a call wakes the writer, which is of the same task.
        Poll::Pending if stream.owes_answers() => Poll::Ready(None),
        Poll::Pending => Poll::Pending,
    });
    either.await
}

async fn read_answers(mut receiver: FramedReceiver, stream: &HostStream) -> String {
    loop {
        // How soon an answer comes counts from its call.
        let received = match receive_unless_owed(&mut receiver, stream).await {
            Some(received) => received,
            None => receiver.receive_soon(LOOK_FOR_ANSWER).await,
        };
        let mut next = match received {
            Ok(Some(frame)) => Some(frame),
            Ok(None) => return "the host ended the stream".to_owned(),
            Err(error) => return error.to_string(),
        };
        // What arrived together is handled together.
        while let Some(Frame { kind, payload }) = next {
            if kind != FrameKind::Message {
                return format!("a frame of kind {kind:?} has no place on the call lane");
            }
            let message = match CalleeMessage::decode(payload) {
                Ok(message) => message,
                Err(error) => return error.to_string(),
            };
            if let Err(error) = stream.receive(message) {
                return error.to_string();
            }
            next = match receiver.receive_buffered() {
                Ok(next) => next,
                Err(error) => return error.to_string(),
            };
        }
    }
}
