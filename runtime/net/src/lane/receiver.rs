//! The receiving half of a framed stream: a buffer that grows with what arrives, and the frames in it.

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use mobula_wire::codec::{self, DecodeError};
use mobula_wire::frame::{Decoded, Frame, FrameError, FrameKind, FrameLimits, decode_frame};
use mobula_wire::hello::HelloRefusal;
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use tokio::io::AsyncReadExt;

use super::Guard;
use super::anticipation::Anticipation;
use super::local_socket::LocalReader;

/// Read in steps of at least this, at most as much as has arrived already (but no less than
/// [`READ_STEP_MAX_BYTES`]): a header that announces 8 MiB does not yet get 8 MiB.
/// A stream that fills a step gets the next one twice as large.
const READ_STEP_MIN_BYTES: usize = 4 << 10;
pub(super) const READ_STEP_MAX_BYTES: usize = 64 << 10;

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

pub(super) enum Reader {
    Quic(quinn::RecvStream),
    Local(LocalReader),
}

/// The receiving half of a stream.
pub struct FramedReceiver {
    reader: Reader,
    pub(super) buffer: BytesMut,
    read_step: usize,
    pub(super) limits: FrameLimits,
    pub(super) guard: Guard,
    anticipation: Anticipation,
}

impl FramedReceiver {
    pub(super) fn new(reader: Reader, limits: FrameLimits, guard: Guard) -> Self {
        FramedReceiver {
            reader,
            buffer: BytesMut::new(),
            read_step: READ_STEP_MIN_BYTES,
            limits,
            guard,
            anticipation: Anticipation::default(),
        }
    }

    /// As [`FramedReceiver::receive`], for a lane on which frames go to and fro: where the last ones
    /// came so soon that waking up took most of the time, it looks for the next one for as long as
    /// `look_for` before it sleeps. Other tasks of this thread have their turn after each look.
    pub async fn receive_soon(
        &mut self,
        look_for: Duration,
    ) -> Result<Option<Frame>, ReceiveError> {
        if let Some(frame) = self.receive_buffered()? {
            return Ok(Some(frame));
        }
        let began = Instant::now();
        let mut now = began;
        let looks = self.anticipation.looks(now);
        while now - began < look_for && self.anticipation.looks(now) {
            if self.look()?
                && let Some(frame) = self.receive_buffered()?
            {
                self.anticipation.found();
                self.anticipation.came(now - began, self.buffer.is_empty());
                return Ok(Some(frame));
            }
            tokio::task::yield_now().await;
            let before = std::mem::replace(&mut now, Instant::now());
            self.anticipation.looked(now, now - before);
        }
        if looks && now - began >= look_for {
            self.anticipation.not_found();
        }
        let received = self.receive().await;
        self.anticipation
            .came(began.elapsed(), self.buffer.is_empty());
        received
    }

    /// Takes what a socket of this machine has, without waiting; whether there was anything.
    fn look(&mut self) -> Result<bool, ReceiveError> {
        let Reader::Local(stream) = &self.reader else {
            return Ok(false);
        };
        let mut piece = [MaybeUninit::uninit(); READ_STEP_MIN_BYTES];
        // Not by way of tokio, whose view of the socket is as old as its last look at all of them.
        match rustix::io::read(stream, &mut piece) {
            // An end is for `receive` to see, which knows what it means here.
            Ok(([], _)) | Err(Errno::WOULDBLOCK | Errno::INTR) => Ok(false),
            Ok((bytes, _)) => {
                self.buffer.extend_from_slice(bytes);
                Ok(true)
            }
            Err(error) => Err(ReceiveError::Lost {
                reason: error.to_string(),
            }),
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
        FrameKind::Message | FrameKind::Chunk | FrameKind::Aside => Ok(frame),
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
