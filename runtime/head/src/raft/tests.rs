//! The driver alone over a real RocksDB: what is acknowledged survives, once, and the log stays
//! short.

use std::path::Path;
use std::time::Duration;

use mobula_core::config::RaftConfig;
use mobula_core::control::{ModuleId, Reader};
use mobula_core::error::ErrorCode;
use mobula_core::id::SessionId;

use super::test_group::{Alone, TABLE, add, open_session, start_driver, sum};
use super::{Driver, EmptyLog, ProposeError, RaftHandle};

async fn start(dir: &Path, raft: RaftConfig) -> (Driver, RaftHandle) {
    let (driver, handle) = start_driver(1, dir, EmptyLog::BecomesGroup, raft, |_| Box::new(Alone));
    let mut leadership = handle.leadership();
    let elected = leadership.wait_for(|l| l.is_leader);
    tokio::time::timeout(Duration::from_secs(20), elected)
        .await
        .unwrap()
        .unwrap();
    (driver, handle)
}

#[tokio::test]
async fn acknowledged_commands_survive_a_restart_and_retries_count_once() {
    let dir = tempfile::tempdir().unwrap();
    let (driver, handle) = start(dir.path(), RaftConfig::default()).await;
    let session = open_session(&handle).await;
    assert_eq!(add(&handle, session, 1, 5).await, Ok(5));
    assert_eq!(
        add(&handle, session, 1, 5).await,
        Ok(5),
        "a retry is not a second time"
    );
    driver.stop().await;
    drop(handle);

    let (driver, handle) = start(dir.path(), RaftConfig::default()).await;
    assert_eq!(
        add(&handle, session, 1, 5).await,
        Ok(5),
        "nor is one after a restart"
    );
    assert_eq!(add(&handle, session, 2, 2).await, Ok(7));
    assert_eq!(sum(&handle.read().await.unwrap()), 7);
    driver.stop().await;
}

#[tokio::test]
async fn a_refused_command_leaves_nothing_and_its_retry_is_refused_alike() {
    let dir = tempfile::tempdir().unwrap();
    let (driver, handle) = start(dir.path(), RaftConfig::default()).await;
    let session = open_session(&handle).await;
    let first = add(&handle, session, 1, 0).await.unwrap_err();
    assert_eq!(first.code, ErrorCode::InvalidArgument);
    assert_eq!(add(&handle, session, 1, 0).await.unwrap_err(), first);
    let reader = handle.read().await.unwrap();
    assert_eq!(reader.get(TABLE, b"refused"), None);
    assert_eq!(reader.get(TABLE, b"touched"), None);
    driver.stop().await;
}

#[tokio::test]
async fn concurrent_commands_all_count_and_a_read_sees_what_was_acknowledged() {
    let dir = tempfile::tempdir().unwrap();
    let (driver, handle) = start(dir.path(), RaftConfig::default()).await;
    let commands = (0..200).map(|_| add(&handle, SessionId::INTERNAL, 0, 1));
    let mut sums: Vec<u64> = futures::future::join_all(commands)
        .await
        .into_iter()
        .map(Result::unwrap)
        .collect();
    sums.sort_unstable();
    assert_eq!(sums, (1..=200).collect::<Vec<u64>>());
    assert_eq!(sum(&handle.read().await.unwrap()), 200);
    driver.stop().await;
}

#[tokio::test]
async fn the_log_is_compacted_and_the_state_stays() {
    let dir = tempfile::tempdir().unwrap();
    let raft = RaftConfig {
        compact_entries: 50,
        keep_entries: 20,
        ..RaftConfig::default()
    };
    let (driver, handle) = start(dir.path(), raft.clone()).await;
    for _ in 0..200 {
        add(&handle, SessionId::INTERNAL, 0, 1).await.unwrap();
    }
    driver.stop().await;
    drop(handle);

    let (driver, handle) = start(dir.path(), raft).await;
    let first = handle.leadership().borrow().first_log_index;
    assert!(first > 100, "the log still begins at {first}");
    assert_eq!(add(&handle, SessionId::INTERNAL, 0, 1).await, Ok(201));
    driver.stop().await;
}

#[tokio::test]
async fn an_unknown_module_is_an_answer_and_not_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let (driver, handle) = start(dir.path(), RaftConfig::default()).await;
    let outcome = handle
        .propose(SessionId::INTERNAL, 0, ModuleId(99), vec![])
        .await
        .unwrap();
    assert_eq!(outcome.result.unwrap_err().code, ErrorCode::NotFound);
    driver.stop().await;
}

#[tokio::test]
async fn a_command_that_no_frame_could_carry_is_refused_before_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let (driver, handle) = start(dir.path(), RaftConfig::default()).await;
    let refused = handle
        .propose(SessionId::INTERNAL, 0, ModuleId(99), vec![0; 8 << 20])
        .await
        .unwrap_err();
    assert!(
        matches!(refused, ProposeError::TooLarge { .. }),
        "{refused}"
    );
    assert_eq!(add(&handle, SessionId::INTERNAL, 0, 1).await, Ok(1));
    driver.stop().await;
}
