//! Which versions a router answers with: it follows the endpoint's row, its rollout and its experiment. What it says of the
//! rollout's steps is in `telling`.
//!
//! Invariants:
//! 1. The router goes on with what it knows while the head is away.
//! 2. It changes to another active version when a replica of that one answers, and not before: neither a
//!    promotion nor a rollback costs an answer.
//! 3. It says that a version is drained after the last request with it was answered.
//! 4. It has as many replicas as the endpoint's row says, and proposes how many that shall be
//!    (`autoscaler`): at each look, and at once when far more requests come than before.
//! 5. A step is judged by what came of it here. A router that is started again counts anew.
//! 6. An experiment changes no version: what it is about is the active one, and one beside it.
//! 7. It never waits for the object store: what is wanted of it is loaded beside the loop (`loading`), one version and
//!    one count at the most, and until it is there requests are sent as if nothing had been asked.

mod telling;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mobula_core::id::Incarnation;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::watch;

use super::arm::{Arm, Compared, Routes, Tried, WhenGone};
use super::autoscaler::pilot::{Pilot, Replicas as SeenReplicas};
use super::client;
use super::experiment::comparing::Comparing;
use super::experiment::plan::Experiment;
use super::meters::{Meters, VersionSeen};
use super::rollout::command::Verdict;
use super::rollout::looking;
use super::rollout::plan::{Rollout, Served};
use super::rollout::reporting::Reporting;
use super::rollout::sentinels::Asking;
use super::rollout::trial::{Evidence, Trial, shortened};
use super::sentinels::noting::Noting;
use super::sentinels::state::Of;
use super::shadow;
use super::shadow::mirror::Shadowed;
use super::shadow::trial::ShadowTrial;
use super::signature::Signature;
use super::state::{Endpoint, Routing, Steered};
use super::versions::{Fit, Replicas, Versions};
use crate::drift::vitals::sentinels::Sentinels;

/// How often the head is asked and the trial is judged: a rollback comes this much later than it could.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// Follows one endpoint.
pub(super) struct Steering {
    name: String,
    versions: Versions,
    incarnation: Incarnation,
    signature: Signature,
    routes: watch::Sender<Arc<Routes<Replicas>>>,
    /// The arms that are wanted, by version, and what tells of their end: two, or three for a moment.
    arms: BTreeMap<u64, (Arc<Arm<Replicas>>, WhenGone)>,
    /// Arms that may still have requests, with their versions.
    leaving: Vec<(u64, WhenGone)>,
    /// The version that is known to fit the endpoint, with its sentinels.
    fitting: Option<(u64, Arc<Sentinels>)>,
    /// The rollout and step that are tried.
    tried: Option<(u64, u32)>,
    /// The experiment that is under way here.
    compared: Option<u64>,
    comparing: Comparing,
    /// The rollout whose candidate is shadowed, with its replicas and what tells of their end.
    shadowing: Option<(u64, Shadowed<Replicas>, WhenGone)>,
    asking: Asking,
    reporting: Reporting,
    noting: Noting,
    pilot: Pilot,
    /// None where the process has no room for them.
    meters: Option<Meters>,
}

impl Steering {
    /// Begins with the active version; what follows is seen at the other end.
    pub(super) fn new(
        versions: Versions,
        incarnation: Incarnation,
        signature: Signature,
        routing: &Routing,
    ) -> (Self, watch::Receiver<Arc<Routes<Replicas>>>) {
        let version = routing.endpoint.version;
        let (arm, when_gone) = versions.arm(&routing.endpoint, version);
        let arm = Arc::new(arm);
        let routes = Routes {
            active: Arc::clone(&arm),
            tried: None,
            compared: None,
            shadowed: None,
        };
        let (sender, receiver) = watch::channel(Arc::new(routes));
        let traffic = Arc::clone(&versions.traffic);
        let pilot = Pilot::new(versions.cluster.clone(), incarnation, traffic);
        let comparing = Comparing::new(
            versions.cluster.clone(),
            versions.storage.clone(),
            incarnation,
        );
        let meters = Meters::new(&routing.endpoint.name)
            .inspect_err(|error| tracing::warn!(%error, "an endpoint is not measured"))
            .ok();
        let steering = Steering {
            name: routing.endpoint.name.clone(),
            versions,
            incarnation,
            signature,
            routes: sender,
            arms: BTreeMap::from([(version, (arm, when_gone))]),
            leaving: Vec::new(),
            fitting: None,
            tried: None,
            compared: None,
            comparing,
            shadowing: None,
            asking: Asking::new(),
            reporting: Reporting::default(),
            noting: Noting::default(),
            pilot,
            meters,
        };
        (steering, receiver)
    }

    /// Follows the head until the router ends.
    pub(super) async fn follow(mut self) {
        let traffic = Arc::clone(&self.versions.traffic);
        loop {
            let is_scaled = match client::steered(&self.versions.cluster, &self.name).await {
                Ok(steered) => {
                    self.look(&steered).await;
                    self.scale(&steered).await
                }
                Err(error) => {
                    tracing::debug!(endpoint = self.name, %error, "the head does not answer");
                    false
                }
            };
            if !is_scaled {
                tokio::select! {
                    () = tokio::time::sleep(LOOK_INTERVAL) => {}
                    () = traffic.load.alarmed() => {}
                }
            }
        }
    }

    /// Has the replicas that the endpoint shall have, and sees whether these should be others.
    async fn scale(&mut self, steered: &Steered) -> bool {
        let routing = &steered.routing;
        let arms = || self.arms.values().map(|(arm, _)| arm);
        for arm in arms() {
            self.versions.resize(&routing.endpoint, arm);
        }
        if let Some((_, shadowed, _)) = &self.shadowing {
            self.versions.resize(&routing.endpoint, &shadowed.arm);
        }
        let seen = SeenReplicas {
            ready: self.routes.borrow().active.fleet().open_count(),
            memory_percent: arms()
                .map(|arm| arm.fleet().memory_percent())
                .max()
                .unwrap_or(0),
            are_drained: arms().all(|arm| arm.fleet().is_drained()),
        };
        let is_scaled = self.pilot.look(steered, seen).await;
        self.measure(routing.endpoint.replicas);
        is_scaled
    }

    fn measure(&mut self, replicas: u32) {
        let counts = [self.asking.take_counts(), self.comparing.take_counts()];
        let Some(meters) = &mut self.meters else {
            return;
        };
        let figures = self.pilot.seen();
        meters.show(replicas, figures, &self.versions.traffic.counts());
        let seen: Vec<VersionSeen> = self
            .arms
            .values()
            .map(|(arm, _)| VersionSeen {
                version: arm.version(),
                statistics: arm.statistics().clone(),
                pending: arm.fleet().pending_count() as u64,
                kept: arm.responses().size(),
            })
            .collect();
        let mut asked: Vec<u64> = self.arms.keys().copied().collect();
        asked.extend(
            self.shadowing
                .iter()
                .map(|(_, shadowed, _)| shadowed.arm.version()),
        );
        let shown = meters
            .show_versions(&seen)
            .and_then(|()| meters.count_sentinels(&asked, counts.into_iter().flatten()));
        if let Err(error) = shown {
            tracing::debug!(endpoint = self.name, %error, "a version is not measured");
        }
    }

    async fn look(&mut self, steered: &Steered) {
        let Steered {
            routing,
            experiment,
            shadow,
        } = steered;
        let endpoint = &routing.endpoint;
        let open = routing
            .rollout
            .as_ref()
            .filter(|rollout| rollout.phase.is_open());
        let under_way = experiment
            .as_ref()
            .filter(|experiment| experiment.is_open());
        if open.is_none() && under_way.is_none() {
            self.versions.forget();
        }
        let open = match open {
            Some(rollout) if self.fits(endpoint, rollout).await => Some(rollout),
            _ => None,
        };
        let compared = match under_way {
            Some(experiment) => self.compare(endpoint, experiment).await,
            None => {
                self.comparing.forget();
                None
            }
        };
        self.shadow(endpoint, open, shadow.as_ref());
        self.route(endpoint, open, compared);
        self.drop_unwanted(endpoint, open, under_way);
        for (arm, _) in self.arms.values() {
            arm.responses().set(routing.cache);
        }
        match (&routing.rollout, open) {
            (_, Some(rollout)) => self.judge(rollout).await,
            (Some(rollout), None) if !rollout.phase.is_open() => {
                self.say_drained(endpoint, rollout).await;
            }
            _ => {}
        }
        match (experiment, under_way) {
            (_, Some(experiment)) => {
                let routes = Arc::clone(&self.routes.borrow());
                if let Some(standing) = self.comparing.judge(experiment, &routes).await {
                    let of = Of::Experiment {
                        experiment: experiment.number,
                    };
                    self.note(of, standing).await;
                }
            }
            (Some(over), None) if !self.is_left(endpoint, over.plan.treatment.version) => {
                self.comparing.say_drained(over).await;
            }
            _ => {}
        }
    }

    /// Whether a candidate takes and gives what the endpoint does. One that never will is rolled back.
    async fn fits(&mut self, endpoint: &Endpoint, rollout: &Rollout) -> bool {
        match self.fit(endpoint, &rollout.candidate) {
            Fit::Yes(sentinels) => {
                self.asking.at(rollout, sentinels);
                true
            }
            Fit::Unknown => {
                self.report(rollout, looking::unread(), true).await;
                false
            }
            Fit::No(reason) => {
                let evidence = Evidence {
                    reason: shortened(&reason),
                    ..Evidence::default()
                };
                self.say(rollout, Verdict::RollBack, evidence).await;
                false
            }
        }
    }

    fn fit(&mut self, endpoint: &Endpoint, served: &Served) -> Fit {
        if let Some((version, sentinels)) = &self.fitting
            && *version == served.version
        {
            return Fit::Yes(Arc::clone(sentinels));
        }
        let found = self.versions.fit(&self.signature, endpoint, served);
        if let Fit::Yes(sentinels) = &found {
            self.fitting = Some((served.version, Arc::clone(sentinels)));
        }
        found
    }

    /// The other side of an experiment, once the head knows that this router counts.
    async fn compare(
        &mut self,
        endpoint: &Endpoint,
        experiment: &Experiment,
    ) -> Option<(u64, Compared<Replicas>)> {
        let (plan, tally) = self.comparing.count(experiment).await?;
        match self.fit(endpoint, &plan.treatment) {
            Fit::Yes(sentinels) => self.comparing.ask(experiment, sentinels),
            Fit::Unknown => return None,
            Fit::No(reason) => {
                self.comparing.refuse(experiment, &reason).await;
                return None;
            }
        }
        let arm = self.arm(endpoint, plan.treatment.version);
        Some((experiment.number, Compared { arm, plan, tally }))
    }

    fn arm(&mut self, endpoint: &Endpoint, version: u64) -> Arc<Arm<Replicas>> {
        let versions = &self.versions;
        let (arm, _) = self.arms.entry(version).or_insert_with(|| {
            let (arm, when_gone) = versions.arm(endpoint, version);
            (Arc::new(arm), when_gone)
        });
        Arc::clone(arm)
    }

    /// Has the shadow that a rollout wants at its first step, and no other.
    fn shadow(&mut self, endpoint: &Endpoint, open: Option<&Rollout>, plan: Option<&shadow::Plan>) {
        let wanted = open.filter(|rollout| rollout.step == 0).zip(plan);
        let known = self.shadowing.as_ref().map(|(number, ..)| *number);
        if known == wanted.map(|(rollout, _)| rollout.number) {
            return;
        }
        if let Some((_, shadowed, when_gone)) = self.shadowing.take() {
            self.leaving.push((shadowed.arm.version(), when_gone));
        }
        self.shadowing = wanted.map(|(rollout, plan)| {
            let version = rollout.candidate.version;
            let (arm, when_gone) = self.versions.shadow(endpoint, version);
            let shadowed = Shadowed {
                arm: Arc::new(arm),
                seed: rollout.seed(),
                plan: Arc::new(plan.clone()),
                trial: Arc::new(Mutex::new(ShadowTrial::new(plan.clone(), rollout))),
            };
            (rollout.number, shadowed, when_gone)
        });
    }

    /// Sends requests where they belong now.
    fn route(
        &mut self,
        endpoint: &Endpoint,
        open: Option<&Rollout>,
        compared: Option<(u64, Compared<Replicas>)>,
    ) {
        let known = Arc::clone(&self.routes.borrow());
        let wanted = self.arm(endpoint, endpoint.version);
        let active = if wanted.is_open() {
            wanted
        } else {
            Arc::clone(&known.active)
        };
        let at = open.map(|rollout| (rollout.number, rollout.step));
        let number = compared.as_ref().map(|(number, _)| *number);
        let is_known = (at, number) == (self.tried, self.compared);
        if is_known && active.version() == known.active.version() {
            return;
        }
        let compared = compared.map(|(_, compared)| compared);
        let shadowed = self.shadowing.as_ref();
        let shadowed = shadowed.map(|(_, shadowed, _)| shadowed.clone());
        let tried = open.filter(|_| shadowed.is_none()).map(|rollout| Tried {
            arm: self.arm(endpoint, rollout.candidate.version),
            seed: rollout.seed(),
            weight_percent: rollout.weight_percent(),
            trial: Arc::new(Mutex::new(Trial::new(
                rollout.guardrails,
                rollout.min_samples,
                rollout.judged_steps(),
                rollout.weight_percent(),
            ))),
        });
        tracing::info!(
            endpoint = self.name,
            active = active.version(),
            candidate = tried.as_ref().map(|tried| tried.arm.version()),
            weight_percent = tried.as_ref().map(|tried| tried.weight_percent),
            treatment = compared.as_ref().map(|compared| compared.arm.version()),
            shadow = shadowed.as_ref().map(|shadowed| shadowed.arm.version()),
            "requests are sent by new rules"
        );
        (self.tried, self.compared) = (at, number);
        self.routes.send_replace(Arc::new(Routes {
            active,
            tried,
            compared,
            shadowed,
        }));
    }

    fn drop_unwanted(
        &mut self,
        endpoint: &Endpoint,
        open: Option<&Rollout>,
        under_way: Option<&Experiment>,
    ) {
        let mut wanted = vec![endpoint.version, self.routes.borrow().active.version()];
        let tried = open.filter(|_| self.shadowing.is_none());
        wanted.extend(tried.map(|rollout| rollout.candidate.version));
        wanted.extend(under_way.map(|experiment| experiment.plan.treatment.version));
        let unwanted: Vec<u64> = self
            .arms
            .keys()
            .copied()
            .filter(|version| !wanted.contains(version))
            .collect();
        for version in unwanted {
            if let Some((_, when_gone)) = self.arms.remove(&version) {
                self.leaving.push((version, when_gone));
            }
        }
        // Nothing is ever sent: such a channel is empty until it is closed.
        let is_there = |gone: &mut WhenGone| matches!(gone.try_recv(), Err(TryRecvError::Empty));
        self.leaving.retain_mut(|(_, gone)| is_there(gone));
    }

    /// Whether a request may be with a version that is wanted no more.
    fn is_left(&self, endpoint: &Endpoint, version: u64) -> bool {
        self.arms.contains_key(&version)
            || self.leaving.iter().any(|(leaving, _)| *leaving == version)
            || self.routes.borrow().active.version() != endpoint.version
    }
}
