//! Trainers that keep a state for those who join.
//!
//! Invariant: who was asked to keep a state is told that it ends until it has heard it, or is asked for the same one again.

use std::time::Duration;

use super::{Crew, Happened, Presence, TrainerLink};

/// The pause after one was told in vain.
const UNSHARE_PAUSE: Duration = Duration::from_secs(1);

impl<L: TrainerLink> Crew<L> {
    /// A trainer that is there waits for a state that others keep for it.
    pub(in crate::training) fn await_state(&mut self, index: usize) {
        self.give_up(index);
        self.slots[index].presence = Presence::Preparing;
    }

    /// Asks `givers` in the background to keep the state after `step`.
    pub(in crate::training) fn ask_to_share(&mut self, givers: &[usize], step: u64) {
        for index in givers {
            let slot = &mut self.slots[*index];
            slot.still_shares.remove(&step);
            let link = slot.link.clone();
            self.spawn(*index, async move {
                let answer = link.share(step).await;
                Happened::Shares { step, answer }
            });
        }
    }

    /// Tells `givers` in the background to keep it no more.
    pub(in crate::training) fn end_sharing(&mut self, givers: &[usize], step: u64) {
        for index in givers {
            self.slots[*index].still_shares.insert(step);
            self.unshare(*index);
        }
    }

    /// Tells those again who may not have heard it, as soon as they are there.
    pub(in crate::training) fn look_after_sharing(&mut self) {
        for index in self.which(|slot| slot.presence != Presence::Away) {
            self.unshare(index);
        }
    }

    /// A trainer has heard that it keeps the states after `steps` no more.
    pub(in crate::training) fn unshared(&mut self, index: usize, steps: &[u64]) {
        let slot = &mut self.slots[index];
        slot.is_unsharing = false;
        slot.still_shares.retain(|step| !steps.contains(step));
        // One may have been added meanwhile.
        if !steps.is_empty() {
            self.unshare(index);
        }
    }

    fn unshare(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        if slot.is_unsharing || slot.still_shares.is_empty() {
            return;
        }
        slot.is_unsharing = true;
        let (link, steps) = (slot.link.clone(), slot.still_shares.clone());
        self.spawn(index, async move {
            let mut heard = Vec::new();
            for step in steps {
                match link.unshare(step).await {
                    Ok(()) => heard.push(step),
                    Err(error) => {
                        tracing::debug!(%error, step, "a trainer still keeps a state for others");
                        tokio::time::sleep(UNSHARE_PAUSE).await;
                        break;
                    }
                }
            }
            Happened::Unshared(heard)
        });
    }
}
