//! The state of one object in one process, and waiting for it.
//!
//! Invariants:
//! 1. Whoever waits is woken when the object settles, or finds it settled; no event falls between.
//! 2. Who gives up waiting leaves nothing behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use mobula_core::object::ObjectError;
use mobula_wire::object::{Stored, WireValue};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::payload::Payload;

/// What an object has come to.
pub type Outcome = Result<Value, ObjectError>;

/// A value, or where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// Here, in this process's own memory.
    Inline(Payload),
    /// In a node's shared memory.
    Stored(Stored),
}

impl From<WireValue> for Value {
    fn from(value: WireValue) -> Self {
        match value {
            WireValue::Inline { format, bytes } => Value::Inline(Payload {
                format,
                bytes: bytes.into(),
            }),
            WireValue::Stored(stored) => Value::Stored(stored),
        }
    }
}

impl From<Value> for WireValue {
    fn from(value: Value) -> Self {
        match value {
            Value::Inline(payload) => WireValue::Inline {
                format: payload.format,
                bytes: payload.bytes.to_vec(),
            },
            Value::Stored(stored) => WireValue::Stored(stored),
        }
    }
}

/// The state of one object.
#[derive(Debug, Default)]
pub(crate) struct Cell(Mutex<CellState>);

#[derive(Debug, Default)]
struct CellState {
    outcome: Option<Outcome>,
    waiters: Vec<Arc<Waiter>>,
}

/// Somebody who waits for one or more objects.
#[derive(Debug, Default)]
struct Waiter {
    settled: AtomicUsize,
    wake: Notify,
}

impl Cell {
    pub(crate) fn settled(outcome: Outcome) -> Self {
        Cell(Mutex::new(CellState {
            outcome: Some(outcome),
            waiters: Vec::new(),
        }))
    }

    pub(crate) fn outcome(&self) -> Option<Outcome> {
        self.0.lock().outcome.clone()
    }

    pub(crate) fn is_settled(&self) -> bool {
        self.0.lock().outcome.is_some()
    }

    /// Settles the object; false if it was settled before, which stays.
    pub(crate) fn settle(&self, outcome: Outcome) -> bool {
        let waiters = {
            let mut state = self.0.lock();
            if state.outcome.is_some() {
                return false;
            }
            state.outcome = Some(outcome);
            std::mem::take(&mut state.waiters)
        };
        for waiter in waiters {
            waiter.settled.fetch_add(1, Ordering::AcqRel);
            waiter.wake.notify_one();
        }
        true
    }

    /// Makes the object pending, if it is still what it was when `seen` was taken from it.
    pub(crate) fn reset(&self, seen: &Outcome) -> bool {
        let mut state = self.0.lock();
        let is_same = state.outcome.as_ref() == Some(seen);
        if is_same {
            state.outcome = None;
        }
        is_same
    }

    /// Puts another outcome in the place of `seen`, if it is still that; answers whether it was.
    pub(crate) fn replace(&self, seen: &Outcome, outcome: Outcome) -> bool {
        let mut state = self.0.lock();
        let is_same = state.outcome.as_ref() == Some(seen);
        if is_same {
            state.outcome = Some(outcome);
        }
        is_same
    }

    /// Waits until the object is settled. Cancel safe.
    pub(crate) async fn wait(&self) -> Outcome {
        loop {
            if let Some(outcome) = self.outcome() {
                return outcome;
            }
            let cells = [self];
            let registration = Registration::enter(&cells);
            if !self.is_settled() {
                registration.waiter.wake.notified().await;
            }
        }
    }

    fn enter(&self, waiter: &Arc<Waiter>) {
        let mut state = self.0.lock();
        if state.outcome.is_some() {
            waiter.settled.fetch_add(1, Ordering::AcqRel);
        } else {
            state.waiters.push(Arc::clone(waiter));
        }
    }

    fn leave(&self, waiter: &Arc<Waiter>) {
        let mut state = self.0.lock();
        state.waiters.retain(|other| !Arc::ptr_eq(other, waiter));
    }
}

/// Entered in all of `cells` until dropped.
struct Registration<'a> {
    cells: &'a [&'a Cell],
    waiter: Arc<Waiter>,
}

impl<'a> Registration<'a> {
    fn enter(cells: &'a [&'a Cell]) -> Self {
        let waiter = Arc::new(Waiter::default());
        for cell in cells {
            cell.enter(&waiter);
        }
        Registration { cells, waiter }
    }
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        for cell in self.cells {
            cell.leave(&self.waiter);
        }
    }
}

/// Waits until at least `count` of `cells` are settled.
pub(crate) async fn wait_for_cells(cells: &[&Cell], count: usize) {
    let count = count.min(cells.len());
    if cells
        .iter()
        .filter(|cell| cell.is_settled())
        .take(count)
        .count()
        >= count
    {
        return;
    }
    let registration = Registration::enter(cells);
    while registration.waiter.settled.load(Ordering::Acquire) < count {
        registration.waiter.wake.notified().await;
    }
}

/// Waits until at least `count` of `objects` are settled, well or badly.
pub async fn wait_for(objects: &[&super::handle::Object], count: usize) {
    let cells: Vec<&Cell> = objects.iter().map(|object| object.cell()).collect();
    wait_for_cells(&cells, count).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn value(byte: u8) -> Outcome {
        Ok(Value::Inline(Payload::encoded(&byte).unwrap()))
    }

    #[tokio::test]
    async fn who_waits_is_woken_and_who_gives_up_leaves_nothing() {
        let cell = Arc::new(Cell::default());
        let waiting = tokio::spawn({
            let cell = Arc::clone(&cell);
            async move { cell.wait().await }
        });
        let impatient = tokio::time::timeout(Duration::from_millis(1), cell.wait()).await;
        assert!(impatient.is_err());
        while cell.0.lock().waiters.len() != 1 {
            tokio::task::yield_now().await;
        }
        assert!(cell.settle(value(1)));
        assert!(!cell.settle(value(2)), "the first outcome stays");
        assert_eq!(waiting.await.unwrap(), value(1));
        assert_eq!(cell.wait().await, value(1));
    }

    #[tokio::test]
    async fn a_part_of_many_can_be_waited_for() {
        let cells: Vec<Cell> = (0..100).map(|_| Cell::default()).collect();
        let all: Vec<&Cell> = cells.iter().collect();
        cells[0].settle(value(0));
        let waiting = wait_for_cells(&all, 3);
        let settling = async {
            for cell in &cells[10..12] {
                tokio::task::yield_now().await;
                cell.settle(value(1));
            }
        };
        tokio::join!(waiting, settling);
        assert!(cells.iter().all(|cell| cell.0.lock().waiters.is_empty()));
        wait_for_cells(&all, 0).await;
    }

    #[tokio::test]
    async fn only_the_outcome_that_was_seen_is_taken_back() {
        let cell = Cell::default();
        cell.settle(value(1));
        assert!(!cell.reset(&value(2)));
        assert!(!cell.replace(&value(2), value(3)));
        assert!(cell.replace(&value(1), value(4)));
        assert!(cell.reset(&value(4)));
        assert!(!cell.is_settled());
    }
}
