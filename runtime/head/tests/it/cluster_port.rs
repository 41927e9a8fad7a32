//! Who knocks at the port that heads and workers use, and must not come in.

use std::net::{SocketAddr, UdpSocket};

use mobula_net::endpoint::{Endpoint, LaneClass};
use mobula_net::identity::{Credentials, Role};
use mobula_wire::hello::{HelloRefusal, Lane};
use mobula_wire::raft::RaftHello;

use crate::one_head::{BOUND, OneHead};

fn endpoint(credentials: &Credentials) -> Endpoint {
    Endpoint::bind_client("127.0.0.1:0".parse().unwrap(), credentials).unwrap()
}

async fn member_of(head: &OneHead, name: &str) -> (Credentials, SocketAddr) {
    let token = head.worker_token().await;
    let (credentials, joined) = head.join(token, name).await.unwrap();
    (credentials, joined.cluster_address.parse().unwrap())
}

/// As large as what heads say to each other, and from a fixed sequence.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 7_u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56) as u8
    };
    (0..length).map(|_| next()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_at_the_cluster_port_change_nothing() {
    let head = OneHead::start().await;
    let other = OneHead::start().await;
    let (own, address) = member_of(&head, "w-1").await;

    // Who has no certificate at all: bytes that are no QUIC, and the beginnings of some that are.
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    for length in [0, 1, 20, 600, 1200, 1472] {
        let mut bytes = noise(length);
        socket.send_to(&bytes, address).unwrap();
        if let Some(first) = bytes.first_mut() {
            // A long header of QUIC version 1.
            *first = 0xc3;
            bytes[1..5.min(length)].copy_from_slice(&[0, 0, 0, 1][..5.min(length) - 1]);
            socket.send_to(&bytes, address).unwrap();
        }
    }

    // A member of another cluster.
    let (foreign, _) = member_of(&other, "w-1").await;
    let foreign = endpoint(&foreign);
    let connecting = foreign.connect(address, LaneClass::Control, Role::Head);
    let connected = tokio::time::timeout(BOUND, connecting).await.unwrap();
    let Err(refused) = connected else {
        panic!("a member of another cluster came in");
    };
    assert!(!refused.to_string().is_empty());

    // A worker of this one that speaks as a head.
    let worker = endpoint(&own);
    let connection = worker
        .connect(address, LaneClass::Control, Role::Head)
        .await
        .unwrap();
    let mut stream = connection.open(Lane::Raft).await.unwrap();
    let hello = RaftHello {
        from: 1,
        to: 1,
        cluster_address: address.to_string(),
        life: 7,
    };
    // It may be refused while it still speaks.
    let _ = stream.sender.send_message(&hello).await;
    let answer = tokio::time::timeout(BOUND, stream.receiver.receive()).await;
    let text = answer.unwrap().unwrap_err().to_string();
    let expected = HelloRefusal::LaneRefused {
        lane: Lane::Raft,
        reason: "it is for heads, the peer is a node".to_owned(),
    };
    assert!(text.contains(&expected.to_string()), "{text}");

    // The head goes on as if nobody had come.
    drop(head.worker("w-2").await);
    head.stop().await;
    other.stop().await;
}
