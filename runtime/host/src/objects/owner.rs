//! What an owner knows about its objects' holders in other processes.
//!
//! An object that never left the process is not in here at all: its handles count themselves.
//!
//! Invariants:
//! 1. A sent object stays in the table as long as it has a handle here, a holder, or a hold for a
//!    reference on its way.
//! 2. A holder is told of every borrowed object that settles, until it says that it has seen it.
//! 3. One question of a holder waits for an answer at a time; a newer one replaces it.
//! 4. A value is missing only for who looked for it where it is now: whoever comes later with an
//!    older place is told the newer one, or waits with the others.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use mobula_core::codec;
use mobula_core::object::{ObjectError, ObjectId, ProcessId};
use mobula_wire::object::{ANSWER_BYTES_MAX, CHANGES_MAX, Change, Next, Settled, WireValue};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::cell::{Cell, Outcome, Value};
use super::completer::Lineage;
use super::handle::Object;
use super::table::{HOLDER_LEASE, NEXT_WAIT, TRANSIT_MAX};
use crate::reply::Reply;

/// Borrows that came before the announcement of their transit, remembered per object: as many as
/// calls of one stream may be in flight.
const EARLY_MAX: usize = 2048;

/// One object of this process.
#[derive(Default)]
pub(crate) struct Entry {
    pub(crate) sequence: u64,
    pub(crate) cell: Cell,
    /// Whether a reference to it was ever sent: only then somebody else can hold it.
    pub(crate) is_sent: AtomicBool,
    /// Handles in this process.
    pub(crate) handles: AtomicUsize,
    /// Objects that its value refers to.
    pub(crate) contains: Mutex<Vec<Object>>,
    /// Creates a lost value anew.
    pub(crate) lineage: Mutex<Option<Arc<dyn Lineage>>>,
}

struct Sent {
    entry: Arc<Entry>,
    holders: BTreeSet<ProcessId>,
    transits: BTreeMap<u64, Instant>,
    early: BTreeSet<u64>,
}

impl Sent {
    fn is_needed(&self) -> bool {
        self.entry.handles.load(Ordering::Acquire) > 0
            || !self.holders.is_empty()
            || !self.transits.is_empty()
    }
}

struct Holder {
    borrowed: BTreeSet<u64>,
    /// What it was not told yet, or has not said it has seen.
    unseen: VecDeque<(u64, u64)>,
    number: u64,
    question: Option<(Reply, u64, Instant)>,
    heard: Instant,
}

/// The sent objects of a process.
#[derive(Default)]
pub(crate) struct OwnerTable(Mutex<Tables>);

#[derive(Default)]
struct Tables {
    sent: HashMap<u64, Sent>,
    holders: BTreeMap<ProcessId, Holder>,
}

/// What happened to objects, for the table to act on once the lock is free.
#[derive(Default)]
pub(crate) struct Aftermath {
    /// Freed: dropping them drops values and what those contain.
    pub(crate) freed: Vec<Arc<Entry>>,
    /// Holders did not find the bytes of these, where they are said to be.
    pub(crate) missing: Vec<(Arc<Entry>, Outcome)>,
    answers: Vec<(Reply, Vec<u8>)>,
}

impl Aftermath {
    /// Sends the answers; the rest is for the caller.
    pub(crate) fn send_answers(&mut self) {
        for (reply, answer) in self.answers.drain(..) {
            reply.send(Ok(answer.into()));
        }
    }
}

impl OwnerTable {
    /// Enters an object whose reference is sent, with a hold for it unless `transit` is 0.
    pub(crate) fn send(&self, entry: &Arc<Entry>, transit: u64) {
        let mut tables = self.0.lock();
        entry.is_sent.store(true, Ordering::Release);
        let sent = tables.sent.entry(entry.sequence).or_insert_with(|| Sent {
            entry: Arc::clone(entry),
            holders: BTreeSet::new(),
            transits: BTreeMap::new(),
            early: BTreeSet::new(),
        });
        if transit != 0 {
            sent.transits.insert(transit, Instant::now());
        }
    }

    /// An object that came back to its owner.
    pub(crate) fn receive(&self, sequence: u64, transit: u64) -> Option<Arc<Entry>> {
        let mut tables = self.0.lock();
        let sent = tables.sent.get_mut(&sequence)?;
        sent.entry.handles.fetch_add(1, Ordering::AcqRel);
        end_transit(sent, transit);
        Some(Arc::clone(&sent.entry))
    }

    /// A sent object's last handle of some is dropped.
    pub(crate) fn dropped(&self, entry: &Arc<Entry>) -> Aftermath {
        let mut tables = self.0.lock();
        let mut aftermath = Aftermath::default();
        entry.handles.fetch_sub(1, Ordering::AcqRel);
        tables.free_unneeded(entry.sequence, &mut aftermath);
        aftermath
    }

    /// An object has settled: its holders are told.
    pub(crate) fn settled(&self, id: ObjectId) -> Aftermath {
        let mut tables = self.0.lock();
        let mut aftermath = Aftermath::default();
        if let Some(sent) = tables.sent.get(&id.sequence) {
            for holder in sent.holders.clone() {
                tables.tell(holder, id.sequence);
                tables.answer(id.owner, holder, &mut aftermath);
            }
        }
        aftermath
    }

    pub(crate) fn change(
        &self,
        own: ProcessId,
        holder: ProcessId,
        changes: &[Change],
    ) -> Aftermath {
        let mut tables = self.0.lock();
        let mut aftermath = Aftermath::default();
        tables.hear(holder);
        for change in changes.iter().take(CHANGES_MAX) {
            tables.take_in(holder, *change, &mut aftermath);
        }
        tables.answer(own, holder, &mut aftermath);
        aftermath
    }

    pub(crate) fn next(&self, own: ProcessId, next: &Next, reply: Reply) -> Aftermath {
        let mut tables = self.0.lock();
        let mut aftermath = Aftermath::default();
        let holder = tables.hear(next.holder);
        holder.unseen.retain(|(number, _)| *number > next.seen);
        let replaced = holder.question.replace((reply, next.seen, Instant::now()));
        if let Some((reply, number, _)) = replaced {
            aftermath.answers.push((reply, empty_answer(number)));
        }
        tables.answer(own, next.holder, &mut aftermath);
        aftermath
    }

    /// Forgets what a process held that is gone.
    pub(crate) fn holder_gone(&self, holder: ProcessId) -> Aftermath {
        let mut tables = self.0.lock();
        let mut aftermath = Aftermath::default();
        tables.remove_holder(holder, &mut aftermath);
        aftermath
    }

    /// Answers old questions, ends old holds, forgets silent holders.
    pub(crate) fn sweep(&self, now: Instant) -> Aftermath {
        let mut tables = self.0.lock();
        let mut aftermath = Aftermath::default();
        let mut silent = Vec::new();
        for (process, holder) in &mut tables.holders {
            let is_due = |(_, _, asked): &mut (Reply, u64, Instant)| now - *asked >= NEXT_WAIT;
            if let Some((reply, number, _)) = holder.question.take_if(is_due) {
                aftermath.answers.push((reply, empty_answer(number)));
            }
            if now.saturating_duration_since(holder.heard) > HOLDER_LEASE {
                silent.push(*process);
            }
        }
        for holder in silent {
            tracing::warn!(%holder, "a holder of objects has been silent; its references end");
            tables.remove_holder(holder, &mut aftermath);
        }
        let late: Vec<u64> = tables
            .sent
            .iter_mut()
            .filter_map(|(sequence, sent)| {
                let before = sent.transits.len();
                sent.transits
                    .retain(|_, since| now.saturating_duration_since(*since) <= TRANSIT_MAX);
                (sent.transits.len() < before).then_some(*sequence)
            })
            .collect();
        for sequence in late {
            tables.free_unneeded(sequence, &mut aftermath);
        }
        aftermath
    }

    pub(crate) fn contains(&self, sequence: u64) -> bool {
        self.0.lock().sent.contains_key(&sequence)
    }

    /// How many objects others may refer to, and how many processes do.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let tables = self.0.lock();
        (tables.sent.len(), tables.holders.len())
    }
}

impl Tables {
    fn hear(&mut self, holder: ProcessId) -> &mut Holder {
        let now = Instant::now();
        let holder = self.holders.entry(holder).or_insert_with(|| Holder {
            borrowed: BTreeSet::new(),
            unseen: VecDeque::new(),
            number: 0,
            question: None,
            heard: now,
        });
        holder.heard = now;
        holder
    }

    fn take_in(&mut self, holder: ProcessId, change: Change, aftermath: &mut Aftermath) {
        match change {
            Change::Borrow { sequence, transit } => {
                let mut is_settled = true;
                if let Some(sent) = self.sent.get_mut(&sequence) {
                    end_transit(sent, transit);
                    sent.holders.insert(holder);
                    is_settled = sent.entry.cell.is_settled();
                    self.hear(holder).borrowed.insert(sequence);
                }
                // One that is not there is told as freed.
                if is_settled {
                    self.tell(holder, sequence);
                }
            }
            Change::Release { sequence } => {
                if let Some(sent) = self.sent.get_mut(&sequence) {
                    sent.holders.remove(&holder);
                }
                self.hear(holder).borrowed.remove(&sequence);
                self.free_unneeded(sequence, aftermath);
            }
            Change::Transit { sequence, transit } => {
                if let Some(sent) = self.sent.get_mut(&sequence)
                    && !sent.early.remove(&transit)
                {
                    sent.transits.insert(transit, Instant::now());
                }
            }
            Change::Missing { sequence, stored } => match self.sent.get(&sequence) {
                Some(sent) => match sent.entry.cell.outcome() {
                    Some(Ok(Value::Stored(seen))) if seen.object == stored => {
                        let seen = Ok(Value::Stored(seen));
                        aftermath.missing.push((Arc::clone(&sent.entry), seen));
                    }
                    // It has been created anew meanwhile, or is lost for good.
                    Some(_) => self.tell(holder, sequence),
                    // It is being created anew, and will be told of then.
                    None => {}
                },
                None => self.tell(holder, sequence),
            },
        }
    }

    fn tell(&mut self, holder: ProcessId, sequence: u64) {
        if let Some(holder) = self.holders.get_mut(&holder) {
            holder.number += 1;
            holder.unseen.push_back((holder.number, sequence));
        }
    }

    /// Answers a holder's waiting question, if there is something to say.
    fn answer(&mut self, own: ProcessId, process: ProcessId, aftermath: &mut Aftermath) {
        let Some(holder) = self.holders.get_mut(&process) else {
            return;
        };
        if holder.unseen.is_empty() {
            return;
        }
        let Some((reply, ..)) = holder.question.take() else {
            return;
        };
        let mut answer = Settled::default();
        let mut size_bytes = 0;
        for (number, sequence) in &holder.unseen {
            let outcome = match self.sent.get(sequence) {
                Some(sent) => sent.entry.cell.outcome(),
                None => Some(Err(ObjectError::Freed {
                    object: ObjectId {
                        owner: own,
                        sequence: *sequence,
                    },
                })),
            };
            // Pending again: it will be told once more.
            if let Some(outcome) = outcome {
                let value = wire_value(outcome);
                size_bytes += size_bytes_of(&value);
                if !answer.objects.is_empty() && size_bytes > ANSWER_BYTES_MAX {
                    break;
                }
                answer.objects.push((*sequence, value));
            }
            answer.number = *number;
            if answer.objects.len() >= CHANGES_MAX {
                break;
            }
        }
        aftermath
            .answers
            .push((reply, codec::encode_plain(&answer)));
    }

    fn remove_holder(&mut self, process: ProcessId, aftermath: &mut Aftermath) {
        let Some(holder) = self.holders.remove(&process) else {
            return;
        };
        if let Some((reply, number, _)) = holder.question {
            aftermath.answers.push((reply, empty_answer(number)));
        }
        for sequence in holder.borrowed {
            if let Some(sent) = self.sent.get_mut(&sequence) {
                sent.holders.remove(&process);
            }
            self.free_unneeded(sequence, aftermath);
        }
    }

    fn free_unneeded(&mut self, sequence: u64, aftermath: &mut Aftermath) {
        if self
            .sent
            .get(&sequence)
            .is_some_and(|sent| !sent.is_needed())
            && let Some(sent) = self.sent.remove(&sequence)
        {
            aftermath.freed.push(sent.entry);
        }
    }
}

fn end_transit(sent: &mut Sent, transit: u64) {
    if transit != 0 && sent.transits.remove(&transit).is_none() {
        // Its announcement comes by another way, or it was taken in before.
        if sent.early.len() >= EARLY_MAX {
            sent.early.clear();
        }
        sent.early.insert(transit);
    }
}

fn empty_answer(number: u64) -> Vec<u8> {
    codec::encode_plain(&Settled {
        number,
        objects: Vec::new(),
    })
}

fn wire_value(outcome: Outcome) -> Result<WireValue, ObjectError> {
    outcome.map(WireValue::from)
}

fn size_bytes_of(value: &Result<WireValue, ObjectError>) -> usize {
    /// What an answer says about an object beside its bytes.
    const ABOUT_BYTES: usize = 256;
    ABOUT_BYTES
        + match value {
            Ok(WireValue::Inline { bytes, .. }) => bytes.len(),
            Err(ObjectError::Failed(error)) => error.to_string().len(),
            Ok(WireValue::Stored(_)) | Err(_) => 0,
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_core::id::NodeId;
    use mobula_wire::object::{Format, Stored};

    const OWN: ProcessId = ProcessId(1);

    /// A value in shared memory, as execution `n` has made it.
    fn made_by(n: u64) -> Outcome {
        Ok(Value::Stored(Stored {
            object: place(n),
            format: Format::Encoded,
            size_bytes: 1 << 20,
            node: NodeId(n),
            agent: format!("10.0.0.{n}:7"),
        }))
    }

    fn place(n: u64) -> ObjectId {
        ObjectId {
            owner: ProcessId(100 + n),
            sequence: n,
        }
    }

    /// What a holder says about object 7, and how often that makes it missing.
    fn said(table: &OwnerTable, holder: u64, change: Change) -> usize {
        let aftermath = table.change(OWN, ProcessId(holder), &[change]);
        for (entry, seen) in &aftermath.missing {
            assert!(entry.cell.reset(seen), "it is missing where it is");
        }
        aftermath.missing.len()
    }

    #[test]
    fn all_who_miss_one_value_share_its_next_one() {
        let table = OwnerTable::default();
        let entry = Arc::new(Entry {
            sequence: 7,
            cell: Cell::settled(made_by(1)),
            handles: 1.into(),
            ..Entry::default()
        });
        table.send(&entry, 0);
        let borrow = Change::Borrow {
            sequence: 7,
            transit: 0,
        };
        let missing_at = |n| Change::Missing {
            sequence: 7,
            stored: place(n),
        };
        for holder in [2, 3, 4] {
            said(&table, holder, borrow);
        }
        assert_eq!(said(&table, 2, missing_at(1)), 1);
        assert_eq!(said(&table, 3, missing_at(1)), 0, "it is being made anew");
        assert!(entry.cell.settle(made_by(2)));
        let told = |table: &OwnerTable| table.0.lock().holders[&ProcessId(4)].number;
        let before = told(&table);
        // It looked where the value was at first, and its word took long.
        assert_eq!(said(&table, 4, missing_at(1)), 0);
        assert_eq!(told(&table), before + 1, "it hears where the value is now");
        assert_eq!(entry.cell.outcome(), Some(made_by(2)), "which stays");
        assert_eq!(said(&table, 4, missing_at(2)), 1, "lost once more");
    }
}
