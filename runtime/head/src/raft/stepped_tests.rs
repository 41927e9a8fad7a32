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
use parking_lot::Mutex;
use raft::prelude::{Entry, Message, MessageType};

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

    fn send_snapshot(&mut self, message: Message, frames: Frames) {
        self.snapshots.lock().push_back((message, frames));
    }
}

/// Heads and the post between them, which somebody must carry.
struct Stepped {
    heads: BTreeMap<u64, HeadCore>,
    post: Post,
    now: Instant,
}

impl Stepped {
    /// A group of heads 1 to `count`, led by 1.
    fn of(count: u64) -> Self {
        let mut group = Stepped {
            heads: BTreeMap::new(),
            post: Post::default(),
            now: Instant::now(),
        };
        for raft_id in 1..=count {
            let modules: Vec<Arc<dyn StateModule>> = vec![Arc::new(Scheduler)];
            let options = CoreOptions {
                raft_id,
                founds_group: raft_id == 1,
                had_log: false,
                raft: RaftConfig::default(),
                clock: Arc::new(Stopped),
                modules,
                seed: 1,
                life: raft_id,
            };
            let post = Box::new(group.post.clone());
            let core = HeadCore::start(MemoryEngine::new(), options, post, group.now).unwrap();
            group.heads.insert(raft_id, core);
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

    /// Asks for a change and carries everything that follows.
    fn change(&mut self, head: u64, change: Change) {
        let now = self.now;
        let head = self.heads.get_mut(&head).unwrap();
        let _answer = head.change(change, now).unwrap();
        head.settle().unwrap();
        self.carry(|_| true);
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
