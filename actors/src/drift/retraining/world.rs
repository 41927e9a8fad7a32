//! The tables of a head with an endpoint, its versions, jobs, rollouts and retrainings, and the leader's loop
//! over them: for tests.

mod jobs;

use std::collections::BTreeMap;

use mobula_core::codec;
use mobula_core::control::{ApplyContext, Controller, ModuleId, Proposal, StateModule};
use mobula_core::error::Rejection;
use mobula_core::label::Labels;
use mobula_core::spec::{JobSpec, PlacementPolicy, Program, RestartPolicy};
use mobula_core::{Incarnation, JobId, NodeId, Resources};
use mobula_scheduler::memory_txn::MemoryTables;
use mobula_scheduler::{
    Command as SchedulerCommand, Query as SchedulerQuery, QueryResponse, Response, Scheduler,
};

use super::command::Command;
use super::controller::RetrainingController;
use super::next::job_view;
use super::plan::{Budget, Mode, RetrainPolicy, Retraining, Terms};
use super::state::tests::{new_version, terms};
use super::tables::history;
use crate::drift::state::{Command as DriftCommand, Drift, Report};
use crate::registry::keys::{Algorithm, Role};
use crate::registry::policy::data::LabelChange;
use crate::registry::search::{ModelView, Selector, VersionView};
use crate::registry::signer::{PrivateKey, Signer};
use crate::registry::stages::{Policy, Stage, model_state};
use crate::registry::state::{Command as RegistryCommand, Query as RegistryQuery, Registry};
use crate::registry::{NewVersion, decide::Decision, events::EventPage};
use crate::serving::rollout::command::{Command as RolloutCommand, Verdict};
use crate::serving::rollout::plan::{Guardrails, Rollout, Strategy};
use crate::serving::rollout::state as rollouts;
use crate::serving::rollout::trial::Evidence;
use crate::serving::state::{Command as ServingCommand, Serving, find as find_endpoint};
use crate::serving::test_tables::served;

const ANSWER_BYTES_MAX: usize = 1 << 22;

const ROUTER: Incarnation = Incarnation(900);

/// Jobs that a budget allows in its period.
pub(super) const BUDGET: Budget = Budget {
    jobs: 2,
    period_ms: 20_000,
};

/// Everything of one head.
pub(super) struct World {
    pub(super) tables: MemoryTables,
    pub(super) now_ms: u64,
    pub(super) index: u64,
    /// Windows that the monitor has reported.
    windows: u64,
    node: (NodeId, Incarnation),
    key: PrivateKey,
    /// What the weights of the next version are made of.
    digests: u32,
}

impl World {
    pub(super) fn new(mode: Mode) -> Self {
        World::with(mode, terms())
    }

    /// `digits` serves version 1, and has a policy.
    pub(super) fn with(mode: Mode, terms: Terms) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let key = PrivateKey::create(&dir.path().join("key"), Algorithm::Ed25519).unwrap();
        let mut world = World {
            tables: MemoryTables::default(),
            now_ms: 1_000_000,
            index: 0,
            windows: 0,
            node: (NodeId(0), Incarnation(0)),
            key,
            digests: 0,
        };
        world.register(new_version('a'));
        let register = SchedulerCommand::RegisterNode {
            name: "worker-1".into(),
            boot_id: "b".into(),
            capacity: Resources::cpu_milli(64_000),
            labels: Labels::new(),
            version: "0.1.0".into(),
        };
        match world.scheduler(&register).unwrap() {
            Response::Registered { node, incarnation } => world.node = (node, incarnation),
            other => panic!("unexpected {other:?}"),
        }
        world.add_key(world.key.public_key().spki().to_vec());
        world.deploy();
        let policy = world.policy(mode, terms);
        world.set_policy(policy).unwrap();
        world
    }

    /// Deploys the first version.
    pub(super) fn deploy(&mut self) {
        for command in served("digits", ROUTER) {
            self.serving(&command).unwrap();
        }
    }

    pub(super) fn policy(&self, mode: Mode, terms: Terms) -> RetrainPolicy {
        RetrainPolicy {
            model: "digits".into(),
            job: JobSpec {
                name: "retrain".into(),
                program: Program::Builtin,
                args: vec!["train".into(), "steps = 3".into()],
                env: BTreeMap::new(),
                resources: Resources::default(),
                placement: PlacementPolicy::default(),
                restart: RestartPolicy::NEVER,
                idempotency_key: None,
                files: Vec::new(),
                retry_errors: false,
                secrets: BTreeMap::new(),
                namespace: None,
            },
            mode,
            budget: BUDGET,
            terms,
        }
    }

    /// Applies the next command of the log; its answer.
    pub(super) fn apply(&mut self, module: ModuleId, payload: &[u8]) -> Result<Vec<u8>, Rejection> {
        let modules: [&dyn StateModule; 4] = [&Scheduler, &Registry, &Serving, &Drift];
        let module = modules.into_iter().find(|m| m.id() == module).unwrap();
        self.index += 1;
        let context = ApplyContext {
            index: self.index,
            term: 1,
            now_ms: self.now_ms,
        };
        let applied = self.tables.apply(module, &context, payload)?;
        Ok(applied.response)
    }

    pub(super) fn retraining(&mut self, command: Command) -> Result<Vec<u8>, Rejection> {
        let command = DriftCommand::Retraining(Box::new(command));
        self.apply(ModuleId::DRIFT, &codec::encode_plain(&command))
    }

    pub(super) fn set_policy(&mut self, policy: RetrainPolicy) -> Result<Vec<u8>, Rejection> {
        self.retraining(Command::SetPolicy {
            endpoint: "digits".into(),
            policy: Box::new(policy),
        })
    }

    fn scheduler(&mut self, command: &SchedulerCommand) -> Result<Response, Rejection> {
        let answer = self.apply(ModuleId::SCHEDULER, &command.encode())?;
        Ok(Response::decode(&answer).unwrap())
    }

    fn registry(&mut self, command: &RegistryCommand) -> Result<Vec<u8>, Rejection> {
        self.apply(ModuleId::REGISTRY, &codec::encode_plain(command))
    }

    pub(super) fn serving(&mut self, command: &ServingCommand) -> Result<Vec<u8>, Rejection> {
        self.apply(ModuleId::SERVING, &codec::encode_plain(command))
    }

    pub(super) fn rollout(&mut self, command: RolloutCommand) -> Result<Vec<u8>, Rejection> {
        self.serving(&ServingCommand::Rollout(command))
    }

    /// Gives the data that all versions were trained on a label.
    fn add_key(&mut self, spki: Vec<u8>) {
        let add = RegistryCommand::AddKey {
            spki,
            roles: [Role::Stage, Role::Release].into(),
            owner: "somebody".into(),
        };
        self.registry(&add).unwrap();
    }

    /// Has every change of a version's stage signed by so many keys from now on.
    pub(super) fn need_signatures(&mut self, signatures: u32) {
        let dir = tempfile::tempdir().unwrap();
        for number in 1..signatures {
            let file = dir.path().join(number.to_string());
            let key = PrivateKey::create(&file, Algorithm::Ed25519).unwrap();
            self.add_key(key.public_key().spki().to_vec());
        }
        let revision = model_state(&self.tables, "digits").revision;
        self.registry(&RegistryCommand::SetPolicy {
            model: "digits".into(),
            policy: Policy {
                signatures,
                ..Policy::default()
            },
            expected_revision: revision,
            envelope: None,
        })
        .unwrap();
    }

    pub(super) fn label_data(&mut self, label: &str) {
        let change = LabelChange {
            data: new_version('a').dataset_blake3,
            name: "digits.csv".into(),
            labels: [label.to_owned()].into(),
            expected_revision: 0,
            envelope: None,
        };
        self.registry(&RegistryCommand::LabelData(change)).unwrap();
    }

    /// What the leader would propose now.
    pub(super) fn proposals(&self) -> Vec<Proposal> {
        RetrainingController.reconcile(&self.tables, self.now_ms)
    }

    /// The leader goes on until it has nothing to propose that changes anything, and jobs are placed.
    pub(super) fn settle(&mut self) {
        for _ in 0..50 {
            let before = self.tables.clone();
            for Proposal { module, payload } in self.proposals() {
                // A refusal changes nothing, as on a head.
                let _ = self.apply(module, &payload);
            }
            self.stop_what_is_stopping();
            if self.tables == before {
                return;
            }
        }
        panic!("the leader proposes without an end");
    }

    pub(super) fn pass(&mut self, ms: u64) {
        self.now_ms += ms;
    }

    fn report(&mut self, dataset_drift: bool) {
        self.windows += 1;
        let version = self.active();
        let report = Report {
            endpoint: "digits".into(),
            model: "digits".into(),
            version,
            incarnation: 1,
            window: self.windows,
            samples: 200,
            windows: 1,
            rows: 200,
            refused: 0,
            dropped: 0,
            features_compared: 64,
            features_drifted: if dataset_drift { 40 } else { 0 },
            dataset_drift,
            prediction_drift: false,
            prediction_distance: 0.0,
            drifted: Vec::new(),
        };
        let command = DriftCommand::Report(report);
        self.apply(ModuleId::DRIFT, &codec::encode_plain(&command))
            .unwrap();
    }

    pub(super) fn drift(&mut self) {
        self.report(true);
    }

    pub(super) fn quiet(&mut self) {
        self.report(false);
    }

    pub(super) fn newest(&self) -> Retraining {
        history(&self.tables, "digits").pop().unwrap()
    }

    pub(super) fn active(&self) -> u64 {
        find_endpoint(&self.tables, "digits").unwrap().version
    }

    pub(super) fn register(&mut self, version: NewVersion) -> u64 {
        let answer = self.registry(&RegistryCommand::Register(version)).unwrap();
        let found: crate::registry::ModelVersion =
            codec::decode(&answer, ANSWER_BYTES_MAX).unwrap();
        found.version
    }

    /// The idempotency keys of the jobs that retrainings have.
    pub(super) fn jobs(&self) -> Vec<String> {
        history(&self.tables, "digits")
            .iter()
            .map(Retraining::job_key)
            .filter(|key| mobula_scheduler::job_of_key(&self.tables, key).is_some())
            .collect()
    }

    pub(super) fn job_count(&self) -> usize {
        let query = SchedulerQuery::ListJobs {
            after: None,
            limit: 0,
        };
        match mobula_scheduler::answer(&self.tables, 0, query).unwrap() {
            QueryResponse::Jobs(jobs) => jobs.iter().filter(|job| job.name == "retrain").count(),
            other => panic!("unexpected {other:?}"),
        }
    }

    pub(super) fn runs(&self, job: u64) -> bool {
        job_view(&self.tables, JobId(job)).is_some_and(|view| !view.finished)
    }

    fn rollout_row(&self) -> Option<Rollout> {
        rollouts::newest(&self.tables, "digits")
    }

    /// The router judges the rollout that is under way, if one is.
    pub(super) fn judge(&mut self, passes: bool) {
        let Some(rollout) = self.rollout_row().filter(|rollout| rollout.phase.is_open()) else {
            return;
        };
        let (verdict, reason) = match passes {
            true => (Verdict::Pass, "within the guardrails"),
            false => (Verdict::RollBack, "worse than the baseline"),
        };
        // A paused rollout passes no step.
        let _ = self.rollout(RolloutCommand::Judge {
            endpoint: "digits".into(),
            rollout: rollout.number,
            step: rollout.step,
            router: ROUTER,
            verdict,
            evidence: Evidence {
                reason: reason.into(),
                ..Evidence::default()
            },
        });
    }

    /// Everything that the loser of the last rollout leaves is taken away.
    pub(super) fn clean(&mut self) {
        let Some(rollout) = self
            .rollout_row()
            .filter(|rollout| !rollout.phase.is_open())
        else {
            return;
        };
        let (endpoint, number, revision) = ("digits".to_owned(), rollout.number, rollout.revision);
        self.rollout(RolloutCommand::Drained {
            endpoint: endpoint.clone(),
            rollout: number,
            revision,
            router: ROUTER,
        })
        .unwrap();
        self.rollout(RolloutCommand::Retired {
            endpoint,
            rollout: number,
            revision,
        })
        .unwrap();
    }

    pub(super) fn try_start_by_hand(&mut self, version: u64) -> Result<Vec<u8>, Rejection> {
        self.rollout(RolloutCommand::Start {
            endpoint: "digits".into(),
            model: "digits".into(),
            version: Some(version),
            strategy: Strategy::Canary,
            steps: vec![10, 100],
            guardrails: Guardrails::STANDARD,
            min_samples: 10,
        })
    }

    pub(super) fn start_by_hand(&mut self, version: u64) {
        self.try_start_by_hand(version).unwrap();
    }

    pub(super) fn promote_by_hand(&mut self, version: u64) {
        self.start_by_hand(version);
        let endpoint = "digits".to_owned();
        self.rollout(RolloutCommand::Promote { endpoint }).unwrap();
    }

    pub(super) fn delete_endpoint(&mut self) {
        let endpoint = "digits".to_owned();
        self.serving(&ServingCommand::Delete {
            endpoint: endpoint.clone(),
        })
        .unwrap();
        self.settle();
        self.serving(&ServingCommand::Gone { endpoint }).unwrap();
    }

    fn ask<T: serde::de::DeserializeOwned>(&self, query: &RegistryQuery) -> T {
        let answer = Registry
            .query(&self.tables, 0, &codec::encode_plain(query))
            .unwrap();
        codec::decode(&answer, ANSWER_BYTES_MAX).unwrap()
    }

    /// Signs a version into staging; of one that is there already, nothing.
    pub(super) fn sign(&mut self, version: u64) {
        self.move_to(version, Stage::Staging);
    }

    /// Takes a version out of use.
    pub(super) fn archive(&mut self, version: u64) {
        self.move_to(version, Stage::Archived);
    }

    fn move_to(&mut self, version: u64, stage: Stage) {
        let model: ModelView = self.ask(&RegistryQuery::Model {
            model: "digits".into(),
        });
        let view: VersionView = self.ask(&RegistryQuery::View {
            model: "digits".into(),
            selector: Selector::Number(version),
        });
        let mut decision = Decision::new(&model, &view, stage, "");
        decision.sign(&self.key).unwrap();
        let _ = self.registry(&RegistryCommand::Stage(decision.into_change()));
    }

    /// The entries of the registry's log that tell of retrainings.
    pub(super) fn retraining_events(&self) -> Vec<serde_json::Value> {
        let mut found: Vec<serde_json::Value> = Vec::new();
        let mut from = 1;
        loop {
            let page: EventPage = self.ask(&RegistryQuery::Events { from });
            let Some(last) = page.events.last() else {
                return found;
            };
            from = last.sequence + 1;
            let texts = page.events.iter().map(|event| &event.text);
            found.extend(
                texts
                    .map(|text| serde_json::from_str(text).unwrap())
                    .filter(|entry: &serde_json::Value| entry["event"] == "retraining"),
            );
        }
    }
}
