//! Actors and sessions come and go.

use std::time::Duration;

use mobula_core::exit::ExitReason;
use mobula_core::id::{ActorId, Incarnation, Term};
use mobula_core::order::{Order, WorkerEvent};
use mobula_net::endpoint::ConnectError;
use mobula_wire::session::{HeadMessage, WorkerMessage};
use mobula_worker::{Worker, WorkerError, WorkerExit};

use crate::fake_head::{BOUND, FakeHead, driver, is_alive, plain, welcome};

fn exited(actor: u64, reason: ExitReason) -> WorkerEvent {
    WorkerEvent::ActorExited {
        actor: ActorId(actor),
        incarnation: Incarnation(1),
        reason,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_are_sent_again_until_they_are_acknowledged() {
    let head = FakeHead::start();
    let mut worker = head.start_worker().await;
    let mut talk = head.welcome(10).await;
    let boot_id = talk.hello.boot_id.clone();
    assert!(talk.hello.capacity.cpu_milli > 0);
    talk.order(Order::Start(Box::new(plain(1, 1)))).await;
    let first = talk.event().await;
    assert!(
        matches!(first.1, WorkerEvent::ActorStarted { .. }),
        "{first:?}"
    );
    talk.drop_connection();

    let mut talk = head.welcome(10).await;
    assert_eq!(talk.hello.boot_id, boot_id, "the agent is still the same");
    assert_eq!(talk.event().await, first, "repeated, with its old number");
    talk.send(&HeadMessage::EventAcknowledged { sequence: first.0 })
        .await;

    // A start that is repeated is answered again, and runs only once.
    talk.order(Order::Start(Box::new(plain(1, 1)))).await;
    let again = talk.acknowledged_event().await;
    assert_eq!(again, first.1);

    let stop = Order::Stop {
        actor: ActorId(1),
        incarnation: Incarnation(1),
        grace_ms: 1000,
    };
    talk.order(stop).await;
    assert_eq!(
        talk.acknowledged_event().await,
        exited(1, ExitReason::Stopped)
    );
    worker.stop();
    while let Some(message) = talk.next().await {
        if message == WorkerMessage::Leaving {
            break;
        }
    }
    drop(talk);
    let exit = tokio::time::timeout(BOUND, worker.wait())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(exit, WorkerExit::Stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hosts_certificate_is_renewed_as_long_as_it_lives_and_after_refusals() {
    let mut head = FakeHead::start();
    head.host_ttl = Duration::from_secs(1);
    let mut worker = head.start_worker().await;
    let mut talk = head.welcome(10).await;
    let pid = talk.start_actor(1, 1).await;
    assert_eq!(talk.signed, 1);
    talk.refuse_to_sign = 1;
    // The refused one, and three that the host gets: it lives for longer than its first ones.
    talk.until_signed(5).await;
    assert!(is_alive(pid));
    let stop = Order::Stop {
        actor: ActorId(1),
        incarnation: Incarnation(1),
        grace_ms: 1000,
    };
    talk.order(stop).await;
    // The host counts them before it obeys, for its messages come in order.
    let told = talk.acknowledged_event().await;
    let WorkerEvent::ActorExited {
        reason: ExitReason::Failed(text),
        ..
    } = &told
    else {
        panic!("expected a count of certificates, got {told:?}")
    };
    let count: u32 = text.split(' ').next().unwrap().parse().unwrap();
    assert!(count >= 2, "{text}");
    // A host that is gone is not asked for any more.
    worker.stop();
    while let Some(message) = talk.next().await {
        if message == WorkerMessage::Leaving {
            break;
        }
    }
    drop(talk);
    tokio::time::timeout(BOUND, worker.wait())
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_incarnation_of_the_node_kills_the_hosts_of_the_old() {
    let head = FakeHead::start();
    let _worker = head.start_worker().await;
    let mut talk = head.welcome(10).await;
    let old = talk.start_actor(1, 1).await;
    assert!(is_alive(old));
    talk.drop_connection();
    let mut talk = head.welcome(20).await;
    let new = talk.start_actor(2, 2).await;
    assert!(!is_alive(old), "dead before the first order was taken");
    assert!(is_alive(new));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_leader_does_not_name_is_ended() {
    let head = FakeHead::start();
    let _worker = head.start_worker().await;
    let mut talk = head.welcome(10).await;
    for actor in 1..=3 {
        talk.start_actor(actor, 1).await;
    }
    // In two pieces: nothing ends before the last.
    for (actor, is_last) in [(3, false), (2, true)] {
        talk.send(&HeadMessage::OrdersComplete {
            term: Term(5),
            standing: vec![(ActorId(actor), Incarnation(1))],
            is_last,
        })
        .await;
    }
    assert_eq!(
        talk.acknowledged_event().await,
        exited(1, ExitReason::Stopped)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_host_is_reported_with_its_signal() {
    let head = FakeHead::start();
    let _worker = head.start_worker().await;
    let mut talk = head.welcome(10).await;
    let pid = talk.start_actor(1, 1).await;
    assert_eq!(talk.start_actor(2, 1).await, pid, "one host for both");
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    assert_eq!(
        talk.acknowledged_event().await,
        exited(1, ExitReason::HostSignaled(9))
    );
    assert_eq!(
        talk.acknowledged_event().await,
        exited(2, ExitReason::HostSignaled(9))
    );
    // Its callers are told so, and need not wait until an answer is overdue.
    let error = head.call(&talk.call_address).await.unwrap_err();
    assert!(
        matches!(&error, ConnectError::Failed { reason, .. } if reason.contains("has ended")),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_stopped_for_too_long_is_killed_and_reported_as_such() {
    let head = FakeHead::start();
    let mut options = head.worker_options();
    options.stopped_process_limit_ms = 1_000;
    let _worker = Worker::start(options).await.unwrap();
    let mut talk = head.welcome(10).await;
    let stopped = talk.start_actor(1, 1).await;
    let pid = rustix::process::Pid::from_raw(i32::try_from(stopped).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    let told = talk.acknowledged_event().await;
    let WorkerEvent::ActorExited {
        reason: ExitReason::Unavailable(text),
        ..
    } = &told
    else {
        panic!("expected the end of a process that was stopped, got {told:?}")
    };
    assert!(text.contains("was stopped (SIGSTOP"), "{text}");
    assert!(text.contains("stopped_process_limit_ms is 1000"), "{text}");
    assert!(!is_alive(stopped));
    assert_ne!(talk.start_actor(1, 2).await, stopped);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_ends_as_it_says_or_as_its_exit_code_says() {
    let head = FakeHead::start();
    let _worker = head.start_worker().await;
    let mut talk = head.welcome(10).await;
    let cases = [
        (1, "completes", "completed"),
        (
            2,
            "fails",
            "failed: driver exited with code 3; its last output: ",
        ),
        (3, "explains", "failed: explained"),
    ];
    for (actor, arg, expected) in cases {
        talk.order(Order::Start(Box::new(driver(actor, &[arg]))))
            .await;
        let reason = loop {
            match talk.acknowledged_event().await {
                WorkerEvent::ActorExited { reason, .. } => break reason.to_string(),
                started => assert!(matches!(started, WorkerEvent::ActorStarted { .. })),
            }
        };
        assert!(reason.starts_with(expected), "{arg}: {reason}");
        assert_eq!(
            reason.contains("there is no data"),
            arg == "fails",
            "{reason}"
        );
    }
    talk.send(&HeadMessage::ReadLog {
        request: 7,
        actor: ActorId(2),
        incarnation: Incarnation(1),
        offset: 0,
        limit_bytes: 100_000,
    })
    .await;
    match talk.next().await {
        Some(WorkerMessage::Log {
            request: 7, bytes, ..
        }) => {
            let text = String::from_utf8(bytes).unwrap();
            assert!(text.contains("there is no data"), "{text}");
        }
        other => panic!("expected a log, got {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_that_cannot_be_fetched_is_a_failed_start() {
    let head = FakeHead::start();
    let _worker = head.start_worker().await;
    let mut talk = head.welcome(10).await;
    let mut start = plain(1, 1);
    start.program = mobula_core::spec::Program::Artifact {
        blake3: "not-a-digest".into(),
        size_bytes: 1,
    };
    talk.order(Order::Start(Box::new(start))).await;
    match talk.acknowledged_event().await {
        WorkerEvent::ActorExited {
            reason: ExitReason::StartFailed(why),
            ..
        } => {
            assert!(why.contains("bad program"), "{why}");
        }
        other => panic!("expected a failed start, got {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_leader_is_not_obeyed() {
    let head = FakeHead::start();
    let worker = head.start_worker().await;
    let mut talk = head.welcome(10).await;
    let order = Order::Start(Box::new(plain(1, 1)));
    talk.send(&HeadMessage::Order {
        term: Term(4),
        order,
    })
    .await;
    let mut status = worker.status();
    let counted = status.wait_for(|status| status.stale_messages == 1);
    tokio::time::timeout(BOUND, counted).await.unwrap().unwrap();
    // The first that is started is one of the present leader's.
    talk.start_actor(2, 1).await;
    talk.drop_connection();

    let mut stale = head.accept().await;
    stale.send(&HeadMessage::Welcome(welcome(10, 4))).await;
    assert_eq!(stale.next().await, None, "the worker hangs up");
    head.welcome(10).await.start_actor(3, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_shown_and_tried_again() {
    let head = FakeHead::start();
    let worker = head.start_worker().await;
    let mut talk = head.accept().await;
    talk.send(&HeadMessage::Refused {
        reason: "no room".into(),
    })
    .await;
    let mut status = worker.status();
    let refused = status.wait_for(|status| {
        status
            .problem
            .as_ref()
            .is_some_and(|problem| problem.contains("no room"))
    });
    tokio::time::timeout(BOUND, refused).await.unwrap().unwrap();
    head.welcome(10).await.start_actor(1, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_agent_in_the_same_data_directory_is_refused() {
    let head = FakeHead::start();
    let _worker = head.start_worker().await;
    let error = Worker::start(head.worker_options()).await.unwrap_err();
    assert!(matches!(error, WorkerError::DataDirInUse { .. }), "{error}");
}
