//! Who is a head, and where: the members table, and the changes of the group that come with it.
//!
//! A change of the group is a Raft configuration change that carries what the table must say about
//! it, so that both become true in one entry. One member is changed at a time, hence no joint
//! configurations.
//!
//! Invariants:
//! 1. A Raft id is the index of the command that gave it out: no two lives of a disk share one.
//! 2. An id that was removed never becomes a member again.
//! 3. Adding whom the group has already changes nothing: a learner that was promoted meanwhile is
//!    not demoted by a late repetition.
//!
//! The table's rows are hints about addresses; who votes is what Raft's own configuration says.

use std::sync::Arc;

use mobula_core::codec;
use mobula_core::control::{
    Applied, ApplyContext, Caller, ModuleId, Origin, Reader, StateModule, Table, Txn,
};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::mutant::{Mutant, is_planted};
use raft::eraftpb::{ConfChange, ConfChangeType, ConfState};
use serde::{Deserialize, Serialize};

/// Members, by Raft id.
const MEMBERS: Table = Table {
    module: ModuleId::HEADS,
    tag: 1,
};

/// Ids that were removed.
const REMOVED: Table = Table {
    module: ModuleId::HEADS,
    tag: 2,
};

/// Members that may be at one time: five voters, and learners on their way in or out.
pub(crate) const MEMBERS_MAX: usize = 16;

/// Removed ids that are remembered. Ids only grow, so a forgotten one is far below all that live;
/// it would still need a certificate of this cluster, which ends after a day.
const REMOVED_MAX: usize = 256;

/// The longest row or command of this module.
const ROW_BYTES_MAX: usize = 4 * 1024;

/// A head, as the others know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its id in Raft.
    pub raft_id: u64,
    /// Its name, for people.
    pub name: String,
    /// Where its control API listens (`ip:port`).
    pub api_address: String,
    /// Where it takes QUIC connections (`ip:port`).
    pub cluster_address: String,
}

/// The group as one head knows it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GroupView {
    /// The Raft ids of those that vote.
    pub voters: Vec<u64>,
    /// The Raft ids of those that only follow.
    pub learners: Vec<u64>,
    /// The table, by Raft id.
    pub members: Vec<Member>,
    /// Ids that were removed.
    pub removed: Vec<u64>,
}

impl GroupView {
    pub(super) fn of(reader: &dyn Reader, conf_state: &ConfState) -> Arc<Self> {
        Arc::new(GroupView {
            voters: conf_state.voters.clone(),
            learners: conf_state.learners.clone(),
            members: members(reader),
            removed: removed(reader),
        })
    }

    /// What the table says about `raft_id`.
    #[must_use]
    pub fn member(&self, raft_id: u64) -> Option<&Member> {
        self.members.iter().find(|member| member.raft_id == raft_id)
    }

    /// Whether it votes or learns.
    #[must_use]
    pub fn contains(&self, raft_id: u64) -> bool {
        self.voters.contains(&raft_id) || self.learners.contains(&raft_id)
    }
}

/// What the module applies. The numbers are persisted: new ones go at the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum HeadCommand {
    /// Gives out a Raft id: the answer is this command's index, big endian.
    Allocate,
    /// A member says where it is.
    SetAddress(Member),
    /// The group was restored from a backup: its members of before are removed, in a group of its own.
    Restored,
    /// A call that changes no table, and is to have a record in the audit log.
    Noted {
        /// What it is about.
        subject: String,
    },
}

impl HeadCommand {
    pub(crate) fn encode(&self) -> Vec<u8> {
        codec::encode_plain(self)
    }
}

/// The id that an applied [`HeadCommand::Allocate`] answered with.
pub(crate) fn allocated_id(response: &[u8]) -> Option<u64> {
    response.try_into().ok().map(u64::from_be_bytes)
}

/// The module of the members table.
pub(crate) struct HeadsModule;

impl StateModule for HeadsModule {
    fn id(&self) -> ModuleId {
        ModuleId::HEADS
    }

    fn name(&self) -> &'static str {
        "heads"
    }

    fn apply(
        &self,
        context: &ApplyContext,
        txn: &mut dyn Txn,
        payload: &[u8],
    ) -> Result<Applied, Rejection> {
        let response = match decode(payload)? {
            HeadCommand::Allocate => context.index.to_be_bytes().to_vec(),
            HeadCommand::SetAddress(member) => {
                refuse_removed(txn, member.raft_id)?;
                put(txn, &member)?;
                Vec::new()
            }
            HeadCommand::Restored => {
                for member in members(txn) {
                    remove(txn, member.raft_id);
                }
                Vec::new()
            }
            HeadCommand::Noted { .. } => Vec::new(),
        };
        Ok(Applied {
            response,
            effects: Vec::new(),
        })
    }

    fn subject(&self, payload: &[u8], response: Option<&[u8]>) -> String {
        match (decode(payload), response.and_then(allocated_id)) {
            (Ok(HeadCommand::Allocate), Some(raft_id)) => format!("a new head, {raft_id}"),
            (Ok(HeadCommand::Allocate), None) => "a new head".to_owned(),
            (Ok(HeadCommand::SetAddress(member)), _) => {
                format!("head {} ({})", member.raft_id, member.name)
            }
            (Ok(HeadCommand::Restored), _) => "a backup".to_owned(),
            (Ok(HeadCommand::Noted { subject }), _) => subject,
            (Err(_), _) => self.name().to_owned(),
        }
    }

    fn query(&self, _: &dyn Reader, _: u64, _: &[u8]) -> Result<Vec<u8>, Rejection> {
        Err(Rejection::invalid(
            "the heads are asked for with ListHeads, not with Query",
        ))
    }

    fn authorize(&self, caller: &Caller, _: &[u8]) -> Result<(), Rejection> {
        match caller {
            Caller::Head => Ok(()),
            _ => Err(Rejection::new(
                ErrorCode::PermissionDenied,
                "only heads change the table of heads",
            )),
        }
    }
}

fn decode(payload: &[u8]) -> Result<HeadCommand, Rejection> {
    codec::decode(payload, ROW_BYTES_MAX).map_err(|error| Rejection::invalid(error.to_string()))
}

fn put(txn: &mut dyn Txn, member: &Member) -> Result<(), Rejection> {
    let key = member.raft_id.to_be_bytes();
    if txn.get(MEMBERS, &key).is_none() && members(txn).len() >= MEMBERS_MAX {
        return Err(Rejection::new(
            ErrorCode::Overloaded,
            format!("there are {MEMBERS_MAX} heads, the most there may be: remove one first"),
        ));
    }
    txn.put(MEMBERS, &key, codec::encode_plain(member));
    Ok(())
}

fn refuse_removed(reader: &dyn Reader, raft_id: u64) -> Result<(), Rejection> {
    let was_removed = reader.get(REMOVED, &raft_id.to_be_bytes()).is_some();
    if !was_removed || is_planted(Mutant::RemovedRejoins) {
        return Ok(());
    }
    Err(Rejection::new(
        ErrorCode::FailedPrecondition,
        format!(
            "head {raft_id} was removed from the group, and an id never comes back: empty its \
             data directory and join again with a new token"
        ),
    ))
}

/// Takes a member out of the table, and remembers that it was removed.
fn remove(txn: &mut dyn Txn, raft_id: u64) {
    txn.delete(MEMBERS, &raft_id.to_be_bytes());
    let known = removed(txn);
    if known.len() >= REMOVED_MAX
        && let Some(oldest) = known.first()
    {
        txn.delete(REMOVED, &oldest.to_be_bytes());
    }
    txn.put(REMOVED, &raft_id.to_be_bytes(), Vec::new());
}

fn members(reader: &dyn Reader) -> Vec<Member> {
    let rows = reader.scan(MEMBERS, &[], None, MEMBERS_MAX);
    rows.iter()
        .filter_map(|(_, value)| codec::decode(value, ROW_BYTES_MAX).ok())
        .collect()
}

fn removed(reader: &dyn Reader) -> Vec<u64> {
    let rows = reader.scan(REMOVED, &[], None, REMOVED_MAX);
    rows.into_iter()
        .filter_map(|(key, _)| key.try_into().ok().map(u64::from_be_bytes))
        .collect()
}

/// A change of the group: one member at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum GroupChange {
    /// A new head follows, and does not vote yet.
    AddLearner(Member),
    /// A learner votes from now on.
    Promote(u64),
    /// A head is no member any more.
    Remove(u64),
}

/// What an entry with a change carries beside Raft's own part of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct ChangeNote {
    /// Tells this proposal from another one at the same index.
    nonce: u64,
    /// The new member's row.
    member: Option<Member>,
    /// Whose call it comes of.
    origin: Option<Origin>,
}

impl GroupChange {
    fn raft_id(&self) -> u64 {
        match self {
            GroupChange::AddLearner(member) => member.raft_id,
            GroupChange::Promote(raft_id) | GroupChange::Remove(raft_id) => *raft_id,
        }
    }

    /// The entry's context and Raft's part of it.
    pub(super) fn to_raft(&self, nonce: u64, origin: Option<Origin>) -> (Vec<u8>, ConfChange) {
        let (change_type, member) = match self {
            GroupChange::AddLearner(member) => {
                (ConfChangeType::AddLearnerNode, Some(member.clone()))
            }
            GroupChange::Promote(_) => (ConfChangeType::AddNode, None),
            GroupChange::Remove(_) => (ConfChangeType::RemoveNode, None),
        };
        let mut change = ConfChange {
            node_id: self.raft_id(),
            ..ConfChange::default()
        };
        change.set_change_type(change_type);
        let note = ChangeNote {
            nonce,
            member,
            origin,
        };
        (codec::encode_plain(&note), change)
    }
}

/// The nonce of the proposal whose entry has this context.
pub(super) fn nonce_of(context: &[u8]) -> Option<u64> {
    let note: ChangeNote = codec::decode(context, ROW_BYTES_MAX).ok()?;
    Some(note.nonce)
}

/// Whose call the change comes of whose entry has this context.
pub(super) fn origin_of(context: &[u8]) -> Option<Origin> {
    let note: ChangeNote = codec::decode(context, ROW_BYTES_MAX).ok()?;
    note.origin
}

/// Raft's configuration, as apply changes it.
pub(crate) trait Configuration {
    /// As it is now.
    fn state(&self) -> ConfState;
    /// Changes it; refuses what would leave no voter.
    fn change(&mut self, change: &ConfChange) -> Result<(), String>;
}

/// What a change is about, for the audit log.
pub(super) fn subject_of(change: &ConfChange, context: &[u8]) -> String {
    let raft_id = change.node_id;
    let note: Option<ChangeNote> = codec::decode(context, ROW_BYTES_MAX).ok();
    match note.and_then(|note| note.member) {
        Some(member) => format!("head {raft_id} ({})", member.name),
        None => format!("head {raft_id}"),
    }
}

/// Applies a change to configuration and table, or to neither. Every replica decides alike: the
/// decision rests on the two only.
pub(super) fn apply_change(
    configuration: &mut dyn Configuration,
    txn: &mut dyn Txn,
    change: &ConfChange,
    context: &[u8],
) -> Result<(), Rejection> {
    let raft_id = change.node_id;
    let state = configuration.state();
    let is_voter = state.voters.contains(&raft_id);
    let is_learner = state.learners.contains(&raft_id);
    let refused = |why: String| Err(Rejection::new(ErrorCode::FailedPrecondition, why));
    let note: Option<ChangeNote> = codec::decode(context, ROW_BYTES_MAX).ok();
    match change.get_change_type() {
        ConfChangeType::AddLearnerNode => {
            refuse_removed(txn, raft_id)?;
            if is_voter || is_learner {
                return Ok(());
            }
            if let Some(member) = note.and_then(|note| note.member) {
                put(txn, &member)?;
            }
        }
        ConfChangeType::AddNode if is_voter => return Ok(()),
        ConfChangeType::AddNode if !is_learner => {
            return refused(format!(
                "head {raft_id} is no learner: it joins first, and is promoted once it has \
                 caught up"
            ));
        }
        ConfChangeType::AddNode => {}
        ConfChangeType::RemoveNode if !is_voter && !is_learner => {
            return refused(format!("head {raft_id} is not in the group"));
        }
        ConfChangeType::RemoveNode => remove(txn, raft_id),
    }
    // Last, because what it refuses must leave no row: the caller discards the writes then.
    configuration
        .change(change)
        .or_else(|reason| refused(format!("the group cannot be changed so: {reason}")))
}
