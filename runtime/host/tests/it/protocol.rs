//! The call lane as a protocol: cancellation, items with credit, and peers that do not keep to it.
//! The host's actors are a script here, which answers as each test says.

use crate::support::{
    Certificates, FIRST, JOB, PATIENCE, address, gate, listen, open, table_with, told,
};
use bytes::Bytes;
use mobula_core::codec;
use mobula_core::error::{CallError, Executed};
use mobula_core::id::ActorId;
use mobula_host::calls::serve_calls;
use mobula_host::client::{CallClient, OutgoingCall, StreamEvent};
use mobula_net::endpoint::{Endpoint, LaneClass};
use mobula_net::identity::Role;
use mobula_net::lane::FramedStream;
use mobula_wire::call::{CallRequest, CalleeMessage, CallerMessage};
use mobula_wire::frame::{Frame, FrameLimits};
use mobula_wire::frame_queue::FrameQueue;
use mobula_wire::hello::Lane;

fn text(value: &str) -> Vec<u8> {
    codec::encode_plain(value)
}

fn cancelled(result: &Result<Bytes, CallError>) -> Option<Executed> {
    match result {
        Err(CallError::Cancelled { executed, .. }) => Some(*executed),
        _ => None,
    }
}

/// A host whose calls a test answers by hand.
struct ByHand {
    endpoint: Endpoint,
    stream: FramedStream,
}

impl ByHand {
    /// Takes the stream that `client` opens with its first call.
    async fn accept(endpoint: &Endpoint) -> Self {
        let connection = endpoint.accept().await.unwrap();
        // It offers no socket, so the caller stays with QUIC.
        let (lane, question) = connection.accept().await.unwrap();
        assert_eq!(lane, Lane::SameMachine);
        drop(question);
        let (lane, stream) = connection.accept().await.unwrap();
        assert_eq!(lane, Lane::Call);
        ByHand {
            endpoint: endpoint.clone(),
            stream,
        }
    }

    async fn next(&mut self) -> CallerMessage {
        let frame = tokio::time::timeout(PATIENCE, self.stream.receiver.receive())
            .await
            .expect("a message in time");
        let Frame { payload, .. } = frame.unwrap().unwrap();
        CallerMessage::decode(payload).unwrap()
    }

    async fn request(&mut self) -> CallRequest {
        match self.next().await {
            CallerMessage::Request(request) => request,
            other => panic!("expected a request, got {other:?}"),
        }
    }

    async fn send(&mut self, message: CalleeMessage) {
        let mut frames = FrameQueue::new();
        frames
            .push_message(FrameLimits::CALL, |head| message.encode_head(head))
            .unwrap();
        self.stream.sender.send_frames(&mut frames).await.unwrap();
    }

    async fn item(&mut self, call: u32, sequence: u64) {
        let value = Bytes::from(vec![sequence as u8]);
        self.send(CalleeMessage::Item {
            call,
            sequence,
            value,
        })
        .await;
    }
}

fn item(sequence: u64) -> Option<StreamEvent> {
    Some(StreamEvent::Item(Bytes::from(vec![sequence as u8])))
}

#[tokio::test]
async fn a_call_that_waits_is_cancelled_at_once_and_never_runs() {
    let certificates = Certificates::new();
    let actor = ActorId(300);
    let (table, _events) = table_with(actor).await;
    let endpoint = listen(&certificates.host(JOB.0));
    let server = tokio::spawn(serve_calls(endpoint.clone(), table));
    let client = CallClient::new(listen(&certificates.client()), None);
    let target = address(&endpoint, actor);

    let running = client
        .start(&target, OutgoingCall::new("wait", text("a")))
        .await;
    open("actor-300 began").await;
    let waiting = client
        .start(&target, OutgoingCall::new("tell", text("b")))
        .await;
    waiting.cancel(false);
    // The actor is busy all the while.
    let result = waiting.answer().await;
    assert_eq!(cancelled(&result), Some(Executed::No), "{result:?}");
    gate("actor-300").add_permits(1);
    running.answer().await.unwrap();
    let all = client
        .call(&target, OutgoingCall::new("tell", text("c")))
        .await;
    assert_eq!(told(all), ["started", "a", "c"]);
    server.abort();
}

#[tokio::test]
async fn a_call_that_was_never_sent_is_cancelled_without_the_host() {
    let certificates = Certificates::new();
    // Nobody accepts: the call waits for the connection.
    let silent = listen(&certificates.host(JOB.0));
    let client = CallClient::new(listen(&certificates.client()), None);
    let target = address(&silent, ActorId(301));
    let pending = client
        .start(&target, OutgoingCall::new("tell", text("a")))
        .await;
    let next = client
        .start(&target, OutgoingCall::new("tell", text("b")))
        .await;
    pending.cancel(true);
    assert_eq!(cancelled(&pending.answer().await), Some(Executed::No));

    let mut host = ByHand::accept(&silent).await;
    let request = host.request().await;
    assert_eq!(request.arguments, text("b"), "the cancelled one never left");
    host.send(CalleeMessage::Answer {
        call: request.call,
        result: Ok(Bytes::new()),
    })
    .await;
    next.answer().await.unwrap();
}

#[tokio::test]
async fn a_cancellation_of_what_runs_reaches_the_host_once_for_each_level() {
    let certificates = Certificates::new();
    let endpoint = listen(&certificates.host(JOB.0));
    let client = CallClient::new(listen(&certificates.client()), None);
    let target = address(&endpoint, ActorId(302));
    let pending = client
        .start(&target, OutgoingCall::new("work", text("a")))
        .await;
    let mut host = ByHand::accept(&endpoint).await;
    let call = host.request().await.call;
    for forced in [false, false, true, false] {
        pending.cancel(forced);
    }
    for forced in [false, true] {
        assert_eq!(host.next().await, CallerMessage::Cancel { call, forced });
    }
    let error = CallError::Cancelled {
        actor: "actor-302".into(),
        executed: Executed::Unknown,
    };
    host.send(CalleeMessage::Answer {
        call,
        result: Err(error),
    })
    .await;
    assert_eq!(cancelled(&pending.answer().await), Some(Executed::Unknown));
}

#[tokio::test]
async fn items_come_in_order_and_credit_goes_back_as_they_are_read() {
    let certificates = Certificates::new();
    let endpoint = listen(&certificates.host(JOB.0));
    let client = CallClient::new(listen(&certificates.client()), None);
    let target = address(&endpoint, ActorId(303));
    let mut stream = client
        .start_stream(&target, OutgoingCall::new("count", text("")), 4)
        .await;
    let mut host = ByHand::accept(&endpoint).await;
    let CallRequest { call, window, .. } = host.request().await;
    assert_eq!(window, Some(4));
    for sequence in 0..4 {
        host.item(call, sequence).await;
    }
    for sequence in 0..2 {
        assert_eq!(stream.next().await, item(sequence));
    }
    assert_eq!(host.next().await, CallerMessage::Credit { call, items: 2 });
    host.item(call, 4).await;
    host.send(CalleeMessage::Answer {
        call,
        result: Ok(Bytes::from_static(b"end")),
    })
    .await;
    for sequence in 2..5 {
        assert_eq!(stream.next().await, item(sequence));
    }
    let end = Some(StreamEvent::End(Ok(Bytes::from_static(b"end"))));
    assert_eq!(stream.next().await, end);
    assert_eq!(stream.next().await, None);
}

#[tokio::test]
async fn a_dropped_stream_cancels_its_call_and_what_is_under_way_is_ignored() {
    let certificates = Certificates::new();
    let endpoint = listen(&certificates.host(JOB.0));
    let client = CallClient::new(listen(&certificates.client()), None);
    let target = address(&endpoint, ActorId(304));
    let stream = client
        .start_stream(&target, OutgoingCall::new("count", text("")), 4)
        .await;
    let mut host = ByHand::accept(&endpoint).await;
    let call = host.request().await.call;
    drop(stream);
    let forced = false;
    assert_eq!(host.next().await, CallerMessage::Cancel { call, forced });
    host.item(call, 0).await;
    host.send(CalleeMessage::Answer {
        call,
        result: Ok(Bytes::new()),
    })
    .await;
    // The same number serves the next call, and the stream is still good.
    let next = client
        .start(&target, OutgoingCall::new("tell", text("")))
        .await;
    let again = host.request().await.call;
    host.send(CalleeMessage::Answer {
        call: again,
        result: Ok(Bytes::from_static(b"fine")),
    })
    .await;
    assert_eq!(next.answer().await.unwrap(), "fine");
}

#[tokio::test]
async fn a_host_that_breaks_the_protocol_is_left_and_what_was_sent_is_unknown() {
    let answer = |call| CalleeMessage::Answer {
        call,
        result: Ok(Bytes::new()),
    };
    let item = |call, sequence| CalleeMessage::Item {
        call,
        sequence,
        value: Bytes::new(),
    };
    // What it sends of a stream with a window of 1, and what is wrong with that.
    let cases = [
        (vec![answer(99)], "was not asked"),
        (vec![item(0, 1)], "came where 0 was due"),
        (vec![item(0, 0), item(0, 1)], "than there was credit for"),
        (vec![item(7, 0)], "was not asked"),
    ];
    for (n, (messages, reason)) in cases.into_iter().enumerate() {
        let certificates = Certificates::new();
        let endpoint = listen(&certificates.host(JOB.0));
        let client = CallClient::new(listen(&certificates.client()), None);
        let target = address(&endpoint, ActorId(305));
        let mut stream = client
            .start_stream(&target, OutgoingCall::new("count", text("")), 1)
            .await;
        let mut host = ByHand::accept(&endpoint).await;
        host.request().await;
        for message in messages {
            host.send(message).await;
        }
        // Nothing is read before, so that no credit goes back.
        let end = tokio::time::timeout(PATIENCE, host.stream.receiver.receive()).await;
        assert!(!matches!(end.expect("it leaves"), Ok(Some(_))), "case {n}");
        let error = loop {
            match stream.next().await.unwrap() {
                StreamEvent::Item(_) => assert_eq!(n, 2),
                StreamEvent::End(result) => break result.unwrap_err(),
            }
        };
        let expected = matches!(
            &error,
            CallError::ActorUnavailable { reason: text, executed: Executed::Unknown, .. }
                if text.contains(reason)
        );
        assert!(expected, "case {n}: {error}");
        host.endpoint.close("done").await;
    }
}

#[tokio::test]
async fn a_caller_that_breaks_the_protocol_is_cut_off() {
    let request = |call| {
        CallerMessage::Request(CallRequest {
            call,
            actor: ActorId(306),
            incarnation: FIRST,
            method: "wait".into(),
            timeout_ms: None,
            key: None,
            window: None,
            arguments: text("a").into(),
        })
    };
    let cases: [Vec<CallerMessage>; 3] = [
        vec![request(u32::MAX)],
        vec![request(3), request(3)],
        vec![request(3), CallerMessage::Credit { call: 3, items: 1 }],
    ];
    for (n, messages) in cases.into_iter().enumerate() {
        let certificates = Certificates::new();
        let (table, _events) = table_with(ActorId(306)).await;
        let endpoint = listen(&certificates.host(JOB.0));
        let server = tokio::spawn(serve_calls(endpoint.clone(), table));
        let connection = listen(&certificates.client())
            .connect(endpoint.local_address(), LaneClass::Control, Role::Host)
            .await
            .unwrap();
        let mut stream = connection.open(Lane::Call).await.unwrap();
        let mut frames = FrameQueue::new();
        for message in messages {
            frames
                .push_message(FrameLimits::CALL, |head| message.encode_head(head))
                .unwrap();
        }
        stream.sender.send_frames(&mut frames).await.unwrap();
        let end = tokio::time::timeout(PATIENCE, stream.receiver.receive())
            .await
            .expect("it ends");
        assert!(matches!(end, Ok(None) | Err(_)), "case {n}: {end:?}");
        server.abort();
    }
}
