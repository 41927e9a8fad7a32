//! Whether another head's message shows that this log lacks what its member has acknowledged: an older
//! copy of the data directory was started, or the disk has lost what it had synced.
//!
//! raft-rs takes for granted that it does not, and panics where it is to commit what the log does not
//! hold (`RaftLog::commit_to`). Of what a head can send, only this asks for that:
//!
//! * A **heartbeat** of this head's term or a later one. It says `min(matched, committed)`: of what is
//!   committed, so much as this member has itself acknowledged to this leader in the leader's term. A
//!   leader begins its term without knowing of anybody's acknowledgements, and what is committed no
//!   later leader replaces. So a member that is far behind, or has just joined, is never told of more
//!   than it holds.
//!
//! And these do not:
//!
//! * An *append* says all that is committed, however far behind its receiver is. It is taken only where the
//!   entry before it is in the log, and commits no further than it reaches itself.
//! * A *snapshot* commits without being installed only where its last entry is in the log, with its term.
//! * A *vote*, its refusal, and the *answer to a read* name an entry and its term, and commit only what
//!   the log holds under both.
//!
//! What this cannot see: another leader than the one that has the acknowledgement takes such a member
//! for one that lags. Then the entries come again, and nobody notices; or some are gone for good, if the
//! member's vote has made a leader that lacks them too. A member that still holds those, and knows them to be
//! committed, does not follow that leader ([`super::committed_conflict`]).

use mobula_storage::engine::Engine;
use mobula_storage::raft_log::LostEntries;
use raft::StateRole;
use raft::prelude::{Message, MessageType};

use super::node_loop::Node;

/// What the log of `node` lacks, if `message` shows that it does. To be asked before raft is handed
/// the message.
pub(super) fn shown_by<E: Engine>(node: &Node<E>, message: &Message) -> Option<LostEntries> {
    if message.get_msg_type() != MessageType::MsgHeartbeat || !is_followed(node, message) {
        return None;
    }
    let last_index = node.raft.raft_log.last_index();
    (message.commit > last_index).then_some(LostEntries {
        last_index,
        acknowledged_index: message.commit,
        leader: message.from,
    })
}

/// Whether raft takes `message`, of whoever says to lead, for one of its leader: it follows none of an earlier
/// term, and whoever leads follows none of its own.
pub(super) fn is_followed<E: Engine>(node: &Node<E>, message: &Message) -> bool {
    let raft = &node.raft;
    let leads = raft.state == StateRole::Leader && message.term == raft.term;
    message.term >= raft.term && !leads
}
