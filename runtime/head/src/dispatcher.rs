//! Carries out effects: orders to workers, wake-ups to waiters, a nudge to placement.
//!
//! Effects are hints. When more of them come than the queue holds, the rest is dropped and
//! everything that stands is sent again from the tables.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mobula_core::control::Effect;
use mobula_core::id::Term;
use mobula_core::mutant::{Mutant, is_planted};
use mobula_core::order::Order;
use mobula_wire::session::HeadMessage;
use tokio::sync::{Notify, mpsc};

use crate::context::HeadContext;
use crate::raft::module_revisions;

/// How many applied runs may wait: one is the effects of one batch of entries, and carrying them
/// out is a few queue operations.
pub(crate) const EFFECTS_CAPACITY: usize = 1024;

/// The effects of one run of entries, each with the index of its entry.
pub(crate) type EffectRun = Vec<(u64, Effect)>;

/// The driver's end: never blocks, because the driver must not wait for anyone.
pub(crate) struct EffectSender {
    pub(crate) runs: mpsc::Sender<EffectRun>,
    pub(crate) lost: Arc<AtomicBool>,
}

impl EffectSender {
    /// Hands over the effects of one run of entries.
    pub(crate) fn send(&self, effects: EffectRun) {
        if !effects.is_empty() && self.runs.try_send(effects).is_err() {
            self.lost.store(true, Ordering::Release);
        }
    }

    /// The tables were replaced as a whole: whatever waits for a change has one.
    pub(crate) fn everything_changed(&self) {
        if is_planted(Mutant::SnapshotWakesNobody) {
            return;
        }
        self.lost.store(true, Ordering::Release);
        // Full means that the dispatcher will look anyway.
        let _ = self.runs.try_send(Vec::new());
    }
}

/// The dispatcher's end.
pub(crate) struct EffectReceiver {
    pub(crate) runs: mpsc::Receiver<EffectRun>,
    pub(crate) lost: Arc<AtomicBool>,
}

/// A queue of effects.
pub(crate) fn effect_queue() -> (EffectSender, EffectReceiver) {
    let (sender, receiver) = mpsc::channel(EFFECTS_CAPACITY);
    let lost = Arc::new(AtomicBool::new(false));
    (
        EffectSender {
            runs: sender,
            lost: lost.clone(),
        },
        EffectReceiver {
            runs: receiver,
            lost,
        },
    )
}

/// What wakes the leader's loops.
#[derive(Default)]
pub(crate) struct Nudges {
    /// Something is to be placed.
    pub(crate) place: Notify,
    /// A table changed that controllers may care about.
    pub(crate) controllers: Notify,
}

/// Carries out effects until the driver ends.
pub(crate) async fn run(
    context: Arc<HeadContext>,
    mut effects: EffectReceiver,
    nudges: Arc<Nudges>,
) {
    // What was changed before this process began is no effect of anything that it applies.
    note_everything(&context).await;
    while let Some(run) = effects.runs.recv().await {
        let leadership = *context.raft.leadership().borrow();
        for (index, effect) in run {
            match effect {
                Effect::Changed(subject) => context.changes.note(&subject, index),
                Effect::Place => nudges.place.notify_one(),
                Effect::Order { node, order } if leadership.is_leader => {
                    let term = Term(leadership.term);
                    context.metrics.ordered(order.kind());
                    context.lives.ordered(&order, crate::timeline::now_us());
                    context
                        .sessions
                        .send(node, context.order_message(term, order));
                }
                Effect::JobEnded(job) if leadership.is_leader => {
                    let term = Term(leadership.term);
                    let order = Order::JobEnded { job };
                    for node in context.sessions.nodes() {
                        context.metrics.ordered(order.kind());
                        let order = order.clone();
                        context
                            .sessions
                            .send(node, HeadMessage::Order { term, order });
                    }
                }
                Effect::Order { .. } | Effect::JobEnded(_) => {}
            }
        }
        nudges.controllers.notify_one();
        if effects.lost.swap(false, Ordering::AcqRel) {
            send_everything_again(&context, &nudges).await;
        }
    }
}

/// Wakes everybody who waits for anything, and takes the modules' revisions from the tables.
async fn note_everything(context: &HeadContext) {
    match context.raft.local_view().await {
        Ok(view) => context.changes.note_all(&module_revisions(&view)),
        Err(error) => tracing::warn!(%error, "the modules' revisions cannot be read"),
    }
}

async fn send_everything_again(context: &HeadContext, nudges: &Nudges) {
    tracing::warn!("effects were dropped; sending every standing order again");
    context.metrics.lost_effects();
    nudges.place.notify_one();
    note_everything(context).await;
    let term = Term(context.raft.leadership().borrow().term);
    for node in context.sessions.nodes() {
        match context.standing_orders(node).await {
            Ok(orders) => {
                for order in orders {
                    context
                        .sessions
                        .send(node, context.order_message(term, order));
                }
            }
            Err(error) => tracing::warn!(%node, %error, "standing orders cannot be read"),
        }
    }
}
