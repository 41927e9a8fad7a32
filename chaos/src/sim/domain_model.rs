//! What the domain modules (checkpoints, models, endpoints, monitors) may answer, written apart from
//! them, and judged in the order of the log like everything else.
//!
//! Above all I7: the newest visible step of a job never goes back but by a rejection that names it, and
//! nobody but the newest start of a driver makes one visible.

use std::collections::{BTreeMap, BTreeSet};

use mobula_actors::checkpoint::state::{
    CHECKPOINTS_PER_JOB, CheckpointCommand, CheckpointModule, CheckpointQuery, CheckpointRef,
    JobCheckpoints,
};
use mobula_actors::drift::state as drift;
use mobula_actors::registry::state as registry;
use mobula_actors::serving::rollout::plan::Cleanup;
use mobula_actors::serving::state as serving;
use mobula_core::codec;
use mobula_core::control::{ModuleId, Reader, StateModule};
use mobula_core::error::Rejection;
use mobula_core::id::{Incarnation, JobId};

use super::experiment_model::{ExperimentModel, Standing, endpoint_of};
use super::rollouts::RolloutModel;
use super::violation::Violation;

/// The largest command or answer of a domain module in a simulation.
pub(crate) const PAYLOAD_BYTES_MAX: usize = 256 * 1024;

const STEPS: &str = "a visible checkpoint is the newest, and of the newest start (I7)";
const VERSIONS: &str = "a version never changes and is given out once";
const ENDPOINTS: &str = "an endpoint is one deployment, and its newest router's word counts (I4)";
const WINDOWS: &str = "a monitor's window counts once";

#[derive(Debug, Default)]
struct Checkpoints {
    incarnation: Incarnation,
    /// Newest first.
    visible: Vec<CheckpointRef>,
    rejected: BTreeSet<String>,
}

#[derive(Debug)]
struct Endpoint {
    router: Incarnation,
    deleting: bool,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Monitor {
    /// Incarnation and number of the last window.
    last: (u64, u64),
    windows: u64,
    events: u64,
    /// The model and version of the last window, if it drifted.
    drifts: Option<(String, u64)>,
}

/// What the log so far has led to in the domain modules.
#[derive(Debug, Default)]
pub(crate) struct DomainModel {
    checkpoints: BTreeMap<JobId, Checkpoints>,
    /// The digests of each model's versions, in their order.
    models: BTreeMap<String, Vec<String>>,
    endpoints: BTreeMap<String, Endpoint>,
    monitors: BTreeMap<String, Monitor>,
    pub(crate) rollouts: RolloutModel,
    pub(crate) experiments: ExperimentModel,
    /// Checkpoints that became visible.
    pub(crate) committed: u64,
    /// Commands of stale incarnations that were refused.
    pub(crate) fenced: u64,
}

type Answer = Result<Vec<u8>, Rejection>;

fn broken<T>(rule: &'static str, index: u64, detail: String) -> Result<T, Violation> {
    Err(Violation::new(rule, format!("entry {index}: {detail}")))
}

/// Reads a command or an answer.
pub(super) fn decode<T: serde::de::DeserializeOwned>(
    index: u64,
    bytes: &[u8],
) -> Result<T, Violation> {
    codec::decode(bytes, PAYLOAD_BYTES_MAX)
        .map_err(|error| Violation::new("answers can be read", format!("entry {index}: {error}")))
}

impl DomainModel {
    /// Takes in one command of a domain module and its answer. `tables` are those after it.
    pub(crate) fn observe(
        &mut self,
        index: u64,
        module: ModuleId,
        payload: &[u8],
        result: &Answer,
        tables: &dyn Reader,
    ) -> Result<(), Violation> {
        match module {
            ModuleId::CHECKPOINT => {
                self.checkpoint(index, &decode(index, payload)?, result, tables)
            }
            ModuleId::REGISTRY => self.registered(index, decode(index, payload)?, result),
            ModuleId::SERVING => {
                let command: serving::Command = decode(index, payload)?;
                let versions = |model: &str| self.models.get(model).map_or(0, Vec::len) as u64;
                self.rollouts
                    .observe(index, &command, result.is_ok(), tables, versions)?;
                let standing = match &command {
                    serving::Command::Experiment(said) => self.standing(endpoint_of(said)),
                    _ => None,
                };
                self.experiments
                    .observe(index, &command, result, standing.as_ref(), tables)?;
                self.served(index, command, result)
            }
            ModuleId::DRIFT => match decode(index, payload)? {
                drift::Command::Report(report) => self.watched(index, &report, result, tables),
                // The simulated people set no policy, and the simulated monitors send windows only.
                drift::Command::Retraining(_)
                | drift::Command::Vitals(_)
                | drift::Command::SetLog { .. } => Ok(()),
            },
            _ => Ok(()),
        }
    }

    /// How many versions a model has.
    pub(crate) fn versions(&self, model: &str) -> u64 {
        self.models.get(model).map_or(0, Vec::len) as u64
    }

    /// What experiments go by of an endpoint. Their commands change nothing of it.
    fn standing(&self, name: &str) -> Option<Standing> {
        let endpoint = self.endpoints.get(name)?;
        let (model, active) = self.rollouts.serves(name)?;
        let rollout = self.rollouts.of(name).last();
        Some(Standing {
            router: endpoint.router,
            is_deleting: endpoint.deleting,
            model: model.to_owned(),
            versions: self.versions(model),
            active,
            is_rolling: rollout.is_some_and(|newest| newest.cleanup != Cleanup::Done),
        })
    }

    /// Endpoints that exist.
    pub(crate) fn endpoints(&self) -> impl Iterator<Item = &String> {
        self.endpoints.keys()
    }

    fn checkpoint(
        &mut self,
        index: u64,
        command: &CheckpointCommand,
        result: &Answer,
        tables: &dyn Reader,
    ) -> Result<(), Violation> {
        let (job, incarnation) = match command {
            CheckpointCommand::Committed { job, checkpoint } => (*job, checkpoint.incarnation),
            CheckpointCommand::Fence { job, incarnation }
            | CheckpointCommand::Rejected {
                job, incarnation, ..
            } => (*job, *incarnation),
            // The simulated drivers and people send none of these.
            CheckpointCommand::Forget { .. }
            | CheckpointCommand::Trim { .. }
            | CheckpointCommand::Keep { .. }
            | CheckpointCommand::Pin { .. }
            | CheckpointCommand::Prune { .. }
            | CheckpointCommand::Preempted { .. } => return Ok(()),
        };
        let is_known = self.checkpoints.contains_key(&job);
        let known = self.checkpoints.entry(job).or_default();
        let is_fenced = incarnation < known.incarnation;
        let expected = !is_fenced
            && match command {
                CheckpointCommand::Committed { checkpoint, .. } => known.admits(checkpoint),
                CheckpointCommand::Rejected { .. } => is_known,
                _ => true,
            };
        if result.is_ok() != expected {
            return broken(
                STEPS,
                index,
                format!("{command:?} was answered {result:?}, and known is {known:?}"),
            );
        }
        self.fenced += u64::from(is_fenced);
        if !expected {
            if !is_known {
                self.checkpoints.remove(&job);
            }
            return Ok(());
        }
        known.incarnation = incarnation;
        match command {
            CheckpointCommand::Committed { checkpoint, .. } => {
                let newest = known.visible.first().map(|newest| newest.step);
                if newest < Some(checkpoint.step) {
                    known.visible.insert(0, checkpoint.clone());
                    known.visible.truncate(CHECKPOINTS_PER_JOB);
                    self.committed += 1;
                }
            }
            CheckpointCommand::Rejected {
                manifest_digest, ..
            } => {
                known.rejected.insert(manifest_digest.clone());
                known
                    .visible
                    .retain(|kept| kept.manifest_digest != *manifest_digest);
            }
            _ => {}
        }
        self.compare_steps(index, job, tables)
    }

    fn compare_steps(&self, index: u64, job: JobId, tables: &dyn Reader) -> Result<(), Violation> {
        let query = CheckpointQuery::List { job }.encode();
        let listed = CheckpointModule.query(tables, 0, &query);
        let listed = listed
            .ok()
            .and_then(|bytes| JobCheckpoints::decode(&bytes).ok());
        let found: Vec<CheckpointRef> = listed
            .unwrap_or_default()
            .checkpoints
            .into_iter()
            .map(|committed| committed.checkpoint)
            .collect();
        let known = self.checkpoints.get(&job).map(|known| &known.visible);
        if known.is_some_and(|known| *known == found) {
            return Ok(());
        }
        broken(
            STEPS,
            index,
            format!("{job} shows {found:?}, and {known:?} were made visible"),
        )
    }

    fn registered(
        &mut self,
        index: u64,
        command: registry::Command,
        result: &Answer,
    ) -> Result<(), Violation> {
        let registry::Command::Register(new) = command else {
            let text = format!("{command:?} is none of the simulator's commands");
            return broken(VERSIONS, index, text);
        };
        let Ok(bytes) = result else {
            return broken(VERSIONS, index, format!("{new:?} was refused: {result:?}"));
        };
        let given: registry::ModelVersion = decode(index, bytes)?;
        let digests = self.models.entry(new.model.clone()).or_default();
        let known = digests.iter().position(|digest| *digest == new.digest);
        let expected = match known {
            Some(at) => at as u64 + 1,
            None => {
                digests.push(new.digest.clone());
                digests.len() as u64
            }
        };
        if (given.version, &given.description.digest) == (expected, &new.digest) {
            return Ok(());
        }
        broken(
            VERSIONS,
            index,
            format!(
                "{new:?} is version {}, and should be {expected}",
                given.version
            ),
        )
    }

    fn served(
        &mut self,
        index: u64,
        command: serving::Command,
        result: &Answer,
    ) -> Result<(), Violation> {
        let shown = format!("{command:?} was answered {result:?}");
        let is_done = match command {
            serving::Command::Deploy {
                endpoint,
                model,
                version,
                ..
            } => {
                let newest = self.models.get(&model).map_or(0, Vec::len) as u64;
                let version = version.unwrap_or(newest);
                let is_there = (1..=newest).contains(&version);
                let expected = is_there && !self.endpoints.contains_key(&endpoint);
                if let (true, Ok(bytes)) = (expected, result) {
                    let given: serving::Endpoint = decode(index, bytes)?;
                    if (given.version, given.router_incarnation) != (version, Incarnation(index)) {
                        return broken(ENDPOINTS, index, shown);
                    }
                    let deployed = Endpoint {
                        router: Incarnation(index),
                        deleting: false,
                    };
                    self.endpoints.insert(endpoint, deployed);
                }
                expected
            }
            serving::Command::Delete { endpoint } => match self.endpoints.get_mut(&endpoint) {
                Some(known) => {
                    known.deleting = true;
                    true
                }
                None => false,
            },
            serving::Command::RouterReady {
                endpoint,
                incarnation,
                ..
            } => match self.endpoints.get_mut(&endpoint) {
                Some(known) if known.router <= incarnation => {
                    known.router = incarnation;
                    true
                }
                Some(_) => {
                    self.fenced += 1;
                    false
                }
                None => false,
            },
            serving::Command::Gone { endpoint } => match self.endpoints.get(&endpoint) {
                Some(known) => {
                    if known.deleting {
                        self.endpoints.remove(&endpoint);
                        // What was seen of it goes with it.
                        self.monitors.remove(&endpoint);
                    }
                    true
                }
                None => false,
            },
            // What comes of both was judged already; who may say what of a rollout has
            // `actors/src/serving/rollout/state_tests.rs`.
            serving::Command::Rollout(_) | serving::Command::Experiment(_) => result.is_ok(),
            // Nothing is scaled: `actors/src/serving/autoscaler/state_tests.rs` has what holds.
            serving::Command::Scaling(_) => result.is_ok(),
            // Nor has anything tokens, rules, graphs, kept answers or sentinels: the tests beside
            // `actors/src/serving/access/state.rs`, `actors/src/serving/graph/state.rs` and
            // `actors/src/serving/sentinels/state.rs` have what holds.
            serving::Command::Access(_)
            | serving::Command::Graph(_)
            | serving::Command::Cache(_)
            | serving::Command::Sentinels(_) => result.is_ok(),
        };
        if result.is_ok() == is_done {
            return Ok(());
        }
        broken(ENDPOINTS, index, shown)
    }

    fn watched(
        &mut self,
        index: u64,
        report: &drift::Report,
        result: &Answer,
        tables: &dyn Reader,
    ) -> Result<(), Violation> {
        let window = (report.incarnation, report.window);
        let before = self.monitors.get(&report.endpoint);
        let last = before.map(|known| known.last);
        if result.is_ok() != (Some(window) >= last) {
            return broken(
                WINDOWS,
                index,
                format!("{report:?} was answered {result:?}, and the last was {last:?}"),
            );
        }
        if result.is_err() {
            self.fenced += 1;
            return Ok(());
        }
        if Some(window) != last {
            let of = (report.model.clone(), report.version);
            let goes_on = before.is_some_and(|known| known.drifts.as_ref() == Some(&of));
            let is_event = report.drifts() && !goes_on;
            let known = self.monitors.entry(report.endpoint.clone()).or_default();
            known.last = window;
            known.windows += report.windows;
            known.events += u64::from(is_event);
            known.drifts = report.drifts().then_some(of);
        }
        let query = codec::encode_plain(&drift::Query::Monitors {
            endpoint: Some(report.endpoint.clone()),
            after: None,
        });
        let found = drift::Drift.query(tables, 0, &query).unwrap_or_default();
        let found: Vec<drift::MonitorStatus> = decode(index, &found)?;
        let known = self
            .monitors
            .get(&report.endpoint)
            .cloned()
            .unwrap_or_default();
        let is_same = |status: &drift::MonitorStatus| {
            (status.windows, status.events) == (known.windows, known.events)
        };
        if found.first().is_some_and(is_same) {
            return Ok(());
        }
        broken(
            WINDOWS,
            index,
            format!("the monitor shows {found:?}, and known is {known:?}"),
        )
    }
}

impl Checkpoints {
    fn admits(&self, new: &CheckpointRef) -> bool {
        let newest = self.visible.first();
        !self.rejected.contains(&new.manifest_digest)
            && newest.is_none_or(|newest| {
                new.step > newest.step
                    || (new.step == newest.step
                        && (new.manifest_digest == newest.manifest_digest
                            || new.weights_blake3 == newest.weights_blake3))
            })
    }
}
