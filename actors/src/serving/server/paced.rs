//! Has callers wait who are refused for want of room and ask again at once.
//!
//! A refusal takes nearly as much of a machine as the answer of a small model does. Callers who do not heed when they may ask again
//! are refused as fast as they can ask, many thousand times a second, and take the processors from those who are answered, until
//! hardly anybody is: who has a deadline is refused because answers take so long, and answers take so long because of refusals.
//!
//! 1. A request is never delayed: one for which there is room is answered at once, whatever came before it.
//! 2. The first refusal is given at once. Who asks again before the time that it named, and is refused again, gets that refusal after
//!    [`HOLD_MIN`], the next one after twice as long, and so on up to [`HOLD_MAX`], until it heeds the time. Each answer takes an eighth
//!    off: so of the requests of one who never waits no more than a sixth are refused in the long run, however many such there are.
//! 3. This is of a connection, and of HTTP/1.1 only: there it has one request at a time, and so one caller. By an HTTP/2 one those of
//!    many callers may come, and nobody can tell which of them asks again.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::http::{Request, Version};
use axum::response::Response;
use futures::future::BoxFuture;
use tokio::time::Instant;
use tower::Service;

/// The shortest wait: what a timer can tell apart from none.
const HOLD_MIN: Duration = Duration::from_millis(1);

/// The longest: of so many callers that a router takes, [`super::MAX_CONNECTIONS`], eight thousand ask in a second then.
const HOLD_MAX: Duration = Duration::from_millis(128);

/// Marks a response that refuses a request for want of room: the same may be taken after this time.
#[derive(Debug, Clone, Copy)]
pub(in crate::serving) struct AskAgainAfter(pub(in crate::serving) Duration);

/// Answers the requests of one connection.
#[derive(Clone)]
pub(super) struct Paced {
    router: Router,
    refusals: Arc<Mutex<Refusals>>,
}

impl Paced {
    pub(super) fn new(router: Router) -> Self {
        Paced {
            router,
            refusals: Arc::default(),
        }
    }
}

impl<B> Service<Request<B>> for Paced
where
    Router: Service<Request<B>, Response = Response, Error = Infallible>,
    <Router as Service<Request<B>>>::Future: Send + 'static,
{
    type Response = Response;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response, Infallible>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<Request<B>>::poll_ready(&mut self.router, context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let has_one_at_a_time = request.version() < Version::HTTP_2;
        let asked = Instant::now();
        let answering = self.router.call(request);
        let refusals = Arc::clone(&self.refusals);
        Box::pin(async move {
            let response = answering.await?;
            if has_one_at_a_time {
                let named = response.extensions().get().copied();
                let hold = refusals
                    .lock()
                    // Whole after every single update, so a panic elsewhere does not spoil it.
                    .unwrap_or_else(PoisonError::into_inner)
                    .hold(asked, Instant::now(), named);
                if !hold.is_zero() {
                    tokio::time::sleep(hold).await;
                }
            }
            Ok(response)
        })
    }
}

/// What a caller was told.
#[derive(Debug, Default)]
struct Refusals {
    /// When it may ask again, as its last refusal named it.
    again: Option<Instant>,
    /// How long that was held back, less what answers since have taken off.
    held: Duration,
}

impl Refusals {
    /// For how long the response to a request is held back that came at `asked` and is answered at `now`: with a refusal, if
    /// `named` is when it may come again.
    fn hold(&mut self, asked: Instant, now: Instant, named: Option<AskAgainAfter>) -> Duration {
        let Some(AskAgainAfter(pause)) = named else {
            self.held -= self.held / 8;
            return Duration::ZERO;
        };
        let is_early = self.again.is_some_and(|again| asked < again);
        self.held = match is_early {
            true => (self.held * 2).clamp(HOLD_MIN, HOLD_MAX),
            false => Duration::ZERO,
        };
        self.again = Some(now + self.held + pause);
        self.held
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use axum::body::Body;
    use axum::http::StatusCode;
    use axum::routing::get;

    use super::*;

    const PAUSE: Duration = Duration::from_secs(1);

    const REFUSED: Option<AskAgainAfter> = Some(AskAgainAfter(PAUSE));

    #[test]
    fn refusals_wait_longer_and_longer_until_the_caller_heeds_the_time() {
        let mut refusals = Refusals::default();
        let mut now = Instant::now();
        let mut ask = |pause: Duration, named| {
            now += pause;
            let hold = refusals.hold(now, now, named);
            now += hold;
            hold.as_millis()
        };
        let at_once = Duration::from_micros(50);
        let held: Vec<u128> = (0..10).map(|_| ask(at_once, REFUSED)).collect();
        assert_eq!(held, [0, 1, 2, 4, 8, 16, 32, 64, 128, 128]);
        // An answer is never held back, and shortens what comes after it.
        assert_eq!([0; 8], [0; 8].map(|_: u8| ask(at_once, None)));
        assert_eq!(ask(at_once, REFUSED), 87);
        assert_eq!([0, 0, 0], [0; 3].map(|_: u8| ask(PAUSE, REFUSED)));
        assert_eq!(ask(PAUSE / 2, REFUSED), 1);
    }

    #[test]
    fn who_never_waits_is_refused_seldom_in_the_long_run_or_waits() {
        // One request of so many is refused.
        for (of, longest_ms) in [(1, 128), (2, 128), (5, 128), (7, 4), (20, 2)] {
            let mut refusals = Refusals::default();
            let mut now = Instant::now();
            let mut hold = Duration::ZERO;
            for request in 0..1_000 {
                let named = REFUSED.filter(|_| request % of == 0);
                now += Duration::from_micros(50);
                let held = refusals.hold(now, now, named);
                now += held;
                if named.is_some() {
                    hold = held;
                }
            }
            let expected_ms = 0..=longest_ms;
            assert!(
                expected_ms.contains(&hold.as_millis()),
                "one of {of}: {hold:?}"
            );
            assert_eq!(hold == HOLD_MAX, longest_ms == 128, "one of {of}");
        }
    }

    /// A server that has room while `has_room` says so.
    fn server(has_room: &Arc<AtomicBool>) -> Paced {
        let has_room = Arc::clone(has_room);
        let answer = move || async move {
            if has_room.load(Ordering::Relaxed) {
                return Response::new(Body::empty());
            }
            let mut refusal = Response::new(Body::empty());
            *refusal.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            refusal.extensions_mut().insert(AskAgainAfter(PAUSE));
            refusal
        };
        Paced::new(Router::new().route("/", get(answer)))
    }

    /// How a request was answered, and after how many milliseconds.
    async fn ask(server: &mut Paced, version: Version) -> (u16, u128) {
        let request = Request::builder().version(version).uri("/");
        let asked = Instant::now();
        let answer = server.call(request.body(Body::empty()).unwrap()).await;
        (
            answer.unwrap().status().as_u16(),
            asked.elapsed().as_millis(),
        )
    }

    #[tokio::test(start_paused = true)]
    async fn only_refusals_are_held_back_and_only_where_a_connection_has_one_caller() {
        let has_room = Arc::new(AtomicBool::new(false));
        let mut one = server(&has_room);
        // A clone is of the same connection.
        let mut same = one.clone();
        for (server, held) in [(&mut one, 0), (&mut same, 1)] {
            assert_eq!(ask(server, Version::HTTP_11).await, (503, held));
        }
        for held in [2, 4] {
            assert_eq!(ask(&mut one, Version::HTTP_11).await, (503, held));
        }
        has_room.store(true, Ordering::Relaxed);
        assert_eq!(ask(&mut one, Version::HTTP_11).await, (200, 0));
        has_room.store(false, Ordering::Relaxed);
        // That answer took an eighth off the four milliseconds, and this is the next refusal.
        assert_eq!(ask(&mut one, Version::HTTP_11).await, (503, 7));

        let mut many = server(&has_room);
        for _ in 0..3 {
            assert_eq!(ask(&mut many, Version::HTTP_2).await, (503, 0));
        }
    }
}
