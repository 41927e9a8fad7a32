//! The tasks that a slot has, for whoever cancels one of them: so its driver hears of it.
//!
//! Invariants:
//! 1. A driver hears of every cancellation of a task that its slot has then, however far it falls behind: what it has
//!    not heard yet is no more than one word for each of these tasks.
//! 2. A task comes here from the line, and goes back there, under the lock of its pool's state: who looks for it under
//!    that lock finds it in one of the two.

use std::collections::{BTreeMap, HashSet};

use mobula_core::object::ObjectId;
use parking_lot::Mutex;
use tokio::sync::Notify;

/// The tasks that one slot has.
#[derive(Default)]
pub(super) struct UnderWay {
    tasks: Mutex<Tasks>,
    /// There is something for the driver to hear.
    news: Notify,
}

#[derive(Default)]
struct Tasks {
    all: HashSet<ObjectId>,
    /// Those that were cancelled since the driver listened last, and whether they are to end by force.
    cancelled: BTreeMap<ObjectId, bool>,
}

impl UnderWay {
    /// The slot has `tasks` from now on.
    pub(super) fn begin(&self, tasks: impl Iterator<Item = ObjectId>) {
        self.tasks.lock().all.extend(tasks);
    }

    /// The slot has `task` no more. Answers whether that was cancelled and the driver has not heard of it.
    pub(super) fn end(&self, task: ObjectId) -> bool {
        let mut tasks = self.tasks.lock();
        tasks.all.remove(&task);
        tasks.cancelled.remove(&task).is_some()
    }

    /// Lets the driver hear that `task` is not wanted any more, if the slot has it; answers whether it has.
    pub(super) fn cancel(&self, task: ObjectId, forced: bool) -> bool {
        let is_here = {
            let mut tasks = self.tasks.lock();
            let is_here = tasks.all.contains(&task);
            if is_here {
                *tasks.cancelled.entry(task).or_default() |= forced;
            }
            is_here
        };
        if is_here {
            self.news.notify_one();
        }
        is_here
    }

    /// The next task that was cancelled, and whether it is to end by force. Only the driver listens.
    pub(super) async fn cancelled(&self) -> (ObjectId, bool) {
        loop {
            let news = self.news.notified();
            let next = self.tasks.lock().cancelled.pop_first();
            if let Some(cancelled) = next {
                return cancelled;
            }
            news.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use mobula_core::object::ProcessId;

    fn task(sequence: u64) -> ObjectId {
        ObjectId {
            owner: ProcessId(1),
            sequence,
        }
    }

    #[test]
    fn a_driver_hears_once_of_what_its_slot_has_and_of_nothing_else() {
        let slot = UnderWay::default();
        slot.begin((1..=4).map(task));
        assert!(!slot.cancel(task(5), true), "it is not here");
        assert!(slot.cancel(task(3), false) && slot.cancel(task(1), true));
        // Force is not taken back.
        assert!(slot.cancel(task(3), true) && slot.cancel(task(3), false));
        assert!(slot.cancel(task(2), false));
        assert!(slot.end(task(2)), "nobody has heard of it");
        assert!(!slot.end(task(4)), "it was not cancelled");
        assert!(!slot.cancel(task(4), false), "it has ended");
        assert_eq!(slot.cancelled().now_or_never(), Some((task(1), true)));
        assert_eq!(slot.cancelled().now_or_never(), Some((task(3), true)));
        assert_eq!(slot.cancelled().now_or_never(), None);
        assert!(!slot.end(task(1)), "the driver has heard of it");
    }

    #[tokio::test]
    async fn a_driver_that_listens_hears_of_it_at_once() {
        let slot = UnderWay::default();
        slot.begin([task(1)].into_iter());
        let (heard, was_here) =
            tokio::join!(slot.cancelled(), async { slot.cancel(task(1), false) });
        assert!(was_here);
        assert_eq!(heard, (task(1), false));
    }
}
