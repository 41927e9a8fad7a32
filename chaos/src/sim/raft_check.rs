//! The omniscient checker of Raft: it sees every head's memory and disk, and every message at the
//! moment it is sent.
//!
//! What it holds against them (I16): one leader in a term · what is committed never changes, and is
//! the same everywhere · a vote or an acknowledgement is on the sender's disk when it leaves · a
//! member that was removed never comes back. And I12: equal applied index, equal tables, compared
//! with a state machine that applies each committed entry once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use mobula_core::codec;
use mobula_core::control::{Command, ModuleId, StateModule};
use mobula_core::error::Rejection;
use mobula_head::simulation::{HeadCore, Reference, rows_sum};
use mobula_storage::engine::{Engine, MemoryEngine, MemorySnapshot};
use mobula_storage::raft_log::LogView;
use raft::prelude::{ConfState, Entry, EntryType, Message, MessageType};

use super::model::Model;
use super::violation::Violation;

/// The largest command in a simulation.
const COMMAND_BYTES_MAX: usize = 1024 * 1024;

/// The first index that a command can have: a fresh group begins behind a bootstrap entry.
const FIRST_INDEX: u64 = mobula_storage::raft_log::BOOTSTRAP_INDEX + 1;

/// What a committed command was, and what became of it.
#[derive(Debug, Clone)]
pub(crate) struct Committed {
    pub(crate) term: u64,
    /// `None` for entries without a command.
    pub(crate) command: Option<Command>,
    pub(crate) result: Option<Result<Vec<u8>, Rejection>>,
    rows_sum: u64,
    data_hash: u64,
}

/// Everything that is known to be committed, and who led.
pub(crate) struct RaftChecker {
    leaders: BTreeMap<u64, u64>,
    committed: Vec<Committed>,
    reference: Reference,
    removed: BTreeSet<u64>,
    /// How many heads began to vote, and how many members went.
    group_changes: (u64, u64),
    /// The entries that changed each module.
    changes: BTreeMap<ModuleId, BTreeSet<u64>>,
    pub(crate) model: Model,
    /// Up to where each life of a head was compared.
    compared: BTreeMap<u64, (u64, u64)>,
}

impl RaftChecker {
    pub(crate) fn new(founder: u64, modules: &[Arc<dyn StateModule>]) -> Self {
        RaftChecker {
            leaders: BTreeMap::new(),
            committed: Vec::new(),
            reference: Reference::new(founder, modules),
            removed: BTreeSet::new(),
            group_changes: (0, 0),
            changes: BTreeMap::new(),
            model: Model::default(),
            compared: BTreeMap::new(),
        }
    }

    /// The last index that any head is known to have committed.
    pub(crate) fn last(&self) -> u64 {
        FIRST_INDEX - 1 + self.committed.len() as u64
    }

    /// What was committed at `index`.
    pub(crate) fn at(&self, index: u64) -> Option<&Committed> {
        let offset = usize::try_from(index.checked_sub(FIRST_INDEX)?).ok()?;
        self.committed.get(offset)
    }

    /// In how many terms somebody led.
    pub(crate) fn leader_count(&self) -> u64 {
        self.leaders.len() as u64
    }

    pub(crate) fn reference(&self) -> &Reference {
        &self.reference
    }

    /// A sum over the tables after everything that is committed.
    pub(crate) fn rows_sum(&self) -> u64 {
        self.reference.rows_sum()
    }

    /// A head begins a new life, from its disk. What is there must be a log: nobody but a leader of a
    /// later term replaces entries, and whatever it replaces goes with all behind it.
    pub(crate) fn restarted(&mut self, raft_id: u64, core: &HeadCore) -> Result<(), Violation> {
        self.compared.remove(&raft_id);
        let log = core.log();
        let mut before = log.truncated();
        for index in before.index + 1..=log.last().index {
            let rule = "a log has no holes, and its terms never go back (I16)";
            let entry = log.entry(index).map_err(|error| {
                let detail = format!("head {raft_id} starts without entry {index}: {error}");
                Violation::new(rule, detail)
            })?;
            if entry.term < before.term {
                let detail = format!(
                    "head {raft_id} starts with term {} at entry {index}, behind term {}",
                    entry.term, before.term
                );
                return Err(Violation::new(rule, detail));
            }
            before.term = entry.term;
        }
        Ok(())
    }

    /// Looks at a head after it has settled.
    pub(crate) fn look(
        &mut self,
        raft_id: u64,
        core: &HeadCore,
        engine: &MemoryEngine,
    ) -> Result<(), Violation> {
        let status = core.status();
        if status.leads {
            let leader = *self.leaders.entry(status.term).or_insert(raft_id);
            if leader != raft_id {
                return Err(Violation::new(
                    "one leader a term (I16)",
                    format!(
                        "heads {leader} and {raft_id} both lead in term {}",
                        status.term
                    ),
                ));
            }
        }
        check_end_of_log(raft_id, core, engine)?;
        let (committed, applied) = self.compared.get(&raft_id).copied().unwrap_or((0, 0));
        let from = (committed + 1).max(status.truncated + 1).max(FIRST_INDEX);
        for index in from..=status.committed {
            self.take_committed(raft_id, core, index)?;
        }
        if status.applied != applied {
            self.compare_tables(raft_id, engine, status.applied)?;
        }
        self.compared
            .insert(raft_id, (status.committed.max(committed), status.applied));
        Ok(())
    }

    fn take_committed(
        &mut self,
        raft_id: u64,
        core: &HeadCore,
        index: u64,
    ) -> Result<(), Violation> {
        let entry = core.log().entry(index).map_err(|error| {
            let detail = format!("head {raft_id} has committed entry {index} but not it: {error}");
            Violation::new("what is committed is there (I16)", detail)
        })?;
        if let Some(known) = self.at(index) {
            if (known.term, known.data_hash) == (entry.term, data_hash(&entry)) {
                return Ok(());
            }
            return Err(Violation::new(
                "what is committed never changes (I2, I16)",
                format!(
                    "head {raft_id} has committed term {} at entry {index}, where term {} was \
                     committed before",
                    entry.term, known.term
                ),
            ));
        }
        if index != self.last() + 1 {
            return Err(Violation::new(
                "what is committed has no holes (I16)",
                format!(
                    "head {raft_id} has committed entry {index}, and nobody the one after {}",
                    self.last()
                ),
            ));
        }
        self.append(index, &entry)
    }

    fn append(&mut self, index: u64, entry: &Entry) -> Result<(), Violation> {
        let before = self.reference.members().clone();
        let result = self.reference.apply(entry);
        self.count_changes(&before);
        for module in self.reference.changed() {
            self.changes.entry(*module).or_default().insert(index);
        }
        let command = match &result {
            Some(_) => codec::decode::<Command>(&entry.data, COMMAND_BYTES_MAX).ok(),
            None => None,
        };
        if let (Some(command), Some(result)) = (&command, &result) {
            self.model
                .observe(index, command, result, &self.reference.reader())?;
        }
        self.check_members()?;
        self.committed.push(Committed {
            term: entry.term,
            command,
            result,
            rows_sum: self.reference.rows_sum(),
            data_hash: data_hash(entry),
        });
        Ok(())
    }

    /// The newest entry that changed a module, of those up to `index`; 0 if none has.
    pub(crate) fn last_change(&self, module: ModuleId, index: u64) -> u64 {
        let changes = self.changes.get(&module);
        let newest = changes.and_then(|changes| changes.range(..=index).next_back());
        newest.copied().unwrap_or(0)
    }

    fn count_changes(&mut self, before: &ConfState) {
        let now = self.reference.members();
        let is_new = |id: &&u64| !before.voters.contains(id);
        let count = |members: &ConfState| members.voters.len() + members.learners.len();
        self.group_changes.0 += now.voters.iter().filter(is_new).count() as u64;
        self.group_changes.1 += count(before).saturating_sub(count(now)) as u64;
    }

    /// How many heads began to vote, and how many members went.
    pub(crate) fn group_changes(&self) -> (u64, u64) {
        self.group_changes
    }

    fn check_members(&self) -> Result<(), Violation> {
        let members = self.reference.members();
        let mut all = members.voters.iter().chain(&members.learners);
        match all.find(|id| self.removed.contains(id)) {
            None => Ok(()),
            Some(id) => Err(Violation::new(
                "a removed head never comes back",
                format!("head {id} was removed and is a member again"),
            )),
        }
    }

    /// The group was told that `raft_id` is removed.
    pub(crate) fn removed(&mut self, raft_id: u64) {
        self.removed.insert(raft_id);
    }

    fn compare_tables(
        &self,
        raft_id: u64,
        engine: &MemoryEngine,
        applied: u64,
    ) -> Result<(), Violation> {
        let found = rows_sum(&engine.snapshot());
        self.check_rows(applied, found, || format!("head {raft_id}"))
    }

    /// Compares tables at `applied` with what they must be there.
    pub(crate) fn check_rows(
        &self,
        applied: u64,
        found: u64,
        whose: impl Fn() -> String,
    ) -> Result<(), Violation> {
        let Some(known) = self.at(applied) else {
            return if applied < FIRST_INDEX {
                Ok(())
            } else {
                Err(Violation::new(
                    "only what is committed is applied (I16)",
                    format!("{} has applied entry {applied} of {}", whose(), self.last()),
                ))
            };
        };
        if known.rows_sum == found {
            return Ok(());
        }
        Err(Violation::new(
            "equal applied index, equal tables (I12)",
            format!(
                "the tables of {} at entry {applied} are not what its entries make",
                whose()
            ),
        ))
    }
}

/// Behind the last entry there is nothing on the disk: after a crash it would be the end of the log.
fn check_end_of_log(raft_id: u64, core: &HeadCore, engine: &MemoryEngine) -> Result<(), Violation> {
    let last = core.log().last().index;
    let log = LogView::new(engine.snapshot());
    match log.entry(last + 1).expect("memory can be read") {
        None => Ok(()),
        Some(entry) => Err(Violation::new(
            "a log ends on the disk where it ends (I16)",
            format!(
                "the log of head {raft_id} ends with entry {last}, and behind it one of term {} is on its \
                 disk",
                entry.term
            ),
        )),
    }
}

/// Whoever tells that a change of the group is committed knows it after a power cut too: the leader counts on
/// it when it answers.
fn check_told_changes(
    message: &Message,
    engine: &MemoryEngine,
    durable: &LogView<MemorySnapshot>,
) -> Result<(), Violation> {
    let kind = message.get_msg_type();
    if !matches!(
        kind,
        MessageType::MsgAppendResponse | MessageType::MsgHeartbeatResponse
    ) {
        return Ok(());
    }
    let applied = durable.applied().expect("memory can be read").index;
    let kept = durable.hard_state().expect("memory can be read").commit;
    if message.commit <= kept.max(applied) {
        return Ok(());
    }
    let log = LogView::new(engine.snapshot());
    for index in kept.max(applied) + 1..=message.commit {
        let entry = log.entry(index).expect("memory can be read");
        if entry.is_some_and(|entry| entry.get_entry_type() != EntryType::EntryNormal) {
            return Err(Violation::new(
                "a change of the group that is told of is known after a crash (I16)",
                format!(
                    "head {} tells that entry {index} is committed, a change of the group, and on its \
                     disk {} is committed",
                    message.from,
                    kept.max(applied)
                ),
            ));
        }
    }
    Ok(())
}

fn data_hash(entry: &Entry) -> u64 {
    let mut hash = u64::from(entry.entry_type.unsigned_abs()) ^ 0x517c_c1b7_2722_0a95;
    for chunk in entry.data.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        hash = (hash ^ u64::from_le_bytes(word))
            .wrapping_mul(0x517c_c1b7_2722_0a95)
            .rotate_left(31);
    }
    hash
}

/// Checks a message at the moment it leaves: what it promises must survive a power cut (I16).
pub(crate) fn check_promise(message: &Message, engine: &MemoryEngine) -> Result<(), Violation> {
    let durable = LogView::new(engine.durable());
    check_told_changes(message, engine, &durable)?;
    let fail = |detail: String| Err(Violation::new("persisted before sent (I16)", detail));
    match message.get_msg_type() {
        MessageType::MsgRequestVoteResponse if !message.reject => {
            let kept = durable.hard_state().expect("memory can be read");
            if (kept.term, kept.vote) == (message.term, message.to) || kept.term > message.term {
                return Ok(());
            }
            fail(format!(
                "head {} votes for {} in term {}, and on its disk are term {} and vote {}",
                message.from, message.to, message.term, kept.term, kept.vote
            ))
        }
        MessageType::MsgAppendResponse if !message.reject => {
            let kept = durable.hard_state().expect("memory can be read");
            if kept.term < message.term {
                return fail(format!(
                    "head {} acknowledges in term {}, and on its disk is term {}",
                    message.from, message.term, kept.term
                ));
            }
            let is_there = durable
                .entry(message.index)
                .expect("memory can be read")
                .is_some();
            let applied = durable.applied().expect("memory can be read").index;
            if is_there || message.index <= applied || message.index < FIRST_INDEX {
                return Ok(());
            }
            // A head that was stopped hears one leader and the next at once: what it acknowledges to the
            // first is replaced by the second in the same write.
            if kept.term > message.term {
                return Ok(());
            }
            fail(format!(
                "head {} acknowledges entry {} in term {}, which is not on its disk; there is term {}",
                message.from, message.index, message.term, kept.term
            ))
        }
        _ => Ok(()),
    }
}
