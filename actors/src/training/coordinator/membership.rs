//! Who takes part in a job's steps: joining, leaving, being lost, being wrong.

use super::{Coordinator, CoordinatorError, Step};
use crate::training::crew::{LinkError, Presence, Slot, TrainerLink};
use crate::training::messages::{Greeting, Held, TrainerError};

impl<L: TrainerLink> Coordinator<L> {
    /// A trainer has other parameters than we: whoever is in the minority is wrong.
    pub(super) fn disagree(
        &mut self,
        index: usize,
        theirs: String,
        step: &mut Step,
    ) -> Result<(), CoordinatorError> {
        self.counters.digest_mismatches += 1;
        let dissenters = step.dissent.entry(theirs.clone()).or_default();
        if !dissenters.contains(&index) {
            dissenters.push(index);
        }
        let count = dissenters.len();
        if count > 1 && 2 * count > self.crew.slots().len() + 1 {
            let ours = self.digest.clone();
            return Err(CoordinatorError::Outvoted {
                step: self.state.step,
                count,
                theirs,
                ours,
            });
        }
        self.log.line(format_args!(
            "trainer-{index} on {} has parameters {theirs} at step {}, and {} is right: its sums \
             are refused and it gets the state again",
            self.crew.slots()[index].node,
            self.state.step,
            self.digest
        ));
        let _ = step.assignment.lost(index);
        self.prepare(index);
        Ok(())
    }

    pub(super) fn failed(
        &mut self,
        index: usize,
        error: &LinkError,
        step: &mut Step,
    ) -> Result<(), CoordinatorError> {
        match error {
            LinkError::Trainer(TrainerError::Stale { current, .. })
                if current.driver_incarnation() > self.epoch.driver_incarnation() =>
            {
                return Err(CoordinatorError::Fenced(current.driver_incarnation()));
            }
            LinkError::Trainer(TrainerError::Unfit(reason)) => {
                let (node, reason) = (self.crew.slots()[index].node.clone(), reason.clone());
                return Err(CoordinatorError::Unfit {
                    slot: index,
                    node,
                    reason,
                });
            }
            LinkError::Trainer(TrainerError::OutOfStep { .. } | TrainerError::Stale { .. }) => {
                let _ = step.assignment.lost(index);
                self.prepare(index);
            }
            LinkError::Trainer(TrainerError::Unprepared) => {
                self.lose(index, "it was started again", step);
            }
            LinkError::Lost(reason) => self.lose(index, reason, step),
        }
        Ok(())
    }

    pub(super) fn lose(&mut self, index: usize, reason: &str, step: &mut Step) {
        let shards = step.assignment.lost(index);
        let slot = &self.crew.slots()[index];
        if slot.is_ready() {
            self.counters.trainers_lost += 1;
            self.counters.reassigned_shards += shards as u64;
            self.epoch = self.epoch.next();
            self.log.line(format_args!(
                "trainer-{index} on {} is lost at step {}: {reason}; {shards} shards of this step \
                 go to the others",
                slot.node, self.state.step
            ));
        }
        self.crew.lose(index);
    }

    pub(super) fn greeted(&mut self, index: usize, greeting: Greeting) {
        let slot = self.crew.slot(index);
        if slot
            .incarnation
            .is_some_and(|known| known != greeting.incarnation)
        {
            self.counters.trainer_restarts += 1;
        }
        slot.incarnation = Some(greeting.incarnation);
        slot.node = greeting.node_name;
        slot.notice_ms = greeting.notice_ms;
        if slot.notice_ms.is_some() {
            self.crew.let_leave(index);
        } else {
            self.prepare(index);
        }
    }

    /// Sends the present state in the background.
    pub(super) fn prepare(&mut self, index: usize) {
        let sent = Held {
            step: self.state.step,
            digest: self.digest.clone(),
        };
        self.crew
            .prepare(index, self.epoch, sent, self.state.to_bytes());
    }

    pub(super) fn joined(&mut self, index: usize, at_step: u64) {
        let slot = self.crew.slot(index);
        slot.presence = Presence::Ready;
        slot.step = at_step;
        self.epoch = self.epoch.next();
        let node = slot.node.clone();
        let ready = self.ready_count();
        self.log.line(format_args!(
            "trainer-{index} on {node} takes part from step {at_step}: {ready} trainers"
        ));
    }

    pub(super) fn let_noticed_leave(&mut self) {
        let noticed = |slot: &Slot<L>| slot.is_ready() && slot.notice_ms.is_some();
        for index in self.crew.which(noticed) {
            self.counters.handoffs += 1;
            self.epoch = self.epoch.next();
            self.log.line(format_args!(
                "trainer-{index} leaves {} at step {}: the node will be taken away",
                self.crew.slots()[index].node,
                self.state.step
            ));
            self.crew.let_leave(index);
        }
    }
}
