//! Calls between two endpoints over real QUIC, and a host process under a test's agent.

use std::sync::Arc;
use std::time::Duration;

use crate::support::{
    Certificates, FIRST, JOB, PATIENCE, address, gate, listen, open, order, registry, storage,
    table_with, told,
};
use mobula_core::codec;
use mobula_core::error::{CallError, Executed};
use mobula_core::exit::ExitReason;
use mobula_core::id::{ActorId, HostId, NodeId};
use mobula_core::order::ActorAddress;
use mobula_host::agent::{HostEnd, HostProcess};
use mobula_host::calls::serve_calls;
use mobula_host::client::{CallClient, CallPath, OutgoingCall, Paths};
use mobula_host::mailbox::Deadline;
use mobula_net::endpoint::{Endpoint, LaneClass};
use mobula_net::identity::{Credentials, Role};
use mobula_net::local::LocalListener;
use mobula_wire::host::{AgentMessage, HostBootstrap, HostMessage, HostRole};
use mobula_wire::object::{METHOD_NEXT, OBJECTS_ACTOR};
use tokio::task::JoinHandle;
use tokio::time::Instant;

struct Host {
    endpoint: Endpoint,
    server: JoinHandle<()>,
}

async fn serve(certificates: &Certificates, actor: ActorId) -> Host {
    let (table, _events) = table_with(actor).await;
    let endpoint = listen(&certificates.host(JOB.0));
    let server = tokio::spawn(serve_calls(endpoint.clone(), table));
    Host { endpoint, server }
}

fn client(credentials: &Credentials) -> CallClient {
    CallClient::new(listen(credentials), None)
}

fn text(value: &str) -> Vec<u8> {
    codec::encode_plain(value)
}

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

fn bootstrap(certificates: &Certificates, socket: &std::path::Path) -> HostBootstrap {
    bootstrap_with(&certificates.host(JOB.0), socket)
}

fn bootstrap_with(credentials: &Credentials, socket: &std::path::Path) -> HostBootstrap {
    HostBootstrap {
        cluster_id: "test".into(),
        job: JOB,
        node: NodeId(1),
        node_name: "one".into(),
        host: HostId(5),
        role: HostRole::Actors,
        agent_socket: socket.to_string_lossy().into_owned(),
        listen_ip: "127.0.0.1".into(),
        api_addresses: Vec::new(),
        ca_pem: credentials.ca_certificate_pem().to_owned(),
        certificate_pem: credentials.certificate_pem().to_owned(),
        key_pem: credentials.private_key().to_pem().to_owned(),
        storage: storage(),
        object_store: None,
    }
}

#[tokio::test]
async fn a_host_obeys_its_agent_and_ends_with_it() {
    let certificates = Certificates::new();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let listener = LocalListener::bind(&socket, "test").unwrap();
    let bootstrap = bootstrap(&certificates, &socket);
    let (process, accepted) =
        tokio::join!(HostProcess::start(bootstrap, registry()), listener.accept());
    let process = process.unwrap();
    let runtime = Arc::clone(process.runtime());
    let (_lane, agent, _peer) = accepted.unwrap();
    let (mut orders, mut reports) = agent.split();
    let running = tokio::spawn(process.run_actors());

    let hello = reports
        .receive_message::<HostMessage>()
        .await
        .unwrap()
        .unwrap();
    let HostMessage::Hello {
        host,
        call_address,
        actor_types,
    } = hello
    else {
        panic!("expected a hello, got {hello:?}")
    };
    assert_eq!((host, actor_types), (HostId(5), vec!["probe".to_owned()]));

    let actor = ActorId(206);
    let start = AgentMessage::Start(Box::new(order(actor, FIRST, b"")));
    orders.send_message(&start).await.unwrap();
    let started = reports
        .receive_message::<HostMessage>()
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        started,
        HostMessage::Started {
            actor,
            incarnation: FIRST
        }
    );

    // From outside, and from the same process without leaving it.
    let target = mobula_core::order::ActorAddress {
        actor,
        incarnation: FIRST,
        node: NodeId(1),
        call_address,
    };
    let outside = client(&certificates.client());
    assert_eq!(
        told(
            outside
                .call(&target, OutgoingCall::new("tell", text("a")))
                .await
        ),
        ["started", "a"]
    );
    let inside = runtime.calls().unwrap();
    assert_eq!(
        told(
            inside
                .call(&target, OutgoingCall::new("tell", text("b")))
                .await
        )
        .len(),
        3
    );

    orders
        .send_message(&AgentMessage::Notice { deadline_ms: 9 })
        .await
        .unwrap();
    let mut notices = runtime.notices();
    notices.wait_for(Option::is_some).await.unwrap();

    let stop = AgentMessage::Stop {
        actor,
        incarnation: FIRST,
        grace_ms: 1000,
    };
    orders.send_message(&stop).await.unwrap();
    let exited = reports
        .receive_message::<HostMessage>()
        .await
        .unwrap()
        .unwrap();
    let reason = ExitReason::Stopped;
    assert_eq!(
        exited,
        HostMessage::Exited {
            actor,
            incarnation: FIRST,
            reason
        }
    );

    drop((orders, reports));
    let end = tokio::time::timeout(PATIENCE, running)
        .await
        .unwrap()
        .unwrap();
    assert!(matches!(end, HostEnd::AgentLost(_)), "{end:?}");
}

#[tokio::test]
async fn a_host_is_called_and_calls_past_the_end_of_its_first_certificate() {
    let certificates = Certificates::new();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let listener = LocalListener::bind(&socket, "test").unwrap();
    let first = certificates.short_lived_host(JOB.0, Duration::from_secs(2));
    let bootstrap = bootstrap_with(&first, &socket);
    let (process, accepted) =
        tokio::join!(HostProcess::start(bootstrap, registry()), listener.accept());
    let process = process.unwrap();
    let runtime = Arc::clone(process.runtime());
    let (_lane, agent, _peer) = accepted.unwrap();
    let (mut orders, mut reports) = agent.split();
    let running = tokio::spawn(process.run_actors());
    let Ok(Some(HostMessage::Hello { call_address, .. })) = reports.receive_message().await else {
        panic!("a host says hello first");
    };
    let actor = ActorId(208);
    let start = AgentMessage::Start(Box::new(order(actor, FIRST, b"")));
    orders.send_message(&start).await.unwrap();
    let Ok(Some(HostMessage::Started { .. })) = reports.receive_message().await else {
        panic!("the actor starts");
    };
    let target = mobula_core::order::ActorAddress {
        actor,
        incarnation: FIRST,
        node: NodeId(1),
        call_address: call_address.clone(),
    };
    let other = serve(&certificates, ActorId(209)).await;
    let others_actor = address(&other.endpoint, ActorId(209));
    let outside = client(&certificates.client());
    outside
        .call(&target, OutgoingCall::new("tell", text("a")))
        .await
        .unwrap();
    let inside = runtime.calls().unwrap();
    inside
        .call(&others_actor, OutgoingCall::new("tell", text("a")))
        .await
        .unwrap();

    // One for another name changes nothing; the right one is taken.
    let stranger = certificates.host(JOB.0 + 1);
    let hour = Duration::from_secs(3600);
    for certificate_pem in [
        certificates.next_for(&stranger, hour),
        certificates.next_for(&first, hour),
    ] {
        let message = AgentMessage::Certificate { certificate_pem };
        orders.send_message(&message).await.unwrap();
    }
    let renewed = async {
        while runtime.credentials().unwrap().get().not_after() == first.not_after() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, renewed).await.unwrap();
    let next = runtime.credentials().unwrap().get();
    assert_eq!(next.identity(), first.identity());

    // What shows the first certificate is of no use once that has ended ...
    let own = listen(&first);
    let others = other.endpoint.local_address();
    let refused = async {
        loop {
            match own.connect(others, LaneClass::Control, Role::Host).await {
                // It ends with its certificates.
                Ok(connection) => drop(connection.closed().await),
                Err(error) => return error,
            }
        }
    };
    tokio::time::timeout(PATIENCE, refused).await.unwrap();

    // ... and the host goes on, both ways, on connections that begin after that.
    let late = client(&certificates.client());
    assert_eq!(
        told(
            late.call(&target, OutgoingCall::new("tell", text("b")))
                .await
        ),
        ["started", "a", "b"]
    );
    let again = async {
        // A call that meets the end of its connection may fail; the next has a new one.
        while inside
            .call(&others_actor, OutgoingCall::new("tell", text("b")))
            .await
            .is_err()
        {}
    };
    tokio::time::timeout(PATIENCE, again).await.unwrap();
    drop((orders, reports));
    tokio::time::timeout(PATIENCE, running)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn a_driver_reports_how_its_main_ended() {
    let certificates = Certificates::new();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let listener = LocalListener::bind(&socket, "test").unwrap();
    let actor = ActorId(207);
    let mut bootstrap = bootstrap(&certificates, &socket);
    bootstrap.role = HostRole::Driver {
        actor,
        incarnation: FIRST,
        args: vec![],
    };
    let (process, accepted) =
        tokio::join!(HostProcess::start(bootstrap, registry()), listener.accept());
    let (_lane, agent, _peer) = accepted.unwrap();
    let (_orders, mut reports) = agent.split();
    let reason = process
        .unwrap()
        .run_driver(async { ExitReason::Failed("no data".to_owned()) })
        .await;
    assert_eq!(reason, ExitReason::Failed("no data".into()));
    let mut seen = Vec::new();
    while let Some(message) = reports.receive_message::<HostMessage>().await.unwrap() {
        seen.push(message);
    }
    let [HostMessage::Hello { .. }, started, exited] = seen.as_slice() else {
        panic!("{seen:?}")
    };
    assert_eq!(
        *started,
        HostMessage::Started {
            actor,
            incarnation: FIRST
        }
    );
    assert_eq!(
        *exited,
        HostMessage::Exited {
            actor,
            incarnation: FIRST,
            reason
        }
    );
}
