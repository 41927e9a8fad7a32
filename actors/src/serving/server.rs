//! Accepts connections for a router: HTTP/1.1, and HTTP/2 from those who begin with it, as gRPC does.
//!
//! 1. Nagle's algorithm is off: with it, a response in two writes waits 40 ms for a delayed acknowledgement.
//! 2. Connections are bounded; past the bound new ones wait in the kernel's backlog.
//! 3. A connection that does not say its protocol within [`IDLE_TIMEOUT`] is closed, an HTTP/1.1 one that sends no request
//!    head for as long, and an HTTP/2 one whose peer does not answer a ping after it.
//! 4. A request's head is bounded: [`HEAD_BYTES_MAX`] and [`HEADERS_MAX`], for HTTP/2 [`HTTP2_HEADERS_BYTES_MAX`]. One beyond
//!    them, and one that cannot be read, hyper answers by itself: 431 and 400, without a body.
//! 5. Who is refused for want of room and asks again at once waits for its next refusal: see `paced`.
//! 6. On shutdown the listener closes at once, requests in flight get [`DRAIN_TIMEOUT`] to finish, and no task is left.

mod at_once;
mod beside;
mod paced;

use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use mobula::{ActorContext, ContextExt};
use rustix::net::sockopt;
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use self::at_once::AtOnce;
use self::beside::Beside;
pub(super) use self::paced::AskAgainAfter;
use self::paced::Paced;

/// Connections served at once. A connection costs some 20 kB idle and at most a request body each while busy.
pub const MAX_CONNECTIONS: usize = 1024;

/// How long a connection may be idle, or take over its first bytes or a request's head.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(75);

/// Calls that one HTTP/2 connection has open at once: as many as a router answers in a moment, and a bound on what it
/// makes us hold.
pub const MAX_STREAMS: u32 = 256;

/// Bytes of the head of an HTTP/1.1 request, of which its address is part: several times what a token and an explanation take. It is
/// also what is read of a connection at once.
pub const HEAD_BYTES_MAX: usize = 64 << 10;

/// Headers of an HTTP/1.1 request. For so many there is room on the stack.
pub const HEADERS_MAX: usize = 100;

/// Bytes of the headers of an HTTP/2 request, each counted with 32 more: what one connection may make us hold, with
/// [`MAX_STREAMS`] calls, is 4 MiB.
pub const HTTP2_HEADERS_BYTES_MAX: u32 = 16 << 10;

/// How long a silent HTTP/2 peer may take to answer a ping.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(20);

/// What an HTTP/2 connection begins with.
const HTTP2_PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Between two looks at a preface that has come in part. Peers send it in one piece.
const PREFACE_PAUSE: Duration = Duration::from_millis(100);

/// How long requests in flight may take after the shutdown began.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Pause after a failed accept: out of file descriptors, which only passes when connections close.
const ACCEPT_RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Why a server ended without being asked to.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The listener is not usable.
    #[error("cannot read the address of the HTTP listener")]
    Listener(#[source] io::Error),
}

/// How a server ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServeSummary {
    /// Connections whose requests were cut off because [`DRAIN_TIMEOUT`] had passed.
    pub aborted_connections: usize,
}

/// Leaves the node of an actor that has closed its listener for a notice. One that cannot leave fails, and its policy
/// starts it again: nobody could reach it any more.
pub(super) async fn leave_node(ctx: &ActorContext, what: &str, deadline_ms: u64) {
    if let Err(error) = ctx.yield_now().await {
        tracing::warn!(%error, deadline_ms, "{what} could not leave its node early");
        ctx.fail(format!(
            "stopped listening for a notice and could not leave: {error}"
        ));
    }
}

/// The server of an actor: its tasks end with it.
pub(super) struct ActorServer {
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl ActorServer {
    /// Serves a router at once. An actor whose server fails, fails with it, and its policy starts it again.
    pub(super) fn start(ctx: &ActorContext, listener: TcpListener, router: Router) -> Self {
        let (stop, mut stopping) = watch::channel(false);
        let shutdown = async move {
            // An actor that is gone stops as one that was asked to.
            let _ = stopping.wait_for(|stop| *stop).await;
        };
        let mut tasks = JoinSet::new();
        let context = ctx.clone();
        tasks.spawn(async move {
            if let Err(error) = serve(listener, router, shutdown).await {
                context.fail(error.to_string());
            }
        });
        ActorServer { stop, tasks }
    }

    /// Closes the listener, and finishes the requests that it has.
    pub(super) async fn drain(&mut self) {
        self.stop.send_replace(true);
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Serves a router until `shutdown` completes and the connections have drained.
///
/// # Errors
/// [`ServeError`] when the listener cannot be used at all; a single failed connection is only logged.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<ServeSummary, ServeError> {
    serve_with(listener, router, shutdown, IDLE_TIMEOUT).await
}

async fn serve_with(
    listener: TcpListener,
    router: Router,
    shutdown: impl Future<Output = ()> + Send,
    idle_timeout: Duration,
) -> Result<ServeSummary, ServeError> {
    let address = listener.local_addr().map_err(ServeError::Listener)?;
    tracing::info!(%address, "serving HTTP");
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let (stop, _) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        let accept = async {
            let permit = Arc::clone(&permits).acquire_owned().await;
            let permit = permit.expect("the semaphore is never closed");
            (listener.accept().await, permit)
        };
        tokio::select! {
            biased;
            () = &mut shutdown => break,
            Some(_) = connections.join_next() => {}
            (accepted, permit) = accept => match accepted {
                Ok((stream, _peer)) => {
                    let stop = stop.subscribe();
                    let connection = serve_connection(stream, router.clone(), stop, idle_timeout);
                    connections.spawn(async move {
                        AtOnce::new(Box::pin(connection)).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::warn!(%address, %error, "accepting a connection failed");
                    tokio::time::sleep(ACCEPT_RETRY_PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    stop.send_replace(true);
    let drained = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(DRAIN_TIMEOUT, drained).await;
    let aborted_connections = connections.len();
    connections.shutdown().await;
    tracing::info!(%address, aborted_connections, "stopped serving HTTP");
    Ok(ServeSummary {
        aborted_connections,
    })
}

/// Has the kernel ask a silent peer whether it is there, so that one that vanished while it was answered is found out.
fn keep_alive(stream: &TcpStream) -> io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, IDLE_TIMEOUT)?;
    sockopt::set_tcp_keepintvl(stream, KEEP_ALIVE_TIMEOUT)?;
    Ok(())
}

/// Waits until a peer has said which protocol it speaks, or has closed its side. hyper waits for the same bytes, and
/// without a limit.
async fn protocol_said(stream: &TcpStream) -> io::Result<()> {
    let mut first = [0; HTTP2_PREFACE.len()];
    loop {
        let count = stream.peek(&mut first).await?;
        if count == 0 || count == first.len() || !HTTP2_PREFACE.starts_with(&first[..count]) {
            return Ok(());
        }
        // What has come stays readable, so that nothing wakes us when there is more.
        tokio::time::sleep(PREFACE_PAUSE).await;
    }
}

async fn serve_connection(
    stream: TcpStream,
    router: Router,
    mut stop: watch::Receiver<bool>,
    idle_timeout: Duration,
) {
    if let Err(error) = stream.set_nodelay(true).and_then(|()| keep_alive(&stream)) {
        tracing::debug!(%error, "cannot set a connection's options, the peer has gone");
        return;
    }
    let said = tokio::select! {
        biased;
        said = tokio::time::timeout(idle_timeout, protocol_said(&stream)) => said,
        // No request of it is in flight.
        _ = stop.changed() => return,
    };
    match said {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            tracing::debug!(%error, "connection ended before it said anything");
            return;
        }
        Err(_) => {
            tracing::debug!(
                ?idle_timeout,
                "closed a connection that did not say its protocol"
            );
            return;
        }
    }
    let beside = Beside::default();
    let mut builder = Builder::new(beside.clone());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(idle_timeout)
        .max_buf_size(HEAD_BYTES_MAX)
        .max_headers(HEADERS_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(HTTP2_HEADERS_BYTES_MAX)
        .keep_alive_interval(idle_timeout)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT);
    let service = TowerToHyperService::new(Paced::new(router));
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let mut is_stopping = false;
    loop {
        let served = poll_fn(|context| {
            let ended = connection.as_mut().poll(context);
            if ended.is_pending() {
                beside.poll(context);
            }
            ended
        });
        tokio::select! {
            result = served => {
                if let Err(error) = result {
                    // Clients go away in the middle of things; this is not the server's failure.
                    tracing::debug!(%error, "HTTP connection ended early");
                }
                return;
            }
            _ = stop.changed(), if !is_stopping => {
                is_stopping = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::task::JoinHandle;
    use tokio::time::timeout;

    use super::*;

    async fn start(idle_timeout: Duration) -> (TcpStream, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(async move {
            let shutdown = std::future::pending();
            serve_with(listener, Router::new(), shutdown, idle_timeout)
                .await
                .unwrap();
        });
        (TcpStream::connect(address).await.unwrap(), serving)
    }

    #[tokio::test]
    async fn a_connection_that_says_nothing_whole_is_closed() {
        for said in [&b""[..], b"P", &HTTP2_PREFACE[..23], b"GET / HT"] {
            let (mut stream, serving) = start(Duration::from_millis(200)).await;
            stream.write_all(said).await.unwrap();
            let mut rest = Vec::new();
            // Closed by a reset where the server has not read what was said.
            let closed = timeout(Duration::from_secs(30), stream.read_to_end(&mut rest)).await;
            assert!(closed.is_ok(), "still open after {said:?}");
            serving.abort();
        }
    }

    /// What a server without routes answers to these bytes, until it closes the connection.
    async fn answer_to(head: &[u8]) -> String {
        let (mut stream, serving) = start(Duration::from_secs(30)).await;
        stream.write_all(head).await.unwrap();
        let mut answer = String::new();
        timeout(Duration::from_secs(30), stream.read_to_string(&mut answer))
            .await
            .expect("the connection is closed")
            .unwrap();
        serving.abort();
        answer
    }

    #[tokio::test]
    async fn heads_are_bounded_and_what_is_none_is_refused() {
        let with_headers = |count: usize| {
            let more: String = (2..count)
                .map(|number| format!("x-{number}: 1\r\n"))
                .collect();
            format!("GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{more}\r\n")
        };
        let answer = answer_to(with_headers(HEADERS_MAX).as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
        let answer = answer_to(with_headers(HEADERS_MAX + 1).as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");

        // No more than is read, so that nothing is left behind that would end the connection before its answer.
        let mut head = b"GET / HTTP/1.1\r\nx: ".to_vec();
        head.resize(HEAD_BYTES_MAX, b'a');
        let answer = answer_to(&head).await;
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
        assert!(answer.ends_with("\r\n\r\n"), "it has a body: {answer}");
        // One that just fits.
        head.truncate(HEAD_BYTES_MAX - 100);
        head.extend(b"\r\nconnection: close\r\n\r\n");
        let answer = answer_to(&head).await;
        assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");

        let answer = answer_to(b"GET / HTTP/1.1\r\nno header\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    }

    #[tokio::test]
    async fn a_preface_in_two_parts_begins_a_connection() {
        let (mut stream, serving) = start(Duration::from_secs(30)).await;
        stream.write_all(&HTTP2_PREFACE[..7]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        let mut rest = HTTP2_PREFACE[7..].to_vec();
        // A SETTINGS frame without any setting.
        rest.extend([0, 0, 0, 4, 0, 0, 0, 0, 0]);
        stream.write_all(&rest).await.unwrap();
        let mut head = [0; 9];
        timeout(Duration::from_secs(30), stream.read_exact(&mut head))
            .await
            .expect("the server answers")
            .unwrap();
        assert_eq!(head[3], 4, "a SETTINGS frame: {head:?}");
        serving.abort();
    }

    #[tokio::test]
    async fn a_shutdown_does_not_wait_for_the_silent() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let shutdown = async {
            let _ = stopped.await;
        };
        let serving = tokio::spawn(serve(listener, Router::new(), shutdown));
        let mut stream = TcpStream::connect(address).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        stop.send(()).unwrap();
        let mut rest = Vec::new();
        let closed = timeout(DRAIN_TIMEOUT / 2, stream.read_to_end(&mut rest)).await;
        assert!(closed.is_ok(), "still open");
        let summary = serving.await.unwrap().unwrap();
        assert_eq!(summary.aborted_connections, 0);
    }
}
