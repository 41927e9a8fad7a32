//! gRPC through the API port: who the service sees, and what a client learns when it cannot connect.

#![allow(clippy::unwrap_used, reason = "helpers of a test fail the test")]

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::net::SocketAddr;
use std::task::{Context, Poll};
use std::time::Duration;

use mobula_net::tcp::{ApiConnectError, ApiConnections, ConnectionLimits, CountRequests};
use mobula_net::tls::PeerRejection;
use mobula_net::{
    ApiListener, ClientTls, ClusterCa, Credentials, Identity, PeerInfo, Role, Validity,
    connect_channel,
};
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::transport::{Channel, Server};
use tonic_prost::ProstCodec;

/// Answers each caller with the name in its certificate.
#[derive(Clone)]
struct WhoAmI;

impl tonic::server::NamedService for WhoAmI {
    const NAME: &'static str = "test.WhoAmI";
}

impl tonic::server::UnaryService<String> for WhoAmI {
    type Response = String;
    type Future = Ready<Result<tonic::Response<String>, tonic::Status>>;

    fn call(&mut self, request: tonic::Request<String>) -> Self::Future {
        let peer = request.extensions().get::<PeerInfo>().cloned().unwrap();
        let name = peer
            .identity
            .map_or("nobody".to_owned(), |identity| identity.to_string());
        ready(Ok(tonic::Response::new(name)))
    }
}

impl Service<http::Request<Body>> for WhoAmI {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(async move {
            let codec = ProstCodec::<String, String>::default();
            Ok(tonic::server::Grpc::new(codec).unary(WhoAmI, request).await)
        })
    }
}

async fn who_am_i(channel: Channel) -> Result<String, tonic::Status> {
    let mut client = tonic::client::Grpc::new(channel);
    client
        .ready()
        .await
        .map_err(|error| tonic::Status::unavailable(error.to_string()))?;
    let path = http::uri::PathAndQuery::from_static("/test.WhoAmI/Ask");
    let codec = ProstCodec::<String, String>::default();
    let reply = client
        .unary(tonic::Request::new(String::new()), path, codec)
        .await?;
    Ok(reply.into_inner())
}

fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

fn credentials(ca: &ClusterCa, role: Role) -> Credentials {
    let identity = Identity::new(ca.cluster_id(), role, format!("{role}-1"), 1);
    ca.issue_with_new_key(&identity, Validity::for_ttl(Duration::from_secs(3600)))
        .unwrap()
}

async fn serve(credentials: &Credentials) -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let listener = ApiListener::bind(loopback(), credentials).await.unwrap();
    serve_at(listener)
}

fn serve_at(listener: ApiListener) -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let address = listener.local_address();
    let server = Server::builder()
        .layer(CountRequests)
        .add_service(WhoAmI)
        .serve_with_incoming(listener);
    (address, tokio::spawn(async move { server.await.unwrap() }))
}

#[tokio::test]
async fn the_service_sees_who_calls() {
    let ca = ClusterCa::create("demo").unwrap();
    let (address, server) = serve(&credentials(&ca, Role::Head)).await;
    let pinned = connect_channel(address, ClientTls::Pinned(ca.key_hash()))
        .await
        .unwrap();
    assert_eq!(who_am_i(pinned).await.unwrap(), "nobody");
    let node = ClientTls::Mutual(credentials(&ca, Role::Node));
    let mutual = connect_channel(address, node).await.unwrap();
    assert_eq!(
        who_am_i(mutual).await.unwrap(),
        "spiffe://demo/node/node-1/1"
    );
    server.abort();
}

/// What a stranger on a new connection hears.
async fn stranger(address: SocketAddr, ca: &ClusterCa) -> Option<(Channel, String)> {
    let channel = connect_channel(address, ClientTls::Pinned(ca.key_hash()))
        .await
        .ok()?;
    let name = who_am_i(channel.clone()).await.ok()?;
    Some((channel, name))
}

/// How long a test waits for what it brought about.
const BOUND: Duration = Duration::from_secs(20);

/// A head's listener that has a place for one member and for two strangers.
async fn with_few_places(ca: &ClusterCa, anonymous_idle: Duration) -> ApiListener {
    let limits = ConnectionLimits {
        certified: 1,
        anonymous: 2,
        anonymous_of_address: 2,
        handshakes_of_address: 8,
        anonymous_idle,
    };
    let own = credentials(ca, Role::Head);
    let listener = ApiListener::bind_within(loopback(), &own, limits);
    listener.await.unwrap()
}

/// Waits until so many strangers are connected.
async fn strangers_come_to(connections: &ApiConnections, count: usize) {
    let counted = async {
        while connections.counts().anonymous != count {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(BOUND, counted).await.unwrap();
}

#[tokio::test]
async fn a_flood_of_strangers_leaves_the_places_of_members_free() {
    let ca = ClusterCa::create("demo").unwrap();
    let listener = with_few_places(&ca, BOUND * 2).await;
    let connections = listener.connections();
    let (address, server) = serve_at(listener);
    let mut flood = Vec::new();
    for _ in 0..2 {
        flood.push(stranger(address, &ca).await.unwrap());
    }
    let third = tokio::time::timeout(BOUND, stranger(address, &ca)).await;
    assert!(third.unwrap().is_none());
    assert!(connections.counts().refused > 0);
    let node = ClientTls::Mutual(credentials(&ca, Role::Node));
    let member = connect_channel(address, node).await.unwrap();
    assert!(who_am_i(member).await.is_ok());

    // Connections that have ended give their places back.
    drop(flood);
    strangers_come_to(&connections, 0).await;
    assert!(stranger(address, &ca).await.is_some());
    server.abort();
}

#[tokio::test]
async fn strangers_who_ask_for_nothing_are_disconnected_whatever_they_ping() {
    let ca = ClusterCa::create("demo").unwrap();
    // Longer than until a client's next ping, and than it takes to see both at the same time.
    let listener = with_few_places(&ca, Duration::from_secs(5)).await;
    let connections = listener.connections();
    let (address, server) = serve_at(listener);
    let node = ClientTls::Mutual(credentials(&ca, Role::Node));
    let member = connect_channel(address, node).await.unwrap();
    // One that has asked something, and one that never does.
    let (asked, _) = stranger(address, &ca).await.unwrap();
    let silent = connect_channel(address, ClientTls::Pinned(ca.key_hash()));
    let _silent = silent.await.unwrap();
    strangers_come_to(&connections, 2).await;
    strangers_come_to(&connections, 0).await;
    assert_eq!(connections.counts().certified, 1);
    assert!(who_am_i(member).await.is_ok());
    // Whoever has something to ask later is connected again.
    let asking = async {
        while who_am_i(asked.clone()).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(BOUND, asking).await.unwrap();
    server.abort();
}

#[tokio::test]
async fn a_strangers_certificate_gets_no_answer() {
    // It accepts the server by pin, but shows a certificate of its own cluster.
    let (ca, other) = (
        ClusterCa::create("demo").unwrap(),
        ClusterCa::create("demo").unwrap(),
    );
    let (address, server) = serve(&credentials(&ca, Role::Head)).await;
    let stranger = ClientTls::Mutual(credentials(&other, Role::Node));
    let error = connect_channel(address, stranger).await.unwrap_err();
    assert!(
        matches!(error, ApiConnectError::WrongPeer { .. }),
        "{error}"
    );
    server.abort();
}

#[tokio::test]
async fn each_reason_for_no_connection_has_its_own_error() {
    let (ca, other) = (
        ClusterCa::create("demo").unwrap(),
        ClusterCa::create("demo").unwrap(),
    );
    let (address, server) = serve(&credentials(&ca, Role::Head)).await;

    let error = connect_channel(address, ClientTls::Pinned(other.key_hash()))
        .await
        .unwrap_err();
    let ApiConnectError::WrongPeer { rejection, .. } = &error else {
        panic!("{error}")
    };
    assert!(
        matches!(rejection, PeerRejection::OtherCa { .. }),
        "{error}"
    );
    assert!(!error.is_retryable());
    server.abort();

    let (address, server) = serve(&credentials(&ca, Role::Host)).await;
    let error = connect_channel(address, ClientTls::Pinned(ca.key_hash()))
        .await
        .unwrap_err();
    let ApiConnectError::WrongPeer { rejection, .. } = &error else {
        panic!("{error}")
    };
    assert!(
        matches!(rejection, PeerRejection::OtherRole { .. }),
        "{error}"
    );
    server.abort();

    // A port that was just free: nobody listens there.
    let free = tokio::net::TcpListener::bind(loopback())
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let error = connect_channel(free, ClientTls::Pinned(ca.key_hash()))
        .await
        .unwrap_err();
    assert!(
        matches!(error, ApiConnectError::ConnectionRefused { .. }),
        "{error}"
    );
    assert!(error.is_retryable());

    // Somebody who does not speak TLS.
    let listener = tokio::net::TcpListener::bind(loopback()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (error, ()) = tokio::join!(
        connect_channel(address, ClientTls::Pinned(ca.key_hash())),
        async {
            use tokio::io::AsyncWriteExt;
            let (mut stream, _) = listener.accept().await.unwrap();
            stream
                .write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                .await
                .unwrap();
        }
    );
    let error = error.unwrap_err();
    assert!(
        matches!(error, ApiConnectError::Handshake { .. }),
        "{error}"
    );
    assert!(!error.is_retryable());
}

#[tokio::test]
async fn a_head_that_dies_during_the_handshake_may_be_asked_again() {
    let ca = ClusterCa::create("demo").unwrap();
    let listener = tokio::net::TcpListener::bind(loopback()).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (error, ()) = tokio::join!(
        connect_channel(address, ClientTls::Pinned(ca.key_hash())),
        // As a killed process does: its kernel ends the connection before a word is answered.
        async { drop(listener.accept().await.unwrap()) }
    );
    let error = error.unwrap_err();
    assert!(
        matches!(error, ApiConnectError::Interrupted { .. }),
        "{error}"
    );
    assert!(error.is_retryable());
}

#[tokio::test]
async fn a_head_that_does_not_answer_times_out() {
    let ca = ClusterCa::create("demo").unwrap();
    // It listens, but never says a word.
    let silent = tokio::net::TcpListener::bind(loopback()).await.unwrap();
    let address = silent.local_addr().unwrap();
    let error = connect_channel(address, ClientTls::Pinned(ca.key_hash()))
        .await
        .unwrap_err();
    assert!(
        matches!(error, ApiConnectError::TimedOut { limit_ms: 5000, .. }),
        "{error}"
    );
}

#[tokio::test]
async fn handshakes_that_dawdle_delay_nobody() {
    let ca = ClusterCa::create("demo").unwrap();
    let (address, server) = serve(&credentials(&ca, Role::Head)).await;
    let mut dawdlers = Vec::new();
    for _ in 0..32 {
        dawdlers.push(tokio::net::TcpStream::connect(address).await.unwrap());
    }
    let channel = connect_channel(address, ClientTls::Pinned(ca.key_hash()))
        .await
        .unwrap();
    assert_eq!(who_am_i(channel).await.unwrap(), "nobody");
    server.abort();
}
