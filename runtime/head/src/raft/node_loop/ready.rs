//! What raft hands out as a `ready`, carried out: written, sent, applied, answered.
//!
//! The loop's invariants 1, 2 and 5 are kept here: what may leave before a write and what only after
//! it, that nothing is stepped meanwhile, and what must be on disk before anybody is told of it.

use mobula_core::mutant::{Mutant, is_planted};
use mobula_storage::engine::{Durability, Engine};
use mobula_storage::raft_log::LogPoint;
use raft::prelude::{ConfState, Entry, HardState, Message, MessageType};

use super::{Fault, Loop, not_leader};
use crate::raft::apply::{AppliedEntry, AppliedRun, StateAt, state_chain};
use crate::raft::changes::tells_of_change;
use crate::raft::configuration::NodeConfiguration;
use crate::raft::proposals::Outcome;

impl<E: Engine> Loop<E> {
    /// Carries out all that raft has to hand out now.
    pub(super) fn handle_readies(&mut self) -> Result<(), Fault> {
        while self.parts.node.has_ready() {
            self.handle_ready()?;
            self.snapshots.report(&mut self.parts.node);
            self.changes.propose_again(&mut self.parts.node);
            self.pin_election_timeout();
        }
        Ok(())
    }

    fn handle_ready(&mut self) -> Result<(), Fault> {
        let mut ready = self.parts.node.ready();
        self.send(ready.take_messages());
        if is_planted(Mutant::SendBeforeFsync) {
            self.send(ready.take_persisted_messages());
        }
        let mut write = if ready.snapshot().is_empty() {
            self.parts.log.begin()
        } else {
            self.snapshots.stage(ready.snapshot(), &self.parts.log)?
        };
        write
            .append(ready.entries())
            .map_err(|error| Fault::new("append to the log", &error))?;
        let sizes = ready.entries().iter().map(|entry| entry.data.len() as u64);
        self.bytes_since_compaction += sizes.sum::<u64>();
        let is_kept =
            |_: &&HardState| !is_planted(Mutant::VoteNotWritten) || !ready.entries().is_empty();
        if let Some(hard_state) = ready.hs().filter(is_kept) {
            write.set_hard_state(hard_state);
        }
        if !write.is_empty() {
            let is_promise = ready.must_sync() || tells_of_change(&ready);
            let durability = if is_promise && !is_planted(Mutant::LogNotSynced) {
                Durability::Synced
            } else {
                Durability::Buffered
            };
            self.commit(write, durability, "write the log")?;
        }
        if !ready.snapshot().is_empty() {
            self.after_install(ready.snapshot().get_metadata().term);
        }
        self.send(ready.take_persisted_messages());
        self.reads.confirm(ready.take_read_states());
        let committed = ready.take_committed_entries();
        self.apply(&committed)?;
        let mut light = self.parts.node.advance(ready);
        self.send(light.take_messages());
        let committed = light.take_committed_entries();
        self.apply(&committed)?;
        self.parts.node.advance_apply();
        let applier = &self.parts.applier;
        self.reads
            .answer(self.parts.log.applied().index, || applier.reader());
        Ok(())
    }

    fn send(&mut self, messages: Vec<Message>) {
        for message in messages {
            if message.get_msg_type() == MessageType::MsgSnapshot {
                self.snapshots.send(message, &mut *self.parts.peers);
            } else {
                self.parts.peers.send(message);
            }
        }
    }

    /// The tables were replaced: everything that was read from them is to be read again.
    fn after_install(&mut self, term: u64) {
        self.applied_term = self.applied_term.max(term);
        self.agreement.replaced(StateAt {
            index: self.parts.log.applied().index,
            hash: state_chain(&self.parts.applier.reader()),
        });
        self.publish_group();
        self.parts.effects.everything_changed();
    }

    fn apply(&mut self, entries: &[Entry]) -> Result<(), Fault> {
        let Some(last) = entries.last() else {
            return Ok(());
        };
        let mut write = self.parts.log.begin();
        let mut configuration = NodeConfiguration {
            node: &mut self.parts.node,
            changed: None,
        };
        let run = self
            .parts
            .applier
            .apply(entries, &mut configuration, write.batch_mut());
        // A leader counts itself among those that know of a change (see `raft::changes`).
        let is_changed = configuration.changed.is_some();
        let is_kept = |_: &ConfState| !is_planted(Mutant::MembershipNotStored);
        if let Some(state) = configuration.changed.filter(is_kept) {
            write.set_conf_state(&state);
        }
        if is_planted(Mutant::AppliedNotWithTables) {
            self.commit(write, Durability::Buffered, "write the tables")?;
            write = self.parts.log.begin();
        }
        write.set_applied(LogPoint {
            index: last.index,
            term: last.term,
        });
        let durability = match is_changed {
            true => Durability::Synced,
            false => Durability::Buffered,
        };
        self.commit(write, durability, "write the tables")?;
        self.applied_term = self.applied_term.max(last.term);
        self.agreement.applied(&run.states);
        self.answer(run);
        Ok(())
    }

    fn answer(&mut self, run: AppliedRun) {
        if run.touches_group {
            self.publish_group();
        }
        for AppliedEntry {
            index,
            term,
            result,
        } in run.outcomes
        {
            let Some(waiting) = self.waiting.remove(&index) else {
                continue;
            };
            let answer = if waiting.term == term || is_planted(Mutant::AnswerOfOtherTerm) {
                Ok(Outcome { index, result })
            } else {
                // Another leader's entry stands where this one's was.
                Err(not_leader(&self.parts.node))
            };
            // Whoever asked may have given up.
            let _ = waiting.reply.send(answer);
        }
        for change in run.changes {
            self.changes.applied(change);
        }
        self.parts.effects.send(run.effects);
    }
}
