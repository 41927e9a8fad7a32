//! What leaves a head's core: kept while it makes a step, then given to the network.

use std::rc::Rc;
use std::sync::{Arc, Mutex};

use mobula_head::simulation::Wire;
use mobula_storage::engine::MemoryEngine;
use mobula_wire::raft::StateClaim;
use raft::prelude::Message;

use crate::sim::network::Place;
use crate::sim::packet::Packet;
use crate::sim::raft_check::check_promise;
use crate::sim::violation::Violation;
use crate::sim::world::World;

/// What left a core since it was last looked at, and what was wrong with it.
#[derive(Default)]
pub(super) struct Sent {
    messages: Vec<Message>,
    claims: Vec<StateClaim>,
    snapshots: Vec<(Message, Vec<Vec<u8>>)>,
    broken: Option<Violation>,
}

/// Keeps what a core sends, and looks whether it may promise that already.
pub(super) struct Outbox {
    pub(super) sent: Arc<Mutex<Sent>>,
    pub(super) engine: MemoryEngine,
}

impl Wire for Outbox {
    fn send(&mut self, message: Message) {
        let promise = check_promise(&message, &self.engine);
        let mut sent = self.sent.lock().expect("nobody panics with it");
        if let Err(violation) = promise {
            sent.broken.get_or_insert(violation);
        }
        sent.messages.push(message);
    }

    fn send_claim(&mut self, claim: &StateClaim) {
        let mut sent = self.sent.lock().expect("nobody panics with it");
        sent.claims.push(claim.clone());
    }

    fn send_snapshot(&mut self, message: Message, frames: Vec<Vec<u8>>) {
        let mut sent = self.sent.lock().expect("nobody panics with it");
        sent.snapshots.push((message, frames));
    }
}

impl World {
    /// What left the core goes into the network.
    pub(super) fn flush_outbox(&mut self, raft_id: u64) {
        let Some(head) = self.heads.get_mut(&raft_id) else {
            return;
        };
        let sent = std::mem::take(&mut *head.sent.lock().expect("nobody panics with it"));
        let life = head.life;
        let group = head.core.as_ref().map(|core| core.group());
        if let Some(violation) = sent.broken {
            self.complain(violation);
        }
        let from = Place::Head(raft_id);
        for claim in sent.claims {
            let members = group
                .iter()
                .flat_map(|group| group.voters.iter().chain(&group.learners));
            let others = members.copied().filter(|id| *id != raft_id);
            for to in others.collect::<Vec<_>>() {
                let packet = Packet::Claim(claim.clone());
                self.send_at(self.now, from, Place::Head(to), packet);
            }
        }
        for message in sent.messages {
            let to = Place::Head(message.to);
            self.send_at(self.now, from, to, Packet::Raft(Box::new(message)));
        }
        for (message, frames) in sent.snapshots {
            self.say(|| format!("head {raft_id} sends a snapshot to {}", message.to));
            let to = Place::Head(message.to);
            let packet = Packet::Snapshot {
                message: Box::new(message),
                frames: Rc::new(frames),
                life,
            };
            self.send_at(self.now, from, to, packet);
        }
    }
}
