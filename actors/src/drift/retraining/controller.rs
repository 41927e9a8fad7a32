//! The leader's loop of retraining: it reads the tables and proposes what comes next, so a new leader goes
//! on where the old one was. All that it proposes may be proposed again.

use mobula_core::codec;
use mobula_core::control::{Controller, ModuleId, Proposal, Reader};
use mobula_core::spec::JobSpec;
use mobula_scheduler::Command as SchedulerCommand;

use super::command::Command;
use super::next::{job_of, job_view, next};
use super::plan::{Phase, Retraining};
use super::state::due;
use super::tables::{Ledger, find, find_policy_row, ledgers};
use crate::drift::state::Command as DriftCommand;
use crate::serving::state::find as find_endpoint;
use crate::training::comparison::{BASELINE_VARIABLE, Baseline};

/// The retraining controller.
#[derive(Debug, Default)]
pub struct RetrainingController;

impl Controller for RetrainingController {
    fn name(&self) -> &'static str {
        "retraining"
    }

    fn reconcile(&mut self, reader: &dyn Reader, now_ms: u64) -> Vec<Proposal> {
        ledgers(reader)
            .iter()
            .flat_map(|(endpoint, ledger)| propose(reader, now_ms, endpoint, ledger))
            .collect()
    }
}

fn propose(reader: &dyn Reader, now_ms: u64, name: &str, ledger: &Ledger) -> Vec<Proposal> {
    let newest = find(reader, name, ledger.newest);
    if let Some(row) = newest.as_ref().filter(|row| row.phase.is_open()) {
        return go_on(reader, now_ms, row);
    }
    // Nobody waits for the job of a retraining that was cancelled.
    let unwanted = newest.as_ref().and_then(|row| {
        let job = job_of(reader, row)?;
        let is_under_way =
            job_view(reader, job).is_some_and(|view| !view.finished && view.state != "stopping");
        is_under_way.then_some(job)
    });
    if let Some(job) = unwanted {
        return vec![scheduler(&SchedulerCommand::StopJob { job })];
    }
    let endpoint = name.to_owned();
    if find_endpoint(reader, name).is_err() {
        return vec![drift(Command::Forget { endpoint })];
    }
    due(reader, now_ms, name, ledger)
        .map(|event| drift(Command::Begin { endpoint, event }))
        .into_iter()
        .collect()
}

fn go_on(reader: &dyn Reader, now_ms: u64, row: &Retraining) -> Vec<Proposal> {
    if next(reader, now_ms, row).is_some() {
        return vec![drift(Command::Advance {
            endpoint: row.endpoint.clone(),
            number: row.number,
            revision: row.revision,
        })];
    }
    if row.phase != Phase::Submitting {
        return Vec::new();
    }
    find_policy_row(reader, &row.endpoint)
        .map(|policy| {
            let spec = job_spec(row, policy.job);
            scheduler(&SchedulerCommand::SubmitJob { spec })
        })
        .into_iter()
        .collect()
}

/// The job of a retraining: the policy's, under a key that no other has, measured against the active version.
fn job_spec(row: &Retraining, mut spec: JobSpec) -> JobSpec {
    let baseline = Baseline {
        digest: row.baseline.digest.clone(),
        size_bytes: row.baseline.size_bytes,
    };
    spec.idempotency_key = Some(row.job_key());
    spec.env
        .insert(BASELINE_VARIABLE.to_owned(), baseline.to_text());
    spec
}

fn scheduler(command: &SchedulerCommand) -> Proposal {
    Proposal {
        module: ModuleId::SCHEDULER,
        payload: command.encode(),
    }
}

fn drift(command: Command) -> Proposal {
    Proposal {
        module: ModuleId::DRIFT,
        payload: codec::encode_plain(&DriftCommand::Retraining(Box::new(command))),
    }
}
