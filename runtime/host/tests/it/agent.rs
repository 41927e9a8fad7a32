//! A host process under a test's agent: its orders and reports, its certificates, its end.

use std::sync::Arc;
use std::time::Duration;

use crate::support::{
    Certificates, FIRST, JOB, PATIENCE, address, client, listen, order, registry, serve, storage,
    text, told,
};
use mobula_core::exit::ExitReason;
use mobula_core::id::{ActorId, HostId, NodeId};
use mobula_host::agent::{HostEnd, HostProcess};
use mobula_host::client::OutgoingCall;
use mobula_net::endpoint::LaneClass;
use mobula_net::identity::{Credentials, Role};
use mobula_net::lane::{FramedReceiver, FramedSender};
use mobula_net::local::LocalListener;
use mobula_wire::host::{AgentMessage, HostBootstrap, HostMessage, HostRole};

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

/// A host's process, and its agent's end of what is between them.
async fn started(
    bootstrap: HostBootstrap,
    listener: &LocalListener,
) -> (HostProcess, (FramedSender, FramedReceiver)) {
    let (process, accepted) =
        tokio::join!(HostProcess::start(bootstrap, registry()), listener.accept());
    let (_lane, agent, _peer) = accepted.unwrap();
    (process.unwrap(), agent.split())
}

#[tokio::test]
async fn a_host_obeys_its_agent_and_ends_with_it() {
    let certificates = Certificates::new();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("agent.sock");
    let listener = LocalListener::bind(&socket, "test").unwrap();
    let bootstrap = bootstrap(&certificates, &socket);
    let (process, (mut orders, mut reports)) = started(bootstrap, &listener).await;
    let runtime = Arc::clone(process.runtime());
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
    let (process, (mut orders, mut reports)) = started(bootstrap, &listener).await;
    let runtime = Arc::clone(process.runtime());
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
    let (process, (_orders, mut reports)) = started(bootstrap, &listener).await;
    let reason = process
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
