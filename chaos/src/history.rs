//! What clients asked and what they were told, in the order in which it happened.
//!
//! Invariants:
//! 1. Moments are places in one sequence: an operation that ended before another began has the
//!    smaller moment. No clock is asked.
//! 2. Every operation that began is in the history, except those that surely had no effect. One
//!    whose client never learnt its outcome, or went away, is kept as [`Ended::Unknown`].

use std::sync::Arc;

use parking_lot::Mutex;

/// How many operations one history may hold. Checking is what bounds it: some thousand operations
/// a key are the most that can be searched, and thousands of keys fit.
pub const OPERATIONS_MAX: usize = 1_000_000;

/// The history is full.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the history holds {OPERATIONS_MAX} operations already: check it, and begin another")]
pub struct HistoryFull;

/// How an operation ended, for the client that asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended<O> {
    /// It was told this.
    Returned {
        /// The moment.
        at: u64,
        /// The answer.
        output: O,
    },
    /// It never learnt whether it took effect: perhaps it did, at any moment since it began.
    Unknown,
}

/// One operation of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation<I, O> {
    /// Which client.
    pub client: u32,
    /// What it asked.
    pub input: I,
    /// The moment at which it began.
    pub began: u64,
    /// How it ended.
    pub ended: Ended<O>,
}

#[derive(Debug)]
struct Log<I, O> {
    next_moment: u64,
    /// `None` where the operation surely had no effect.
    operations: Vec<Option<Operation<I, O>>>,
}

impl<I, O> Log<I, O> {
    fn moment(&mut self) -> u64 {
        self.next_moment += 1;
        self.next_moment
    }
}

/// A history that several clients write into. Clones share it.
#[derive(Debug)]
pub struct History<I, O>(Arc<Mutex<Log<I, O>>>);

impl<I, O> Clone for History<I, O> {
    fn clone(&self) -> Self {
        History(Arc::clone(&self.0))
    }
}

impl<I, O> History<I, O> {
    /// An empty history.
    #[must_use]
    pub fn new() -> Self {
        History(Arc::new(Mutex::new(Log {
            next_moment: 0,
            operations: Vec::new(),
        })))
    }

    /// An operation begins: call this before anything is sent.
    pub fn begin(&self, client: u32, input: I) -> Result<Pending<I, O>, HistoryFull> {
        let mut log = self.0.lock();
        if log.operations.len() >= OPERATIONS_MAX {
            return Err(HistoryFull);
        }
        let began = log.moment();
        let index = log.operations.len();
        log.operations.push(Some(Operation {
            client,
            input,
            began,
            ended: Ended::Unknown,
        }));
        Ok(Pending {
            history: self.clone(),
            index,
        })
    }

    /// What is recorded so far. Operations that are still pending are in it as unknown.
    #[must_use]
    pub fn operations(&self) -> Vec<Operation<I, O>>
    where
        I: Clone,
        O: Clone,
    {
        self.0.lock().operations.iter().flatten().cloned().collect()
    }
}

impl<I, O> Default for History<I, O> {
    fn default() -> Self {
        History::new()
    }
}

/// An operation that has begun. Dropped, its outcome stays unknown.
#[derive(Debug)]
#[must_use = "an operation that is not ended counts as one of unknown outcome"]
pub struct Pending<I, O> {
    history: History<I, O>,
    index: usize,
}

impl<I, O> Pending<I, O> {
    /// It was answered.
    pub fn returned(self, output: O) {
        let mut log = self.history.0.lock();
        let at = log.moment();
        if let Some(operation) = &mut log.operations[self.index] {
            operation.ended = Ended::Returned { at, output };
        }
    }

    /// It surely had no effect, and is taken out of the history.
    pub fn not_executed(self) {
        self.history.0.lock().operations[self.index] = None;
    }

    /// Nobody can tell whether it had an effect.
    pub fn unknown(self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_follow_each_other_and_what_had_no_effect_is_left_out() {
        let history = History::new();
        let first = history.begin(1, "a").unwrap();
        let second = history.begin(2, "b").unwrap();
        first.returned(7);
        second.not_executed();
        history.begin(1, "c").unwrap().unknown();
        drop(history.begin(3, "d").unwrap());
        let operations = history.operations();
        let inputs: Vec<_> = operations.iter().map(|o| (o.input, o.began)).collect();
        assert_eq!(inputs, [("a", 1), ("c", 4), ("d", 5)]);
        assert_eq!(operations[0].ended, Ended::Returned { at: 3, output: 7 });
        assert!(operations[1..].iter().all(|o| o.ended == Ended::Unknown));
    }
}
