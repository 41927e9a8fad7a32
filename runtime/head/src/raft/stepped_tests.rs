//! Heads that are driven by hand, one message at a time: orders of events that a network brings about
//! once in a thousand runs.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use mobula_core::clock::Clock;
use mobula_core::config::RaftConfig;
use mobula_core::control::{ModuleId, StateModule};
use mobula_core::id::SessionId;
use mobula_scheduler::{Command, Scheduler};
use mobula_storage::engine::{Column, Durability, Engine, MemoryEngine, Read, WriteBatch};
use mobula_wire::raft::StateClaim;
use parking_lot::Mutex;
use raft::prelude::{Entry, Message, MessageType};
use tokio::sync::oneshot::Receiver;

use super::proposals::ChangeError;
use super::test_group::member;
use crate::simulation::{Change, CoreFault, CoreOptions, HeadCore, Wire};

mod conflicts;

struct Stopped;

impl Clock for Stopped {
    fn now_ms(&self) -> u64 {
        1_000
    }
}

type Frames = Vec<Vec<u8>>;

#[derive(Clone, Default)]
struct Post {
    messages: Arc<Mutex<VecDeque<Message>>>,
    snapshots: Arc<Mutex<VecDeque<(Message, Frames)>>>,
}

impl Wire for Post {
    fn send(&mut self, message: Message) {
        self.messages.lock().push_back(message);
    }

    fn send_claim(&mut self, _: &StateClaim) {}

    fn send_snapshot(&mut self, message: Message, frames: Frames) {
        self.snapshots.lock().push_back((message, frames));
    }
}

/// Heads and the post between them, which somebody must carry.
struct Stepped {
    heads: BTreeMap<u64, HeadCore>,
    disks: BTreeMap<u64, MemoryEngine>,
    post: Post,
    now: Instant,
}

impl Stepped {
    /// A group of heads 1 to `count`, led by 1.
    fn of(count: u64) -> Self {
        let mut group = Stepped {
            heads: BTreeMap::new(),
            disks: BTreeMap::new(),
            post: Post::default(),
            now: Instant::now(),
        };
        for raft_id in 1..=count {
            group.start(raft_id, false);
            group.carry(|_| true);
            if raft_id > 1 {
                group.change(1, Change::AddLearner(member(raft_id)));
                group.ticks(1, 3);
                group.change(1, Change::Promote(raft_id));
                group.ticks(1, 3);
            }
        }
        let voters: Vec<u64> = (1..=count).collect();
        assert_eq!(group.heads[&1].group().voters, voters);
        assert!(group.heads[&1].status().leads);
        group
    }

    /// Starts a head on its disk, which is a new one the first time.
    fn start(&mut self, raft_id: u64, had_log: bool) {
        self.try_start(raft_id, had_log).unwrap();
    }

    /// Starts a head; the error is what its process would end with.
    fn try_start(&mut self, raft_id: u64, had_log: bool) -> Result<(), String> {
        let modules: Vec<Arc<dyn StateModule>> = vec![Arc::new(Scheduler)];
        let options = CoreOptions {
            raft_id,
            founds_group: raft_id == 1,
            had_log,
            raft: RaftConfig::default(),
            clock: Arc::new(Stopped),
            modules,
            seed: 1,
            life: raft_id + 100 * u64::from(had_log),
        };
        let disk = self.disks.entry(raft_id).or_default();
        let post = Box::new(self.post.clone());
        let core = HeadCore::start(disk.clone(), options, post, self.now)?;
        self.heads.insert(raft_id, core);
        Ok(())
    }

    /// Lets head 1, which leads, put `count` commands into the log, and carries nothing.
    fn propose(&mut self, count: usize) {
        let now = self.now;
        let leader = self.heads.get_mut(&1).unwrap();
        for _ in 0..count {
            let command = Command::OpenSession {
                client: "test".into(),
            };
            // Whether it is applied shows in what is committed.
            let _answer = leader
                .propose(
                    SessionId::INTERNAL,
                    0,
                    ModuleId::SCHEDULER,
                    command.encode(),
                    now,
                )
                .unwrap();
        }
        leader.settle().unwrap();
    }

    fn committed(&self, head: u64) -> u64 {
        self.heads[&head].status().committed
    }

    /// Asks for a change and carries everything that follows.
    fn change(&mut self, head: u64, change: Change) -> Receiver<Result<(), ChangeError>> {
        let answer = self.ask(head, change);
        self.carry(|_| true);
        answer
    }

    /// Asks for a change, and carries nothing.
    fn ask(&mut self, head: u64, change: Change) -> Receiver<Result<(), ChangeError>> {
        let now = self.now;
        let head = self.heads.get_mut(&head).unwrap();
        let answer = head.change(change, now).unwrap();
        head.settle().unwrap();
        answer
    }

    /// Lets time pass for one head, and carries everything that follows.
    fn ticks(&mut self, head: u64, count: usize) {
        for _ in 0..count {
            let head = self.heads.get_mut(&head).unwrap();
            head.tick();
            head.settle().unwrap();
            self.carry(|_| true);
        }
    }

    /// Lets time pass for the leader; `deprived` hears that there is one, and gets no entries.
    fn ticks_without_appends_to(&mut self, deprived: u64, count: usize) {
        for _ in 0..count {
            let leader = self.heads.get_mut(&1).unwrap();
            leader.tick();
            leader.settle().unwrap();
            let is_beat = |message: &Message| message.get_msg_type() == MessageType::MsgHeartbeat;
            self.carry(|message| message.to != deprived || is_beat(message));
        }
    }

    /// Lets time pass for head 1, which leads, until `head` ends over what it hears; with what.
    fn ticks_until_end_of(&mut self, head: u64) -> Option<CoreFault> {
        for _ in 0..RaftConfig::default().election_ticks {
            let leader = self.heads.get_mut(&1).unwrap();
            leader.tick();
            leader.settle().unwrap();
            loop {
                let Some(message) = self.post.messages.lock().pop_front() else {
                    break;
                };
                let to = message.to;
                let Some(target) = self.heads.get_mut(&to) else {
                    continue;
                };
                match target.step(message, self.now) {
                    Ok(()) => target.settle().unwrap(),
                    Err(fault) => {
                        assert_eq!(to, head, "{fault}");
                        self.heads.remove(&to);
                        return Some(fault);
                    }
                }
            }
        }
        None
    }

    /// Carries one message.
    fn carry_one(&mut self) {
        let message = self.post.messages.lock().pop_front();
        let Some(message) = message else { return };
        if let Some(head) = self.heads.get_mut(&message.to) {
            head.step(message, self.now).unwrap();
            head.settle().unwrap();
        }
    }

    /// Carries messages, and what they lead to, as long as there are any; those that `passes` does
    /// not want, or that are for nobody, are lost.
    fn carry(&mut self, passes: impl Fn(&Message) -> bool) {
        loop {
            let message = self.post.messages.lock().pop_front();
            if let Some(message) = message {
                if let (true, Some(head)) = (passes(&message), self.heads.get_mut(&message.to)) {
                    head.step(message, self.now).unwrap();
                    head.settle().unwrap();
                }
                continue;
            }
            let snapshot = self.post.snapshots.lock().pop_front();
            let Some((message, frames)) = snapshot else {
                return;
            };
            let (from, to) = (message.from, message.to);
            let target = self.heads.get_mut(&to).unwrap();
            let arrived = target.snapshot_arrived(message, &frames, self.now).unwrap();
            target.settle().unwrap();
            let source = self.heads.get_mut(&from).unwrap();
            source.snapshot_sent(to, arrived, self.now).unwrap();
            source.settle().unwrap();
        }
    }
}

/// What `disk` holds now, on another one.
fn copy_of(disk: &MemoryEngine) -> MemoryEngine {
    let mut batch = WriteBatch::new();
    for column in Column::ALL {
        for (key, value) in disk.scan(column, b"", b"", usize::MAX).unwrap() {
            batch.put(column, key, value);
        }
    }
    let copy = MemoryEngine::new();
    copy.write(batch, Durability::Synced).unwrap();
    copy
}

#[test]
fn a_head_on_an_older_copy_of_its_disk_ends_before_it_panics_and_stays_down() {
    let mut group = Stepped::of(3);
    let older = copy_of(&group.disks[&2]);
    let held = group.heads[&2].log().last().index;
    group.propose(3);
    group.carry(|_| true);
    let acknowledged = group.heads[&2].log().last().index;
    assert!(acknowledged >= held + 3, "{held} and {acknowledged}");

    group.heads.remove(&2);
    group.disks.insert(2, older);
    group.start(2, true);
    let fault = group.ticks_until_end_of(2).expect("an end of head 2");
    assert!(fault.is_divergence(), "{fault}");
    let what = format!(
        "its log ends at entry {held}, and it has acknowledged entry {acknowledged} to head 1"
    );
    assert_eq!(fault.to_string(), what);

    // Another leader would know of no acknowledgement, so it must not come so far.
    let refused = group.try_start(2, true).unwrap_err();
    assert!(refused.contains(&what), "{refused}");
    assert!(refused.contains("`mobula head remove 2`"), "{refused}");
    // The others are a majority.
    group.propose(1);
    group.ticks(1, 3);
    assert!(group.committed(3) > acknowledged);
}

#[test]
fn a_head_that_is_behind_restarts_or_has_just_joined_lacks_nothing_that_it_acknowledged() {
    let mut group = Stepped::of(3);
    let ticks = RaftConfig::default().election_ticks / 2;
    // Head 3 hears that there is a leader, and gets no entries; then only later ones, of which each says
    // how much is committed.
    group.propose(5);
    group.ticks_without_appends_to(3, ticks);
    let lacked = group.committed(1);
    assert!(group.committed(3) < lacked && group.committed(2) == lacked);
    group.propose(1);
    group.ticks(1, 1);
    // Neither does one that was away meanwhile, nor one that knows of nothing at all.
    group.heads.remove(&2);
    group.propose(5);
    group.ticks(1, 3);
    group.start(2, true);
    group.start(4, false);
    let _added = group.ask(1, Change::AddLearner(member(4)));
    group.ticks_without_appends_to(4, ticks);
    assert_eq!(group.committed(4), 0);
    group.ticks(1, 2 * ticks);
    for head in 2..=4 {
        assert_eq!(group.committed(head), group.committed(1), "head {head}");
    }
}

#[test]
fn a_heartbeat_of_an_earlier_term_says_nothing_about_this_log() {
    let mut group = Stepped::of(2);
    let now = group.now;
    let follower = group.heads.get_mut(&2).unwrap();
    let mut message = Message {
        from: 1,
        to: 2,
        term: follower.status().term - 1,
        commit: 1_000_000,
        ..Message::default()
    };
    message.set_msg_type(MessageType::MsgHeartbeat);
    follower.step(message, now).unwrap();
    follower.settle().unwrap();
}

#[test]
fn a_leader_that_was_elected_with_its_own_removal_in_the_log_steps_down() {
    let mut group = Stepped::of(3);
    let now = group.now;
    let leader = group.heads.get_mut(&1).unwrap();
    let _answer = leader.change(Change::Remove(2), now).unwrap();
    leader.settle().unwrap();
    // The others have the entry, and the leader never hears that they do.
    group.carry(|message| message.to != 1);
    group.heads.remove(&1);
    // So long that head 3 gives up on its leader, and not so long that it stands itself.
    group.ticks(3, RaftConfig::default().election_ticks);
    group.ticks(2, 40);
    let two = &group.heads[&2];
    assert_eq!(two.group().voters, [1, 3], "its own removal is applied");
    assert!(!two.status().leads, "{:?}", two.status());
}

#[test]
fn a_head_that_does_not_lead_passes_nobodys_questions_on() {
    let mut group = Stepped::of(3);
    let now = group.now;
    for kind in [MessageType::MsgReadIndex, MessageType::MsgPropose] {
        let mut message = Message {
            from: 3,
            to: 2,
            entries: vec![Entry {
                data: vec![7; 24],
                ..Entry::default()
            }],
            ..Message::default()
        };
        message.set_msg_type(kind);
        let follower = group.heads.get_mut(&2).unwrap();
        follower.step(message, now).unwrap();
        follower.settle().unwrap();
        let sent = std::mem::take(&mut *group.post.messages.lock());
        assert!(sent.is_empty(), "{kind:?} led to {sent:?}");
    }
}

#[test]
fn a_change_that_is_answered_is_known_to_a_majority_after_a_crash_of_everybody() {
    let mut group = Stepped::of(2);
    group.start(3, false);
    group.change(1, Change::AddLearner(member(3)));
    group.ticks(1, 3);
    // The new head hears of its promotion only by the next heartbeat; what counts is what is known when the
    // answer comes.
    let mut answer = group.ask(1, Change::Promote(3));
    let mut is_answered = false;
    for _ in 0..20 {
        group.carry_one();
        is_answered = answer.try_recv().is_ok_and(|made| made.is_ok());
        if is_answered {
            break;
        }
        if group.post.messages.lock().is_empty() {
            let leader = group.heads.get_mut(&1).unwrap();
            leader.tick();
            leader.settle().unwrap();
        }
    }
    assert!(is_answered);
    group.heads.clear();
    let mut knowing = Vec::new();
    for raft_id in 1..=3 {
        group.disks[&raft_id].crash_keeping(0);
        group.start(raft_id, true);
        group.heads.get_mut(&raft_id).unwrap().settle().unwrap();
        if group.heads[&raft_id].group().voters == [1, 2, 3] {
            knowing.push(raft_id);
        }
    }
    assert!(knowing.len() >= 2, "only {knowing:?} know three voters");
}

#[test]
fn a_learner_whose_snapshot_did_not_arrive_is_not_promoted_in_a_young_group() {
    let mut group = Stepped::of(2);
    group.start(3, false);
    let _added = group.ask(1, Change::AddLearner(member(3)));
    group.ticks_without_appends_to(3, 6);
    let mut answer = group.ask(1, Change::Promote(3));
    let refused = answer.try_recv().unwrap().unwrap_err().to_string();
    assert!(
        refused.contains("has not caught up: it holds entry 0"),
        "{refused}"
    );
}
