//! What clients begin: which command or question comes next, and with what in it.

use std::collections::BTreeMap;

use mobula_core::id::NodeId;
use mobula_core::namespace::NamespaceEntry;
use mobula_core::resource::Resources;
use mobula_core::spec::{ActorSpec, JobSpec, PlacementPolicy, Program, RestartPolicy};
use mobula_scheduler::{Command, Query};
use rand::Rng;

use crate::sim::domain;
use crate::sim::packet::{Ask, Question};
use crate::sim::world::World;

/// Jobs of one client: enough to meet each other, few enough that they end.
const JOBS_MAX: usize = 12;

/// The first of the choices that change something in a domain module.
const DOMAIN_CHOICE: usize = 62;
/// How many of a client's choices are such, beside those by chance, where endpoints are deployed.
const DOMAIN_SHARE: f64 = 0.4;

impl World {
    /// Begins what chance says, where there is something to do it to.
    pub(super) fn begin_something(&mut self, index: usize) {
        // Where there are endpoints much is asked of them: a rollout takes several commands that fit.
        let choice = match self.swarm.endpoints && self.rng.random_bool(DOMAIN_SHARE) {
            true => DOMAIN_CHOICE,
            false => self.rng.random_range(0..100),
        };
        let client = &self.clients[index];
        let job = pick(&client.jobs, choice);
        let actor = pick(&client.actors, choice);
        let ask = match (choice, job, actor) {
            (0..35, _, _) if client.jobs.len() < JOBS_MAX => {
                let spec = self.job_spec(index);
                self.change(index, true, &Command::SubmitJob { spec })
            }
            (35..42, Some(job), _) => self.change(index, true, &Command::StopJob { job }),
            (42..52, Some(job), _) => {
                let actors = vec![self.actor_spec(choice)];
                let command = Command::CreateActors {
                    job,
                    actors,
                    gang: false,
                    get_or_create: choice % 2 == 0,
                    creator: None,
                };
                self.change(index, true, &command)
            }
            (52..56, _, Some(actor)) => {
                let command = Command::StopActor {
                    job: None,
                    actor,
                    grace_ms: 100,
                };
                self.change(index, true, &command)
            }
            (56..60, ..) => {
                let node = NodeId(self.rng.random_range(1..=3));
                let on = self.rng.random_bool(0.3);
                self.change(index, true, &Command::DrainNode { node, on })
            }
            (60..62, ..) => {
                let client = format!("client-{index}");
                let Some(session) = self.clients[index].session else {
                    return;
                };
                let command = Command::CloseSession { session, client };
                let ask = self.change(index, true, &command);
                let number = self.begin(index, ask);
                self.clients[index].closing = Some(number);
                return;
            }
            (DOMAIN_CHOICE..72, ..) => {
                let change = self.domain_change();
                self.change_in(index, true, change.module, change.payload)
            }
            (72..78, ..) => Ask::Look(self.domain_question(job)),
            (78..90, Some(job), _) => Ask::Look(Question::Scheduler(Query::Job { job })),
            _ => Ask::Look(Question::Scheduler(Query::ListJobs {
                after: None,
                limit: 0,
            })),
        };
        self.begin(index, ask);
    }

    fn job_spec(&mut self, index: usize) -> JobSpec {
        let repeats = self.rng.random_bool(0.2);
        let client = &mut self.clients[index];
        if !repeats || client.keys == 0 {
            client.keys += 1;
        }
        // Under one key one specification, so everything in it is a function of the key.
        let key = format!("{index}-{}", client.keys);
        let cpu_milli = 250 * (1 + client.keys % 4);
        JobSpec {
            name: key.clone(),
            program: Program::Builtin,
            args: Vec::new(),
            env: BTreeMap::new(),
            resources: cpu(cpu_milli),
            placement: PlacementPolicy::default(),
            restart: RestartPolicy::times(u32::try_from(client.keys % 4).unwrap_or(0)),
            idempotency_key: Some(key),
            files: Vec::new(),
            retry_errors: client.keys.is_multiple_of(3),
            secrets: Default::default(),
            namespace: client.keys.is_multiple_of(2).then(|| NamespaceEntry {
                name: "shared".to_owned(),
                principal: "clients".to_owned(),
            }),
        }
    }

    fn actor_spec(&mut self, choice: usize) -> ActorSpec {
        ActorSpec {
            name: choice.is_multiple_of(2).then(|| format!("named-{choice}")),
            // Others of that name may be there: of another job of the namespace, and detached or not.
            detached: choice.is_multiple_of(4),
            init: vec![1, 2, 3],
            resources: cpu(500),
            restart: RestartPolicy::times(2),
            ..ActorSpec::of_type("simulated")
        }
    }

    /// Nodes take actors again.
    pub(super) fn undrain(&mut self) {
        for node in 1..=self.workers.len() as u64 {
            let command = Command::DrainNode {
                node: NodeId(node),
                on: false,
            };
            let ask = self.change(0, false, &command);
            self.begin(0, ask);
        }
    }

    /// Endpoints are taken down, for their actors would run for ever.
    pub(super) fn take_down(&mut self) {
        let endpoints: Vec<String> = self.checker.model.domain.endpoints().cloned().collect();
        for endpoint in endpoints {
            let change = domain::delete(endpoint);
            let ask = self.change_in(0, false, change.module, change.payload);
            self.begin(0, ask);
        }
    }
}

fn pick<T: Copy>(list: &[T], choice: usize) -> Option<T> {
    if list.is_empty() {
        None
    } else {
        Some(list[choice % list.len()])
    }
}

fn cpu(cpu_milli: u64) -> Resources {
    Resources {
        cpu_milli,
        ..Resources::default()
    }
}
