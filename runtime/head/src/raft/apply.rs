//! Applies committed entries to the tables: sessions in front, modules behind, all pure.

use std::collections::BTreeMap;
use std::sync::Arc;

use mobula_core::codec;
use mobula_core::control::{
    Applied, ApplyContext, Command, Effect, ModuleId, Reader, StateModule, Subject, Table, Txn,
};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::SessionId;
use mobula_core::mutant::{Mutant, is_planted};
use mobula_scheduler::session::{self, Seen};
use mobula_storage::engine::{Engine, Read, WriteBatch};
use mobula_storage::raft_log::decode_raft;
use mobula_storage::tables::{ApplyBatch, TablesReader};
use raft::prelude::{ConfChange, Entry, EntryType};

use super::membership::{self, Configuration};
use super::proposals::TableView;
use crate::audit;

/// The head's own table: what is about the log rather than about any module.
const HEAD_TABLE: Table = Table {
    module: ModuleId::HEADS,
    tag: 0,
};

/// The key under which the newest time in the log is kept.
const LOG_TIME_KEY: &[u8] = b"log_time_ms";

/// The key under which the chain of hashes over all writes is kept.
const STATE_CHAIN_KEY: &[u8] = b"state_chain";

/// Before a module's number: the key under which the index is kept of the entry that changed the module
/// last.
const REVISION_KEY: &[u8] = b"revision/";

/// The largest command that is decoded; far above what the API lets in.
const COMMAND_BYTES_MAX: usize = 8 * 1024 * 1024;

/// The largest stored answer.
const RESPONSE_BYTES_MAX: usize = 8 * 1024 * 1024;

/// The longest text of a refusal: sessions keep them as answers (640 000 of them at the most, 312 MiB), and some repeat
/// what was asked for.
const REFUSAL_BYTES_MAX: usize = 512;

/// What one entry did.
pub(crate) struct AppliedEntry {
    pub(crate) index: u64,
    pub(crate) term: u64,
    pub(crate) result: Result<Vec<u8>, Rejection>,
}

/// What an entry did that was, or might have been, a change of the group.
pub(crate) struct AppliedChange {
    pub(crate) index: u64,
    /// Of the proposal; `None` for an entry that changes nothing, such as what raft makes of a
    /// change while another is pending.
    pub(crate) nonce: Option<u64>,
    pub(crate) result: Result<(), Rejection>,
}

/// What a replica's state is after an entry: a hash over everything that the entries up to there
/// wrote, and so over what the tables hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StateAt {
    pub(crate) index: u64,
    pub(crate) hash: [u8; 32],
}

/// What a run of entries did.
#[derive(Default)]
pub(crate) struct AppliedRun {
    pub(crate) outcomes: Vec<AppliedEntry>,
    pub(crate) changes: Vec<AppliedChange>,
    /// With the index of the entry that each is an effect of.
    pub(crate) effects: Vec<(u64, Effect)>,
    /// The state after each entry.
    pub(crate) states: Vec<StateAt>,
    /// Whether membership or its table may have changed.
    pub(crate) touches_group: bool,
}

/// Applies entries.
pub(crate) struct Applier<E> {
    engine: E,
    modules: BTreeMap<ModuleId, Arc<dyn StateModule>>,
}

impl<E: Engine> Applier<E> {
    pub(crate) fn new(engine: E, modules: BTreeMap<ModuleId, Arc<dyn StateModule>>) -> Self {
        Applier { engine, modules }
    }

    /// The tables as they are now.
    pub(crate) fn reader(&self) -> TableView<E::Snapshot> {
        TablesReader::new(self.engine.snapshot())
    }

    /// Applies `entries` in order; their writes go into `target`, changes of the group also into
    /// `configuration`.
    pub(crate) fn apply(
        &self,
        entries: &[Entry],
        configuration: &mut dyn Configuration,
        target: &mut WriteBatch,
    ) -> AppliedRun {
        let mut batch = ApplyBatch::new(&self.engine);
        let mut run = AppliedRun::default();
        let mut chain = state_chain(&batch);
        for entry in entries {
            // The type first: entries without data may still be changes.
            match entry.get_entry_type() {
                EntryType::EntryNormal if entry.data.is_empty() => {
                    // A new leader's first entry, or a change that raft refused.
                    run.changes.push(AppliedChange {
                        index: entry.index,
                        nonce: None,
                        result: Ok(()),
                    });
                }
                EntryType::EntryNormal => {
                    let result = self.apply_one(entry, &mut batch, &mut run.touches_group);
                    let result = result.map(|applied| {
                        let effects = applied.effects.into_iter();
                        run.effects
                            .extend(effects.map(|effect| (entry.index, effect)));
                        applied.response
                    });
                    run.outcomes.push(AppliedEntry {
                        index: entry.index,
                        term: entry.term,
                        result,
                    });
                }
                EntryType::EntryConfChange => {
                    run.touches_group = true;
                    run.changes.push(AppliedChange {
                        index: entry.index,
                        nonce: membership::nonce_of(&entry.context),
                        result: apply_change(entry, configuration, &mut batch),
                    });
                }
                EntryType::EntryConfChangeV2 => {
                    tracing::error!(index = entry.index, "no head proposes joint changes");
                }
            }
            chain = chained(&chain, entry.index, &batch.take_writes_hash());
            run.states.push(StateAt {
                index: entry.index,
                hash: chain,
            });
        }
        if !entries.is_empty() {
            let mut txn = batch.begin();
            txn.put(HEAD_TABLE, STATE_CHAIN_KEY, chain.to_vec());
            txn.commit();
        }
        batch.write_into(target);
        run
    }

    fn apply_one(
        &self,
        entry: &Entry,
        batch: &mut ApplyBatch<&E>,
        touches_group: &mut bool,
    ) -> Result<Applied, Rejection> {
        let command: Command = codec::decode(&entry.data, COMMAND_BYTES_MAX)
            .map_err(|error| Rejection::new(ErrorCode::Internal, error.to_string()))?;
        *touches_group |= command.module == ModuleId::HEADS;
        let now_ms = advance_log_time(batch, command.now_ms);
        let mut txn = batch.begin();
        match session::check(&txn, command.session, command.seq, now_ms) {
            Seen::Fresh => {}
            Seen::Duplicate(_) if is_planted(Mutant::SessionUnchecked) => {}
            Seen::Expired if is_planted(Mutant::ExpiredSessionRuns) => {}
            Seen::Duplicate(stored) => {
                return Ok(Applied {
                    response: replay(&stored)?,
                    effects: vec![],
                });
            }
            Seen::Expired => {
                return Err(Rejection::new(
                    ErrorCode::SessionExpired,
                    format!(
                        "{} has expired or command {} is too old for it: open a new session; \
                         whether the command was applied before is not known any more",
                        command.session, command.seq
                    ),
                ));
            }
        }
        let Some(module) = self.modules.get(&command.module) else {
            return Err(Rejection::not_found(format!(
                "no module has id {}",
                command.module.0
            )));
        };
        let context = ApplyContext {
            index: entry.index,
            term: entry.term,
            now_ms,
        };
        let origin = command.origin.as_ref();
        let outcome = module
            .apply_from(&context, origin, &mut txn, &command.payload)
            .map_err(shortened);
        // A refusal is an answer too: a retry must get the same one, without its writes.
        let mut txn = match &outcome {
            Ok(_) => txn,
            Err(_) => {
                txn.discard();
                batch.begin()
            }
        };
        if let Ok(applied) = &outcome {
            note_revision(&mut txn, entry.index, &applied.effects);
        }
        let answer = outcome.as_ref().map(|applied| &applied.response);
        if answer.is_ok() || !is_planted(Mutant::RefusalNotRecorded) {
            session::record(
                &mut txn,
                command.session,
                command.seq,
                now_ms,
                codec::encode_plain(&answer),
            );
        }
        let refused = outcome.as_ref().err();
        // Whoever has no token is nobody, and could fill the log.
        let is_known = refused.is_none_or(|why| why.code != ErrorCode::Unauthenticated);
        if let Some(origin) = command.origin.as_ref().filter(|_| is_known) {
            let response = answer.ok().map(Vec::as_slice);
            let call = audit::Call {
                origin,
                subject: module.subject(&command.payload, response),
                session: command.session,
                stamp: command.seq,
                refused,
            };
            audit::append(&mut txn, &context, call);
        }
        txn.commit();
        outcome
    }
}

/// A refused change leaves configuration and table as they are.
fn apply_change<R: Read>(
    entry: &Entry,
    configuration: &mut dyn Configuration,
    batch: &mut ApplyBatch<R>,
) -> Result<(), Rejection> {
    let change: ConfChange = decode_raft(&entry.data)
        .map_err(|error| Rejection::new(ErrorCode::Internal, error.to_string()))?;
    let mut txn = batch.begin();
    let result = membership::apply_change(configuration, &mut txn, &change, &entry.context);
    let mut txn = match &result {
        Ok(()) => txn,
        Err(_) => {
            txn.discard();
            batch.begin()
        }
    };
    if let Some(origin) = membership::origin_of(&entry.context) {
        let context = ApplyContext {
            index: entry.index,
            term: entry.term,
            now_ms: log_time_ms(&txn),
        };
        let call = audit::Call {
            origin: &origin,
            subject: membership::subject_of(&change, &entry.context),
            session: SessionId::INTERNAL,
            stamp: 0,
            refused: result.as_ref().err(),
        };
        audit::append(&mut txn, &context, call);
    }
    txn.commit();
    result
}

/// The refusal with the beginning of its text, where that is too long to be kept.
fn shortened(mut refusal: Rejection) -> Rejection {
    let text = &mut refusal.message;
    if text.len() > REFUSAL_BYTES_MAX {
        text.truncate(text.floor_char_boundary(REFUSAL_BYTES_MAX));
        text.push('…');
    }
    refusal
}

fn replay(stored: &[u8]) -> Result<Vec<u8>, Rejection> {
    codec::decode::<Result<Vec<u8>, Rejection>>(stored, RESPONSE_BYTES_MAX)
        .map_err(|error| Rejection::new(ErrorCode::Internal, error.to_string()))?
}

/// The hash over everything that was written so far. It is a row of the tables, so that snapshots and
/// backups carry it, and it becomes true with the writes that it is of.
pub(super) fn state_chain(reader: &dyn Reader) -> [u8; 32] {
    reader
        .get(HEAD_TABLE, STATE_CHAIN_KEY)
        .and_then(|bytes| bytes.try_into().ok())
        .unwrap_or_default()
}

/// The next link: the same on every replica, however many entries it applies at once.
fn chained(before: &[u8; 32], index: u64, writes: &[u8; 32]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(before);
    hasher.update(&index.to_be_bytes());
    hasher.update(writes);
    *hasher.finalize().as_bytes()
}

/// The newest time in the log.
pub(super) fn log_time_ms(reader: &dyn Reader) -> u64 {
    reader
        .get(HEAD_TABLE, LOG_TIME_KEY)
        .and_then(|bytes| bytes.try_into().ok().map(u64::from_be_bytes))
        .unwrap_or(0)
}

/// Which entry changed each module last. It is replicated, so that whoever watches a module may go on
/// at any head, after any restart, behind the last change that it saw.
pub(crate) fn module_revisions(reader: &dyn Reader) -> BTreeMap<ModuleId, u64> {
    let rows = reader.scan(HEAD_TABLE, REVISION_KEY, None, usize::from(u8::MAX) + 1);
    rows.into_iter()
        .filter_map(|(key, value)| {
            let module = ModuleId(*key.strip_prefix(REVISION_KEY)?.first()?);
            Some((module, u64::from_be_bytes(value.try_into().ok()?)))
        })
        .collect()
}

fn note_revision(txn: &mut dyn Txn, index: u64, effects: &[Effect]) {
    if is_planted(Mutant::RevisionForgotten) {
        return;
    }
    for effect in effects {
        if let Effect::Changed(Subject::Module(module)) = effect {
            let key = [REVISION_KEY, &[module.0]].concat();
            txn.put(HEAD_TABLE, &key, index.to_be_bytes().to_vec());
        }
    }
}

/// Log time never goes back, whatever a new leader's clock says.
fn advance_log_time<R: Read>(batch: &mut ApplyBatch<R>, stamped_ms: u64) -> u64 {
    let newest = log_time_ms(batch);
    if stamped_ms > newest {
        let mut txn = batch.begin();
        txn.put(HEAD_TABLE, LOG_TIME_KEY, stamped_ms.to_be_bytes().to_vec());
        txn.commit();
    }
    if is_planted(Mutant::LogTimeGoesBack) {
        return stamped_ms;
    }
    stamped_ms.max(newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_that_repeats_a_large_command_is_kept_short() {
        let refused = |text: String| shortened(Rejection::invalid(text)).message;
        assert_eq!(refused("too many".to_owned()), "too many");
        // Two bytes a character, behind one: the limit is inside of one.
        let cut = refused(format!("x{}", "ä".repeat(REFUSAL_BYTES_MAX)));
        assert_eq!(cut.len(), REFUSAL_BYTES_MAX - 1 + '…'.len_utf8());
        assert!(cut.ends_with("ä…"));
    }
}
