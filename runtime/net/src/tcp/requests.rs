//! Which connections of strangers are in use. One on which nobody asks for anything is closed: it may be anybody's,
//! and its place is another one's who brings a token.
//!
//! Bytes do not say whether a connection is in use, as clients of HTTP/2 send pings for as long as they like.
//! Requests do.
//!
//! Invariants:
//! 1. A connection is in use from the head of a request until HTTP/2 has the end of its answer, and is not closed
//!    meanwhile. For what HTTP/2 still holds of answers then, a few MiB at most, the limit is time enough.
//! 2. A request of which nothing more comes is ended, so that it does not keep its connection in use.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http_body::{Frame, SizeHint};
use parking_lot::Mutex;
use tokio::time::{Instant, Sleep};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service};

use super::listener::PeerInfo;

/// The requests of one connection.
#[derive(Debug, Clone)]
pub(super) struct Requests {
    /// How long the connection may be without any, and a request without a byte of it.
    limit: Duration,
    counted: Arc<Mutex<Counted>>,
}

#[derive(Debug)]
struct Counted {
    in_flight: usize,
    /// When the last one ended; before the first, when the connection was made.
    ended: Instant,
}

/// One request, for as long as it is in flight.
struct InFlight(Requests);

impl Requests {
    /// Those of a connection that was made now.
    pub(super) fn new(limit: Duration) -> Self {
        let counted = Counted {
            in_flight: 0,
            ended: Instant::now(),
        };
        Requests {
            limit,
            counted: Arc::new(Mutex::new(counted)),
        }
    }

    fn begin(&self) -> InFlight {
        self.counted.lock().in_flight += 1;
        InFlight(self.clone())
    }

    /// How long the connection may still be without a request.
    fn left(&self) -> Duration {
        let counted = self.counted.lock();
        match counted.in_flight {
            0 => self.limit.saturating_sub(counted.ended.elapsed()),
            _ => self.limit,
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        let mut counted = self.0.counted.lock();
        counted.in_flight -= 1;
        counted.ended = Instant::now();
    }
}

/// Wakes whoever serves a connection when it has been without a request for too long.
#[derive(Debug)]
pub(super) struct Idleness {
    requests: Requests,
    timer: Pin<Box<Sleep>>,
}

impl Idleness {
    pub(super) fn of(requests: &Requests) -> Self {
        Idleness {
            requests: requests.clone(),
            timer: Box::pin(tokio::time::sleep(requests.left())),
        }
    }

    /// Ready when it is too long.
    pub(super) fn poll_exceeded(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.timer.as_mut().poll(cx));
            // The timer does not follow each request; it looks again when it may be time.
            let left = self.requests.left();
            if left.is_zero() {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(Instant::now() + left);
        }
    }
}

/// Tells the connections of an [`ApiListener`](super::ApiListener) of their requests. Every server on one has it:
/// without, strangers are disconnected whatever they ask.
#[derive(Debug, Clone, Copy, Default)]
pub struct CountRequests;

/// A service of which the connections know their requests.
#[derive(Debug, Clone)]
pub struct Counting<S> {
    inner: S,
}

impl<S> Layer<S> for CountRequests {
    type Service = Counting<S>;

    fn layer(&self, inner: S) -> Counting<S> {
        Counting { inner }
    }
}

impl<S> Service<Request<Body>> for Counting<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Send + 'static,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let peer = request.extensions().get::<PeerInfo>();
        let Some(requests) = peer.and_then(|peer| peer.requests.clone()) else {
            return Box::pin(self.inner.call(request));
        };
        let in_flight = requests.begin();
        let limit = requests.limit;
        let answering = self.inner.call(request.map(|body| {
            Body::new(Arriving {
                body,
                limit,
                timer: None,
            })
        }));
        Box::pin(async move {
            let response = answering.await?;
            Ok(response.map(|body| {
                Body::new(Leaving {
                    body,
                    _in_flight: in_flight,
                })
            }))
        })
    }
}

/// What a stranger sends, for which nobody waits longer than the limit at a time.
struct Arriving {
    body: Body,
    limit: Duration,
    /// Runs while nothing comes.
    timer: Option<Pin<Box<Sleep>>>,
}

impl http_body::Body for Arriving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) {
            this.timer = None;
            return Poll::Ready(frame);
        }
        let limit = this.limit;
        let timer = this
            .timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        ready!(timer.as_mut().poll(cx));
        Poll::Ready(Some(Err(Status::deadline_exceeded(format!(
            "nothing more of the request came for {} s: send it again",
            limit.as_secs()
        )))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer, with whose end the request ends.
struct Leaving {
    body: Body,
    _in_flight: InFlight,
}

impl http_body::Body for Leaving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.get_mut().body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use http_body::Body as _;
    use std::convert::Infallible;
    use std::future::poll_fn;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    /// Of which nothing comes.
    struct Silent;

    impl http_body::Body for Silent {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            Poll::Pending
        }
    }

    async fn next_frame(mut body: Body) -> Option<Result<Frame<Bytes>, Status>> {
        poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await
    }

    fn request(requests: &Requests, body: Body) -> Request<Body> {
        let mut request = Request::new(body);
        request.extensions_mut().insert(PeerInfo {
            peer_address: ([127, 0, 0, 1], 7).into(),
            identity: None,
            requests: Some(requests.clone()),
        });
        request
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_is_idle_after_the_end_of_its_last_answer() {
        let requests = Requests::new(LIMIT);
        let mut idleness = Idleness::of(&requests);
        // An answer that is a stream, like a log that is followed.
        let following =
            |_: Request<Body>| async { Ok::<_, Infallible>(Response::new(Body::new(Silent))) };
        let mut service = CountRequests.layer(tower::service_fn(following));
        let asked = request(&requests, Body::empty());
        let answer = service.call(asked).await.unwrap();
        let exceeded = poll_fn(|cx| idleness.poll_exceeded(cx));
        assert!(tokio::time::timeout(LIMIT * 3, exceeded).await.is_err());
        drop(answer);
        let ended = Instant::now();
        poll_fn(|cx| idleness.poll_exceeded(cx)).await;
        assert!(ended.elapsed() >= LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_of_which_nothing_comes_ends_and_leaves_its_connection_idle() {
        let requests = Requests::new(LIMIT);
        let reading = |request: Request<Body>| async move {
            let frame = next_frame(request.into_body()).await;
            let status = frame.expect("a frame").expect_err("nothing was sent");
            assert_eq!(status.code(), tonic::Code::DeadlineExceeded);
            Ok::<_, Infallible>(Response::new(Body::empty()))
        };
        let mut service = CountRequests.layer(tower::service_fn(reading));
        let asked = request(&requests, Body::new(Silent));
        let answer = service.call(asked).await.unwrap();
        assert_eq!(requests.counted.lock().in_flight, 0);
        drop(answer);
        let mut idleness = Idleness::of(&requests);
        poll_fn(|cx| idleness.poll_exceeded(cx)).await;
    }
}
