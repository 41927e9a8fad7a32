//! The driver over a real RocksDB: what is acknowledged survives, once, and the log stays short.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mobula_core::clock::Clock;
use mobula_core::codec;
use mobula_core::config::RaftConfig;
use mobula_core::control::{
    Applied, ApplyContext, Caller, ModuleId, Reader, StateModule, Table, Txn,
};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::SessionId;
use mobula_scheduler::{Command, Response, Scheduler};
use mobula_storage::engine::{RocksEngine, RocksOptions};

use super::{Driver, DriverOptions, RaftHandle};
use crate::dispatcher::effect_queue;

const COUNTER: ModuleId = ModuleId(200);
const TABLE: Table = Table {
    module: COUNTER,
    tag: 1,
};

/// Adds the byte in its payload to a sum, which is its answer; refuses zero after writing.
struct Counter;

fn sum(reader: &dyn Reader) -> u64 {
    reader
        .get(TABLE, b"sum")
        .map_or(0, |bytes| u64::from_be_bytes(bytes.try_into().unwrap()))
}

impl StateModule for Counter {
    fn id(&self) -> ModuleId {
        COUNTER
    }

    fn name(&self) -> &'static str {
        "counter"
    }

    fn apply(
        &self,
        _context: &ApplyContext,
        txn: &mut dyn Txn,
        payload: &[u8],
    ) -> Result<Applied, Rejection> {
        let next = sum(txn) + u64::from(payload[0]);
        txn.put(TABLE, b"sum", next.to_be_bytes().to_vec());
        txn.put(TABLE, b"touched", vec![1]);
        if payload[0] == 0 {
            txn.put(TABLE, b"refused", vec![1]);
            return Err(Rejection::invalid("zero adds nothing"));
        }
        Ok(Applied {
            response: next.to_be_bytes().to_vec(),
            effects: Vec::new(),
        })
    }

    fn query(&self, reader: &dyn Reader, _: u64, _: &[u8]) -> Result<Vec<u8>, Rejection> {
        Ok(codec::encode_plain(&sum(reader)))
    }

    fn authorize(&self, _: &Caller, _: &[u8]) -> Result<(), Rejection> {
        Ok(())
    }
}

/// A clock that goes forward by one each time, and back when told to.
struct StepClock(AtomicU64);

impl Clock for StepClock {
    fn now_ms(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

async fn start(dir: &Path, raft: RaftConfig) -> (Driver, RaftHandle) {
    let engine = RocksEngine::open(dir, &RocksOptions::small()).unwrap();
    let modules: [Arc<dyn StateModule>; 2] = [Arc::new(Counter), Arc::new(Scheduler)];
    let (effects, _dropped) = effect_queue();
    let (driver, handle) = Driver::start(
        engine,
        DriverOptions {
            raft_id: 1,
            raft,
            modules: modules
                .into_iter()
                .map(|module| (module.id(), module))
                .collect(),
            clock: Arc::new(StepClock(AtomicU64::new(1_000))),
            effects,
        },
    )
    .unwrap();
    let mut leadership = handle.leadership();
    let elected = leadership.wait_for(|l| l.is_leader);
    tokio::time::timeout(Duration::from_secs(20), elected)
        .await
        .unwrap()
        .unwrap();
    (driver, handle)
}

async fn add(handle: &RaftHandle, session: SessionId, seq: u64, by: u8) -> Result<u64, Rejection> {
    let outcome = handle
        .propose(session, seq, COUNTER, vec![by])
        .await
        .unwrap();
    outcome
        .result
        .map(|bytes| u64::from_be_bytes(bytes.try_into().unwrap()))
}

async fn open_session(handle: &RaftHandle) -> SessionId {
    let command = Command::OpenSession {
        client: "test".into(),
    };
    let outcome = handle
        .propose(
            SessionId::INTERNAL,
            0,
            ModuleId::SCHEDULER,
            command.encode(),
        )
        .await
        .unwrap();
    match Response::decode(&outcome.result.unwrap()).unwrap() {
        Response::SessionOpened { session } => session,
        other => panic!("{other:?}"),
    }
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
