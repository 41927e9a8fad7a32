//! Waking those who wait for a change. A waiter takes a ticket *before* it reads the tables and
//! then waits on it, so that no change falls between.
//!
//! Invariant: what is known of a subject only grows. A module's revision is the index of the entry that
//! changed it last, the same at every head that has applied as much; so whoever has seen one revision
//! may ask any head for the next (I17: in order, no gap, no duplicate, resumable).

use std::collections::BTreeMap;
use std::sync::Arc;

use mobula_core::control::{ModuleId, Subject};
use parking_lot::Mutex;
use tokio::sync::watch;

/// Subjects followed at the same time, one slot each: waiters of one subject share it. Old slots
/// without waiters are dropped when this many exist.
const SLOTS_MAX: usize = 16_384;

/// Knows the newest change of each subject that somebody follows, and of each module.
#[derive(Clone, Default)]
pub(crate) struct Changes {
    slots: Arc<Mutex<BTreeMap<Subject, watch::Sender<u64>>>>,
}

impl Changes {
    /// Notes that the entry at `index` changed `subject`.
    pub(crate) fn note(&self, subject: &Subject, index: u64) {
        let mut slots = self.slots.lock();
        let raise = |newest: &mut u64| *newest = index.max(*newest);
        match subject {
            // A module's revision is asked for by clients (`WaitModule`), so it is kept without them.
            Subject::Module(_) => slots.entry(subject.clone()).or_default().send_modify(raise),
            _ => {
                if let Some(slot) = slots.get(subject) {
                    slot.send_modify(raise);
                }
            }
        }
    }

    /// Notes that anything may have changed, the modules up to these revisions.
    pub(crate) fn note_all(&self, revisions: &BTreeMap<ModuleId, u64>) {
        for slot in self.slots.lock().values() {
            // Without a number that is newer, but whoever waits looks again.
            slot.send_modify(|_| {});
        }
        for (module, revision) in revisions {
            self.note(&Subject::Module(*module), *revision);
        }
    }

    /// A ticket that wakes at the next change of `subject`.
    pub(crate) fn follow(&self, subject: Subject) -> watch::Receiver<u64> {
        let mut slots = self.slots.lock();
        if slots.len() >= SLOTS_MAX {
            slots.retain(|subject, slot| {
                matches!(subject, Subject::Module(_)) || slot.receiver_count() > 0
            });
        }
        let mut receiver = slots.entry(subject).or_default().subscribe();
        receiver.mark_unchanged();
        receiver
    }

    /// The index of the entry that changed a module last, of those that are applied here; 0 if none
    /// has.
    pub(crate) fn module_revision(&self, module: ModuleId) -> u64 {
        let mut slots = self.slots.lock();
        *slots.entry(Subject::Module(module)).or_default().borrow()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_core::id::JobId;

    #[tokio::test]
    async fn a_ticket_taken_before_the_change_wakes() {
        let changes = Changes::default();
        let mut ticket = changes.follow(Subject::Job(JobId(1)));
        changes.note(&Subject::Job(JobId(2)), 1);
        assert!(!ticket.has_changed().unwrap());
        changes.note(&Subject::Job(JobId(1)), 2);
        ticket.changed().await.unwrap();
        changes.note_all(&BTreeMap::new());
        ticket.changed().await.unwrap();
    }

    #[test]
    fn module_revisions_grow_without_waiters_and_never_shrink() {
        let (changes, module) = (Changes::default(), ModuleId(9));
        assert_eq!(changes.module_revision(module), 0);
        changes.note(&Subject::Module(module), 7);
        changes.note(&Subject::Module(module), 12);
        assert_eq!(changes.module_revision(module), 12);
        // A snapshot that is older than what was applied since it was asked for.
        changes.note_all(&BTreeMap::from([(module, 9)]));
        assert_eq!(changes.module_revision(module), 12);
        changes.note_all(&BTreeMap::from([(module, 30)]));
        assert_eq!(changes.module_revision(module), 30);
    }

    /// They were counts since the head's start: a client that had seen five changes at one head waited
    /// in vain at another one for which the sixth was the fifth.
    #[tokio::test]
    async fn who_has_seen_a_change_at_one_head_is_told_of_the_next_by_another() {
        let (before, after, module) = (Changes::default(), Changes::default(), ModuleId(9));
        before.note(&Subject::Module(module), 5);
        let seen = before.module_revision(module);
        // The other head took the change at 5 from a snapshot, and hears of the one at 8.
        after.note_all(&BTreeMap::from([(module, 5)]));
        let mut ticket = after.follow(Subject::Module(module));
        assert!(*ticket.borrow() <= seen);
        after.note(&Subject::Module(module), 8);
        assert_eq!(*ticket.wait_for(|newest| *newest > seen).await.unwrap(), 8);
    }
}
