//! Calls between two endpoints over real QUIC.

use std::time::Duration;

use crate::support::{
    Certificates, JOB, address, client, gate, listen, open, serve, table_with, text, told,
};
use mobula_core::error::{CallError, Executed};
use mobula_core::id::ActorId;
use mobula_core::order::ActorAddress;
use mobula_host::calls::serve_calls;
use mobula_host::client::{CallClient, CallPath, OutgoingCall, Paths};
use mobula_host::mailbox::Deadline;
use mobula_wire::object::{METHOD_NEXT, OBJECTS_ACTOR};
use tokio::time::Instant;

#[tokio::test]
async fn calls_cross_each_path_in_order_and_bring_users_errors() {
    let cases = [
        (Paths::Any, CallPath::SameMachine, 200),
        (Paths::QuicOnly, CallPath::Network, 210),
    ];
    for (paths, expected, actor) in cases {
        calls_arrive_in_order(paths, expected, ActorId(actor)).await;
    }
}

async fn calls_arrive_in_order(paths: Paths, expected: CallPath, actor: ActorId) {
    let certificates = Certificates::new();
    let host = serve(&certificates, actor).await;
    let client = CallClient::with_paths(listen(&certificates.client()), None, paths);
    let target = address(&host.endpoint, actor);

    let first = client
        .start(&target, OutgoingCall::new("tell", text("a")))
        .await;
    let second = client
        .start(&target, OutgoingCall::new("tell", text("b")))
        .await;
    assert_eq!(told(second.answer().await), ["started", "a", "b"]);
    assert_eq!(told(first.answer().await), ["started", "a"]);
    let path = client.path_to(host.endpoint.local_address());
    assert_eq!(path, Some(expected));

    let error = client
        .call(&target, OutgoingCall::new("refuse", text("no")))
        .await
        .unwrap_err();
    assert_eq!(
        error,
        CallError::User {
            payload: text("no"),
            message: "no".into()
        }
    );
    let error = client
        .call(&target, OutgoingCall::new("large", text("")))
        .await
        .unwrap_err();
    assert!(matches!(error, CallError::ResultLost(_)), "{error}");
    let error = client
        .call(&target, OutgoingCall::new("tell", vec![0; 9 << 20]))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("pass them in parts"), "{error}");
    // The stream is still good.
    client
        .call(&target, OutgoingCall::new("tell", text("c")))
        .await
        .unwrap();
}

#[tokio::test]
async fn many_callers_share_one_stream() {
    let certificates = Certificates::new();
    let actor = ActorId(201);
    let host = serve(&certificates, actor).await;
    let client = client(&certificates.host(JOB.0));
    let target = address(&host.endpoint, actor);
    let calls = (0..200).map(|n| {
        let (client, target) = (client.clone(), target.clone());
        tokio::spawn(async move {
            client
                .call(&target, OutgoingCall::new("tell", text(&n.to_string())))
                .await
        })
    });
    let (mut answered, mut overloaded) = (0, 0);
    for outcome in futures::future::join_all(calls).await {
        match outcome.unwrap() {
            Ok(_) => answered += 1,
            Err(CallError::Overloaded { .. }) => overloaded += 1,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(answered + overloaded, 200);
    let all = told(
        client
            .call(&target, OutgoingCall::new("tell", text("last")))
            .await,
    );
    assert_eq!(
        all.len(),
        answered + 2,
        "each answered call ran once, no refused one did"
    );
}

#[tokio::test]
async fn a_lost_connection_makes_what_was_sent_unknown() {
    let certificates = Certificates::new();
    let actor = ActorId(202);
    let host = serve(&certificates, actor).await;
    let client = client(&certificates.client());
    let target = address(&host.endpoint, actor);
    let pending = client
        .start(&target, OutgoingCall::new("wait", text("a")))
        .await;
    open("actor-202 began").await;
    host.server.abort();
    host.endpoint.close("the host dies").await;
    let error = pending.answer().await.unwrap_err();
    assert!(
        matches!(
            error,
            CallError::ActorUnavailable {
                executed: Executed::Unknown,
                ..
            }
        ),
        "{error}"
    );
}

#[tokio::test]
async fn the_end_of_the_quic_connection_ends_the_unix_socket_beside_it() {
    let certificates = Certificates::new();
    let actor = ActorId(211);
    let host = serve(&certificates, actor).await;
    let endpoint = listen(&certificates.client());
    let client = CallClient::new(endpoint.clone(), None);
    let target = address(&host.endpoint, actor);
    let pending = client
        .start(&target, OutgoingCall::new("wait", text("a")))
        .await;
    open("actor-211 began").await;
    // The certificates of both sides are gone with it.
    endpoint.close("expired").await;
    let error = pending.answer().await.unwrap_err();
    assert_eq!(error.executed(), Executed::Unknown, "{error}");
    gate("actor-211").add_permits(1);
}

#[tokio::test]
async fn what_never_left_was_not_executed() {
    let certificates = Certificates::new();
    let client = client(&certificates.client());
    // A host of another cluster: the handshake fails, so nothing is sent.
    let stranger = listen(&Certificates::new().host(JOB.0));
    let accepting = stranger.clone();
    let acceptor = tokio::spawn(async move { accepting.accept().await.is_some() });
    let target = address(&stranger, ActorId(203));
    let error = client
        .call(&target, OutgoingCall::new("tell", text("a")))
        .await
        .unwrap_err();
    assert_eq!(error.executed(), Executed::No, "{error}");
    acceptor.abort();
}

#[tokio::test]
async fn another_jobs_process_may_not_call() {
    let certificates = Certificates::new();
    let actor = ActorId(204);
    let host = serve(&certificates, actor).await;
    let client = client(&certificates.host(JOB.0 + 1));
    let target = address(&host.endpoint, actor);
    let error = client
        .call(&target, OutgoingCall::new("tell", text("a")))
        .await
        .unwrap_err();
    let CallError::NotPermitted(reason) = error else {
        panic!("{error:?}");
    };
    assert!(
        reason.starts_with("a process of job-4 may not call actors of job-3"),
        "{reason}"
    );
}

#[tokio::test]
async fn a_process_of_another_job_of_the_namespace_may_call_and_one_of_its_past_may_not() {
    let certificates = Certificates::new();
    let actor = ActorId(212);
    let (table, _events) = table_with(actor).await;
    let endpoint = listen(&certificates.host_in_shop(JOB.0, 7));
    let _server = tokio::spawn(serve_calls(endpoint.clone(), table));
    let target = address(&endpoint, actor);
    let tell = || OutgoingCall::new("tell", text("a"));
    // On the Unix socket a caller may do what its certificate beside it says, and no more.
    let paths = [
        (Paths::Any, CallPath::SameMachine),
        (Paths::QuicOnly, CallPath::Network),
    ];
    for (paths, expected) in paths {
        let own = listen(&certificates.host_in_shop(JOB.0 + 1, 7));
        let colleague = CallClient::with_paths(own, None, paths);
        colleague.call(&target, tell()).await.unwrap();
        assert_eq!(colleague.path_to(endpoint.local_address()), Some(expected));
        // Objects are not for colleagues.
        let objects = ActorAddress {
            actor: OBJECTS_ACTOR,
            ..target.clone()
        };
        let read = OutgoingCall::new(METHOD_NEXT, Vec::new());
        let error = colleague.call(&objects, read).await.unwrap_err();
        let CallError::NotPermitted(reason) = error else {
            panic!("{error:?}");
        };
        assert!(reason.contains("pass values by value"), "{reason}");
    }
    for stranger in [
        certificates.host(JOB.0 + 1),
        certificates.host_in_shop(JOB.0 + 1, 6),
    ] {
        let error = client(&stranger).call(&target, tell()).await.unwrap_err();
        let CallError::NotPermitted(reason) = error else {
            panic!("{error:?}");
        };
        assert!(reason.contains("the same `--namespace`"), "{reason}");
    }
}

#[tokio::test]
async fn a_deadline_ends_the_wait_and_says_what_is_known() {
    let certificates = Certificates::new();
    let actor = ActorId(205);
    let host = serve(&certificates, actor).await;
    let client = client(&certificates.client());
    let target = address(&host.endpoint, actor);
    // The deadline passes while the method runs.
    let deadline = Deadline {
        at: Instant::now() + Duration::from_millis(500),
        limit_ms: 500,
    };
    let pending = client
        .start(
            &target,
            OutgoingCall::new("wait", text("a")).with_deadline(Some(deadline)),
        )
        .await;
    open("actor-205 began").await;
    let error = pending.answer().await.unwrap_err();
    assert!(
        matches!(
            error,
            CallError::DeadlineExceeded {
                limit_ms: 500,
                executed: Executed::Unknown,
                ..
            }
        ),
        "{error}"
    );
    gate("actor-205").add_permits(1);
    client
        .call(&target, OutgoingCall::new("tell", text("b")))
        .await
        .unwrap();
}
