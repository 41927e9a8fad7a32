//! What a router sees of a rollout's step: a judgement, or a candidate whose replicas do not answer.

use super::plan::Rollout;
use super::trial::{Evidence, Judgement, shortened};
use crate::serving::arm::{Arm, Routes, lock};
use crate::serving::fleet::Backend;

/// What was seen.
#[derive(Debug)]
pub(in crate::serving) enum Seen {
    /// What follows from what was counted.
    Judged(Judgement),
    /// Nothing can follow before more replicas of the candidate answer.
    Waits(Evidence),
}

/// A look at the step that a rollout is at; `None` where requests are not sent by it yet.
pub(in crate::serving) fn look<B: Backend>(routes: &Routes<B>, rollout: &Rollout) -> Option<Seen> {
    let (arm, judgement) = match (&routes.shadowed, &routes.tried) {
        (Some(shadowed), _) => (&shadowed.arm, Some(lock(&shadowed.trial).judge())),
        (None, Some(tried)) if tried.weight_percent == 0 => (&tried.arm, None),
        (None, Some(tried)) => {
            let judgement = lock(&tried.trial).judge();
            return Some(match judgement {
                Judgement::Hold(evidence) if !tried.arm.is_open() => unanswered(evidence),
                judgement => Seen::Judged(judgement),
            });
        }
        (None, None) => return None,
    };
    // A step without requests is passed when the candidate could take all of them: what follows may be that.
    let (do_all, answering) = answering(arm, rollout);
    Some(match judgement {
        None | Some(Judgement::Pass(_)) if !do_all => Seen::Waits(answering),
        None => Seen::Judged(Judgement::Pass(answering)),
        Some(Judgement::Hold(evidence)) if !arm.is_open() => unanswered(evidence),
        Some(judgement) => Seen::Judged(judgement),
    })
}

/// A candidate that is not looked at, as its file is not.
pub(in crate::serving) fn unread() -> Evidence {
    Evidence {
        reason:
            "the candidate's file is not read yet, so it is not known whether it fits the endpoint"
                .to_owned(),
        ..Evidence::default()
    }
}

fn unanswered(evidence: Evidence) -> Seen {
    Seen::Waits(Evidence {
        reason: shortened(&format!(
            "no replica of the candidate answers; {}",
            evidence.reason
        )),
        ..evidence
    })
}

/// Whether as many replicas answer as the candidate shall have, and how many do.
fn answering<B: Backend>(arm: &Arm<B>, rollout: &Rollout) -> (bool, Evidence) {
    let replicas = u32::try_from(arm.fleet().replica_count()).unwrap_or(u32::MAX);
    let (_, count) = rollout.replica_counts(replicas);
    let open = arm.fleet().open_count();
    let evidence = Evidence {
        reason: format!("{open} of {count} replicas answer"),
        ..Evidence::default()
    };
    (open >= count as usize, evidence)
}

#[cfg(test)]
#[path = "looking_tests.rs"]
mod tests;
