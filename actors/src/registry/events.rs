//! The registry's audit log: one entry of each change, written by the apply of the change itself.
//!
//! An entry is a line of JSON. Entries form a chain, in which each hash covers the one before, and the
//! leaves of a hash tree (RFC 6962), so that one entry can be proved to be in the log without the others.
//! The text of the oldest entries goes when there are [`EVENTS_MAX`]; of the tree stays what proofs of the
//! later ones need, so its root still covers all that ever was.
//!
//! The head's own audit log (`mobula audit`) says in whose name a call came and what was refused; both name
//! the entry of the Raft log.
//!
//! Invariants:
//! 1. An entry exists exactly when its change took effect, and never changes.
//! 2. Sequence numbers begin at 1 and have no gaps; entry `n` is leaf `n - 1`.
//! 3. An entry holds names, digests, public keys and signatures: no secret, no bytes of a model.

use std::collections::BTreeSet;

use mobula_core::control::{ApplyContext, Reader, Txn};
use mobula_core::error::Rejection;
use mobula_core::row;
use serde::{Deserialize, Serialize};

use super::merkle::{self, Hash};
use super::policy::gate::Decision;
use super::tables::{ENDS, ENDS_KEY, EVENTS, TREE, subtree_key};

/// Entries that are kept with their text: at 1 to 20 KiB each (one that sets policies has their
/// text, of up to 32) some 100 MiB, which a snapshot carries. Whoever
/// wants more exports them (`mobula audit export`).
pub const EVENTS_MAX: u64 = 50_000;

/// Entries in one answer, and bytes of them: an answer has 4 MiB at the most.
const PAGE_EVENTS: usize = 1_000;
const PAGE_BYTES: usize = 2 << 20;

/// A change, as its entry tells it.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum Event<'a> {
    /// A version was registered.
    Registered {
        model: &'a str,
        version: u64,
        digest: &'a str,
        dataset_blake3: &'a str,
        job: u64,
    },
    /// A version changed its stage.
    Staged {
        model: &'a str,
        version: u64,
        from: &'a str,
        to: &'a str,
        /// The version that left production by this.
        replaces: Option<u64>,
        revision: u64,
        signers: &'a [String],
        envelopes: Vec<serde_json::Value>,
        /// What the policies said; absent for what they are not asked about.
        #[serde(skip_serializing_if = "Option::is_none")]
        gate: Option<&'a Decision>,
    },
    /// An alias was moved, made or removed.
    Aliased {
        model: &'a str,
        alias: &'a str,
        from: Option<u64>,
        to: Option<u64>,
        revision: u64,
    },
    /// A tag was set or removed.
    Tagged {
        model: &'a str,
        version: u64,
        tag: &'a str,
        value: Option<&'a str>,
    },
    /// How many signatures a model needs was changed.
    PolicySet {
        model: &'a str,
        risk: &'a str,
        signatures: u32,
        revision: u64,
        signers: &'a [String],
        envelopes: Vec<serde_json::Value>,
    },
    /// A key may sign from now on.
    KeyAdded {
        key: &'a str,
        public_key: String,
        roles: Vec<&'static str>,
        owner: &'a str,
        #[serde(skip_serializing_if = "<[String]>::is_empty")]
        signers: &'a [String],
        #[serde(skip_serializing_if = "Vec::is_empty")]
        envelopes: Vec<serde_json::Value>,
    },
    /// A key may sign no more.
    KeyRevoked {
        key: &'a str,
        reason: &'a str,
        #[serde(skip_serializing_if = "<[String]>::is_empty")]
        signers: &'a [String],
        #[serde(skip_serializing_if = "Vec::is_empty")]
        envelopes: Vec<serde_json::Value>,
    },
    /// Other policies count from now on.
    PolicyFileSet {
        revision: u64,
        policies: &'a [String],
        text: &'a str,
        signers: &'a [String],
        envelopes: Vec<serde_json::Value>,
    },
    /// Data was labelled.
    DataLabelled {
        data: &'a str,
        name: &'a str,
        labels: &'a BTreeSet<String>,
        revision: u64,
        signers: &'a [String],
        envelopes: Vec<serde_json::Value>,
    },
    /// Something was approved, or approvals were withdrawn.
    Approved {
        subject: &'a str,
        withdrawn: bool,
        principal: &'a str,
        reason: &'a str,
        revision: u64,
        signers: &'a [String],
        envelopes: Vec<serde_json::Value>,
    },
    /// The policies were asked.
    GateDecided {
        /// Of a training: the job.
        #[serde(skip_serializing_if = "Option::is_none")]
        job: Option<u64>,
        gate: &'a Decision,
    },
    /// A retraining of an endpoint's model took a step.
    Retraining(Retrained<'a>),
    /// A rollout ended, or was taken back.
    Rollout(RolloutEnded<'a>),
    /// An experiment ended.
    Experiment(ExperimentEnded<'a>),
}

/// A step of a retraining, as its entry tells it.
#[derive(Debug, Serialize)]
pub(crate) struct Retrained<'a> {
    /// The endpoint that drifted.
    pub(crate) endpoint: &'a str,
    /// The retraining's number there.
    pub(crate) number: u64,
    /// The endpoint's model.
    pub(crate) model: &'a str,
    /// The job that trains, once there is one.
    pub(crate) job: Option<u64>,
    /// The version that it registered, once there is one.
    pub(crate) version: Option<u64>,
    /// The phase that was entered.
    pub(crate) phase: &'a str,
    /// Why.
    pub(crate) reason: &'a str,
}

/// How a rollout ended, as its entry tells it.
#[derive(Debug, Serialize)]
pub(crate) struct RolloutEnded<'a> {
    /// The endpoint.
    pub(crate) endpoint: &'a str,
    /// The rollout's number there.
    pub(crate) number: u64,
    /// The endpoint's model.
    pub(crate) model: &'a str,
    /// The version of before.
    pub(crate) stable: u64,
    /// The version that was tried.
    pub(crate) candidate: u64,
    /// How it went on.
    pub(crate) strategy: &'a str,
    /// At which step it was, counted from 0.
    pub(crate) step: u32,
    /// `promoted`, `aborted` or `rolled_back`.
    pub(crate) outcome: &'a str,
    /// Why.
    pub(crate) reason: &'a str,
}

/// How an experiment ended, as its entry tells it.
#[derive(Debug, Serialize)]
pub(crate) struct ExperimentEnded<'a> {
    /// The endpoint.
    pub(crate) endpoint: &'a str,
    /// The experiment's number there.
    pub(crate) number: u64,
    /// The endpoint's model.
    pub(crate) model: &'a str,
    /// The endpoint's version.
    pub(crate) control: u64,
    /// The version that it was compared with.
    pub(crate) treatment: u64,
    /// BLAKE3 of the plan.
    pub(crate) plan_blake3: String,
    /// Why it is over: `decided`, `exhausted`, `guardrail`, `unfit`, `stopped` or `sentinel`.
    pub(crate) outcome: &'a str,
    /// What the numbers say by then: `control`, `treatment` or `undecided`.
    pub(crate) decision: &'a str,
    /// Why.
    pub(crate) reason: &'a str,
}

/// An entry's text.
#[derive(Serialize)]
struct Entry<'a> {
    sequence: u64,
    /// The entry of the Raft log.
    index: u64,
    time_ms: u64,
    #[serde(flatten)]
    event: &'a Event<'a>,
}

/// An entry as it is stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredEvent {
    /// Its number.
    pub sequence: u64,
    /// One line of JSON.
    pub text: String,
    /// [`merkle::leaf`] of the text.
    pub leaf: Hash,
    /// [`merkle::chained`] behind the entry before.
    pub chain: Hash,
}

/// Where the log begins and ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ends {
    /// Entries that were dropped; the first that is kept has the number behind.
    pub dropped: u64,
    /// The chain's hash of the last one that was dropped; zeros if none was.
    pub anchor: Hash,
    /// Entries that ever were.
    pub size: u64,
    /// The chain's hash of the last one.
    pub chain: Hash,
}

/// A page of the log, and what its end is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventPage {
    /// Where the log begins and ends.
    pub ends: Ends,
    /// The root of the tree over all entries.
    pub root: Hash,
    /// The peaks of the tree over the dropped entries, from the left.
    pub before: Vec<Hash>,
    /// The entries; none behind the last.
    pub events: Vec<StoredEvent>,
}

/// One entry with the proof that it is in the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventProof {
    /// The entry.
    pub event: StoredEvent,
    /// Entries of the log that has the root.
    pub size: u64,
    /// That log's root.
    pub root: Hash,
    /// The siblings on the way from the leaf to the root.
    pub path: Vec<Hash>,
}

/// Where the log begins and ends now.
pub(super) fn ends(reader: &dyn Reader) -> Ends {
    row::get(reader, ENDS, ENDS_KEY).unwrap_or_default()
}

/// Writes a change's entry. To be called within the command that makes the change.
pub(super) fn append(txn: &mut dyn Txn, context: &ApplyContext, event: &Event<'_>) {
    append_within(txn, context, event, EVENTS_MAX);
}

/// Writes the entry of a retraining's step, within the command that takes it.
pub(crate) fn retrained(txn: &mut dyn Txn, context: &ApplyContext, step: Retrained<'_>) {
    append(txn, context, &Event::Retraining(step));
}

/// Writes the entry of a rollout's end, within the command that ends it.
pub(crate) fn rollout_ended(txn: &mut dyn Txn, context: &ApplyContext, ended: RolloutEnded<'_>) {
    append(txn, context, &Event::Rollout(ended));
}

/// Writes the entry of an experiment's end, within the command that ends it.
pub(crate) fn experiment_ended(
    txn: &mut dyn Txn,
    context: &ApplyContext,
    ended: ExperimentEnded<'_>,
) {
    append(txn, context, &Event::Experiment(ended));
}

fn append_within(txn: &mut dyn Txn, context: &ApplyContext, event: &Event<'_>, events_max: u64) {
    let mut ends = ends(txn);
    let entry = Entry {
        sequence: ends.size + 1,
        index: context.index,
        time_ms: context.now_ms,
        event,
    };
    let text = serde_json::to_string(&entry).expect("texts and numbers always encode");
    let leaf = merkle::leaf(text.as_bytes());
    let stored = StoredEvent {
        sequence: entry.sequence,
        text,
        leaf,
        chain: merkle::chained(&ends.chain, &leaf),
    };
    row::put(txn, EVENTS, &stored.sequence.to_be_bytes(), &stored);
    add_leaf(txn, ends.size, leaf);
    ends.size += 1;
    ends.chain = stored.chain;
    // One goes for each that comes.
    if ends.size - ends.dropped > events_max {
        drop_oldest(txn, &mut ends);
    }
    row::put(txn, ENDS, ENDS_KEY, &ends);
}

/// Adds leaf `index`, and each subtree that it completes.
fn add_leaf(txn: &mut dyn Txn, index: u64, leaf: Hash) {
    let (mut level, mut index, mut hash) = (0, index, leaf);
    row::put(txn, TREE, &subtree_key(level, index), &hash);
    while index & 1 == 1 {
        hash = merkle::node(&subtree(txn, level, index - 1), &hash);
        (level, index) = (level + 1, index >> 1);
        row::put(txn, TREE, &subtree_key(level, index), &hash);
    }
}

fn subtree(reader: &dyn Reader, level: u8, index: u64) -> Hash {
    row::get(reader, TREE, &subtree_key(level, index)).expect("no subtree is dropped too early")
}

/// Drops the oldest entry's text, and the subtrees that nothing needs any more: those within a larger one
/// of which all entries were dropped.
fn drop_oldest(txn: &mut dyn Txn, ends: &mut Ends) {
    let key = (ends.dropped + 1).to_be_bytes();
    let oldest: StoredEvent = row::get(txn, EVENTS, &key).expect("entries have no gaps");
    txn.delete(EVENTS, &key);
    ends.anchor = oldest.chain;
    ends.dropped += 1;
    for level in 0..u8::try_from(ends.dropped.trailing_zeros()).expect("64 at the most") {
        let last = (ends.dropped >> level) - 1;
        txn.delete(TREE, &subtree_key(level, last));
        txn.delete(TREE, &subtree_key(level, last - 1));
    }
}

fn peaks(reader: &dyn Reader, size: u64) -> Vec<Hash> {
    merkle::peaks(size)
        .map(|(level, index)| subtree(reader, level, index))
        .collect()
}

/// The entries from number `from` on, a page of them.
pub(super) fn page(reader: &dyn Reader, from: u64) -> EventPage {
    let ends = ends(reader);
    let after = from.max(ends.dropped + 1) - 1;
    let rows = reader.scan(EVENTS, &[], Some(&after.to_be_bytes()), PAGE_EVENTS);
    let mut bytes_left = PAGE_BYTES;
    let events = rows
        .iter()
        .map_while(|(_, bytes)| {
            bytes_left = bytes_left.checked_sub(bytes.len())?;
            Some(row::from_bytes(EVENTS, bytes))
        })
        .collect();
    EventPage {
        root: merkle::root(&peaks(reader, ends.size)),
        before: peaks(reader, ends.dropped),
        ends,
        events,
    }
}

/// The proof that entry `sequence` is in the log.
pub(super) fn proof(reader: &dyn Reader, sequence: u64) -> Result<EventProof, Rejection> {
    let ends = ends(reader);
    let Some(event) = row::get(reader, EVENTS, &sequence.to_be_bytes()) else {
        return Err(Rejection::not_found(format!(
            "the registry's log has no entry {sequence}: it holds {} to {}",
            ends.dropped + 1,
            ends.size
        )));
    };
    let subtree = |level: u8, index: u64| subtree(reader, level, index);
    Ok(EventProof {
        event,
        size: ends.size,
        root: merkle::root(&peaks(reader, ends.size)),
        path: merkle::prove(sequence - 1, ends.size, &subtree),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_scheduler::memory_txn::MemoryTables;

    fn grown(count: u64, events_max: u64) -> MemoryTables {
        let mut tables = MemoryTables::default();
        for number in 1..=count {
            let context = ApplyContext {
                index: 10 * number,
                term: 1,
                now_ms: 100 * number,
            };
            let event = Event::KeyRevoked {
                key: "k",
                reason: "lost",
                signers: &[],
                envelopes: Vec::new(),
            };
            append_within(&mut tables, &context, &event, events_max);
        }
        tables
    }

    /// Every entry that is kept is proved, chained, and counted; what is left of the tree is bounded.
    fn check(tables: &MemoryTables, count: u64, events_max: u64) {
        let page = page(tables, 0);
        assert_eq!(page.ends.size, count);
        let kept = count.min(events_max);
        assert_eq!(page.events.len() as u64, kept);
        let mut chain = page.ends.anchor;
        let mut tree = merkle::Frontier::new(page.ends.dropped, page.before.clone()).unwrap();
        for event in &page.events {
            assert_eq!(event.leaf, merkle::leaf(event.text.as_bytes()));
            chain = merkle::chained(&chain, &event.leaf);
            assert_eq!(event.chain, chain);
            tree.push(event.leaf);
            let proof = proof(tables, event.sequence).unwrap();
            let root =
                merkle::root_of_proof(event.leaf, event.sequence - 1, proof.size, &proof.path);
            assert_eq!(root, Some(page.root), "{}", event.sequence);
        }
        assert_eq!((tree.root(), chain), (page.root, page.ends.chain));
        let bound = usize::try_from(3 * kept).unwrap() + 2 * 64 + 1;
        assert!(tables.row_count() <= bound, "{}", tables.row_count());
    }

    #[test]
    fn entries_are_chained_and_proved_also_when_older_ones_are_gone() {
        for count in 0..40 {
            for events_max in [1, 2, 7, 8, 100] {
                check(&grown(count, events_max), count, events_max);
            }
        }
    }

    #[test]
    fn the_root_covers_what_was_dropped() {
        let (all, few) = (grown(37, 100), grown(37, 5));
        assert_eq!(page(&all, 0).root, page(&few, 0).root);
        let error = proof(&few, 32).unwrap_err();
        assert!(error.message.contains("33 to 37"), "{error}");
        assert!(proof(&all, 38).is_err());
        assert!(proof(&all, 0).is_err());
    }

    #[test]
    fn an_entry_says_what_when_and_where() {
        let tables = grown(2, 10);
        let found = page(&tables, 2);
        assert_eq!(
            found.events[0].text,
            r#"{"sequence":2,"index":20,"time_ms":200,"event":"key_revoked","key":"k","reason":"lost"}"#
        );
        assert_eq!(page(&tables, 3).events, []);
    }
}
