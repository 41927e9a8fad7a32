//! Waking those who wait for a change. A waiter takes a ticket *before* it reads the tables and
//! then waits on it, so that no change falls between.

use std::collections::BTreeMap;
use std::sync::Arc;

use mobula_core::control::{ModuleId, Subject};
use parking_lot::Mutex;
use tokio::sync::watch;

/// Subjects followed at the same time, one slot each: waiters of one subject share it. Old slots
/// without waiters are dropped when this many exist.
const SLOTS_MAX: usize = 16_384;

/// Counts changes per subject.
#[derive(Clone, Default)]
pub(crate) struct Changes {
    slots: Arc<Mutex<BTreeMap<Subject, watch::Sender<u64>>>>,
}

impl Changes {
    /// Notes a change of `subject`.
    pub(crate) fn note(&self, subject: &Subject) {
        let mut slots = self.slots.lock();
        match subject {
            // A module's count is asked for by clients (`WaitModule`), so it is kept without them.
            Subject::Module(_) => {
                slots
                    .entry(subject.clone())
                    .or_default()
                    .send_modify(|count| *count += 1);
            }
            _ => {
                if let Some(slot) = slots.get(subject) {
                    slot.send_modify(|count| *count += 1);
                }
            }
        }
    }

    /// Notes that anything may have changed.
    pub(crate) fn note_all(&self) {
        for slot in self.slots.lock().values() {
            slot.send_modify(|count| *count += 1);
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

    /// How often a module has changed since this head started.
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
        changes.note(&Subject::Job(JobId(2)));
        assert!(!ticket.has_changed().unwrap());
        changes.note(&Subject::Job(JobId(1)));
        ticket.changed().await.unwrap();
    }

    #[test]
    fn module_revisions_grow_without_waiters() {
        let changes = Changes::default();
        changes.note(&Subject::Module(ModuleId(9)));
        changes.note(&Subject::Module(ModuleId(9)));
        assert_eq!(changes.module_revision(ModuleId(9)), 2);
    }
}
