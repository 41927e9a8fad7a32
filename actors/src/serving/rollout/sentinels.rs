//! Sentinels of a candidate: each of its replicas is asked its version's known rows before a step is passed, and again and again
//! while the rollout is open. How, `serving::sentinels` says.
//!
//! Invariants:
//! 1. A step is passed only when every replica of the candidate that takes requests has answered as it should at this step.
//! 2. One answer that is another rolls the candidate back, at every look until the head has heard of it.
//! 3. A version without sentinels is neither asked nor held, and that is said.

use std::sync::Arc;

use super::looking::{self, Seen};
use super::plan::Rollout;
use super::trial::{Evidence, Judgement, shortened};
use crate::drift::vitals::sentinels::Sentinels;
use crate::serving::arm::{Arm, Routes};
use crate::serving::fleet::Backend;
use crate::serving::sentinels::state::Standing;
use crate::serving::sentinels::{AnswerCounts, Asker, not_asked, why};

/// Asks the replicas of a candidate at one step of its rollout.
pub(in crate::serving) struct Asking {
    /// By the rollout and its step.
    asker: Asker<(u64, u32)>,
}

impl Asking {
    /// Asks nobody yet.
    pub(in crate::serving) fn new() -> Self {
        Asking {
            asker: Asker::new(),
        }
    }

    /// Asks by the step that a rollout is at, whose candidate has these sentinels. Each step begins anew.
    pub(in crate::serving) fn at(&mut self, rollout: &Rollout, sentinels: Arc<Sentinels>) {
        self.asker.at((rollout.number, rollout.step), sentinels);
    }

    /// A look at the step, as [`looking::look`] has it, and at what the candidate has answered to its sentinels.
    pub(in crate::serving) fn look<B: Backend>(
        &mut self,
        routes: &Routes<B>,
        rollout: &Rollout,
    ) -> Option<Seen> {
        let seen = looking::look(routes, rollout)?;
        let answers = self.asker.look(candidate(routes));
        if self.asker.has_none() {
            return Some(noted(seen));
        }
        if let Some(wrong) = &answers.wrong {
            let evidence = Evidence {
                reason: why(wrong),
                ..evidence_of(seen)
            };
            return Some(Seen::Judged(Judgement::RollBack(evidence)));
        }
        let (right, asked) = (answers.right, answers.open);
        Some(match seen {
            Seen::Judged(Judgement::Pass(evidence)) if asked == 0 || right < asked => {
                let reason = format!(
                    "{right} of {asked} replicas have answered the candidate's sentinels; {}",
                    evidence.reason
                );
                Seen::Waits(Evidence {
                    reason: shortened(&reason),
                    ..evidence
                })
            }
            seen => seen,
        })
    }

    /// How far the candidate is asked at this step; absent before the first look at it.
    pub(in crate::serving) fn standing(&self) -> Option<Standing> {
        self.asker.standing()
    }

    /// What it has answered since this was last asked, with its version.
    pub(in crate::serving) fn take_counts(&mut self) -> Option<(u64, AnswerCounts)> {
        self.asker.take_counts()
    }
}

/// The replicas of the candidate.
fn candidate<B>(routes: &Routes<B>) -> Option<&Arm<B>> {
    let shadowed = routes.shadowed.as_ref().map(|shadowed| &*shadowed.arm);
    let tried = routes.tried.as_ref().map(|tried| &*tried.arm);
    shadowed.or(tried)
}

/// The same, where it says that the candidate was not asked.
fn noted(seen: Seen) -> Seen {
    let note = |evidence: Evidence| Evidence {
        reason: not_asked(&evidence.reason),
        ..evidence
    };
    match seen {
        Seen::Judged(Judgement::Pass(evidence)) => Seen::Judged(Judgement::Pass(note(evidence))),
        Seen::Judged(Judgement::Hold(evidence)) => Seen::Judged(Judgement::Hold(note(evidence))),
        seen => seen,
    }
}

fn evidence_of(seen: Seen) -> Evidence {
    match seen {
        Seen::Waits(evidence)
        | Seen::Judged(
            Judgement::Pass(evidence) | Judgement::Hold(evidence) | Judgement::RollBack(evidence),
        ) => evidence,
    }
}

#[cfg(test)]
#[path = "sentinels_tests.rs"]
mod tests;
