//! Raft's own view of the group, changed by the entries that are applied.
//!
//! Invariant: a head that is no member any more does not lead.

use mobula_storage::engine::Engine;
use raft::StateRole;
use raft::prelude::{ConfChange, ConfState};

use super::membership::Configuration;
use super::node_loop::Node;

/// Raft's configuration while entries are applied.
pub(super) struct NodeConfiguration<'a, E: Engine> {
    pub(super) node: &'a mut Node<E>,
    pub(super) changed: Option<ConfState>,
}

impl<E: Engine> NodeConfiguration<'_, E> {
    /// raft 0.7 lets a leader lead on that is no member any more, and panics when that one's next
    /// entry is on the disk. A leader hands over before it is removed, but one that was elected with
    /// its own removal in the log finds out only here.
    fn step_down_if_removed(&mut self) {
        let raft = &mut self.node.raft;
        let is_member = raft.prs().get(raft.id).is_some();
        if !is_member && raft.state == StateRole::Leader {
            tracing::warn!("this head leads and was removed from the group; it steps down");
            raft.become_follower(raft.term, raft::INVALID_ID);
        }
    }
}

impl<E: Engine> Configuration for NodeConfiguration<'_, E> {
    fn state(&self) -> ConfState {
        self.node.raft.prs().conf().to_conf_state()
    }

    fn change(&mut self, change: &ConfChange) -> Result<(), String> {
        let mut state = self
            .node
            .apply_conf_change(change)
            .map_err(|error| error.to_string())?;
        self.step_down_if_removed();
        // raft keeps them in hash sets; what is stored and sent has one form.
        state.voters.sort_unstable();
        state.learners.sort_unstable();
        tracing::info!(voters = ?state.voters, learners = ?state.learners, "the group has changed");
        self.changed = Some(state);
        Ok(())
    }
}
