//! The checkers, put onto what a run has recorded.

use std::path::Path;

use super::injector::Record;
use super::outcome::Check;
use super::scenario::Scenario;
use super::traffic::Traffic;
use crate::checker::linearizable::check_by_key;
use crate::checker::model::{CountingRegister, MadeOnce};
use crate::history::Operation;

fn by_key<I: Clone, O: Clone>(
    operations: Vec<Operation<(String, I), O>>,
) -> impl Iterator<Item = (String, Operation<I, O>)> {
    operations.into_iter().map(|operation| {
        let Operation {
            client,
            input: (key, input),
            began,
            ended,
        } = operation;
        let operation = Operation {
            client,
            input,
            began,
            ended,
        };
        (key, operation)
    })
}

pub(super) fn check_registers(traffic: &Traffic) -> Check {
    let operations = traffic.registers.operations();
    let count = operations.len();
    let mut broken: Vec<String> = traffic.broken.lock().iter().cloned().collect();
    let checked = check_by_key(&CountingRegister, by_key(operations));
    broken.extend(checked.err().map(|error| error.to_string()));
    let looked_at = format!("{count} operations");
    Check::of(
        "registers are linearizable (I1, I2, I3)",
        looked_at,
        &broken,
    )
}

pub(super) fn check_once(traffic: &Traffic) -> Check {
    let operations = traffic.jobs.operations();
    let count = operations.len();
    let checked = check_by_key(&MadeOnce, by_key(operations));
    let broken: Vec<String> = checked
        .err()
        .map(|error| error.to_string())
        .into_iter()
        .collect();
    let looked_at = format!("{count} submissions");
    Check::of("a key makes one job (I3)", looked_at, &broken)
}

pub(super) fn check_jobs(scenario: &Scenario, traffic: &Traffic, marks: &Path) -> Check {
    let mut ledger = traffic.ledger.lock();
    // Without a mark there is no file.
    for key in std::fs::read_to_string(marks).unwrap_or_default().lines() {
        ledger.ran(key);
    }
    let found = ledger.check(scenario.checks.job_restarts_max);
    let mut broken: Vec<String> = found.iter().map(ToString::to_string).collect();
    for job in ledger.last_seen() {
        let end = job.end.as_deref().unwrap_or("under way");
        let has_result = end.starts_with("succeeded") && end.contains(&format!("\"{}\"", job.key));
        if !has_result && !ledger.was_stopped(&job.key) {
            broken.push(format!("job {} of {}: {end}", job.id, job.key));
        }
    }
    let looked_at = format!("{} keys", ledger.acknowledged_count());
    let name = "every acknowledged job is there, ran, and has one end (I2, I3, I4, I5)";
    Check::of(name, looked_at, &broken)
}

pub(super) fn check_ended(scenario: &Scenario, record: &Record) -> Check {
    let name = "no process ends by itself";
    if scenario.checks.heads_may_end {
        let looked_at = format!("{} did, as this scenario allows", record.ended.len());
        return Check::of(name, looked_at, &[]);
    }
    Check::of(name, "none did".to_owned(), &record.ended)
}
