//! Trainers that keep a state for those who join.

use super::{Crew, Happened, Presence, TrainerLink};

impl<L: TrainerLink> Crew<L> {
    /// A trainer that is there waits for a state that others keep for it.
    pub(in crate::training) fn await_state(&mut self, index: usize) {
        self.give_up(index);
        self.slots[index].presence = Presence::Preparing;
    }

    /// Asks `givers` in the background to keep the state after `step`.
    pub(in crate::training) fn ask_to_share(&mut self, givers: &[usize], step: u64) {
        for index in givers {
            let link = self.slots[*index].link.clone();
            self.spawn(*index, async move {
                let answer = link.share(step).await;
                Happened::Shares { step, answer }
            });
        }
    }

    /// Tells `givers` in the background to keep it no more.
    pub(in crate::training) fn end_sharing(&mut self, givers: &[usize], step: u64) {
        for index in givers {
            let link = self.slots[*index].link.clone();
            self.spawn(*index, async move {
                if let Err(error) = link.unshare(step).await {
                    // It keeps it until it is asked for another one.
                    tracing::debug!(%error, step, "a trainer still keeps a state for others");
                }
                Happened::Unshared
            });
        }
    }
}
