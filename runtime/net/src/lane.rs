//! Framed streams: whole messages in, whole messages out, over QUIC or a Unix socket.
//!
//! Invariants:
//! 1. Receiving is cancel safe: a frame is given out whole or stays. So is flushing: what was queued
//!    goes out once, in order, however often the future is dropped and made again.
//! 2. Memory is bounded by the lane's frame limit: for the sender by its queue, for the receiver by
//!    reserving only as much as has already arrived, once more.
//! 3. A stream that ends inside a frame, or whose sender was dropped with frames unsent, is an error
//!    for the receiver and never a clean end.

use std::any::Any;
use std::fmt;
use std::io;
use std::sync::Arc;

use bytes::{Buf, Bytes, BytesMut};
use mobula_wire::codec::{self, DecodeError, EncodeError};
use mobula_wire::frame::{
    Decoded, Frame, FrameError, FrameKind, FrameLimits, HEADER_SIZE_BYTES, decode_frame,
    encode_frame, encode_header,
};
use mobula_wire::frame_queue::FrameQueue;
use mobula_wire::hello::HelloRefusal;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// Queued beyond one largest frame: enough to put some hundred small messages into one write.
const COALESCE_BYTES: usize = 64 << 10;
/// Read in steps of at least this, at most as much as has arrived already (but no less than
/// [`READ_STEP_MAX_BYTES`]): a header that announces 8 MiB does not yet get 8 MiB.
/// A stream that fills a step gets the next one twice as large.
const READ_STEP_MIN_BYTES: usize = 4 << 10;
const READ_STEP_MAX_BYTES: usize = 64 << 10;
/// A buffer that grew for one large frame is given back.
const KEEP_BYTES_MAX: usize = 256 << 10;

/// Keeps the connection open for as long as one of its streams is.
pub(crate) type Guard = Option<Arc<dyn Any + Send + Sync>>;

/// Why a frame was not sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The frame is over the lane's limit; nothing was queued.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The value cannot be encoded; nothing was queued.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// Too much is queued: flush first. Nothing was queued.
    #[error("{queued_bytes} bytes are queued, the limit is {limit_bytes}; flush first")]
    QueueFull {
        /// What waits, in bytes.
        queued_bytes: usize,
        /// The bound, in bytes.
        limit_bytes: usize,
    },
    /// The receiver does not want more of this stream; what it sent back may say why.
    #[error("the peer has stopped reading this stream; receive from it to learn why")]
    Stopped,
    /// The connection is gone. What was sent before may or may not have arrived.
    #[error("connection lost while sending: {reason}")]
    Lost {
        /// How it ended.
        reason: String,
    },
}

/// Why no frame was received.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The peer does not accept this stream.
    #[error("the peer refuses the stream: {0}")]
    Refused(HelloRefusal),
    /// The bytes are not frames.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The frame is not the message that was expected.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// A frame of a kind that has no place here.
    #[error("a frame of kind {kind:?} has no place at this point of the stream")]
    Unexpected {
        /// Its kind.
        kind: FrameKind,
    },
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame, {missing_bytes} bytes early: the sender died")]
    Truncated {
        /// How much of the frame is missing, in bytes, at least.
        missing_bytes: usize,
    },
    /// The connection is gone.
    #[error("connection lost while receiving: {reason}")]
    Lost {
        /// How it ended.
        reason: String,
    },
}

/// Both directions of a stream.
#[derive(Debug)]
pub struct FramedStream {
    /// To the peer.
    pub sender: FramedSender,
    /// From the peer.
    pub receiver: FramedReceiver,
}

impl FramedStream {
    /// The two directions, for two tasks.
    #[must_use]
    pub fn split(self) -> (FramedSender, FramedReceiver) {
        (self.sender, self.receiver)
    }

    pub(crate) fn quic(
        sender: quinn::SendStream,
        receiver: quinn::RecvStream,
        limits: FrameLimits,
        guard: Guard,
    ) -> Self {
        FramedStream {
            sender: FramedSender::new(Writer::Quic(sender), limits, guard.clone()),
            receiver: FramedReceiver::new(Reader::Quic(receiver), limits, guard),
        }
    }

    pub(crate) fn local(stream: tokio::net::UnixStream, limits: FrameLimits) -> Self {
        let (reader, writer) = stream.into_split();
        FramedStream {
            sender: FramedSender::new(Writer::Local(writer), limits, None),
            receiver: FramedReceiver::new(Reader::Local(reader), limits, None),
        }
    }

    /// Once the lane is known.
    pub(crate) fn set_limits(&mut self, limits: FrameLimits) {
        self.sender.limits = limits;
        self.receiver.limits = limits;
    }

    pub(crate) fn set_guard(&mut self, guard: Guard) {
        self.sender.guard = guard.clone();
        self.receiver.guard = guard;
    }
}

enum Writer {
    Quic(quinn::SendStream),
    Local(OwnedWriteHalf),
}

/// The sending half of a stream.
pub struct FramedSender {
    writer: Writer,
    /// Whole frames, and possibly the header that belongs to `tail`.
    queued: BytesMut,
    /// A payload that is not copied into the queue; goes out after it.
    tail: Bytes,
    limits: FrameLimits,
    guard: Guard,
}

impl FramedSender {
    fn new(writer: Writer, limits: FrameLimits, guard: Guard) -> Self {
        FramedSender {
            writer,
            queued: BytesMut::new(),
            tail: Bytes::new(),
            limits,
            guard,
        }
    }

    /// Puts a frame into the queue; it leaves with the next flush.
    pub fn queue(&mut self, kind: FrameKind, payload: &[u8]) -> Result<(), SendError> {
        let limit_bytes =
            self.limits.payload_bytes_max as usize + HEADER_SIZE_BYTES + COALESCE_BYTES;
        // A tail is the end of the queue: nothing can be put behind it.
        let after = self.queued.len() + HEADER_SIZE_BYTES + payload.len();
        if !self.tail.is_empty() || (!self.queued.is_empty() && after > limit_bytes) {
            let queued_bytes = self.queued.len() + self.tail.len();
            return Err(SendError::QueueFull {
                queued_bytes,
                limit_bytes,
            });
        }
        Ok(encode_frame(kind, payload, self.limits, &mut self.queued)?)
    }

    /// Puts a message into the queue; it leaves with the next flush.
    pub fn queue_message<T: Serialize + ?Sized>(&mut self, message: &T) -> Result<(), SendError> {
        self.queue(FrameKind::Message, &codec::encode(message)?)
    }

    /// How much is queued, in bytes: whoever coalesces flushes from time to time.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.queued.len() + self.tail.len()
    }

    /// Sends all that is queued. Cancel safe. It waits for as long as the peer does not read.
    pub async fn flush(&mut self) -> Result<(), SendError> {
        while !self.queued.is_empty() {
            let sent = self.writer.write(&self.queued).await?;
            self.queued.advance(sent);
        }
        if self.queued.capacity() > KEEP_BYTES_MAX {
            self.queued = BytesMut::new();
        }
        while !self.tail.is_empty() {
            self.writer.write_shared(&mut self.tail).await?;
        }
        Ok(())
    }

    /// Sends a frame, after whatever is queued. If it is cancelled the frame may be queued still;
    /// the next flush sends it.
    pub async fn send(&mut self, kind: FrameKind, payload: &[u8]) -> Result<(), SendError> {
        self.make_room().await?;
        self.queue(kind, payload)?;
        self.flush().await
    }

    /// Sends a message, after whatever is queued. Cancellation as with [`FramedSender::send`].
    pub async fn send_message<T: Serialize + ?Sized>(
        &mut self,
        message: &T,
    ) -> Result<(), SendError> {
        let payload = codec::encode(message)?;
        self.send(FrameKind::Message, &payload).await
    }

    /// Sends raw bytes without copying them. Cancellation as with [`FramedSender::send`].
    pub async fn send_chunk(&mut self, payload: Bytes) -> Result<(), SendError> {
        self.make_room().await?;
        let header = encode_header(FrameKind::Chunk, payload.len(), self.limits)?;
        self.queued.extend_from_slice(&header);
        self.tail = payload;
        self.flush().await
    }

    /// Sends frames that were put together elsewhere, after whatever is queued here. Cancel safe:
    /// what has left is gone from `frames`.
    pub async fn send_frames(&mut self, frames: &mut FrameQueue) -> Result<(), SendError> {
        self.flush().await?;
        while !frames.is_empty() {
            match (&mut self.writer, frames.front_shared()) {
                (Writer::Quic(_), Some(piece)) => {
                    // A clone shares the memory, so that what left can be counted.
                    let mut rest = piece.clone();
                    let before = rest.len();
                    self.writer.write_shared(&mut rest).await?;
                    frames.advance(before - rest.len());
                }
                _ => {
                    let sent = self.writer.write(frames.front()).await?;
                    frames.advance(sent);
                }
            }
        }
        Ok(())
    }

    /// What a frame on this stream may have.
    #[must_use]
    pub fn limits(&self) -> FrameLimits {
        self.limits
    }

    async fn make_room(&mut self) -> Result<(), SendError> {
        if self.queued.len() >= COALESCE_BYTES || !self.tail.is_empty() {
            self.flush().await?;
        }
        Ok(())
    }

    /// Sends what is queued and ends the stream. Over QUIC it returns when the peer's side has
    /// received everything, so that the connection may then be closed.
    pub async fn finish(mut self) -> Result<(), SendError> {
        self.flush().await?;
        match &mut self.writer {
            Writer::Quic(stream) => {
                stream.finish().map_err(|_| SendError::Stopped)?;
                match stream.stopped().await {
                    Ok(None) => Ok(()),
                    Ok(Some(_)) => Err(SendError::Stopped),
                    Err(error) => Err(SendError::Lost {
                        reason: error.to_string(),
                    }),
                }
            }
            Writer::Local(stream) => stream.shutdown().await.map_err(lost_sending),
        }
    }
}

impl Drop for FramedSender {
    fn drop(&mut self) {
        let unsent = self.queued_bytes() > 0;
        if let (Writer::Quic(stream), true) = (&mut self.writer, unsent) {
            // Otherwise quinn would end the stream as if all had been said. An error means that it
            // is closed already.
            let _ = stream.reset(quinn::VarInt::from_u32(1));
        }
    }
}

impl fmt::Debug for FramedSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FramedSender")
            .field("queued_bytes", &self.queued_bytes())
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

impl Writer {
    /// Cancel safe: either it returns how much went out, or nothing did.
    async fn write(&mut self, bytes: &[u8]) -> Result<usize, SendError> {
        match self {
            Writer::Quic(stream) => stream.write(bytes).await.map_err(write_failed),
            Writer::Local(stream) => match stream.write(bytes).await.map_err(lost_sending)? {
                0 => Err(SendError::Lost {
                    reason: "the socket takes no more bytes".into(),
                }),
                sent => Ok(sent),
            },
        }
    }

    /// The same for bytes that need no copy; takes off what went out.
    async fn write_shared(&mut self, bytes: &mut Bytes) -> Result<(), SendError> {
        match self {
            Writer::Quic(stream) => {
                stream
                    .write_chunks(std::slice::from_mut(bytes))
                    .await
                    .map_err(write_failed)?;
            }
            Writer::Local(_) => {
                let sent = self.write(bytes).await?;
                bytes.advance(sent);
            }
        }
        Ok(())
    }
}

fn write_failed(error: quinn::WriteError) -> SendError {
    match error {
        quinn::WriteError::Stopped(_) => SendError::Stopped,
        quinn::WriteError::ConnectionLost(error) => SendError::Lost {
            reason: error.to_string(),
        },
        error => SendError::Lost {
            reason: error.to_string(),
        },
    }
}

fn lost_sending(error: io::Error) -> SendError {
    match error.kind() {
        io::ErrorKind::BrokenPipe => SendError::Stopped,
        _ => SendError::Lost {
            reason: error.to_string(),
        },
    }
}

enum Reader {
    Quic(quinn::RecvStream),
    Local(OwnedReadHalf),
}

/// The receiving half of a stream.
pub struct FramedReceiver {
    reader: Reader,
    buffer: BytesMut,
    read_step: usize,
    limits: FrameLimits,
    guard: Guard,
}

impl FramedReceiver {
    fn new(reader: Reader, limits: FrameLimits, guard: Guard) -> Self {
        FramedReceiver {
            reader,
            buffer: BytesMut::new(),
            read_step: READ_STEP_MIN_BYTES,
            limits,
            guard,
        }
    }

    /// The next frame, or `None` when the peer has ended the stream. Cancel safe. After an error the
    /// stream is of no more use.
    pub async fn receive(&mut self) -> Result<Option<Frame>, ReceiveError> {
        self.receive_any().await?.map(established).transpose()
    }

    /// The next frame if it has arrived already, for whoever handles many at once.
    pub fn receive_buffered(&mut self) -> Result<Option<Frame>, ReceiveError> {
        match decode_frame(&mut self.buffer, self.limits)? {
            Decoded::Frame(frame) => established(frame).map(Some),
            Decoded::Incomplete { .. } => Ok(None),
        }
    }

    /// The next message, or `None` when the peer has ended the stream. Cancel safe.
    pub async fn receive_message<T: DeserializeOwned>(
        &mut self,
    ) -> Result<Option<T>, ReceiveError> {
        match self.receive().await? {
            None => Ok(None),
            Some(Frame {
                kind: FrameKind::Message,
                payload,
            }) => {
                let limit_bytes = self.limits.payload_bytes_max as usize;
                Ok(Some(codec::decode(&payload, limit_bytes)?))
            }
            Some(Frame { kind, .. }) => Err(ReceiveError::Unexpected { kind }),
        }
    }

    /// Also frames of the handshake.
    pub(crate) async fn receive_any(&mut self) -> Result<Option<Frame>, ReceiveError> {
        loop {
            let missing_bytes = match decode_frame(&mut self.buffer, self.limits)? {
                Decoded::Frame(frame) => return Ok(Some(frame)),
                Decoded::Incomplete { missing_bytes } => missing_bytes,
            };
            let step_max = READ_STEP_MAX_BYTES.max(self.buffer.len());
            self.buffer
                .reserve(missing_bytes.clamp(self.read_step, step_max));
            let room = self.buffer.capacity() - self.buffer.len();
            let count = match &mut self.reader {
                Reader::Quic(stream) => stream.read_buf(&mut self.buffer).await,
                Reader::Local(stream) => stream.read_buf(&mut self.buffer).await,
            }
            .map_err(|error| ReceiveError::Lost {
                reason: describe(&error),
            })?;
            match (count, self.buffer.is_empty()) {
                (0, true) => return Ok(None),
                (0, false) => return Err(ReceiveError::Truncated { missing_bytes }),
                // As fast a sender will fill a larger step as well, for the price of one.
                (count, _) if count >= room => {
                    self.read_step = (2 * self.read_step).min(READ_STEP_MAX_BYTES);
                }
                _ => {}
            }
        }
    }
}

impl fmt::Debug for FramedReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FramedReceiver")
            .field("buffered_bytes", &self.buffer.len())
            .field("limits", &self.limits)
            .field("guarded", &self.guard.is_some())
            .finish_non_exhaustive()
    }
}

/// A frame as it may come once the handshake is over.
fn established(frame: Frame) -> Result<Frame, ReceiveError> {
    match frame.kind {
        kind @ (FrameKind::Hello | FrameKind::Welcome) => Err(ReceiveError::Unexpected { kind }),
        FrameKind::Refusal => Err(ReceiveError::Refused(HelloRefusal::decode(&frame.payload)?)),
        FrameKind::Message | FrameKind::Chunk => Ok(frame),
    }
}

/// An I/O error's text; quinn says "connection lost" and hides the cause one level below.
fn describe(error: &io::Error) -> String {
    match error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<quinn::ReadError>())
    {
        Some(quinn::ReadError::ConnectionLost(cause)) => cause.to_string(),
        Some(quinn::ReadError::Reset(_)) => "the sender gave the stream up".to_owned(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use tokio::net::UnixStream;

    fn pair(limits: FrameLimits) -> (FramedStream, FramedStream) {
        let (a, b) = UnixStream::pair().unwrap();
        (
            FramedStream::local(a, limits),
            FramedStream::local(b, limits),
        )
    }

    #[tokio::test]
    async fn messages_and_chunks_arrive_in_order() {
        let (mut a, mut b) = pair(FrameLimits::BULK);
        let big = Bytes::from(vec![7_u8; 3 << 20]);
        let sending = async {
            a.sender.queue_message("one").unwrap();
            a.sender.queue_message("two").unwrap();
            a.sender.send_chunk(big.clone()).await.unwrap();
            a.sender.send_message("three").await.unwrap();
            a.sender.finish().await.unwrap();
        };
        let receiving = async {
            let receiver = &mut b.receiver;
            assert_eq!(
                receiver.receive_message::<String>().await.unwrap().unwrap(),
                "one"
            );
            assert_eq!(
                receiver.receive_message::<String>().await.unwrap().unwrap(),
                "two"
            );
            assert_eq!(receiver.receive().await.unwrap().unwrap().payload, big);
            assert_eq!(
                receiver.receive_message::<String>().await.unwrap().unwrap(),
                "three"
            );
            assert!(receiver.receive().await.unwrap().is_none());
        };
        tokio::join!(sending, receiving);
    }

    #[tokio::test]
    async fn frames_put_together_elsewhere_arrive_however_often_sending_is_interrupted() {
        let (mut a, mut b) = pair(FrameLimits::CALL);
        let mut frames = FrameQueue::new();
        let large = Bytes::from(vec![3_u8; 1 << 20]);
        for payload in [large.clone(), Bytes::from_static(b"small"), large] {
            frames.push_message(FrameLimits::CALL, |_| payload).unwrap();
        }
        let mut sizes = Vec::new();
        while sizes.len() < 3 {
            let _ = a.sender.send_frames(&mut frames).now_or_never();
            if let Some(frame) = b.receiver.receive().now_or_never() {
                sizes.push(frame.unwrap().unwrap().payload.len());
            }
            while let Some(frame) = b.receiver.receive_buffered().unwrap() {
                sizes.push(frame.payload.len());
            }
            tokio::task::yield_now().await;
        }
        assert_eq!(sizes, [1 << 20, 5, 1 << 20]);
        assert!(frames.is_empty());
    }

    #[tokio::test]
    async fn cancelled_flushes_and_receives_lose_nothing() {
        let (mut a, mut b) = pair(FrameLimits::BULK);
        let chunk = Bytes::from(vec![9_u8; 2 << 20]);
        // Nobody reads, so this stops half way.
        assert!(a.sender.send_chunk(chunk.clone()).now_or_never().is_none());
        assert!(matches!(
            a.sender.queue_message("x"),
            Err(SendError::QueueFull { .. })
        ));
        let mut received = None;
        while received.is_none() {
            received = b.receiver.receive().now_or_never();
            let _ = a.sender.flush().now_or_never();
            // Readiness is the reactor's to report.
            tokio::task::yield_now().await;
        }
        assert_eq!(received.unwrap().unwrap().unwrap().payload, chunk);
        a.sender.send_message("after").await.unwrap();
        assert_eq!(
            b.receiver
                .receive_message::<String>()
                .await
                .unwrap()
                .unwrap(),
            "after"
        );
    }

    #[tokio::test]
    async fn a_large_announcement_gets_no_memory_and_a_cut_frame_is_an_error() {
        let (a, b) = UnixStream::pair().unwrap();
        let mut b = FramedStream::local(b, FrameLimits::CALL);
        let header = encode_header(FrameKind::Message, 8 << 20, FrameLimits::CALL).unwrap();
        a.writable().await.unwrap();
        a.try_write(&header).unwrap();
        drop(a);
        let error = b.receiver.receive().await.unwrap_err();
        assert!(
            matches!(error, ReceiveError::Truncated { missing_bytes } if missing_bytes == 8 << 20)
        );
        assert!(b.receiver.buffer.capacity() <= 2 * READ_STEP_MAX_BYTES);
    }

    #[tokio::test]
    async fn an_oversized_frame_is_refused_on_both_sides() {
        let (mut a, mut b) = pair(FrameLimits::CONTROL);
        let payload = vec![0; (1 << 20) + 1];
        let error = a
            .sender
            .send(FrameKind::Message, &payload)
            .await
            .unwrap_err();
        assert!(matches!(
            error,
            SendError::Frame(FrameError::TooLarge { .. })
        ));
        a.sender.limits = FrameLimits::CALL;
        let receiving = b.receiver.receive();
        let (_, received) = tokio::join!(
            async { a.sender.send(FrameKind::Message, &payload).now_or_never() },
            receiving
        );
        assert!(matches!(
            received,
            Err(ReceiveError::Frame(FrameError::TooLarge { .. }))
        ));
    }

    #[tokio::test]
    async fn refusals_and_strange_kinds_are_errors() {
        let (mut a, mut b) = pair(FrameLimits::CONTROL);
        let refusal = HelloRefusal::VersionSkew {
            offered: 1,
            spoken: 2,
        };
        a.sender
            .send(FrameKind::Refusal, &refusal.encode())
            .await
            .unwrap();
        a.sender.send(FrameKind::Welcome, &[]).await.unwrap();
        a.sender.send(FrameKind::Chunk, &[1]).await.unwrap();
        assert!(
            matches!(b.receiver.receive().await, Err(ReceiveError::Refused(r)) if r == refusal)
        );
        assert!(matches!(
            b.receiver.receive().await,
            Err(ReceiveError::Unexpected { .. })
        ));
        assert!(b.receiver.receive_message::<String>().await.is_err());
    }
}
