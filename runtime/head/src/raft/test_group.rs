//! A group of drivers in one process, over real RocksDBs and a network that loses messages
//! (`test_network`).

use std::collections::{BTreeMap, BTreeSet};
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
use mobula_core::error::Rejection;
use mobula_core::id::SessionId;
use mobula_scheduler::{Command, Response, Scheduler};
use mobula_storage::engine::{RocksEngine, RocksOptions};
use mobula_storage::tables::state_hash;
use mobula_wire::raft::StateClaim;
use raft::prelude::Message;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::chance::Chance;
use super::inputs::{InputSender, input_queue};
use super::membership::{GroupChange, HeadCommand, Member, allocated_id};
use super::proposals::ChangeError;
use super::snapshots::PinnedTables;
use super::test_network::{Network, Wire};
use super::transport::Peers;
use super::{Driver, DriverOptions, EmptyLog, GroupView, ProposeError, RaftHandle};
use crate::dispatcher::effect_queue;

/// Far above what anything here takes on a busy machine.
pub(super) const LIMIT: Duration = Duration::from_secs(40);

pub(super) const COUNTER: ModuleId = ModuleId(200);
pub(super) const TABLE: Table = Table {
    module: COUNTER,
    tag: 1,
};

/// Adds the byte in its payload to a sum, which is its answer; refuses zero after writing.
struct Counter;

pub(super) fn sum(reader: &dyn Reader) -> u64 {
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

/// The peers of a head that has none.
pub(super) struct Alone;

impl Peers for Alone {
    fn send(&mut self, message: Message) {
        panic!("a head without peers sends {message:?}");
    }

    fn send_snapshot(&mut self, message: Message, _: PinnedTables) {
        panic!("a head without peers sends {message:?}");
    }

    fn send_claim(&mut self, _: &StateClaim) {}

    fn set_group(&mut self, _: &GroupView) {}
}

/// Starts a driver with a counter and the scheduler.
pub(super) fn start_driver(
    raft_id: u64,
    dir: &Path,
    empty_log: EmptyLog,
    raft: RaftConfig,
    peers: impl FnOnce(InputSender) -> Box<dyn Peers>,
) -> (Driver, RaftHandle) {
    let engine = RocksEngine::open(dir, &RocksOptions::small()).unwrap();
    let modules: [Arc<dyn StateModule>; 2] = [Arc::new(Counter), Arc::new(Scheduler)];
    let (effects, _dropped) = effect_queue();
    let inputs = input_queue();
    let peers = peers(inputs.0.clone());
    Driver::start(
        engine,
        inputs,
        DriverOptions {
            raft_id,
            empty_log,
            raft,
            modules: modules
                .into_iter()
                .map(|module| (module.id(), module))
                .collect(),
            clock: Arc::new(StepClock(AtomicU64::new(1_000))),
            effects,
            peers,
            chance: Chance::drawn(),
        },
    )
    .unwrap()
}

pub(super) async fn add(
    handle: &RaftHandle,
    session: SessionId,
    seq: u64,
    by: u8,
) -> Result<u64, Rejection> {
    let outcome = handle
        .propose(session, seq, COUNTER, vec![by])
        .await
        .unwrap();
    outcome
        .result
        .map(|bytes| u64::from_be_bytes(bytes.try_into().unwrap()))
}

pub(super) async fn open_session(handle: &RaftHandle) -> SessionId {
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

/// One head of a group.
pub(super) struct TestHead {
    pub(super) raft_id: u64,
    pub(super) handle: RaftHandle,
    dir: Arc<tempfile::TempDir>,
    driver: Driver,
}

/// Heads, by Raft id, and what is between them.
pub(super) struct TestGroup {
    pub(super) heads: BTreeMap<u64, TestHead>,
    pub(super) network: Network,
    pub(super) raft: RaftConfig,
    stopped: BTreeMap<u64, Arc<tempfile::TempDir>>,
}

impl TestGroup {
    /// A group of one.
    pub(super) async fn new(raft: RaftConfig) -> Self {
        let mut group = TestGroup {
            heads: BTreeMap::new(),
            network: Network::default(),
            raft,
            stopped: BTreeMap::new(),
        };
        let dir = Arc::new(tempfile::tempdir().unwrap());
        group.start(1, dir, EmptyLog::BecomesGroup);
        group.leader().await;
        group
    }

    /// A group of `count` voters.
    pub(super) async fn of(count: usize, raft: RaftConfig) -> Self {
        let mut group = TestGroup::new(raft).await;
        while group.heads.len() < count {
            let raft_id = group.add_learner().await;
            group.promote(raft_id).await;
        }
        group
    }

    fn start(&mut self, raft_id: u64, dir: Arc<tempfile::TempDir>, empty_log: EmptyLog) {
        let network = self.network.clone();
        let (driver, handle) =
            start_driver(raft_id, dir.path(), empty_log, self.raft.clone(), |inbox| {
                network.lock().inboxes.insert(raft_id, inbox.clone());
                Box::new(Wire {
                    from: raft_id,
                    network: network.clone(),
                    inbox,
                })
            });
        let head = TestHead {
            raft_id,
            handle,
            dir,
            driver,
        };
        self.heads.insert(raft_id, head);
    }

    /// A new head with an id that the group gives out, which follows. It may still be behind.
    pub(super) async fn add_learner(&mut self) -> u64 {
        let raft_id = self.allocate().await;
        let dir = Arc::new(tempfile::tempdir().unwrap());
        self.start(raft_id, dir, EmptyLog::Waits);
        self.change(GroupChange::AddLearner(member(raft_id)))
            .await
            .unwrap();
        raft_id
    }

    pub(super) async fn allocate(&self) -> u64 {
        let outcome = self
            .leader()
            .await
            .handle
            .propose(
                SessionId::INTERNAL,
                0,
                ModuleId::HEADS,
                HeadCommand::Allocate.encode(),
            )
            .await
            .unwrap();
        allocated_id(&outcome.result.unwrap()).unwrap()
    }

    pub(super) async fn change(&self, change: GroupChange) -> Result<(), ChangeError> {
        self.leader().await.handle.change_group(change).await
    }

    /// Promotes a learner once the leader finds it close enough.
    pub(super) async fn promote(&self, raft_id: u64) {
        eventually("a promotion", || async {
            self.change(GroupChange::Promote(raft_id)).await.is_ok()
        })
        .await;
    }

    /// The head that leads.
    pub(super) async fn leader(&self) -> &TestHead {
        let found = async {
            loop {
                let leads = |head: &&TestHead| head.handle.leadership().borrow().is_leader;
                let is_cut = |head: &&TestHead| self.network.lock().cut.contains(&head.raft_id);
                if let Some(head) = self.heads.values().find(|h| leads(h) && !is_cut(h)) {
                    return head;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(LIMIT, found)
            .await
            .expect("a head leads")
    }

    /// Adds to the counter until a leader acknowledges it; the same stamp each time.
    pub(super) async fn add(&self, session: SessionId, seq: u64, by: u8) -> u64 {
        let adding = async {
            loop {
                let leader = &self.leader().await.handle;
                match leader.propose(session, seq, COUNTER, vec![by]).await {
                    Ok(outcome) => {
                        let sum = outcome.result.unwrap();
                        return u64::from_be_bytes(sum.try_into().unwrap());
                    }
                    Err(ProposeError::Stopped) => panic!("the leader's driver has ended"),
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        };
        tokio::time::timeout(LIMIT, adding)
            .await
            .expect("an acknowledgement")
    }

    /// Ends a head as the end of its process would.
    pub(super) async fn stop(&mut self, raft_id: u64) {
        let head = self.heads.remove(&raft_id).unwrap();
        self.network.lock().inboxes.remove(&raft_id);
        head.driver.stop().await;
        self.stopped.insert(raft_id, head.dir);
    }

    /// Starts a stopped head on the disk that it left.
    pub(super) fn restart(&mut self, raft_id: u64) {
        let dir = self.stopped.remove(&raft_id).unwrap();
        self.start(raft_id, dir, EmptyLog::Waits);
    }

    pub(super) fn cut(&self, raft_id: u64) {
        self.network.lock().cut.insert(raft_id);
    }

    pub(super) fn heal(&self) {
        self.network.lock().cut.clear();
    }

    /// From now on, loses `loss` of a thousand messages.
    pub(super) fn lose(&self, loss: u32, seed: u64) {
        let mut weather = self.network.lock();
        weather.loss = loss;
        weather.rng = Some(StdRng::seed_from_u64(seed));
    }

    pub(super) fn lose_snapshots(&self, count: u32) {
        self.network.lock().lost_snapshots = count;
    }

    pub(super) fn delay_reports(&self, delay: Duration) {
        self.network.lock().report_delay = delay;
    }

    pub(super) fn damage_snapshots(&self, count: u32) {
        self.network.lock().damaged_snapshots = count;
    }

    /// Waits until all heads have applied the same, and checks that they hold the same (I12).
    pub(super) async fn converge(mut self) {
        let leader = self.leader().await;
        let index = leader.handle.read_index_of_own().await;
        for head in self.heads.values() {
            eventually("all heads to apply the same", || async {
                head.handle.read_index_of_own().await >= index
            })
            .await;
        }
        // Whoever is stopped last must not elect a leader meanwhile, whose first entry is one more.
        for raft_id in self.heads.keys() {
            self.cut(*raft_id);
        }
        let mut hashes = BTreeMap::new();
        while let Some((raft_id, head)) = self.heads.pop_first() {
            let dir = head.dir.clone();
            head.driver.stop().await;
            drop(head.handle);
            let engine = RocksEngine::open(dir.path(), &RocksOptions::small()).unwrap();
            hashes.insert(raft_id, state_hash(&engine).unwrap());
        }
        let distinct: BTreeSet<_> = hashes.values().map(|hash| *hash.as_bytes()).collect();
        assert_eq!(distinct.len(), 1, "{hashes:?}");
    }
}

impl RaftHandle {
    /// The last index that this head itself has applied.
    async fn read_index_of_own(&self) -> u64 {
        // The loop publishes its indexes with each turn; a question is a turn.
        let _ = self.progress().await;
        tokio::time::sleep(Duration::from_millis(30)).await;
        self.leadership().borrow().applied_index
    }
}

pub(super) fn member(raft_id: u64) -> Member {
    Member {
        raft_id,
        name: format!("head-{raft_id}"),
        api_address: format!("127.0.0.1:{}", 7000 + raft_id % 1000),
        cluster_address: format!("127.0.0.1:{}", 8000 + raft_id % 1000),
    }
}

/// Looks until it is so.
pub(super) async fn eventually<Fut: Future<Output = bool>>(what: &str, look: impl Fn() -> Fut) {
    let looking = async {
        while !look().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    if tokio::time::timeout(LIMIT, looking).await.is_err() {
        panic!("{what}: not within {} s", LIMIT.as_secs());
    }
}
