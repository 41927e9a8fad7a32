//! Heads that are driven by hand, one message at a time: orders of events that a network brings about
//! once in a thousand runs.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use mobula_core::clock::Clock;
use mobula_core::config::RaftConfig;
use mobula_core::control::StateModule;
use mobula_scheduler::Scheduler;
use mobula_storage::engine::MemoryEngine;
use mobula_wire::raft::StateClaim;
use parking_lot::Mutex;
use raft::prelude::{Entry, Message, MessageType};
use tokio::sync::oneshot::Receiver;

use super::proposals::ChangeError;
use super::test_group::member;
use crate::simulation::{Change, CoreOptions, HeadCore, Wire};

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
        let core = HeadCore::start(disk.clone(), options, post, self.now).unwrap();
        self.heads.insert(raft_id, core);
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
