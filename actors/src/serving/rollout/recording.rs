//! What the registry's log says of a rollout: how it ended, and that it was taken back. Written by the command that
//! decides.

use mobula_core::control::{ApplyContext, Txn};

use super::plan::{Phase, Rollout, Strategy};
use crate::registry::events::{RolloutEnded, rollout_ended};

/// Writes the entry of a rollout of this model that has just entered its phase; none while it is under way.
pub(super) fn record(context: &ApplyContext, txn: &mut dyn Txn, model: &str, rollout: &Rollout) {
    let outcome = match rollout.phase {
        Phase::Running | Phase::Paused => return,
        Phase::Promoted => "promoted",
        Phase::Aborted => "aborted",
        Phase::RolledBack => "rolled_back",
    };
    let strategy = match rollout.strategy {
        Strategy::Canary => "canary",
        Strategy::BlueGreen => "blue_green",
        Strategy::Rolling => "rolling",
    };
    let decision = rollout.decisions.last();
    let evidence = decision.and_then(|decision| decision.evidence.as_ref());
    let entry = RolloutEnded {
        endpoint: &rollout.endpoint,
        number: rollout.number,
        model,
        stable: rollout.stable.version,
        candidate: rollout.candidate.version,
        strategy,
        step: rollout.step,
        outcome,
        reason: evidence.map_or("a client decided", |found| found.reason.as_str()),
    };
    rollout_ended(txn, context, entry);
}

#[cfg(test)]
#[path = "recording_tests.rs"]
mod tests;
