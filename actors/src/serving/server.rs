//! Accepts connections for a router: HTTP/1.1, and HTTP/2 from those who begin with it, as gRPC does.
//!
//! 1. Nagle's algorithm is off: with it, a response in two writes waits 40 ms for a delayed acknowledgement.
//! 2. Connections are bounded; past the bound new ones wait in the kernel's backlog.
//! 3. An HTTP/1.1 connection that sends no request head for [`IDLE_TIMEOUT`] is closed, and an HTTP/2 one whose peer does not
//!    answer a ping after it.
//! 4. On shutdown the listener closes at once, requests in flight get [`DRAIN_TIMEOUT`] to finish, and no task is left.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use mobula::{ActorContext, ContextExt};
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

/// Connections served at once. A connection costs some 20 kB idle and at most a request body each while busy.
pub const MAX_CONNECTIONS: usize = 1024;

/// How long a connection may be idle, or take over a request's head.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(75);

/// Calls that one HTTP/2 connection has open at once: as many as a router answers in a moment, and a bound on what it
/// makes us hold.
pub const MAX_STREAMS: u32 = 256;

/// How long a silent HTTP/2 peer may take to answer a ping.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(20);

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

/// Serves a router until `shutdown` completes and the connections have drained.
///
/// # Errors
/// [`ServeError`] when the listener cannot be used at all; a single failed connection is only logged.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    shutdown: impl Future<Output = ()> + Send,
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
                    let connection = serve_connection(stream, router.clone(), stop.subscribe());
                    connections.spawn(async move {
                        connection.await;
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

async fn serve_connection(stream: TcpStream, router: Router, mut stop: watch::Receiver<bool>) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot switch off Nagle's algorithm, the peer has gone");
        return;
    }
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .keep_alive_interval(IDLE_TIMEOUT)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT);
    let service = TowerToHyperService::new(router);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    let mut is_stopping = false;
    loop {
        tokio::select! {
            result = connection.as_mut() => {
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
