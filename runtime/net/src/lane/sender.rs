//! The sending half of a framed stream: a queue of frames, and what it is written to.

use std::fmt;
use std::io;

use bytes::{Buf, Bytes, BytesMut};
use mobula_wire::codec::{self, EncodeError};
use mobula_wire::frame::{
    FrameError, FrameKind, FrameLimits, HEADER_SIZE_BYTES, encode_frame, encode_header,
};
use mobula_wire::frame_queue::FrameQueue;
use serde::Serialize;

use super::Guard;
use super::local_socket::LocalWriter;

/// Queued beyond one largest frame: enough to put some hundred small messages into one write.
const COALESCE_BYTES: usize = 64 << 10;
/// A buffer that grew for one large frame is given back.
const KEEP_BYTES_MAX: usize = 256 << 10;
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

pub(super) enum Writer {
    Quic(quinn::SendStream),
    Local(LocalWriter),
}

/// The sending half of a stream.
pub struct FramedSender {
    writer: Writer,
    /// Whole frames, and possibly the header that belongs to `tail`.
    queued: BytesMut,
    /// A payload that is not copied into the queue; goes out after it.
    tail: Bytes,
    pub(super) limits: FrameLimits,
    pub(super) guard: Guard,
}

impl FramedSender {
    pub(super) fn new(writer: Writer, limits: FrameLimits, guard: Guard) -> Self {
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

    /// Whether the queue takes another frame of any size. Whoever reads and writes one stream in one
    /// task queues while there is room and flushes beside reading: two peers that each wait until the
    /// other reads would wait for ever.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.queued.len() < COALESCE_BYTES && self.tail.is_empty()
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
        if !self.has_room() {
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
            Writer::Local(stream) => stream.shut_down().map_err(lost_sending),
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
