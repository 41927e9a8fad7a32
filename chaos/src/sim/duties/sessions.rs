//! Sessions of workers with a leader: they begin with a registration and the list of what is to run; renewals and events follow.

use mobula_core::order::Order;
use mobula_head::simulation::{CoreFault, View};
use mobula_scheduler::{Command, EventOutcome, Response, orders_for_node};

use super::Served;
use crate::sim::asked::{For, Polled};
use crate::sim::packet::{HeadSays, WorkerSays};
use crate::sim::world::World;

impl World {
    pub(crate) fn hear_worker(
        &mut self,
        raft_id: u64,
        worker: usize,
        session: u64,
        said: WorkerSays,
    ) -> Result<(), CoreFault> {
        let now = self.now;
        let leader = self.core(raft_id).and_then(|core| core.leadership().leader);
        let Some(duties) = self.duties(raft_id) else {
            let leader = leader.filter(|leader| *leader != raft_id);
            self.tell(raft_id, session, worker, HeadSays::Refused { leader });
            return Ok(());
        };
        if let WorkerSays::Hello {
            name,
            boot,
            capacity,
        } = said
        {
            let served = Served {
                worker,
                node: None,
                renewed_at: now,
                held: Some(Vec::new()),
                ends_after: None,
            };
            duties.sessions.insert(session, served);
            let command = Command::RegisterNode {
                name,
                boot_id: boot,
                capacity,
                labels: Default::default(),
                version: "simulated".to_owned(),
            };
            return self.propose_internal(raft_id, For::Registration { worker, session }, &command);
        }
        let term = duties.term;
        let Some(served) = duties.sessions.get_mut(&session) else {
            let leader = Some(raft_id);
            self.tell(raft_id, session, worker, HeadSays::Refused { leader });
            return Ok(());
        };
        served.renewed_at = now;
        match said {
            WorkerSays::Renew if served.ends_after == Some(0) => {
                self.refuse(raft_id, session);
                Ok(())
            }
            WorkerSays::Renew if served.ends_after.is_some() => {
                served.ends_after = served.ends_after.map(|left| left - 1);
                Ok(())
            }
            WorkerSays::Renew => {
                self.tell(raft_id, session, worker, HeadSays::Renewed { term });
                Ok(())
            }
            WorkerSays::Event { sequence, event } => {
                let Some((node, incarnation)) = served.node else {
                    return Ok(());
                };
                let command = Command::NodeEvent {
                    node,
                    incarnation,
                    event,
                };
                self.propose_internal(raft_id, For::Event { session, sequence }, &command)
            }
            WorkerSays::Hello { .. } => unreachable!("it was taken above"),
        }
    }

    pub(crate) fn head_loses_session(&mut self, raft_id: u64, session: u64) {
        if let Some(duties) = self.duties(raft_id) {
            duties.sessions.remove(&session);
        }
    }

    pub(super) fn registration_ends(
        &mut self,
        raft_id: u64,
        worker: usize,
        session: u64,
        outcome: Polled,
    ) {
        let registered = match outcome {
            Polled::Proposal(Ok(outcome)) => outcome.result.ok(),
            _ => None,
        };
        let response = registered.and_then(|bytes| Response::decode(&bytes).ok());
        let Some(Response::Registered { node, incarnation }) = response else {
            return self.refuse(raft_id, session);
        };
        let Some(duties) = self.duties(raft_id) else {
            return;
        };
        let term = duties.term;
        // A node has one session: the newer one replaces the older.
        let older: Vec<u64> = duties
            .sessions
            .iter()
            .filter(|(number, served)| {
                **number != session && served.node.is_some_and(|(id, _)| id == node)
            })
            .map(|(number, _)| *number)
            .collect();
        for number in older {
            duties.sessions.remove(&number);
        }
        let Some(served) = duties.sessions.get_mut(&session) else {
            return;
        };
        served.node = Some((node, incarnation));
        let welcome = HeadSays::Welcome {
            term,
            node,
            incarnation,
        };
        self.tell(raft_id, session, worker, welcome);
        let _ = self.look(raft_id, For::Greeting { session }, None);
    }

    pub(super) fn refuse(&mut self, raft_id: u64, session: u64) {
        let served = self
            .duties(raft_id)
            .and_then(|duties| duties.sessions.remove(&session));
        if let Some(served) = served {
            let leader = None;
            self.tell(
                raft_id,
                session,
                served.worker,
                HeadSays::Refused { leader },
            );
        }
    }

    pub(super) fn greet(&mut self, raft_id: u64, session: u64, view: &View) {
        let Some(duties) = self.duties(raft_id) else {
            return;
        };
        let term = duties.term;
        let Some(served) = duties.sessions.get(&session) else {
            return;
        };
        let (worker, Some((node, _))) = (served.worker, served.node) else {
            return;
        };
        let mut standing = Vec::new();
        for order in orders_for_node(view, node) {
            match &order {
                Order::Start(start) => standing.push((start.actor, start.incarnation)),
                Order::Stop {
                    actor, incarnation, ..
                } => standing.push((*actor, *incarnation)),
                Order::Notice { .. } | Order::NoticeWithdrawn | Order::JobEnded { .. } => {}
            }
            self.tell(raft_id, session, worker, HeadSays::Order { term, order });
        }
        let complete = HeadSays::OrdersComplete { term, standing };
        self.tell(raft_id, session, worker, complete);
        let served = self
            .duties(raft_id)
            .and_then(|duties| duties.sessions.get_mut(&session));
        for order in served
            .and_then(|served| served.held.take())
            .unwrap_or_default()
        {
            self.tell(raft_id, session, worker, HeadSays::Order { term, order });
        }
    }

    pub(super) fn event_ends(
        &mut self,
        raft_id: u64,
        session: u64,
        sequence: u64,
        outcome: Polled,
    ) {
        let applied = match outcome {
            Polled::Proposal(Ok(outcome)) => outcome.result.ok(),
            _ => None,
        };
        let response = applied.and_then(|bytes| Response::decode(&bytes).ok());
        match response {
            Some(Response::Event(EventOutcome::Applied | EventOutcome::AlreadyKnown)) => {
                let served = self
                    .duties(raft_id)
                    .and_then(|duties| duties.sessions.get(&session));
                if let Some(worker) = served.map(|served| served.worker) {
                    let said = HeadSays::Acknowledged { sequence };
                    self.tell(raft_id, session, worker, said);
                }
            }
            _ => self.refuse(raft_id, session),
        }
    }
}

#[cfg(test)]
mod tests {
    use mobula_core::control::Effect;
    use mobula_core::id::{ActorId, Incarnation, NodeId};

    use super::super::super::EVENTS_MAX;
    use super::super::Duties;
    use super::*;

    /// The list of what is to run was read, then an actor was assigned, and the worker heard of the actor
    /// before it heard the list: it ended the actor, and nobody ever knew.
    #[test]
    fn an_order_that_is_newer_than_the_greeting_is_told_after_it() {
        let mut world = World::new(1, EVENTS_MAX, false);
        world.add_head(1, true);
        let (node, incarnation, session) = (NodeId(1), Incarnation(1), 7);
        let mut duties = Duties::new(1, 0);
        let served = Served {
            worker: 0,
            node: Some((node, incarnation)),
            renewed_at: 0,
            held: Some(Vec::new()),
            ends_after: None,
        };
        duties.sessions.insert(session, served);
        if let Some(head) = world.heads.get_mut(&1) {
            head.duties = Some(duties);
        }
        let order = Order::Stop {
            actor: ActorId(1),
            incarnation,
            grace_ms: 0,
        };
        let told = |world: &World| world.due().get("messages to workers").copied();
        let effect = Effect::Order { node, order };
        world.carry_out(1, vec![effect.clone()], false);
        assert_eq!(told(&world), None, "the greeting comes first");
        let view = world.checker.reference().reader();
        world.greet(1, session, &view);
        assert_eq!(told(&world), Some(2), "the end of the list, and the order");
        world.carry_out(1, vec![effect], false);
        assert_eq!(told(&world), Some(3), "from now on at once");
    }
}
