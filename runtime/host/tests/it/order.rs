//! Calls that need no order: the connections that they take, and what those carry.

use std::collections::BTreeMap;

use crate::support::{Certificates, JOB, PATIENCE, address, listen, table_with, told};
use mobula_core::codec;
use mobula_core::id::ActorId;
use mobula_host::calls::serve_calls;
use mobula_host::client::{CallClient, CallOrder, CallPath, LARGE_STREAMS, OutgoingCall, Paths};
use mobula_wire::hello::Lane;

fn call(text: &str, order: CallOrder) -> OutgoingCall {
    OutgoingCall::new("tell", codec::encode_plain(text)).in_order(order)
}

#[tokio::test]
async fn calls_without_order_go_round_connections_of_their_own() {
    let certificates = Certificates::new();
    let host = listen(&certificates.host(JOB.0));
    let client = CallClient::with_paths(listen(&certificates.client()), None, Paths::QuicOnly);
    let target = address(&host, ActorId(230));
    let mut pending = Vec::new();
    for _ in 0..2 * LARGE_STREAMS {
        pending.push(client.start(&target, call("a", CallOrder::Any)).await);
    }
    pending.push(client.start(&target, call("b", CallOrder::Kept)).await);
    let mut requests: BTreeMap<Lane, Vec<usize>> = BTreeMap::new();
    let accepting = async {
        for _ in 0..=LARGE_STREAMS {
            let connection = host.accept().await.expect("the endpoint is open");
            let (lane, mut stream) = connection.accept().await.unwrap();
            let expected = if lane == Lane::Call { 1 } else { 2 };
            for _ in 0..expected {
                stream.receiver.receive().await.unwrap().unwrap();
            }
            requests.entry(lane).or_default().push(expected);
        }
    };
    tokio::time::timeout(PATIENCE, accepting)
        .await
        .expect("all connections come");
    let large = vec![2; usize::from(LARGE_STREAMS)];
    assert_eq!(
        requests,
        BTreeMap::from([(Lane::Call, vec![1]), (Lane::LargeCall, large)])
    );
}

#[tokio::test]
async fn each_call_without_order_is_answered_once_on_every_path() {
    for (paths, actor) in [(Paths::QuicOnly, 231), (Paths::Any, 232)] {
        let (certificates, actor) = (Certificates::new(), ActorId(actor));
        let (table, _events) = table_with(actor).await;
        let endpoint = listen(&certificates.host(JOB.0));
        let server = tokio::spawn(serve_calls(endpoint.clone(), table));
        let client = CallClient::with_paths(listen(&certificates.client()), None, paths);
        let target = address(&endpoint, actor);
        let names: Vec<String> = (0..12).map(|number| number.to_string()).collect();
        // One after the other: the actor's mailbox is small.
        for name in &names {
            told(client.call(&target, call(name, CallOrder::Any)).await);
        }
        let mut heard = told(client.call(&target, call("last", CallOrder::Kept)).await);
        heard.sort_unstable();
        let mut expected: Vec<String> = names;
        expected.extend(["started".to_owned(), "last".to_owned()]);
        expected.sort_unstable();
        assert_eq!(heard, expected, "{paths:?}");
        if paths == Paths::Any {
            // One stream is enough there, and all calls share it.
            let path = client.path_to(endpoint.local_address());
            assert_eq!(path, Some(CallPath::SameMachine));
        }
        endpoint.close("done").await;
        server.await.unwrap();
    }
}
