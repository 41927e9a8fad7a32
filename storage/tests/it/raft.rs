//! A real `RawNode` on the log: what raft itself asserts about its storage holds, over restarts,
//! power cuts, compaction and a snapshot to a newcomer.

use mobula_core::control::{ModuleId, Reader, Table, Txn};
use mobula_storage::engine::{Durability, Engine, MemoryEngine, RocksEngine, RocksOptions};
use mobula_storage::raft_log::{LogPoint, RaftLog, decode_raft, encode_raft};
use mobula_storage::snapshot::SnapshotInstall;
use mobula_storage::tables::{ApplyBatch, TablesReader, state_hash};
use raft::eraftpb::{ConfChange, ConfChangeType, EntryType, Message, MessageType, Snapshot};
use raft::{Config, RawNode};

const TABLE: Table = Table {
    module: ModuleId::SCHEDULER,
    tag: 1,
};

/// The head's loop in small: each committed entry's data becomes a row's key.
struct Node<E: Engine + Clone> {
    log: RaftLog<E>,
    raw: RawNode<RaftLog<E>>,
    sent: Vec<Message>,
}

impl<E: Engine + Clone> Node<E> {
    fn start(id: u64, engine: E) -> Self {
        let log = RaftLog::open(engine).unwrap();
        let config = Config {
            id,
            applied: log.applied().index,
            ..Config::default()
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let raw = RawNode::new(&config, log.clone(), &logger).unwrap();
        Node {
            log,
            raw,
            sent: Vec::new(),
        }
    }

    fn run(&mut self) {
        while self.raw.has_ready() {
            let mut ready = self.raw.ready();
            self.sent.append(&mut ready.take_messages());
            let mut write = self.log.begin();
            write.append(ready.entries()).unwrap();
            if let Some(hard_state) = ready.hs() {
                write.set_hard_state(hard_state);
            }
            assert!(
                ready.snapshot().is_empty(),
                "these tests install snapshots by themselves"
            );
            self.log.commit(write, Durability::Synced).unwrap();
            self.sent.append(&mut ready.take_persisted_messages());
            self.apply(ready.take_committed_entries());
            let mut light = self.raw.advance(ready);
            self.sent.append(&mut light.take_messages());
            self.apply(light.take_committed_entries());
            self.raw.advance_apply();
        }
    }

    fn apply(&mut self, entries: Vec<raft::eraftpb::Entry>) {
        let Some(last) = entries.last() else { return };
        let applied = LogPoint {
            index: last.index,
            term: last.term,
        };
        let mut write = self.log.begin();
        let mut batch = ApplyBatch::new(self.log.engine());
        for entry in &entries {
            if entry.entry_type == EntryType::EntryConfChange as i32 {
                let change: ConfChange = decode_raft(&entry.data).unwrap();
                write.set_conf_state(&self.raw.apply_conf_change(&change).unwrap());
            } else if !entry.data.is_empty() {
                let mut txn = batch.begin();
                let count = txn.get(TABLE, &entry.data).map_or(0, |count| count[0]);
                txn.put(TABLE, &entry.data, vec![count + 1]);
                txn.commit();
            }
        }
        batch.write_into(write.batch_mut());
        write.set_applied(applied);
        self.log.commit(write, Durability::Buffered).unwrap();
    }

    fn lead(&mut self) {
        self.raw.campaign().unwrap();
        self.run();
        assert_eq!(self.raw.raft.state, raft::StateRole::Leader);
    }

    fn propose(&mut self, key: &str) {
        self.raw.propose(vec![], key.into()).unwrap();
        self.run();
    }

    fn rows(&self) -> Vec<(String, u8)> {
        let rows = TablesReader::new(self.log.engine().snapshot()).scan(TABLE, b"", None, 999);
        rows.into_iter()
            .map(|(key, value)| (String::from_utf8(key).unwrap(), value[0]))
            .collect()
    }
}

fn born<E: Engine + Clone>(engine: E) -> Node<E> {
    RaftLog::open(engine.clone())
        .unwrap()
        .bootstrap(&[1])
        .unwrap();
    Node::start(1, engine)
}

#[test]
fn a_single_node_survives_restarts_on_disk() {
    let dir = tempfile::tempdir().unwrap();
    let open = || RocksEngine::open(dir.path(), &RocksOptions::small()).unwrap();
    let mut node = born(open());
    node.lead();
    node.propose("a");
    node.propose("b");
    for round in 1..=3 {
        drop(node);
        node = Node::start(1, open());
        node.lead();
        node.propose(&format!("round-{round}"));
    }
    let expected = ["a", "b", "round-1", "round-2", "round-3"].map(|key| (key.to_owned(), 1));
    assert_eq!(node.rows(), expected, "every proposal was applied once");
}

#[test]
fn after_a_power_cut_every_committed_entry_is_applied_once() {
    for kept in 0..6 {
        let engine = MemoryEngine::new();
        let mut node = born(engine.clone());
        node.lead();
        for number in 0..10 {
            node.propose(&format!("{number}"));
        }
        drop(node);
        engine.crash_keeping(kept);
        let mut node = Node::start(1, engine);
        node.lead();
        let expected: Vec<_> = (0..10).map(|number| (number.to_string(), 1)).collect();
        assert_eq!(node.rows(), expected, "kept {kept}");
    }
}

#[test]
fn a_newcomer_needs_the_snapshot_and_then_follows_the_compacted_log() {
    let mut leader = born(MemoryEngine::new());
    leader.lead();
    leader.propose("before");
    let mut change = ConfChange::default();
    change.set_change_type(ConfChangeType::AddLearnerNode);
    change.node_id = 2;
    leader.raw.propose_conf_change(vec![], change).unwrap();
    leader.run();
    let mut write = leader.log.begin();
    leader
        .log
        .compact_to(&mut write, leader.log.applied().index)
        .unwrap();
    leader.log.commit(write, Durability::Synced).unwrap();
    assert_eq!(leader.log.conf_state().learners, [2]);

    // The newcomer's empty log rejects the append; raft then asks its storage for a snapshot.
    let is_append = |message: &&Message| message.get_msg_type() == MessageType::MsgAppend;
    let append = leader
        .sent
        .iter()
        .find(is_append)
        .expect("the newcomer is probed");
    let mut answer = Message {
        to: 1,
        from: 2,
        term: append.term,
        ..Message::default()
    };
    answer.set_msg_type(MessageType::MsgAppendResponse);
    answer.reject = true;
    answer.index = append.index;
    leader.raw.step(answer).unwrap();
    leader.run();
    let request = leader
        .log
        .take_snapshot_request()
        .expect("there is no snapshot yet");
    assert_eq!(request.follower, 2);

    let mut bytes = Vec::new();
    leader.log.export().write_to(&mut bytes).unwrap();
    let mut snapshot = Snapshot::default();
    snapshot.mut_metadata().index = leader.log.applied().index;
    snapshot.mut_metadata().term = leader.log.applied().term;
    *snapshot.mut_metadata().mut_conf_state() = leader.log.conf_state();
    leader.log.set_prepared_snapshot(snapshot.clone());
    leader.sent.clear();
    let mut alive = Message {
        to: 1,
        from: 2,
        term: leader.raw.raft.term,
        ..Message::default()
    };
    alive.set_msg_type(MessageType::MsgHeartbeatResponse);
    leader.raw.step(alive).unwrap();
    leader.run();
    let sent = leader
        .sent
        .iter()
        .find(|message| message.msg_type == MessageType::MsgSnapshot as i32);
    let sent: Message = decode_raft(&encode_raft(sent.expect("the snapshot is sent"))).unwrap();
    assert_eq!(sent.get_snapshot(), &snapshot);

    let engine = MemoryEngine::new();
    let log = RaftLog::open(engine.clone()).unwrap();
    let mut install = SnapshotInstall::new(1 << 20);
    install.read_from(&mut bytes.as_slice()).unwrap();
    install.install(&log).unwrap();
    let newcomer = Node::start(2, engine.clone());
    assert_eq!(newcomer.rows(), [("before".to_owned(), 1)]);
    assert_eq!(newcomer.log.conf_state().learners, [2]);
    assert_eq!(
        state_hash(&engine).unwrap(),
        state_hash(leader.log.engine()).unwrap(),
        "equal applied index means equal state"
    );
}
