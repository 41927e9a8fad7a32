use mobula_wire::hello::{HelloRefusal, Lane, StreamHello};

use super::*;
use crate::identity::{ClusterCa, Validity};
use crate::lane::{FramedStream, ReceiveError};
use crate::testing::{credentials, expired_credentials, loopback, rebind};

/// A listening head of `ca`'s cluster, and a client endpoint with `ours`.
fn head_and(ca: &ClusterCa, ours: &Credentials) -> (Endpoint, Endpoint) {
    let head = Endpoint::bind(loopback(), &credentials(ca, Role::Head)).unwrap();
    (head, Endpoint::bind_client(loopback(), ours).unwrap())
}

/// Connects while the head accepts; the head's side is kept alive in the result.
async fn connect(
    client: &Endpoint,
    head: &Endpoint,
    class: LaneClass,
    expected: Role,
) -> Result<(Connection, Connection), ConnectError> {
    let address = head.local_address();
    let connecting = client.connect(address, class, expected);
    tokio::pin!(connecting);
    let accepting = head.accept();
    tokio::pin!(accepting);
    tokio::select! {
        result = &mut connecting => {
            let ours = result?;
            Ok((ours, accepting.await.unwrap()))
        }
        theirs = &mut accepting => Ok((connecting.await?, theirs.unwrap())),
    }
}

#[tokio::test]
async fn members_know_each_other_and_exchange_messages() {
    let ca = ClusterCa::create("demo").unwrap();
    let (head, node) = head_and(&ca, &credentials(&ca, Role::Node));
    for class in [LaneClass::Control, LaneClass::Bulk] {
        let lane = if class == LaneClass::Control {
            Lane::Control
        } else {
            Lane::Bulk
        };
        let (ours, theirs) = connect(&node, &head, class, Role::Head).await.unwrap();
        assert_eq!(ours.peer().role, Role::Head);
        assert_eq!(theirs.peer(), &node.identity());
        assert_eq!(theirs.class(), class);

        let mut stream = ours.open(lane).await.unwrap();
        stream.sender.send_message("ping").await.unwrap();
        let (accepted_lane, mut accepted) = theirs.accept().await.unwrap();
        assert_eq!(accepted_lane, lane);
        let message = accepted.receiver.receive_message::<String>().await.unwrap();
        assert_eq!(message.as_deref(), Some("ping"));
        let reply = async {
            accepted.sender.send_message("pong").await.unwrap();
            accepted.sender.finish().await.unwrap();
        };
        let receive = async {
            let message = stream.receiver.receive_message::<String>().await.unwrap();
            assert_eq!(message.as_deref(), Some("pong"));
            assert!(stream.receiver.receive().await.unwrap().is_none());
        };
        tokio::join!(reply, receive);
    }
}

#[tokio::test]
async fn another_clusters_certificate_is_refused_by_either_side() {
    let (ours, theirs) = (
        ClusterCa::create("a").unwrap(),
        ClusterCa::create("b").unwrap(),
    );
    let (head, node) = head_and(&theirs, &credentials(&ours, Role::Node));
    let error = connect(&node, &head, LaneClass::Control, Role::Head)
        .await
        .unwrap_err();
    let rejection = PeerRejection::OtherCa {
        expected: ours.key_hash(),
    };
    assert!(
        matches!(&error, ConnectError::WrongPeer { rejection: r, .. } if *r == rejection),
        "{error}"
    );
}

#[tokio::test]
async fn an_expired_certificate_is_refused_on_both_sides() {
    let ca = ClusterCa::create("demo").unwrap();
    let (head, node) = head_and(&ca, &expired_credentials(&ca, Role::Node));
    let error = connect(&node, &head, LaneClass::Control, Role::Head)
        .await
        .unwrap_err();
    assert!(matches!(error, ConnectError::Refused { .. }), "{error}");
    assert!(!error.is_retryable());

    let head = Endpoint::bind(loopback(), &expired_credentials(&ca, Role::Head)).unwrap();
    let node = Endpoint::bind_client(loopback(), &credentials(&ca, Role::Node)).unwrap();
    let error = connect(&node, &head, LaneClass::Control, Role::Head)
        .await
        .unwrap_err();
    let ConnectError::WrongPeer { rejection, .. } = error else {
        panic!("{error}")
    };
    assert!(
        matches!(rejection, PeerRejection::NotValidNow { .. }),
        "{rejection}"
    );
}

#[tokio::test]
async fn a_peer_of_another_role_is_refused() {
    let ca = ClusterCa::create("demo").unwrap();
    let (head, node) = head_and(&ca, &credentials(&ca, Role::Node));
    let error = connect(&node, &head, LaneClass::Control, Role::Host)
        .await
        .unwrap_err();
    let ConnectError::WrongPeer { rejection, .. } = error else {
        panic!("{error}")
    };
    assert_eq!(
        rejection,
        PeerRejection::OtherRole {
            expected: Role::Host,
            found: Role::Head
        }
    );
}

#[tokio::test]
async fn who_shows_no_certificate_is_refused() {
    let ca = ClusterCa::create("demo").unwrap();
    let (head, _) = head_and(&ca, &credentials(&ca, Role::Node));
    let slot = RejectionSlot::default();
    let tls = crate::tls::client_config_pinned(
        ca.key_hash(),
        Role::Head,
        crate::tls::ALPN_CONTROL,
        &slot,
    )
    .unwrap();
    let crypto = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    let stranger = quinn::Endpoint::client(loopback()).unwrap();
    let connecting = stranger
        .connect_with(config, head.local_address(), SERVER_NAME)
        .unwrap();
    let outcome = async {
        let connection = connecting.await?;
        Err::<(), _>(connection.closed().await)
    };
    let error = tokio::select! {
        error = outcome => error.unwrap_err(),
        accepted = head.accept() => panic!("accepted {accepted:?}"),
    };
    assert!(
        matches!(error, ConnectionError::ConnectionClosed(_)),
        "{error}"
    );
}

#[tokio::test]
async fn a_lie_about_the_class_gains_nothing() {
    let ca = ClusterCa::create("demo").unwrap();
    let ours = credentials(&ca, Role::Node);
    let (head, node) = head_and(&ca, &ours);
    let slot = RejectionSlot::default();
    let mut config = client_config(LaneClass::Control, &ours, Role::Head, &slot).unwrap();
    config.initial_dst_cid_provider(Arc::new(|| quinn::ConnectionId::new(&[0xff; 20])));
    let connecting = node
        .0
        .quinn
        .connect_with(config, head.local_address(), SERVER_NAME)
        .unwrap();
    tokio::select! {
        result = connecting => assert!(result.is_err()),
        accepted = head.accept() => panic!("accepted {accepted:?}"),
    }
}

#[tokio::test]
async fn a_stream_that_is_not_read_blocks_no_other() {
    let ca = ClusterCa::create("demo").unwrap();
    let (head, node) = head_and(&ca, &credentials(&ca, Role::Node));
    let (ours, theirs) = connect(&node, &head, LaneClass::Control, Role::Head)
        .await
        .unwrap();
    let mut stuck = ours.open(Lane::Call).await.unwrap();
    let mut lively = ours.open(Lane::Control).await.unwrap();
    let flooding = async {
        let payload = vec![0; 4 << 20];
        stuck.sender.send(FrameKind::Message, &payload).await
    };
    let talking = async {
        let mut accepted = std::collections::BTreeMap::new();
        for _ in 0..2 {
            let (lane, stream) = theirs.accept().await.unwrap();
            accepted.insert(lane, stream);
        }
        for round in 0..100_u32 {
            lively.sender.send_message(&round).await.unwrap();
            let server = accepted.get_mut(&Lane::Control).unwrap();
            assert_eq!(
                server.receiver.receive_message::<u32>().await.unwrap(),
                Some(round)
            );
        }
    };
    tokio::select! {
        result = flooding => panic!("nobody reads, yet it went out: {result:?}"),
        () = talking => {}
    }
}

#[tokio::test]
async fn lanes_are_kept_to_their_class_and_raft_to_heads() {
    let ca = ClusterCa::create("demo").unwrap();
    let (head, node) = head_and(&ca, &credentials(&ca, Role::Node));
    let (ours, theirs) = connect(&node, &head, LaneClass::Control, Role::Head)
        .await
        .unwrap();
    assert!(matches!(
        ours.open(Lane::Bulk).await,
        Err(OpenError::WrongClass { .. })
    ));
    let mut raft = ours.open(Lane::Raft).await.unwrap();
    let answer = tokio::select! {
        answer = raft.receiver.receive() => answer,
        accepted = theirs.accept() => panic!("accepted {accepted:?}"),
    };
    assert!(
        matches!(
            answer,
            Err(ReceiveError::Refused(HelloRefusal::LaneRefused {
                lane: Lane::Raft,
                ..
            }))
        ),
        "{answer:?}"
    );
}

#[tokio::test]
async fn another_version_is_refused_by_name() {
    let ca = ClusterCa::create("demo").unwrap();
    let (head, node) = head_and(&ca, &credentials(&ca, Role::Node));
    let (ours, theirs) = connect(&node, &head, LaneClass::Control, Role::Head)
        .await
        .unwrap();
    let (sender, receiver) = ours.0.quinn.open_bi().await.unwrap();
    let mut stream = FramedStream::quic(sender, receiver, FrameLimits::CONTROL, ours.guard());
    let mut hello = StreamHello::new(Lane::Control, "demo");
    hello.protocol_version += 1;
    stream
        .sender
        .send(FrameKind::Hello, &hello.encode())
        .await
        .unwrap();
    let answer = tokio::select! {
        answer = stream.receiver.receive() => answer,
        accepted = theirs.accept() => panic!("accepted {accepted:?}"),
    };
    assert!(
        matches!(
            answer,
            Err(ReceiveError::Refused(HelloRefusal::VersionSkew { .. }))
        ),
        "{answer:?}"
    );
}

#[tokio::test]
async fn connections_end_with_their_certificates() {
    let ca = ClusterCa::create("demo").unwrap();
    let node = Identity::new("demo", Role::Node, "node-1", 1);
    // Certificates count whole seconds.
    let short = ca
        .issue_with_new_key(&node, Validity::for_ttl(Duration::from_secs(2)))
        .unwrap();
    let (head, node) = head_and(&ca, &short);
    let (ours, theirs) = connect(&node, &head, LaneClass::Control, Role::Head)
        .await
        .unwrap();
    // A renewal serves new connections.
    node.replace_credentials(&credentials(&ca, Role::Node))
        .unwrap();
    let (renewed, _kept) = connect(&node, &head, LaneClass::Control, Role::Head)
        .await
        .unwrap();
    let (ours, theirs) = tokio::join!(ours.closed(), theirs.closed());
    for end in [ours, theirs] {
        assert!(
            matches!(
                end,
                ConnectionLost::ClosedByPeer { .. } | ConnectionLost::ClosedHere
            ),
            "{end}"
        );
    }
    assert!(!renewed.is_closed());
}

#[test]
fn a_killed_and_restarted_peer_voids_its_old_connections() {
    let ca = ClusterCa::create("demo").unwrap();
    let head_credentials = credentials(&ca, Role::Head);
    let new_runtime = || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
    };
    let (ours, first, second) = (
        new_runtime().unwrap(),
        new_runtime().unwrap(),
        new_runtime().unwrap(),
    );
    let head = first.block_on(async { Endpoint::bind(loopback(), &head_credentials).unwrap() });
    let address = head.local_address();
    let (accepted, accepting) = std::sync::mpsc::channel();
    first.spawn(async move {
        let connection = head.accept().await;
        accepted.send(()).unwrap();
        std::future::pending::<()>().await;
        drop((head, connection));
    });
    let node = ours.block_on(async {
        Endpoint::bind_client(loopback(), &credentials(&ca, Role::Node)).unwrap()
    });
    let connection = ours
        .block_on(node.connect(address, LaneClass::Control, Role::Head))
        .unwrap();
    accepting.recv().unwrap();
    // It dies without a word: a runtime that stops polls nothing more, so no farewell is sent.
    first.shutdown_timeout(Duration::from_secs(5));
    assert!(!connection.is_closed());
    let again = second.block_on(rebind(address, &head_credentials));
    let end = ours.block_on(connection.closed());
    assert_eq!(
        end,
        ConnectionLost::PeerEnded,
        "told at once, not by a timeout"
    );
    drop(again);
}
