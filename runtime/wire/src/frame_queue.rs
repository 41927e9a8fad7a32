//! Frames on their way out: small ones share a buffer, a large payload keeps its own memory.
//!
//! Invariants:
//! 1. Bytes leave in the order in which frames were pushed.
//! 2. What was taken with [`FrameQueue::advance`] never comes again.

use std::collections::VecDeque;

use bytes::{Buf, Bytes, BytesMut};

use crate::frame::{FrameError, FrameKind, FrameLimits, HEADER_SIZE_BYTES, encode_header};

/// From this size on a payload is not copied: below it, one more piece costs more than the copy.
const SHARED_BYTES_MIN: usize = 16 << 10;

/// The open buffer is given back when one burst has made it larger than this.
const KEEP_BYTES_MAX: usize = 256 << 10;

/// Encoded frames that wait to be written.
#[derive(Debug, Default)]
pub struct FrameQueue {
    sealed: VecDeque<Bytes>,
    open: BytesMut,
    sealed_bytes: usize,
}

impl FrameQueue {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        FrameQueue::default()
    }

    /// Appends a message's frame. `write_head` writes the message's head and answers what comes
    /// behind it. After an error nothing was appended.
    pub fn push_message(
        &mut self,
        limits: FrameLimits,
        write_head: impl FnOnce(&mut BytesMut) -> Bytes,
    ) -> Result<(), FrameError> {
        let start = self.open.len();
        self.open.extend_from_slice(&[0; HEADER_SIZE_BYTES]);
        let payload = write_head(&mut self.open);
        let length_bytes = self.open.len() - start - HEADER_SIZE_BYTES + payload.len();
        match encode_header(FrameKind::Message, length_bytes, limits) {
            Ok(header) => {
                self.open[start..start + HEADER_SIZE_BYTES].copy_from_slice(&header);
            }
            Err(error) => {
                self.open.truncate(start);
                return Err(error);
            }
        }
        if payload.len() < SHARED_BYTES_MIN {
            self.open.extend_from_slice(&payload);
        } else {
            let head = self.open.split().freeze();
            self.sealed_bytes += head.len() + payload.len();
            self.sealed.push_back(head);
            self.sealed.push_back(payload);
        }
        Ok(())
    }

    /// How much waits, in bytes.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        self.sealed_bytes + self.open.len()
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.sealed.is_empty() && self.open.is_empty()
    }

    /// The bytes that are next, as far as they lie together; empty only if nothing waits.
    #[must_use]
    pub fn front(&self) -> &[u8] {
        self.sealed.front().map_or(&self.open, |piece| piece)
    }

    /// The same where their memory can be shared.
    pub fn front_shared(&mut self) -> Option<&mut Bytes> {
        self.sealed.front_mut()
    }

    /// Takes `count` bytes off the front, at most what [`FrameQueue::front`] shows.
    pub fn advance(&mut self, count: usize) {
        match self.sealed.front_mut() {
            Some(piece) => {
                piece.advance(count);
                self.sealed_bytes -= count;
                if piece.is_empty() {
                    self.sealed.pop_front();
                }
            }
            None => {
                self.open.advance(count);
                if self.open.is_empty() {
                    self.reset_open();
                }
            }
        }
    }

    /// Starts again at the buffer's beginning, so that it is not allocated anew.
    fn reset_open(&mut self) {
        if self.open.capacity() > KEEP_BYTES_MAX {
            self.open = BytesMut::new();
        } else {
            self.open.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Decoded, decode_frame};

    fn drain(queue: &mut FrameQueue, step: usize) -> BytesMut {
        let mut out = BytesMut::new();
        while !queue.is_empty() {
            let count = queue.front().len().min(step);
            out.extend_from_slice(&queue.front()[..count]);
            queue.advance(count);
        }
        assert_eq!(queue.len_bytes(), 0);
        out
    }

    #[test]
    fn frames_leave_in_order_whole_and_once() {
        for step in [1, 7, 1000, usize::MAX] {
            let mut queue = FrameQueue::new();
            let sizes = [0, 3, SHARED_BYTES_MIN, 5, 2 * SHARED_BYTES_MIN, 1];
            for (n, size) in sizes.into_iter().enumerate() {
                let payload = Bytes::from(vec![n as u8; size]);
                queue
                    .push_message(FrameLimits::CALL, |head| {
                        head.extend_from_slice(b"head");
                        payload
                    })
                    .unwrap();
            }
            let mut bytes = drain(&mut queue, step);
            for (n, size) in sizes.into_iter().enumerate() {
                let Decoded::Frame(frame) = decode_frame(&mut bytes, FrameLimits::CALL).unwrap()
                else {
                    panic!("frame {n} is incomplete")
                };
                assert_eq!(&frame.payload[..4], b"head");
                assert_eq!(frame.payload[4..], vec![n as u8; size]);
            }
            assert!(bytes.is_empty());
        }
    }

    #[test]
    fn a_frame_over_the_limit_leaves_nothing_behind() {
        let mut queue = FrameQueue::new();
        let large = Bytes::from(vec![0; FrameLimits::CONTROL.payload_bytes_max as usize + 1]);
        let pushed = queue.push_message(FrameLimits::CONTROL, |head| {
            head.extend_from_slice(b"head");
            large
        });
        assert!(pushed.is_err());
        assert!(queue.is_empty());
    }
}
