//! How long a rollout's step has waited for replicas of the candidate, replicated.
//!
//! Invariants:
//! 1. Time is that of the log's entries. It passes while the router says again and again that the step still waits: after a
//!    silence of more than [`SILENCE_MAX_MS`] the wait begins anew, because no replica can be placed where heads cannot decide.
//! 2. A wait is one router's at one step. It begins anew with another router, so that a cluster which was down has not
//!    waited meanwhile, and is over as soon as that router says anything else of the step, or the rollout's phase or step changes.
//! 3. A paused rollout does not wait: nothing is counted, and none is rolled back for it.

use mobula_core::control::{ApplyContext, ModuleId, Reader, Table, Txn};
use mobula_core::error::Rejection;
use mobula_core::id::Incarnation;
use mobula_core::row;

use super::plan::{Action, Phase, Rollout, Waiting};
use super::reporting::REPEAT_INTERVAL;
use super::state::{enter, key, put_progress, standing};
use super::trial::{Evidence, shortened};

/// Endpoint name, 0, number of the rollout → [`Waiting`], while its step does.
const WAITS: Table = Table {
    module: ModuleId::SERVING,
    tag: 10,
};

/// The longest silence, in milliseconds, that a wait goes on through: a router repeats itself every [`REPEAT_INTERVAL`], and two of
/// its words may get lost while heads elect a leader.
const SILENCE_MAX_MS: u64 = 3 * REPEAT_INTERVAL.as_millis() as u64;

fn find(reader: &dyn Reader, rollout: &Rollout) -> Option<Waiting> {
    row::get(reader, WAITS, &key(&rollout.endpoint, rollout.number))
}

/// A router says that the step waits; for how many milliseconds it has.
fn go_on(context: &ApplyContext, txn: &mut dyn Txn, rollout: &Rollout, router: Incarnation) -> u64 {
    let goes_on = |known: &Waiting| {
        known.router == router
            && known.step == rollout.step
            && context.now_ms.saturating_sub(known.last_ms) <= SILENCE_MAX_MS
    };
    let since_ms = find(txn, rollout)
        .filter(goes_on)
        .map_or(context.now_ms, |known| known.since_ms);
    let known = Waiting {
        router,
        step: rollout.step,
        since_ms,
        last_ms: context.now_ms,
    };
    row::put(txn, WAITS, &key(&rollout.endpoint, rollout.number), &known);
    context.now_ms.saturating_sub(since_ms)
}

/// A step waits for replicas of the candidate: as long as its rollout may.
pub(super) fn wait(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    mut rollout: Rollout,
    router: Incarnation,
    evidence: Evidence,
) -> Result<Rollout, Rejection> {
    let says = |how: &str| Evidence {
        reason: shortened(&format!("{how}: {}", evidence.reason)),
        ..evidence.clone()
    };
    if rollout.phase == Phase::Paused {
        let evidence = says("paused, so that its wait does not count");
        put_progress(context, txn, &rollout, router, evidence);
        return Ok(rollout);
    }
    let waited_ms = go_on(context, txn, &rollout, router);
    let most_ms = rollout.replica_wait_max_ms;
    let (waited, most) = (waited_ms / 1000, most_ms / 1000);
    if most_ms == 0 {
        let evidence = says(&format!("waiting for {waited} s"));
        put_progress(context, txn, &rollout, router, evidence);
    } else if waited_ms < most_ms {
        let evidence = says(&format!("waiting for {waited} s of {most} s at the most"));
        put_progress(context, txn, &rollout, router, evidence);
    } else {
        let endpoint = standing(txn, &rollout.endpoint)?;
        let evidence = says(&format!(
            "waited for replicas of the candidate for {waited} s, and {most} s are the limit"
        ));
        rollout.decided(context.now_ms, Action::RollBack, Some(evidence));
        enter(context, txn, endpoint, &mut rollout, Phase::RolledBack);
    }
    Ok(rollout)
}

/// The step waits no more.
pub(super) fn end(txn: &mut dyn Txn, rollout: &Rollout) {
    txn.delete(WAITS, &key(&rollout.endpoint, rollout.number));
}

#[cfg(test)]
#[path = "waiting_tests.rs"]
mod tests;
