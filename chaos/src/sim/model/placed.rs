//! Nodes and actors in the model: who lives as which incarnation, where, and what that takes.

use mobula_core::id::{ActorId, Incarnation, NodeId};
use mobula_core::order::WorkerEvent;
use mobula_core::resource::Resources;
use mobula_scheduler::EventOutcome;

use super::{FENCED, Model, Node, broken};
use crate::sim::violation::Violation;

impl Model {
    pub(super) fn registered(
        &mut self,
        index: u64,
        name: &str,
        boot: &str,
        capacity: &Resources,
        id: NodeId,
        incarnation: Incarnation,
    ) -> Result<(), Violation> {
        const RULE: &str = "a lost incarnation never counts as alive again (I6)";
        let known = self.names.get(name).copied();
        if known.is_some_and(|known| known != id) {
            return broken(
                RULE,
                index,
                format!("`{name}` was {known:?} and is {id} now"),
            );
        }
        self.names.insert(name.to_owned(), id);
        let lives = self
            .nodes
            .get(&id)
            .is_some_and(|node| !node.is_lost && node.boot == boot);
        let expected = match self.nodes.get(&id) {
            Some(node) if lives => node.incarnation,
            _ => Incarnation(index),
        };
        if incarnation != expected {
            return broken(
                RULE,
                index,
                format!("{id} registers as {incarnation} and should as {expected}"),
            );
        }
        if !lives {
            self.clear_node(id);
        }
        let node = Node {
            boot: boot.to_owned(),
            incarnation,
            is_lost: false,
            capacity: capacity.clone(),
        };
        self.nodes.insert(id, node);
        Ok(())
    }

    pub(super) fn clear_node(&mut self, id: NodeId) {
        for actor in self.actors.values_mut() {
            if actor.on == Some(id) {
                actor.on = None;
            }
        }
    }

    pub(super) fn is_current(&self, id: NodeId, incarnation: Incarnation) -> bool {
        self.nodes
            .get(&id)
            .is_some_and(|node| !node.is_lost && node.incarnation == incarnation)
    }

    pub(super) fn lost(
        &mut self,
        index: u64,
        id: NodeId,
        incarnation: Incarnation,
        outcome: &EventOutcome,
    ) -> Result<(), Violation> {
        let is_current = self.is_current(id, incarnation);
        if is_current != (*outcome == EventOutcome::Applied) {
            return broken(
                FENCED,
                index,
                format!("the loss of {id} as {incarnation} came to {outcome:?}"),
            );
        }
        if is_current {
            self.nodes_lost += 1;
            self.clear_node(id);
            if let Some(node) = self.nodes.get_mut(&id) {
                node.is_lost = true;
            }
        }
        Ok(())
    }

    pub(super) fn event(
        &mut self,
        index: u64,
        id: NodeId,
        incarnation: Incarnation,
        event: &WorkerEvent,
        outcome: &EventOutcome,
    ) -> Result<(), Violation> {
        let is_fenced = matches!(outcome, EventOutcome::Fenced { .. });
        if is_fenced == self.is_current(id, incarnation) {
            return broken(
                FENCED,
                index,
                format!("an event of {id} as {incarnation} came to {outcome:?}"),
            );
        }
        self.fenced += u64::from(is_fenced);
        let (WorkerEvent::ActorStarted {
            actor,
            incarnation: started,
            ..
        }
        | WorkerEvent::ActorExited {
            actor,
            incarnation: started,
            ..
        }) = event
        else {
            return Ok(());
        };
        let known = self.actors.get(actor);
        let is_here = known.is_some_and(|known| known.on == Some(id));
        let is_its = is_here && known.is_some_and(|known| known.incarnation == *started);
        let is_exit = matches!(event, WorkerEvent::ActorExited { .. });
        let is_applied = *outcome == EventOutcome::Applied;
        if (is_applied && !is_its) || (is_exit && is_its && !is_fenced && !is_applied) {
            return broken(
                FENCED,
                index,
                format!("{event:?} of {id} came to {outcome:?}, and known is {known:?}"),
            );
        }
        if is_exit && is_applied {
            self.actors.entry(*actor).or_default().on = None;
        }
        Ok(())
    }

    pub(super) fn assigned(
        &mut self,
        index: u64,
        actor: ActorId,
        incarnation: Incarnation,
        (node, node_incarnation): (NodeId, Incarnation),
    ) -> Result<(), Violation> {
        if !self.is_current(node, node_incarnation) {
            return broken(
                FENCED,
                index,
                format!("{actor} goes to {node} as {node_incarnation}, which does not live"),
            );
        }
        if self.ended.contains(&actor) {
            return broken(
                "what was told to end does not start again (I5)",
                index,
                format!("{actor} goes to {node}"),
            );
        }
        let known = self.actors.entry(actor).or_default();
        if known.on.is_some() || incarnation != Incarnation(index) {
            return broken(
                FENCED,
                index,
                format!("{actor} is granted {incarnation}, and known is {known:?}"),
            );
        }
        known.on = Some(node);
        known.incarnation = incarnation;
        Ok(())
    }

    pub(super) fn check_current(
        &self,
        index: u64,
        actor: ActorId,
        incarnation: Incarnation,
    ) -> Result<(), Violation> {
        let known = self.actors.get(&actor);
        if known.is_some_and(|known| known.incarnation == incarnation && known.on.is_some()) {
            return Ok(());
        }
        broken(
            FENCED,
            index,
            format!("{actor} acts as {incarnation}, and known is {known:?}"),
        )
    }

    /// No node gives away more than it has (I10).
    pub(super) fn check_capacity(&self, index: u64) -> Result<(), Violation> {
        for (id, node) in &self.nodes {
            let mut taken = Resources::default();
            for actor in self.actors.values().filter(|actor| actor.on == Some(*id)) {
                taken = taken.plus(&actor.resources);
            }
            let shortfalls = node.capacity.shortfalls(&taken);
            if !node.is_lost && !shortfalls.is_empty() {
                return broken(
                    "no node gives away more than it has (I10)",
                    index,
                    format!("{id} lacks {shortfalls:?}"),
                );
            }
        }
        Ok(())
    }
}
