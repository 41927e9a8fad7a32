//! The two doors of a head, the cluster's endpoint and the control API, and the certificate that both
//! show.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mobula_net::endpoint::Endpoint;
use mobula_net::identity::{Credentials, Role};
use mobula_net::tcp::{ApiCredentials, ApiListener, CountRequests};
use mobula_wire::control::control_server::ControlServer;
use tokio::sync::watch as tokio_watch;
use tokio::task::JoinSet;

use crate::bootstrap::HeadIdentity;
use crate::context::HeadContext;
use crate::raft::PeerNetwork;
use crate::{api, session};

/// Connections of workers and other heads that are served at the same time: one each, ten thousand
/// nodes at the most.
const CONNECTIONS_MAX: usize = 10_000;

/// How often it is checked whether the certificate is due for renewal.
const RENEWAL_INTERVAL: Duration = Duration::from_secs(60);

/// When a client of the control API that says nothing is asked whether it is there, and how long it may take to answer:
/// longer than a process is paused as a rule.
const API_KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(60);
const API_KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(60);

/// Takes connections of workers and other heads until the endpoint is closed.
pub(crate) async fn serve_cluster(
    context: Arc<HeadContext>,
    endpoint: Endpoint,
    network: PeerNetwork,
) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            connection = endpoint.accept() => {
                let Some(connection) = connection else { return };
                if connections.len() >= CONNECTIONS_MAX {
                    tracing::warn!(peer = %connection.peer(), "too many connections");
                    connection.close("the head serves 10000 connections at the most");
                    continue;
                }
                match connection.peer().role {
                    Role::Node => {
                        connections.spawn(session::serve(context.clone(), connection));
                    }
                    Role::Head => {
                        let network = network.clone();
                        connections.spawn(async move { network.serve(connection).await });
                    }
                    Role::Host | Role::Client => {
                        tracing::warn!(peer = %connection.peer(), "only workers and heads connect to a head");
                        connection.close("only workers and heads connect to a head");
                    }
                }
            }
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

/// Serves the control API and `/metrics` until `shutdown` becomes true. The error is why it no longer can.
pub(crate) async fn serve_api(
    context: Arc<HeadContext>,
    listener: ApiListener,
    mut shutdown: tokio_watch::Receiver<bool>,
) -> Result<(), String> {
    let service = ControlServer::new(api::ControlService {
        context: context.clone(),
    })
    .max_decoding_message_size(api::MESSAGE_BYTES_MAX)
    .max_encoding_message_size(api::MESSAGE_BYTES_MAX);
    let scrapes = axum::Router::new()
        .route("/metrics", axum::routing::get(api::scrape))
        .route("/metrics/{node}", axum::routing::get(api::scrape))
        .with_state(context.clone());
    let routes = tonic::service::Routes::new(service)
        .into_axum_router()
        .merge(scrapes)
        .layer(axum::middleware::from_fn_with_state(context, api::measure));
    let stop = async move {
        // An error means that the head is gone, which is a stop too.
        let _ = shutdown.wait_for(|stop| *stop).await;
    };
    let served = tonic::transport::Server::builder()
        .layer(CountRequests)
        .tcp_nodelay(true)
        // Clients whose machines vanish say nothing any more, and each holds a file descriptor.
        .http2_keepalive_interval(Some(API_KEEP_ALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(API_KEEP_ALIVE_TIMEOUT))
        .add_routes(tonic::service::Routes::from(routes))
        .serve_with_incoming_shutdown(listener, stop)
        .await;
    served.map_err(|error| match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    })
}

/// Renews the head's certificate whenever it is due, at both listeners.
pub(crate) async fn renew_certificate(
    mut identity: HeadIdentity,
    endpoint: Endpoint,
    api_credentials: ApiCredentials,
    renewed: tokio_watch::Sender<Credentials>,
) {
    loop {
        tokio::time::sleep(RENEWAL_INTERVAL).await;
        if SystemTime::now() < identity.credentials.renew_at() {
            continue;
        }
        match identity.renew() {
            Ok(credentials) => {
                if let Err(error) = endpoint.replace_credentials(&credentials) {
                    tracing::error!(%error, "the endpoint refuses the new certificate");
                }
                if let Err(error) = api_credentials.replace(&credentials) {
                    tracing::error!(%error, "the control API refuses the new certificate");
                }
                renewed.send_replace(credentials.clone());
                identity.credentials = credentials;
            }
            Err(error) => tracing::error!(%error, "the certificate cannot be renewed"),
        }
    }
}
