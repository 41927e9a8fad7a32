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
use std::io;
use std::sync::Arc;

use mobula_wire::frame::FrameLimits;

mod anticipation;
mod local_socket;
mod receiver;
mod sender;

pub use receiver::{FramedReceiver, ReceiveError};
pub use sender::{FramedSender, SendError};

use receiver::Reader;
use sender::Writer;

/// Keeps the connection open for as long as one of its streams is.
pub(crate) type Guard = Option<Arc<dyn Any + Send + Sync>>;

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

    pub(crate) fn local(stream: tokio::net::UnixStream, limits: FrameLimits) -> io::Result<Self> {
        let (reader, writer) = local_socket::halves(stream)?;
        Ok(FramedStream {
            sender: FramedSender::new(Writer::Local(writer), limits, None),
            receiver: FramedReceiver::new(Reader::Local(reader), limits, None),
        })
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

#[cfg(test)]
mod tests {
    use super::receiver::READ_STEP_MAX_BYTES;
    use super::*;
    use bytes::Bytes;
    use futures::FutureExt;
    use mobula_wire::frame::{FrameError, FrameKind, encode_header};
    use mobula_wire::frame_queue::FrameQueue;
    use mobula_wire::hello::HelloRefusal;
    use tokio::net::UnixStream;

    fn pair(limits: FrameLimits) -> (FramedStream, FramedStream) {
        let (a, b) = UnixStream::pair().unwrap();
        (
            FramedStream::local(a, limits).unwrap(),
            FramedStream::local(b, limits).unwrap(),
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
        let mut b = FramedStream::local(b, FrameLimits::CALL).unwrap();
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
