//! Which versions a router answers with: it follows the endpoint's row and its rollout, and judges the
//! rollout's steps.
//!
//! Invariants:
//! 1. The router goes on with what it knows while the head is away.
//! 2. It changes to another active version when a replica of that one answers, and not before: neither a
//!    promotion nor a rollback costs an answer.
//! 3. It says that a version is drained after the last request with it was answered.
//! 4. It has as many replicas as the endpoint's row says, and proposes how many that shall be
//!    (`autoscaler`): at each look, and at once when far more requests come than before.
//! 5. A step is judged by what came of it here. A router that is started again counts anew.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mobula::{ActorRef, Cluster, StorageLocation};
use mobula_core::id::Incarnation;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::arm::{Arm, Origin, Routes, Tried, WhenGone, lock};
use super::autoscaler::pilot::{Pilot, Replicas as SeenReplicas};
use super::client;
use super::controller::{monitor_name, replica_name};
use super::feed::feed;
use super::fleet::Fleet;
use super::guard::traffic::Traffic;
use super::meters::{Meters, VersionSeen};
use super::replica::Replica;
use super::replica_link::{feed_monitor, follow_origin, keep_open};
use super::rollout::command::{Command, Verdict};
use super::rollout::plan::{Cleanup, Phase, Rollout, Served};
use super::rollout::trial::{Evidence, Judgement, Trial, shortened};
use super::signature::{ROW_VALUES_MAX, Signature};
use super::state::{Endpoint, Routing};
use crate::registry::artifact::Artifact;
use crate::registry::version_file::VersionFileError;
use crate::storage::open_blobs;

/// How often the head is asked and the trial is judged: a rollback comes this much later than it could.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

type Replicas = ActorRef<Replica>;

/// Why an endpoint cannot answer with a version.
#[derive(Debug, thiserror::Error)]
pub(super) enum SignatureError {
    #[error("the version's file: {0}")]
    Version(#[from] VersionFileError),
    #[error(
        "version {version} of {model} is trained on {samples}: an endpoint answers for numbers \
         with classes, at most {ROW_VALUES_MAX} numbers a row"
    )]
    Samples {
        model: String,
        version: u64,
        samples: String,
    },
}

impl SignatureError {
    /// Whether another try cannot help.
    fn is_final(&self) -> bool {
        !matches!(self, SignatureError::Version(VersionFileError::Store(_)))
    }
}

/// How the versions of an endpoint are reached.
pub(super) struct Versions {
    cluster: Cluster,
    storage: StorageLocation,
    traffic: Arc<Traffic>,
}

impl Versions {
    pub(super) fn new(cluster: Cluster, storage: StorageLocation) -> Self {
        Versions {
            cluster,
            storage,
            traffic: Arc::default(),
        }
    }

    /// What the endpoint's active version takes and gives.
    pub(super) async fn signature(&self, endpoint: &Endpoint) -> Result<Signature, SignatureError> {
        self.signature_of(&endpoint.model, &active(endpoint)).await
    }

    async fn signature_of(
        &self,
        model: &str,
        served: &Served,
    ) -> Result<Signature, SignatureError> {
        let blobs = open_blobs(&self.storage).map_err(VersionFileError::from)?;
        let artifact = Artifact::load(&blobs, &served.digest, served.size_bytes).await?;
        Signature::of(&artifact).map_err(|samples| SignatureError::Samples {
            model: model.to_owned(),
            version: served.version,
            samples,
        })
    }

    /// An arm that looks for its replicas from now on.
    fn arm(&self, endpoint: &Endpoint, version: u64) -> (Arm<Replicas>, WhenGone) {
        let mut tasks = JoinSet::new();
        let fleet = Fleet::sharing(endpoint.replicas, Arc::clone(&self.traffic));
        for (number, berth) in fleet.berths() {
            let name = replica_name(&endpoint.name, version, number);
            tasks.spawn(keep_open(self.cluster.clone(), name, berth));
        }
        let (feed, reader) = feed();
        let monitor = monitor_name(&endpoint.name, version);
        tasks.spawn(feed_monitor(self.cluster.clone(), monitor, reader));
        let (learnt, origin) = watch::channel(Origin::default());
        tasks.spawn(follow_origin(
            self.cluster.clone(),
            endpoint.model.clone(),
            version,
            learnt,
        ));
        Arm::new(version, origin, fleet, feed, tasks)
    }

    /// Gives an arm as many replicas as the endpoint shall have.
    fn resize(&self, endpoint: &Endpoint, arm: &Arm<Replicas>) {
        for (number, berth) in arm.fleet().resize(endpoint.replicas) {
            let name = replica_name(&endpoint.name, arm.version(), number);
            arm.spawn(keep_open(self.cluster.clone(), name, berth));
        }
    }
}

fn active(endpoint: &Endpoint) -> Served {
    Served {
        version: endpoint.version,
        digest: endpoint.digest.clone(),
        size_bytes: endpoint.size_bytes,
    }
}

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
    /// The rollout whose candidate is known to fit the endpoint.
    fitting: Option<u64>,
    /// The rollout and step that are tried.
    tried: Option<(u64, u32)>,
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
        };
        let (sender, receiver) = watch::channel(Arc::new(routes));
        let traffic = Arc::clone(&versions.traffic);
        let pilot = Pilot::new(versions.cluster.clone(), incarnation, traffic);
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
            pilot,
            meters,
        };
        (steering, receiver)
    }

    /// Follows the head until the router ends.
    pub(super) async fn follow(mut self) {
        let traffic = Arc::clone(&self.versions.traffic);
        loop {
            let is_scaled = match client::routing(&self.versions.cluster, &self.name).await {
                Ok(routing) => {
                    self.look(&routing).await;
                    self.scale(&routing).await
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
    async fn scale(&mut self, routing: &Routing) -> bool {
        let arms = || self.arms.values().map(|(arm, _)| arm);
        for arm in arms() {
            self.versions.resize(&routing.endpoint, arm);
        }
        let seen = SeenReplicas {
            ready: self.routes.borrow().active.fleet().open_count(),
            are_drained: arms().all(|arm| arm.fleet().is_drained()),
        };
        let is_scaled = self.pilot.look(routing, seen).await;
        self.measure(routing.endpoint.replicas);
        is_scaled
    }

    fn measure(&mut self, replicas: u32) {
        let Some(meters) = &mut self.meters else {
            return;
        };
        let figures = self.pilot.seen();
        let counts = self.versions.traffic.counts();
        meters.show(replicas, figures, &counts);
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
        if let Err(error) = meters.show_versions(&seen) {
            tracing::debug!(endpoint = self.name, %error, "a version is not measured");
        }
    }

    async fn look(&mut self, routing: &Routing) {
        let endpoint = &routing.endpoint;
        let open = routing
            .rollout
            .as_ref()
            .filter(|rollout| rollout.phase.is_open());
        let open = match open {
            Some(rollout) if self.fits(endpoint, rollout).await => Some(rollout),
            _ => None,
        };
        self.route(endpoint, open);
        self.drop_unwanted(endpoint, open);
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
    }

    /// Whether a candidate takes and gives what the endpoint does. One that never will is rolled back.
    async fn fits(&mut self, endpoint: &Endpoint, rollout: &Rollout) -> bool {
        if self.fitting == Some(rollout.number) {
            return true;
        }
        let candidate = &rollout.candidate;
        let reason = match self.versions.signature_of(&endpoint.model, candidate).await {
            Ok(signature) if signature == self.signature => {
                self.fitting = Some(rollout.number);
                return true;
            }
            Ok(other) => other.difference(candidate.version, &self.signature),
            Err(error) if error.is_final() => error.to_string(),
            Err(error) => {
                tracing::warn!(endpoint = self.name, %error, "a candidate cannot be looked at yet");
                return false;
            }
        };
        let evidence = Evidence {
            reason: shortened(&reason),
            ..Evidence::default()
        };
        self.say(rollout, Verdict::RollBack, evidence).await;
        false
    }

    fn arm(&mut self, endpoint: &Endpoint, version: u64) -> Arc<Arm<Replicas>> {
        let versions = &self.versions;
        let (arm, _) = self.arms.entry(version).or_insert_with(|| {
            let (arm, when_gone) = versions.arm(endpoint, version);
            (Arc::new(arm), when_gone)
        });
        Arc::clone(arm)
    }

    /// Sends requests where they belong now.
    fn route(&mut self, endpoint: &Endpoint, open: Option<&Rollout>) {
        let known = Arc::clone(&self.routes.borrow());
        let wanted = self.arm(endpoint, endpoint.version);
        let active = if wanted.is_open() {
            wanted
        } else {
            Arc::clone(&known.active)
        };
        let at = open.map(|rollout| (rollout.number, rollout.step));
        if at == self.tried && active.version() == known.active.version() {
            return;
        }
        let tried = open.map(|rollout| Tried {
            arm: self.arm(endpoint, rollout.candidate.version),
            seed: rollout.seed(),
            weight_percent: rollout.weight_percent(),
            trial: Arc::new(Mutex::new(Trial::new(
                rollout.guardrails,
                rollout.min_samples,
                rollout.judged_steps(),
            ))),
        });
        tracing::info!(
            endpoint = self.name,
            active = active.version(),
            candidate = tried.as_ref().map(|tried| tried.arm.version()),
            weight_percent = tried.as_ref().map(|tried| tried.weight_percent),
            "requests are sent by new rules"
        );
        self.tried = at;
        self.routes.send_replace(Arc::new(Routes { active, tried }));
    }

    fn drop_unwanted(&mut self, endpoint: &Endpoint, open: Option<&Rollout>) {
        let mut wanted = vec![endpoint.version, self.routes.borrow().active.version()];
        wanted.extend(open.map(|rollout| rollout.candidate.version));
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

    async fn judge(&self, rollout: &Rollout) {
        let routes = Arc::clone(&self.routes.borrow());
        let Some(tried) = &routes.tried else {
            return;
        };
        let judgement = if tried.weight_percent == 0 {
            all_answer(&tried.arm, rollout)
        } else {
            lock(&tried.trial).judge()
        };
        match judgement {
            Judgement::RollBack(evidence) => self.say(rollout, Verdict::RollBack, evidence).await,
            Judgement::Pass(evidence) if rollout.phase == Phase::Running => {
                self.say(rollout, Verdict::Pass, evidence).await;
            }
            Judgement::Pass(_) | Judgement::Hold(_) => {}
        }
    }

    async fn say(&self, rollout: &Rollout, verdict: Verdict, evidence: Evidence) {
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
    async fn say_drained(&self, endpoint: &Endpoint, rollout: &Rollout) {
        let Some(retiring) = rollout.retiring().map(|served| served.version) else {
            return;
        };
        let is_left = self.arms.contains_key(&retiring)
            || self.leaving.iter().any(|(version, _)| *version == retiring)
            || self.routes.borrow().active.version() != endpoint.version;
        if rollout.cleanup != Cleanup::Draining || is_left {
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

/// The judgement of a step without requests: it is passed when the candidate could take all of them.
fn all_answer(arm: &Arm<Replicas>, rollout: &Rollout) -> Judgement {
    let replicas = u32::try_from(arm.fleet().replica_count()).unwrap_or(u32::MAX);
    let (_, count) = rollout.replica_counts(replicas);
    let open = arm.fleet().open_count();
    let evidence = Evidence {
        reason: format!("{open} of {count} replicas answer"),
        ..Evidence::default()
    };
    if open >= count as usize {
        Judgement::Pass(evidence)
    } else {
        Judgement::Hold(evidence)
    }
}
