//! Whether another head's message shows that the leader's log is another one than what is committed in
//! this one: members of a majority have lost entries that they had acknowledged (older copies of their
//! directories were started, or their disks have lost what they had synced), and have elected one of
//! themselves.
//!
//! Raft takes for granted that a leader holds all that is committed. Where one does not, raft-rs does not
//! notice, and a member that holds more is harmed without a word:
//!
//! * It answers an *append* that begins below what is committed here with its commit index, as one that
//!   holds it all already. The leader counts that as an acknowledgement of entries that this member does
//!   not hold, and commits on it.
//! * It lets a *snapshot* of more than is committed here replace the whole log and the tables: maybe the
//!   last that still hold what the others have lost.
//!
//! So this head ends instead, before raft is handed the message. What shows it: an append names the term of
//! the entry before it and of each of its entries, a snapshot that of its last one. The log of a leader does
//! not change within its term, so that late and repeated messages say nothing wrong. An append with an
//! index and no term is of a leader whose log ends below what this member was taken to hold.
//!
//! The note on the disk does not keep the head down, as that of [`super::lost_entries`] does: it is this one
//! that has the truth. It has to come up again to be asked for what it holds (`mobula head backup --local`),
//! and to go on once a leader that holds everything is back. The note is for the leader's next step. Whoever
//! starts heads again starts this one in seconds, and once the leader has compacted its log, the first that
//! it sends is a snapshot, of which nobody can tell what it lacks. So none is taken as long as nothing more is
//! committed here than when the note was written. More is committed only behind a leader that holds what
//! is committed here, and then the note says nothing any more.
//!
//! What this cannot see: entries that this member holds and does not know to be committed are replaced, as
//! raft does with any others. A member that was away until the leader had compacted its log hears of a
//! snapshot first, without a note. And in a copy that was taken right before a new term began, another
//! entry of that same term may stand later; heads that compare what they hold ([`super::agreement`]) find
//! that.
//!
//! # Panics of raft-rs 0.7 that such a message does not reach
//!
//! * `maybe_append`, "conflict with committed entry": an append that begins below the commit index is
//!   answered before that, and the entries of any other lie above it.
//! * `append`, "out of range" and `truncate_and_append`: only what is above the commit index is replaced.
//! * `commit_to`: an append commits no more than it reaches itself. A heartbeat says no more than this member
//!   has acknowledged, and answering with its commit index it acknowledges nothing beyond its log; one that has
//!   lost entries itself is the case of [`super::lost_entries`].
//! * `restore` of a snapshot: one of less than is committed is ignored before its assertion. One of a
//!   configuration without this member is ignored too.
//! * `handle_append_entries`, "term must be valid": the search goes down to the start of the log at most,
//!   where a term is always known (below it, 0).
//! * The leader's side: a member that acknowledges more than the leader has is `matched` beyond its log. It
//!   then reads no entries there, which is no error, and names term 0 for the entry before; what it may commit is
//!   looked up by its own term, and beyond its log there is none. Rejections below `matched` are dropped as late
//!   ones.
//! * An answer to what a head sent before it lost entries, in a term that it now leads again, counts as if it
//!   were new: it makes a leader of too few votes, or a `matched` beyond its log, and neither is asserted.
//! * `load_state`, at the start: [`mobula_storage::raft_log::RaftLog::open`] refuses such a store.

use mobula_storage::engine::Engine;
use mobula_storage::raft_log::{CommittedConflict, LogPoint, RaftLog};
use raft::prelude::{Message, MessageType};

use super::lost_entries::is_followed;
use super::node_loop::{Fault, Node};

/// Looks whether `message` shows that the leader's log is another one than what is committed in `log`, which
/// is that of `node`, or could hide it; the error is what this head must end with. To be asked before raft is
/// handed the message.
pub(super) fn check<E: Engine>(
    node: &Node<E>,
    log: &RaftLog<E>,
    message: &Message,
) -> Result<(), Fault> {
    if !is_followed(node, message) {
        return Ok(());
    }
    if let Some(conflict) = shown_by(node, message) {
        let noted = log.note_committed_conflict(conflict);
        noted.map_err(|error| Fault::new("note a conflict with the leader", &error))?;
        return Err(conflict.into());
    }
    if !replaces_log(node, message) {
        return Ok(());
    }
    let noted = log
        .committed_conflict()
        .map_err(|error| Fault::new("read the note of a conflict", &error))?;
    match noted {
        // Below: the commit index is written with the next entries, so a crash may take it back.
        Some(noted) if node.raft.raft_log.committed <= noted.committed => {
            tracing::error!(
                leader = message.from,
                index = last_of_snapshot(message).index,
                "a snapshot is refused that would replace what a leader before was found to lack"
            );
            Err(noted.into())
        }
        _ => Ok(()),
    }
}

fn last_of_snapshot(message: &Message) -> LogPoint {
    let metadata = message.get_snapshot().get_metadata();
    LogPoint {
        index: metadata.index,
        term: metadata.term,
    }
}

/// The first entry that is committed here and of which `message` shows that the leader's log holds another
/// one, or none.
fn shown_by<E: Engine>(node: &Node<E>, message: &Message) -> Option<CommittedConflict> {
    let first = match message.get_msg_type() {
        MessageType::MsgAppend => LogPoint {
            index: message.index,
            term: message.log_term,
        },
        MessageType::MsgSnapshot => last_of_snapshot(message),
        _ => return None,
    };
    let raft_log = &node.raft.raft_log;
    // Of what is compacted only the last entry's term is known.
    let known_from = raft_log.first_index() - 1;
    let committed = raft_log.committed;
    let entries = message.entries.iter().map(|entry| LogPoint {
        index: entry.index,
        term: entry.term,
    });
    std::iter::once(first)
        .chain(entries)
        .skip_while(|told| told.index < known_from)
        .take_while(|told| told.index <= committed)
        .find_map(|told| {
            let own_term = raft_log.term(told.index).ok()?;
            (own_term != told.term).then_some(CommittedConflict {
                index: told.index,
                own_term,
                leader: message.from,
                term: message.term,
                leaders_entry_term: told.term,
                committed,
            })
        })
}

/// Whether raft would let the snapshot in `message` replace the log: it takes one that ends with an entry of
/// this log for news of what is committed.
fn replaces_log<E: Engine>(node: &Node<E>, message: &Message) -> bool {
    if message.get_msg_type() != MessageType::MsgSnapshot {
        return false;
    }
    let last = last_of_snapshot(message);
    let raft_log = &node.raft.raft_log;
    last.index > raft_log.committed && !raft_log.match_term(last.index, last.term)
}
