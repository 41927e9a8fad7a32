//! Trainers that upload a share of a checkpoint: they hold the bits that the driver saves.
//!
//! A trainer is asked some steps ahead to keep the state after a step that it has not taken yet, which costs it no
//! time and the memory of the other half of its buffers. Then the driver gives it pieces by hash; what it holds
//! otherwise, or does not hold, it refuses.
//!
//! Invariants:
//! 1. Of each machine one trainer is asked, and none of the driver's own: they would share its way to the store.
//! 2. A helper that is lost is noticed as a lost trainer is, and nothing waits for it.
//! 3. The end of a save ends what was asked for it: it names the order that each helper was given, and so takes nothing
//!    from a later save, which may be of the same step.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::future::BoxFuture;
use mobula_storage::checkpoint::Piece;

use super::crew::{Crew, Happened, Slot, TrainerLink};
use super::messages::KeepOrder;
use crate::checkpoint::sharing::Helper;

impl<L: TrainerLink> Crew<L> {
    /// Asks in the background those who were not asked yet.
    pub(super) fn ask_to_keep(&mut self, step: u64, own_node: &str) {
        let mut nodes = BTreeSet::from([own_node.to_owned()]);
        let order = self.next_keep_order();
        for index in self.which(Slot::is_ready) {
            let slot = self.slot(index);
            let was_asked = slot.asked_to_keep.is_some_and(|(_, asked)| asked == step);
            if !nodes.insert(slot.node.clone()) || was_asked {
                continue;
            }
            (slot.asked_to_keep, slot.keeps) = (Some((order, step)), false);
            let link = slot.link.clone();
            self.spawn(index, async move {
                let answer = link.keep(order, step).await;
                Happened::Keeps { order, answer }
            });
        }
    }

    /// A trainer has said whether it keeps what `order` asked for.
    pub(super) fn keeps(&mut self, index: usize, order: KeepOrder, does: bool) {
        let slot = self.slot(index);
        // An answer to an earlier order says nothing of the last one.
        if slot.asked_to_keep.is_some_and(|(asked, _)| asked == order) {
            slot.keeps = does;
        }
    }

    /// Those who said that they keep the state after `step`.
    pub(super) fn helpers(&self, step: u64) -> Vec<Arc<dyn Helper>> {
        let keepers = self.slots().iter().enumerate();
        keepers
            .filter(|(_, slot)| slot.is_ready() && slot.keeps)
            .filter_map(|(index, slot)| {
                let (order, _) = slot.asked_to_keep.filter(|(_, asked)| *asked == step)?;
                let helper: Arc<dyn Helper> = Arc::new(TrainerHelper {
                    name: format!("trainer-{index} on {}", slot.node),
                    link: slot.link.clone(),
                    order,
                });
                Some(helper)
            })
            .collect()
    }
}

struct TrainerHelper<L> {
    name: String,
    link: L,
    /// By which it was asked to keep the state.
    order: KeepOrder,
}

impl<L: TrainerLink> Helper for TrainerHelper<L> {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn upload(&self, step: u64, pieces: Vec<Piece>) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move {
            let stored = self.link.store(step, pieces).await;
            stored.map_err(|error| error.to_string())
        })
    }

    fn release(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let order = self.order;
            if let Err(error) = self.link.release(order).await {
                tracing::debug!(%error, ?order, "a trainer still keeps the state of a checkpoint");
            }
        })
    }
}
