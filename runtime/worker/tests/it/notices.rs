//! The machine is about to be taken away.

use std::time::{Duration, SystemTime};

use mobula_core::order::{Order, WorkerEvent};
use mobula_wire::session::WorkerMessage;
use mobula_worker::notices::NoticeSource;
use mobula_worker::{Worker, WorkerExit};

use crate::fake_head::{BOUND, FakeHead, is_alive};

fn in_ms(ms: u64) -> u64 {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap();
    (now + Duration::from_millis(ms)).as_millis() as u64
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_gives_notice_and_its_removal_withdraws_it() {
    let head = FakeHead::start();
    let mut options = head.worker_options();
    let file = head.dir.path().join("notice");
    options.notice_file = Some(file.clone());
    let _worker = Worker::start(options).await.unwrap();
    let mut talk = head.welcome(10).await;
    let deadline_ms = in_ms(3_600_000);
    let new = head.dir.path().join("notice.new");
    std::fs::write(&new, format!(r#"{{"deadline_ms": {deadline_ms}}}"#)).unwrap();
    std::fs::rename(&new, &file).unwrap();
    let expected = WorkerEvent::Notice {
        deadline_ms,
        source: "file".into(),
    };
    assert_eq!(talk.acknowledged_event().await, expected);
    // The leader's echo of it is nothing new.
    talk.order(Order::Notice { deadline_ms }).await;
    std::fs::remove_file(&file).unwrap();
    assert_eq!(
        talk.acknowledged_event().await,
        WorkerEvent::NoticeWithdrawn
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_deadline_of_a_command_the_worker_is_gone() {
    let head = FakeHead::start();
    let mut worker = head.start_worker().await;
    let mut talk = head.welcome(10).await;
    let pid = talk.start_actor(1, 1).await;
    let deadline_ms = in_ms(300);
    talk.order(Order::Notice { deadline_ms }).await;
    let expected = WorkerEvent::Notice {
        deadline_ms,
        source: "command".into(),
    };
    assert_eq!(talk.acknowledged_event().await, expected);
    let exit = tokio::time::timeout(BOUND, worker.wait())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        exit,
        WorkerExit::Preempted {
            source: NoticeSource::Command
        }
    );
    assert!(!is_alive(pid));
    assert_eq!(
        talk.next().await,
        None,
        "a machine that is taken away says nothing"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn after_sigterm_the_worker_leaves_when_its_actors_have() {
    let head = FakeHead::start();
    let mut options = head.worker_options();
    options.sigterm_is_notice = true;
    options.default_grace_ms = 3_600_000;
    let mut worker = Worker::start(options).await.unwrap();
    let mut talk = head.welcome(10).await;
    talk.start_actor(1, 1).await;
    let own = rustix::process::getpid();
    rustix::process::kill_process(own, rustix::process::Signal::TERM).unwrap();
    match talk.acknowledged_event().await {
        WorkerEvent::Notice { source, .. } => assert_eq!(source, "sigterm"),
        other => panic!("expected a notice, got {other:?}"),
    }
    let (actor, incarnation) = (mobula_core::ActorId(1), mobula_core::Incarnation(1));
    talk.order(Order::Stop {
        actor,
        incarnation,
        grace_ms: 1_000,
    })
    .await;
    talk.acknowledged_event().await;
    assert_eq!(talk.next().await, Some(WorkerMessage::Leaving));
    drop(talk);
    let exit = tokio::time::timeout(BOUND, worker.wait())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(exit, WorkerExit::Drained);
}
