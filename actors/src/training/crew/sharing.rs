//! Trainers that keep a state for those who join.
//!
//! Invariants:
//! 1. Who was asked to keep a state is told that it ends until it has heard it.
//! 2. No two orders to keep a state are equal, and a later one is greater, for whatever it is kept: what comes late is known
//!    by that ([`KeepOrder`]).

use std::time::Duration;

use super::{Crew, Happened, Presence, TrainerLink};
use crate::training::messages::KeepOrder;

/// The pause after one was told in vain.
const UNSHARE_PAUSE: Duration = Duration::from_secs(1);

impl<L: TrainerLink> Crew<L> {
    /// A trainer that is there waits for a state that others keep for it.
    pub(in crate::training) fn await_state(&mut self, index: usize) {
        self.give_up(index);
        self.slots[index].presence = Presence::Preparing;
    }

    /// The next order to keep a state.
    pub(in crate::training) fn next_keep_order(&mut self) -> KeepOrder {
        self.keep_order = self.keep_order.next();
        self.keep_order
    }

    /// Asks `givers` in the background to keep the state after `step`. Answers which order that is.
    pub(in crate::training) fn ask_to_share(&mut self, givers: &[usize], step: u64) -> KeepOrder {
        let order = self.next_keep_order();
        for index in givers {
            let link = self.slots[*index].link.clone();
            self.spawn(*index, async move {
                let answer = link.share(order, step).await;
                Happened::Shares { order, answer }
            });
        }
        order
    }

    /// Tells `givers` in the background to keep no more what `order` asked for.
    pub(in crate::training) fn end_sharing(&mut self, givers: &[usize], order: KeepOrder) {
        for index in givers {
            self.slots[*index].still_shares = Some(order);
            self.unshare(*index);
        }
    }

    /// Tells those again who may not have heard it, as soon as they are there.
    pub(in crate::training) fn look_after_sharing(&mut self) {
        for index in self.which(|slot| slot.presence != Presence::Away) {
            self.unshare(index);
        }
    }

    /// A trainer has heard that what `heard` and those before it asked for has ended, if it has heard anything.
    pub(in crate::training) fn unshared(&mut self, index: usize, heard: Option<KeepOrder>) {
        let slot = &mut self.slots[index];
        slot.is_unsharing = false;
        // A later one may have ended meanwhile.
        slot.still_shares.take_if(|order| Some(*order) <= heard);
        if heard.is_some() {
            self.unshare(index);
        }
    }

    fn unshare(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        let Some(order) = slot.still_shares.filter(|_| !slot.is_unsharing) else {
            return;
        };
        slot.is_unsharing = true;
        let link = slot.link.clone();
        self.spawn(index, async move {
            let heard = match link.unshare(order).await {
                Ok(()) => Some(order),
                Err(error) => {
                    tracing::debug!(%error, ?order, "a trainer still keeps a state for others");
                    tokio::time::sleep(UNSHARE_PAUSE).await;
                    None
                }
            };
            Happened::Unshared(heard)
        });
    }
}
