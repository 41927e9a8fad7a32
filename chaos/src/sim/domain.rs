//! What clients and running actors want of the domain modules: checkpoints of drivers and what they keep,
//! versions of models, endpoints with their routers, and windows of monitors.
//!
//! Running actors speak as a real host does without a session, so anything may arrive twice, late, or
//! from an incarnation that is long over.

use mobula_actors::checkpoint::state::{CheckpointCommand, CheckpointQuery, CheckpointRef};
use mobula_actors::drift::state as drift;
use mobula_actors::registry::state as registry;
use mobula_actors::serving::replica_settings::ReplicaSettings;
use mobula_actors::serving::state as serving;
use mobula_core::codec;
use mobula_core::control::ModuleId;
use mobula_core::id::{Incarnation, JobId, SessionId};
use mobula_core::kept::Holder;
use rand::Rng;

use super::head::leader_of;
use super::network::Place;
use super::options::{MILLISECOND, Micros, SECOND};
use super::packet::{Ask, Packet, Question, Request};
use super::world::World;

/// The modules that clients watch and ask.
pub(crate) const WATCHED: [ModuleId; 5] = [
    ModuleId::CHECKPOINT,
    ModuleId::REGISTRY,
    ModuleId::SERVING,
    ModuleId::DRIFT,
    ModuleId::KEPT,
];

/// Models and endpoints: few, so that clients get into each other's way.
const MODELS: u32 = 2;
const ENDPOINTS: u32 = 2;

/// Files of which a version can be made; the same one twice is the same version.
const DIGESTS: [char; 6] = ['a', 'b', 'c', 'd', 'e', 'f'];

/// How much of what an actor says is said again, and until when: as long as a host's stream lives
/// without a word from the head.
const AGAIN: f64 = 0.2;
const AGAIN_AFTER_MAX: Micros = 4 * SECOND;

/// A thing that a running actor is, beside an actor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Role {
    /// It answers for an endpoint.
    Router(String),
    /// It looks at an endpoint's requests.
    Monitor(String),
}

impl Role {
    /// The role of an actor with this name.
    pub(crate) fn of(name: &str) -> Option<Role> {
        let inner = |prefix: &str, suffix: &str| {
            let name = name.strip_prefix(prefix)?.strip_suffix(suffix)?;
            Some(name.to_owned())
        };
        // A monitor's name says whose version it watches after the endpoint.
        let endpoint = |inner: String| Some(inner.rsplit_once('/')?.0.to_owned());
        inner("serving/", "/router").map(Role::Router).or_else(|| {
            inner("drift/", "/monitor")
                .and_then(endpoint)
                .map(Role::Monitor)
        })
    }
}

/// What a client changes in a domain module.
pub(crate) struct Change {
    pub(crate) module: ModuleId,
    pub(crate) payload: Vec<u8>,
}

fn model(number: u32) -> String {
    format!("model-{number}")
}

/// The change that takes an endpoint down.
pub(crate) fn delete(endpoint: String) -> Change {
    Change {
        module: ModuleId::SERVING,
        payload: codec::encode_plain(&serving::Command::Delete { endpoint }),
    }
}

impl World {
    /// Something that a client may want changed.
    pub(crate) fn domain_change(&mut self) -> Change {
        let model = model(self.rng.random_range(0..MODELS));
        let endpoint = format!("endpoint-{}", self.rng.random_range(0..ENDPOINTS));
        let what = self.rng.random_range(0..10);
        let compared = match what {
            3..7 if self.swarm.experiments && self.rng.random_bool(0.5) => {
                let command = self.experiment_change();
                command.map(serving::Command::Experiment)
            }
            3..7 if self.swarm.endpoints => self.rollout_change().map(serving::Command::Rollout),
            _ => None,
        };
        if let Some(command) = compared {
            return Change {
                module: ModuleId::SERVING,
                payload: codec::encode_plain(&command),
            };
        }
        if what == 9
            && let Some(dropped) = self.kept_change()
        {
            return dropped;
        }
        match what {
            0 | 1 if self.swarm.endpoints => {
                let command = serving::Command::Deploy {
                    endpoint,
                    model,
                    version: self.rng.random_bool(0.3).then_some(1),
                    replicas: self.rng.random_range(1..=2),
                    settings: ReplicaSettings::default(),
                    token_hash: [7; 32],
                };
                Change {
                    module: ModuleId::SERVING,
                    payload: codec::encode_plain(&command),
                }
            }
            2 if self.swarm.endpoints && self.rng.random_bool(0.3) => delete(endpoint),
            _ => {
                let digest = DIGESTS[self.rng.random_range(0..DIGESTS.len())];
                let new = registry::NewVersion {
                    model,
                    digest: digest.to_string().repeat(64),
                    size_bytes: 10,
                    weights_blake3: "a".repeat(64),
                    dataset_blake3: "b".repeat(64),
                    job: 1,
                    metrics: Default::default(),
                    training_json: "{}".to_owned(),
                };
                Change {
                    module: ModuleId::REGISTRY,
                    payload: codec::encode_plain(&registry::Command::Register(new)),
                }
            }
        }
    }

    /// Something that a client may want to see.
    pub(crate) fn domain_question(&mut self, job: Option<JobId>) -> Question {
        match (job, self.rng.random_range(0..3)) {
            (Some(job), 0) => {
                let payload = CheckpointQuery::List { job }.encode();
                Question::Module(ModuleId::CHECKPOINT, payload)
            }
            (_, 1) => {
                let payload = codec::encode_plain(&registry::Query::List { after: None });
                Question::Module(ModuleId::REGISTRY, payload)
            }
            _ => {
                let payload = codec::encode_plain(&serving::Query::List);
                Question::Module(ModuleId::SERVING, payload)
            }
        }
    }

    /// A driver has begun: its older starts are to commit nothing more.
    pub(crate) fn driver_began(&mut self, worker: usize, job: JobId, incarnation: Incarnation) {
        let command = CheckpointCommand::Fence { job, incarnation };
        self.actor_says(worker, ModuleId::CHECKPOINT, command.encode());
    }

    /// A driver goes on; now and then it keeps a value, saves, and finds damage in what was saved.
    pub(crate) fn driver_goes_on(&mut self, worker: usize, job: JobId, driver: Holder) {
        if self.rng.random_bool(0.1) {
            self.driver_keeps(worker, job, driver);
        }
        let (_, incarnation) = driver;
        if !self.rng.random_bool(0.1) {
            return;
        }
        // Drivers of one job count the same steps, whoever of them is the living one.
        let step = self.now / (50 * MILLISECOND);
        let digest = format!("{job}-{step}");
        let command = if self.rng.random_bool(0.1) {
            CheckpointCommand::Rejected {
                job,
                incarnation,
                step,
                manifest_digest: digest,
                reason: "simulated".to_owned(),
            }
        } else {
            CheckpointCommand::Committed {
                job,
                checkpoint: CheckpointRef {
                    step,
                    incarnation,
                    manifest_path: format!("jobs/{job}/{step}"),
                    manifest_digest: digest.clone(),
                    size_bytes: step,
                    weights_blake3: Some(digest),
                    metric: None,
                },
            }
        };
        self.actor_says(worker, ModuleId::CHECKPOINT, command.encode());
    }

    /// An actor of an endpoint goes on.
    pub(crate) fn role_goes_on(&mut self, worker: usize, role: Role, incarnation: Incarnation) {
        match role {
            Role::Router(endpoint) if self.rng.random_bool(0.3) => {
                let command = serving::Command::RouterReady {
                    endpoint,
                    incarnation,
                    http_address: format!("127.0.0.1:{}", worker + 1),
                };
                self.actor_says(worker, ModuleId::SERVING, codec::encode_plain(&command));
            }
            Role::Router(endpoint) if self.rng.random_bool(0.5) => {
                let counted = self.router_counts(&endpoint, incarnation);
                let said = match counted {
                    Some(command) => Some(serving::Command::Experiment(command)),
                    None => {
                        let said = self.router_says(&endpoint, incarnation);
                        said.map(serving::Command::Rollout)
                    }
                };
                if let Some(command) = said {
                    self.actor_says(worker, ModuleId::SERVING, codec::encode_plain(&command));
                }
            }
            Role::Monitor(endpoint) if self.rng.random_bool(0.1) => {
                let report = self.report_of(endpoint, incarnation);
                let command = drift::Command::Report(report);
                self.actor_says(worker, ModuleId::DRIFT, codec::encode_plain(&command));
            }
            Role::Router(_) | Role::Monitor(_) => {}
        }
    }

    fn report_of(&mut self, endpoint: String, incarnation: Incarnation) -> drift::Report {
        drift::Report {
            endpoint,
            model: model(self.rng.random_range(0..MODELS)),
            version: 1,
            incarnation: incarnation.0,
            window: self.now / (100 * MILLISECOND),
            samples: 10,
            windows: 1,
            rows: 10,
            refused: 0,
            dropped: 0,
            features_compared: 4,
            features_drifted: 2,
            dataset_drift: self.rng.random_bool(0.5),
            prediction_drift: false,
            prediction_distance: 0.0,
            drifted: Vec::new(),
        }
    }

    /// An actor tells the leader something, if it knows who leads, or any head.
    pub(crate) fn actor_says(&mut self, worker: usize, module: ModuleId, payload: Vec<u8>) {
        let leader = leader_of(&self.heads).filter(|_| self.rng.random_bool(0.8));
        let Some(head) = leader.or_else(|| self.any_head()) else {
            return;
        };
        let request = Request {
            client: None,
            operation: 0,
            attempt: 0,
            ask: Ask::Change {
                session: SessionId::INTERNAL,
                seq: 0,
                module,
                payload,
            },
        };
        let packet = Packet::Request(request);
        self.send_at(
            self.now,
            Place::Worker(worker),
            Place::Head(head),
            packet.clone(),
        );
        // A host asks again until it is answered, over a stream that holds what it could not deliver:
        // by then others may have taken the actor's place, and have spoken.
        if self.rng.random_bool(AGAIN) {
            let later = self.now + self.rng.random_range(0..AGAIN_AFTER_MAX);
            self.send_at(later, Place::Worker(worker), Place::Head(head), packet);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_actors_of_an_endpoint_are_known_by_their_names() {
        use mobula_actors::serving::controller::{monitor_name, replica_name, router_name};
        assert_eq!(Role::of(&router_name("e")), Some(Role::Router("e".into())));
        assert_eq!(
            Role::of(&monitor_name("e", 1)),
            Some(Role::Monitor("e".into()))
        );
        assert_eq!(Role::of(&replica_name("e", 1, 1)), None);
    }
}
