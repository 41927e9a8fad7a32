//! Sentinels of a treatment: each of its replicas is asked its version's known rows while the experiment is under way. How,
//! `serving::sentinels` says.
//!
//! Invariants:
//! 1. One wrong answer ends the experiment, as a violated guardrail does, at every look until the head has heard of it.
//! 2. Nothing waits for right answers: an experiment changes no version, and the rollout after it asks for itself.
//! 3. A treatment without sentinels is not asked, and that is said.

use std::sync::Arc;

use super::findings::{Decision, Findings};
use super::plan::Ending;
use crate::drift::vitals::sentinels::Sentinels;
use crate::serving::arm::Routes;
use crate::serving::fleet::Backend;
use crate::serving::rollout::trial::shortened;
use crate::serving::sentinels::state::Standing;
use crate::serving::sentinels::{AnswerCounts, Asker, not_asked, why};

/// Asks the replicas of a treatment.
pub(super) struct Asking {
    /// By the experiment's number.
    asker: Asker<u64>,
}

impl Asking {
    /// Asks nobody yet.
    pub(super) fn new() -> Self {
        Asking {
            asker: Asker::new(),
        }
    }

    /// Asks for the experiment of this number, whose treatment has these sentinels.
    pub(super) fn at(&mut self, number: u64, sentinels: Arc<Sentinels>) {
        self.asker.at(number, sentinels);
    }

    /// What follows from what was counted, and from what the treatment has answered to its sentinels by now.
    pub(super) fn look<B: Backend>(
        &mut self,
        routes: &Routes<B>,
        (ending, findings): (Option<Ending>, Findings),
    ) -> (Option<Ending>, Findings) {
        let compared = routes.compared.as_ref();
        let answers = self.asker.look(compared.map(|compared| &*compared.arm));
        let Some(wrong) = &answers.wrong else {
            return (ending, findings);
        };
        let findings = Findings {
            decision: Decision::Control,
            reason: shortened(&format!("the treatment is {}", why(wrong))),
            ..findings
        };
        (Some(Ending::Sentinel), findings)
    }

    /// How far the treatment is asked; absent before the first look at it.
    pub(super) fn standing(&self) -> Option<Standing> {
        self.asker.standing()
    }

    /// What it has answered since this was last asked, with its version.
    pub(super) fn take_counts(&mut self) -> Option<(u64, AnswerCounts)> {
        self.asker.take_counts()
    }

    /// The same numbers; where the treatment has no sentinels, that is said.
    pub(super) fn noted(&self, findings: Findings) -> Findings {
        if !self.asker.has_none() {
            return findings;
        }
        Findings {
            reason: not_asked(&findings.reason),
            ..findings
        }
    }
}

#[cfg(test)]
#[path = "sentinels_tests.rs"]
pub(super) mod tests;
