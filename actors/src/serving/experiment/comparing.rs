//! The router's end of an experiment: it counts, looks what follows, and tells the head.
//!
//! Invariants:
//! 1. No request is assigned before the head knows that this router counts, and which count it is.
//! 2. What was told and not taken is told again as long as it is so.

use std::sync::{Arc, Mutex};

use mobula::Cluster;
use mobula_core::id::Incarnation;
use tokio::time::Instant;

use super::Plan;
use super::command::Command;
use super::findings::{Decision, Findings};
use super::plan::{Ending, Experiment};
use super::tally::Tally;
use crate::serving::arm::lock;
use crate::serving::client;
use crate::serving::rollout::plan::Cleanup;
use crate::serving::rollout::reporting::REPORT_INTERVAL;
use crate::serving::rollout::trial::shortened;

/// The experiment that this router counts.
struct Current {
    number: u64,
    plan: Arc<Plan>,
    tally: Arc<Mutex<Tally>>,
    reported: Option<Instant>,
    /// How many keys and values the last report was about.
    reported_values: u64,
}

/// Follows an endpoint's experiments.
pub(in crate::serving) struct Comparing {
    cluster: Cluster,
    router: Incarnation,
    current: Option<Current>,
}

impl Comparing {
    pub(in crate::serving) fn new(cluster: Cluster, router: Incarnation) -> Self {
        Comparing {
            cluster,
            router,
            current: None,
        }
    }

    /// What this router counts in an experiment; `None` while the head does not know that it does.
    pub(in crate::serving) async fn count(
        &mut self,
        experiment: &Experiment,
    ) -> Option<(Arc<Plan>, Arc<Mutex<Tally>>)> {
        if experiment.counting != Some(self.router) {
            self.current = None;
            self.tell(Command::Count {
                endpoint: experiment.plan.endpoint.clone(),
                experiment: experiment.number,
                router: self.router,
            })
            .await;
            return None;
        }
        if self.current.as_ref().map(|current| current.number) != Some(experiment.number) {
            let tally = Tally::new(experiment.plan.clone(), experiment.alpha());
            self.current = Some(Current {
                number: experiment.number,
                plan: Arc::new(experiment.plan.clone()),
                tally: Arc::new(Mutex::new(tally)),
                reported: None,
                reported_values: 0,
            });
        }
        let current = self.current.as_ref()?;
        Some((Arc::clone(&current.plan), Arc::clone(&current.tally)))
    }

    /// Forgets what was counted of an experiment that is over.
    pub(in crate::serving) fn forget(&mut self) {
        self.current = None;
    }

    /// Looks what follows from what was counted, and tells the head.
    pub(in crate::serving) async fn judge(&mut self, experiment: &Experiment) {
        let Some(current) = &mut self.current else {
            return;
        };
        let ((ending, findings), keys) = {
            let tally = lock(&current.tally);
            (tally.judge(), tally.exposed())
        };
        if let Some(ending) = ending {
            return self.conclude(experiment, ending, findings).await;
        }
        let is_due = current
            .reported
            .is_none_or(|reported| reported.elapsed() >= REPORT_INTERVAL);
        let values: u64 = findings
            .measured
            .iter()
            .map(|row| row.control.count + row.treatment.count)
            .sum();
        let known = keys + values;
        if !is_due || known == current.reported_values {
            return;
        }
        (current.reported, current.reported_values) = (Some(Instant::now()), known);
        self.tell(Command::Report {
            endpoint: experiment.plan.endpoint.clone(),
            experiment: experiment.number,
            router: self.router,
            findings,
        })
        .await;
    }

    /// Says that the treatment cannot be compared.
    pub(in crate::serving) async fn refuse(&self, experiment: &Experiment, reason: &str) {
        let findings = Findings {
            decision: Decision::Control,
            ..Findings::because(shortened(reason))
        };
        self.conclude(experiment, Ending::Unfit, findings).await;
    }

    /// Says that nothing is left of the treatment.
    pub(in crate::serving) async fn say_drained(&self, experiment: &Experiment) {
        if experiment.cleanup != Cleanup::Draining {
            return;
        }
        self.tell(Command::Drained {
            endpoint: experiment.plan.endpoint.clone(),
            experiment: experiment.number,
            revision: experiment.revision,
            router: self.router,
        })
        .await;
    }

    async fn conclude(&self, experiment: &Experiment, ending: Ending, findings: Findings) {
        tracing::info!(
            endpoint = experiment.plan.endpoint,
            experiment = experiment.number,
            ?ending,
            decision = ?findings.decision,
            reason = findings.reason,
            "an experiment is over"
        );
        self.tell(Command::Conclude {
            endpoint: experiment.plan.endpoint.clone(),
            experiment: experiment.number,
            router: self.router,
            ending,
            findings,
        })
        .await;
    }

    async fn tell(&self, command: Command) {
        if let Err(error) = client::experiment(&self.cluster, command).await {
            // What is still so at the next look is said again.
            tracing::debug!(%error, "the head did not take a word about an experiment");
        }
    }
}
