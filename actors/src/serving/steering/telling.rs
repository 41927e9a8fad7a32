//! What a router says of its endpoint's rollout: what follows at its step, why nothing does yet, and that nothing is left of a
//! version; and how far the sentinels of the version beside the active one are answered.

use std::sync::Arc;

use super::Steering;
use crate::serving::client;
use crate::serving::rollout::command::{Command, Verdict};
use crate::serving::rollout::looking::Seen;
use crate::serving::rollout::plan::{Cleanup, Phase, Rollout};
use crate::serving::rollout::trial::{Evidence, Judgement};
use crate::serving::sentinels::state::{Command as SentinelsCommand, Of, Standing};
use crate::serving::state::Endpoint;

impl Steering {
    /// Looks what follows at the step that a rollout is at, and tells the head.
    pub(super) async fn judge(&mut self, rollout: &Rollout) {
        let routes = Arc::clone(&self.routes.borrow());
        match self.asking.look(&routes, rollout) {
            Some(Seen::Judged(Judgement::RollBack(evidence))) => {
                return self.say(rollout, Verdict::RollBack, evidence).await;
            }
            Some(Seen::Judged(Judgement::Pass(evidence))) if rollout.phase == Phase::Running => {
                return self.say(rollout, Verdict::Pass, evidence).await;
            }
            Some(Seen::Judged(Judgement::Pass(evidence) | Judgement::Hold(evidence))) => {
                self.report(rollout, evidence, false).await;
            }
            Some(Seen::Waits(evidence)) => self.report(rollout, evidence, true).await,
            None => {}
        }
        if let Some(standing) = self.asking.standing() {
            let of = Of::Step {
                rollout: rollout.number,
                step: rollout.step,
            };
            self.note(of, standing).await;
        }
    }

    /// Tells the head how far the sentinels of the version beside the active one are answered, when that has changed.
    pub(super) async fn note(&mut self, of: Of, standing: Standing) {
        if !self.noting.is_due(of, standing) {
            return;
        }
        let command = SentinelsCommand::Note {
            endpoint: self.name.clone(),
            router: self.incarnation,
            of,
            standing,
        };
        match client::note_sentinels(&self.versions.cluster, command).await {
            Ok(()) => self.noting.taken(of, standing),
            // What is still so at the next look is said again.
            Err(error) => {
                tracing::debug!(endpoint = self.name, %error, "the head did not take a word about sentinels");
            }
        }
    }

    /// Tells the head why a step is not decided, now and then.
    pub(super) async fn report(&mut self, rollout: &Rollout, evidence: Evidence, waits: bool) {
        if !self.reporting.is_due(rollout, &evidence) {
            return;
        }
        let (endpoint, router) = (self.name.clone(), self.incarnation);
        let (rollout, step) = (rollout.number, rollout.step);
        let command = if waits {
            Command::Wait {
                endpoint,
                rollout,
                step,
                router,
                evidence,
            }
        } else {
            Command::Report {
                endpoint,
                rollout,
                step,
                router,
                evidence,
            }
        };
        self.tell(command).await;
    }

    pub(super) async fn say(&self, rollout: &Rollout, verdict: Verdict, evidence: Evidence) {
        tracing::info!(
            endpoint = self.name,
            rollout = rollout.number,
            step = rollout.step,
            ?verdict,
            reason = evidence.reason,
            "a step is judged"
        );
        self.tell(Command::Judge {
            endpoint: self.name.clone(),
            rollout: rollout.number,
            step: rollout.step,
            router: self.incarnation,
            verdict,
            evidence,
        })
        .await;
    }

    /// Says that nothing is left of the version that a rollout ended, once that is so.
    pub(super) async fn say_drained(&self, endpoint: &Endpoint, rollout: &Rollout) {
        let Some(retiring) = rollout.retiring().map(|served| served.version) else {
            return;
        };
        if rollout.cleanup != Cleanup::Draining || self.is_left(endpoint, retiring) {
            return;
        }
        self.tell(Command::Drained {
            endpoint: self.name.clone(),
            rollout: rollout.number,
            revision: rollout.revision,
            router: self.incarnation,
        })
        .await;
    }

    async fn tell(&self, command: Command) {
        if let Err(error) = client::roll_out(&self.versions.cluster, command).await {
            // What is still so at the next look is said again.
            tracing::debug!(endpoint = self.name, %error, "the head did not take a word about a rollout");
        }
    }
}
