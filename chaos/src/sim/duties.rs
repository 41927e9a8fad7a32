//! What a leader's process does beside Raft, as the tasks of a real head do it: sessions of workers,
//! placement passes, expiry of leases, orders.
//!
//! The decisions are the production scheduler's ([`placement_pass`], `orders_for_node`); the tasks
//! around them are async and bound to sockets in a head, so they are played here after
//! `runtime/head/src/{leadership,health,dispatcher,session}.rs`.

mod sessions;

use std::collections::BTreeMap;

use mobula_core::control::{Controller, Effect, ModuleId};
use mobula_core::id::{Incarnation, NodeId, SessionId};
use mobula_core::order::Order;
use mobula_head::raft::Leadership;
use mobula_head::simulation::{CoreFault, View};
use mobula_scheduler::{Command, Query, QueryResponse, answer, next_wakeup_ms, placement_pass};

use super::asked::{For, Polled};
use super::network::Place;
use super::options::{MILLISECOND, Micros, SECOND};
use super::packet::{HeadSays, Packet};
use super::world::World;

/// How long a worker counts as alive without a word. Shorter than a real one's ten seconds, so that
/// short runs see leases end.
pub(crate) const LEASE: Micros = 2 * SECOND;

const HEALTH_INTERVAL: Micros = 250 * MILLISECOND;
const CONTROL_INTERVAL: Micros = 300 * MILLISECOND;
const PLACEMENT_PAUSE_MAX: Micros = 5 * SECOND;
const PLACEMENT_RETRY: Micros = 200 * MILLISECOND;

/// A worker's session with this leader.
pub(crate) struct Served {
    worker: usize,
    /// Known once the registration is applied.
    node: Option<(NodeId, Incarnation)>,
    renewed_at: Micros,
    /// Orders that came up before the standing ones were read. They are told after those, as a real
    /// session's outbox waits for the greeting: the list says what is to run and nothing else, and an
    /// older one would end what a newer order has begun.
    held: Option<Vec<Order>>,
    /// Its node was lost: how many more renewals are heard before it ends. What comes until then is fenced
    /// by the tables.
    ends_after: Option<u32>,
}

/// The duties of one term.
pub(crate) struct Duties {
    term: u64,
    sessions: BTreeMap<u64, Served>,
    is_placing: bool,
    place_at: Micros,
    is_checking: bool,
    check_at: Micros,
    seen: BTreeMap<(NodeId, Incarnation), Micros>,
    /// The lives of nodes that had a session when the tables were asked for who is alive.
    asked_of: Vec<(NodeId, Incarnation)>,
    is_controlling: bool,
    control_at: Micros,
    controllers: Vec<Box<dyn Controller>>,
}

impl Duties {
    fn new(term: u64, now: Micros) -> Self {
        Duties {
            term,
            sessions: BTreeMap::new(),
            is_placing: false,
            place_at: now,
            is_checking: false,
            check_at: now + HEALTH_INTERVAL,
            seen: BTreeMap::new(),
            asked_of: Vec::new(),
            is_controlling: false,
            control_at: now,
            controllers: mobula_actors::controllers(),
        }
    }

    fn session_of(&self, node: NodeId) -> Option<(u64, usize)> {
        self.sessions
            .iter()
            .filter(|(_, served)| served.node.is_some_and(|(id, _)| id == node))
            .map(|(session, served)| (*session, served.worker))
            .next_back()
    }
}

impl World {
    /// Begins and ends duties with leadership.
    pub(crate) fn follow_leadership(&mut self, raft_id: u64, leadership: Leadership) {
        let now = self.now;
        let Some(head) = self.heads.get_mut(&raft_id) else {
            return;
        };
        let term = head.duties.as_ref().map(|duties| duties.term);
        if leadership.is_leader && term == Some(leadership.term) {
            return;
        }
        let ended = head.duties.take();
        if leadership.is_leader {
            head.duties = Some(Duties::new(leadership.term, now));
            self.say(|| format!("head {raft_id} leads in term {}", leadership.term));
        }
        for (session, served) in ended.into_iter().flat_map(|duties| duties.sessions) {
            let refused = HeadSays::Refused {
                leader: leadership.leader.filter(|leader| *leader != raft_id),
            };
            self.tell(raft_id, session, served.worker, refused);
        }
    }

    fn tell(&mut self, raft_id: u64, session: u64, worker: usize, said: HeadSays) {
        let packet = Packet::FromHead { session, said };
        self.send_at(
            self.now,
            Place::Head(raft_id),
            Place::Worker(worker),
            packet,
        );
    }

    fn duties(&mut self, raft_id: u64) -> Option<&mut Duties> {
        self.heads.get_mut(&raft_id)?.duties.as_mut()
    }

    /// The effects of what was applied.
    pub(crate) fn carry_out(&mut self, raft_id: u64, effects: Vec<Effect>, are_lost: bool) {
        let now = self.now;
        for effect in effects {
            match effect {
                Effect::Place => {
                    if let Some(duties) = self.duties(raft_id) {
                        duties.place_at = duties.place_at.min(now);
                    }
                }
                Effect::Order { node, order } => {
                    let Some(duties) = self.duties(raft_id) else {
                        continue;
                    };
                    let (term, session) = (duties.term, duties.session_of(node));
                    let Some((session, worker)) = session else {
                        continue;
                    };
                    let served = duties.sessions.get_mut(&session);
                    match served.and_then(|served| served.held.as_mut()) {
                        Some(held) => held.push(order),
                        None => {
                            self.tell(raft_id, session, worker, HeadSays::Order { term, order });
                        }
                    }
                }
                // Waiters, and the objects of jobs, are not simulated.
                Effect::Changed(_) | Effect::JobEnded(_) => {}
            }
        }
        if are_lost && let Some(duties) = self.duties(raft_id) {
            duties.place_at = duties.place_at.min(now);
            // Every session is told everything again; the simplest way is a new one.
            for (session, served) in std::mem::take(&mut duties.sessions) {
                let leader = Some(raft_id);
                self.tell(
                    raft_id,
                    session,
                    served.worker,
                    HeadSays::Refused { leader },
                );
            }
        }
    }

    fn propose_internal(
        &mut self,
        raft_id: u64,
        whose: For,
        command: &Command,
    ) -> Result<(), CoreFault> {
        let payload = command.encode();
        self.propose(
            raft_id,
            whose,
            SessionId::INTERNAL,
            0,
            ModuleId::SCHEDULER,
            payload,
        )
    }

    /// What is due is begun. Asking does not write, so no fault can come of it.
    pub(crate) fn do_duties(&mut self, raft_id: u64) {
        let now = self.now;
        let Some(duties) = self.duties(raft_id) else {
            return;
        };
        let places = !duties.is_placing && duties.place_at <= now;
        let checks = !duties.is_checking && duties.check_at <= now;
        let controls = !duties.is_controlling && duties.control_at <= now;
        duties.is_controlling |= controls;
        duties.is_placing |= places;
        duties.is_checking |= checks;
        if checks {
            let lives = duties.sessions.values().filter_map(|served| served.node);
            duties.asked_of = lives.collect();
        }
        if places {
            let _ = self.look(raft_id, For::Placement, None);
        }
        if checks {
            let _ = self.look(raft_id, For::Health, None);
        }
        if controls {
            let _ = self.look(raft_id, For::Control, None);
        }
    }

    /// Something that the duties asked came to an end.
    pub(crate) fn duty_hears(&mut self, raft_id: u64, whose: For, outcome: Polled) {
        match (whose, outcome) {
            (For::Placement, Polled::View(Ok(view))) => self.place(raft_id, &view),
            (For::Placement, Polled::Proposal(Ok(_))) => {
                let now = self.now;
                if let Some(duties) = self.duties(raft_id) {
                    duties.is_placing = false;
                    duties.place_at = now;
                }
            }
            (For::Placement, _) => self.place_later(raft_id, PLACEMENT_RETRY),
            (For::Health, Polled::View(Ok(view))) => self.check_health(raft_id, &view),
            (For::Health, _) => {
                let next = self.now + HEALTH_INTERVAL;
                if let Some(duties) = self.duties(raft_id) {
                    duties.is_checking = false;
                    duties.check_at = next;
                }
            }
            (For::Control, outcome) => self.control(raft_id, outcome),
            (For::Registration { worker, session }, outcome) => {
                self.registration_ends(raft_id, worker, session, outcome);
            }
            (For::Event { session, sequence }, outcome) => {
                self.event_ends(raft_id, session, sequence, outcome);
            }
            (For::Greeting { session }, Polled::View(Ok(view))) => {
                self.greet(raft_id, session, &view);
            }
            (For::Greeting { session }, _) => self.refuse(raft_id, session),
            _ => {}
        }
    }

    /// The controllers look at the tables, and what they want is proposed.
    fn control(&mut self, raft_id: u64, outcome: Polled) {
        let next = self.now + CONTROL_INTERVAL;
        let core = self.heads.get(&raft_id).and_then(|head| head.core.as_ref());
        let now_ms = core.map_or(0, |core| core.now_ms());
        let Some(duties) = self.duties(raft_id) else {
            return;
        };
        duties.is_controlling = false;
        duties.control_at = next;
        let Polled::View(Ok(view)) = outcome else {
            return;
        };
        let controllers = duties.controllers.iter_mut();
        let proposals: Vec<_> = controllers
            .flat_map(|controller| controller.reconcile(&view, now_ms))
            .collect();
        for proposal in proposals {
            let (module, payload) = (proposal.module, proposal.payload);
            // A fault cannot come of it, as above.
            let _ = self.propose(
                raft_id,
                For::Nobody,
                SessionId::INTERNAL,
                0,
                module,
                payload,
            );
        }
    }

    fn place_later(&mut self, raft_id: u64, pause: Micros) {
        let at = self.now + pause;
        if let Some(duties) = self.duties(raft_id) {
            duties.is_placing = false;
            duties.place_at = at;
        }
    }

    fn place(&mut self, raft_id: u64, view: &View) {
        let Some(head) = self.heads.get(&raft_id) else {
            return;
        };
        let Some(core) = &head.core else { return };
        let now_ms = core.now_ms();
        match placement_pass(view, now_ms) {
            Some(command) => {
                // A fault cannot come of it: a proposal writes nothing before the next step.
                let _ = self.propose_internal(raft_id, For::Placement, &command);
            }
            None => {
                let wakeup = next_wakeup_ms(view, now_ms);
                let pause = wakeup.map_or(PLACEMENT_PAUSE_MAX, |at_ms| {
                    at_ms.saturating_sub(now_ms).saturating_mul(MILLISECOND)
                });
                self.place_later(raft_id, pause.min(PLACEMENT_PAUSE_MAX));
            }
        }
    }

    fn check_health(&mut self, raft_id: u64, view: &View) {
        let now = self.now;
        let Ok(QueryResponse::Nodes(nodes)) = answer(view, 0, Query::ListNodes) else {
            return;
        };
        let live: Vec<_> = nodes
            .iter()
            .filter(|node| node.lost_ms.is_none())
            .map(|node| (node.node, node.incarnation))
            .collect();
        let Some(duties) = self.duties(raft_id) else {
            return;
        };
        duties.is_checking = false;
        duties.check_at = now + HEALTH_INTERVAL;
        for served in duties.sessions.values_mut() {
            let is_lost = |life| duties.asked_of.contains(&life) && !live.contains(&life);
            if served.ends_after.is_none() && served.node.is_some_and(is_lost) {
                served.ends_after = Some(1);
            }
        }
        duties.seen.retain(|key, _| live.contains(key));
        let mut expired = Vec::new();
        for key in live {
            let renewed = duties
                .sessions
                .values()
                .filter(|served| served.node == Some(key))
                .map(|served| served.renewed_at)
                .max();
            let last = duties.seen.entry(key).or_insert(now);
            *last = (*last).max(renewed.unwrap_or(0));
            if now - *last >= LEASE {
                expired.push(key);
            }
        }
        for (node, incarnation) in expired {
            self.say(|| format!("head {raft_id}: the lease of {node} {incarnation} ran out"));
            let command = Command::NodeLost { node, incarnation };
            let _ = self.propose_internal(raft_id, For::Nobody, &command);
            let duties = self.duties(raft_id).into_iter();
            for served in duties.flat_map(|duties| duties.sessions.values_mut()) {
                if served.node == Some((node, incarnation)) {
                    served.ends_after = Some(1);
                }
            }
        }
    }
}
