//! What the test binary does when the agent starts it as a host or as a driver.

use std::io::Write;
use std::path::Path;

use mobula_core::exit::ExitReason;
use mobula_core::spec::ActorKind;
use mobula_net::identity::{Credentials, PrivateKey};
use mobula_net::lane::FramedStream;
use mobula_net::local::connect_local;
use mobula_wire::hello::Lane;
use mobula_wire::host::{AgentMessage, BOOTSTRAP_ENV, HostBootstrap, HostMessage, HostRole};

/// Entry of a host; nothing when the test suite runs.
#[test]
fn host() {
    run_if_started_by_an_agent();
}

/// Entry of a driver.
#[test]
fn builtin() {
    run_if_started_by_an_agent();
}

fn run_if_started_by_an_agent() {
    let Some(path) = std::env::var_os(BOOTSTRAP_ENV) else {
        return;
    };
    let text = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let bootstrap: HostBootstrap = serde_json::from_slice(&text).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let code = runtime.block_on(serve(bootstrap));
    std::process::exit(code);
}

async fn serve(bootstrap: HostBootstrap) -> i32 {
    let socket = Path::new(&bootstrap.agent_socket);
    let mut stream = connect_local(socket, &bootstrap.cluster_id, Lane::Control)
        .await
        .unwrap();
    // Nobody calls here; it is held, as a host holds its own, until the process ends.
    let calls = std::net::UdpSocket::bind((bootstrap.listen_ip.as_str(), 0)).unwrap();
    let hello = HostMessage::Hello {
        host: bootstrap.host,
        call_address: calls.local_addr().unwrap().to_string(),
        actor_types: vec!["plain".into()],
    };
    stream.sender.send_message(&hello).await.unwrap();
    if let HostRole::Driver {
        actor,
        incarnation,
        args,
    } = &bootstrap.role
    {
        return match args.first().map(String::as_str) {
            Some("fails") => {
                // Past the capture of the test harness, which knows only the print macros.
                std::io::stderr().write_all(b"there is no data\n").unwrap();
                3
            }
            Some("explains") => {
                let reason = ExitReason::Failed("explained".into());
                let (actor, incarnation) = (*actor, *incarnation);
                let exited = HostMessage::Exited {
                    actor,
                    incarnation,
                    reason,
                };
                stream.sender.send_message(&exited).await.unwrap();
                4
            }
            _ => 0,
        };
    }
    let key = PrivateKey::from_pem(&bootstrap.key_pem).unwrap();
    let first = Credentials::new(&bootstrap.certificate_pem, key, &bootstrap.ca_pem).unwrap();
    serve_actors(stream, first).await
}

async fn serve_actors(mut stream: FramedStream, mut credentials: Credentials) -> i32 {
    let mut renewals = 0;
    loop {
        let Ok(Some(message)) = stream.receiver.receive_message::<AgentMessage>().await else {
            return 9;
        };
        let answer = match message {
            AgentMessage::Start(start) => {
                let (actor, incarnation) = (start.actor, start.incarnation);
                match start.spec.kind {
                    ActorKind::Actor { type_name } if type_name == "plain" => {
                        HostMessage::Started { actor, incarnation }
                    }
                    other => HostMessage::Exited {
                        actor,
                        incarnation,
                        reason: ExitReason::StartFailed(format!("unknown: {other:?}")),
                    },
                }
            }
            AgentMessage::Stop {
                actor, incarnation, ..
            } => HostMessage::Exited {
                actor,
                incarnation,
                reason: match renewals {
                    0 => ExitReason::Stopped,
                    _ => ExitReason::Failed(format!("{renewals} certificates")),
                },
            },
            AgentMessage::Certificate { certificate_pem } => {
                let next = credentials.renewed(&certificate_pem).unwrap();
                assert!(next.not_after() >= credentials.not_after());
                (credentials, renewals) = (next, renewals + 1);
                continue;
            }
            // A host that says nothing to a question holds up nobody for long.
            AgentMessage::Notice { .. }
            | AgentMessage::NoticeWithdrawn
            | AgentMessage::Heads { .. }
            | AgentMessage::Advice { .. }
            | AgentMessage::Ask { .. } => continue,
            AgentMessage::Shutdown { .. } => return 0,
        };
        stream.sender.send_message(&answer).await.unwrap();
    }
}
