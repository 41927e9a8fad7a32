//! What the replicated tables need at their bounds: nodes, actors, and a history that grows.
//!
//! The tables are those of the scheduler, in memory and with its own commands; rows on a head's disk
//! are the same bytes.

use mobula_benches::results::Results;
use mobula_benches::tables::Tables;
use mobula_core::label::Labels;
use mobula_core::spec::{ActorSpec, JobSpec, PlacementPolicy, Program, RestartPolicy};
use mobula_core::{JobId, Resources};
use mobula_scheduler::limits::{ACTORS_PER_COMMAND_MAX, NODES_MAX};
use mobula_scheduler::{Command, Response};
use serde_json::json;

use crate::Options;

const ACTORS: usize = 100_000;

/// A job that does nothing, as small as a user's.
pub(crate) fn job(number: u64) -> JobSpec {
    JobSpec {
        name: format!("job-{number}"),
        program: Program::Builtin,
        args: vec!["train".to_owned()],
        env: Default::default(),
        resources: Resources::cpu_milli(100),
        placement: PlacementPolicy::default(),
        restart: RestartPolicy::NEVER,
        idempotency_key: None,
        files: Vec::new(),
        retry_errors: false,
        secrets: Default::default(),
        namespace: None,
    }
}

fn actor(number: usize) -> ActorSpec {
    ActorSpec {
        name: Some(format!("actor-{number}")),
        init: vec![7; 64],
        resources: Resources::cpu_milli(10),
        mailbox_capacity: 16,
        ..ActorSpec::of_type("bench")
    }
}

/// This process's resident memory, in MiB.
pub(crate) fn resident_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}

pub(crate) fn measure(options: &Options, results: &mut Results) {
    let before = resident_mib();
    let mut tables = Tables::default();
    let mut note = |tables: &Tables, name: &str| {
        let (mib, rows) = (resident_mib() - before, tables.rows.row_count());
        results.row(
            &format!("{name:<60} {mib:>12.1} MiB  {rows} rows"),
            json!({ "name": name, "unit": "MiB", "mean": mib, "rows": rows }),
        );
    };
    for number in 0..NODES_MAX {
        tables.apply(&Command::RegisterNode {
            name: format!("node-{number}"),
            boot_id: "boot".to_owned(),
            capacity: Resources::cpu_milli(64_000),
            labels: Labels::new(),
            version: "0".to_owned(),
        });
    }
    note(&tables, &format!("tables: {NODES_MAX} nodes, the bound"));
    let mut left = ACTORS;
    while left > 0 {
        let count = left.min(ACTORS_PER_COMMAND_MAX);
        tables.apply(&Command::CreateActors {
            job: JobId::SYSTEM,
            actors: (left - count..left).map(actor).collect(),
            gang: false,
            get_or_create: false,
            creator: None,
        });
        left -= count;
    }
    tables.place_all();
    note(&tables, &format!("tables: and {ACTORS} actors, placed"));
    let quarter = (options.jobs / 4).max(1);
    for number in 1..=options.jobs {
        let submitted = tables.apply(&Command::SubmitJob { spec: job(number) });
        if let Response::JobSubmitted { job, .. } = submitted {
            tables.apply(&Command::StopJob { job });
        }
        if number % quarter == 0 {
            note(
                &tables,
                &format!("tables: and {number} jobs that have ended"),
            );
        }
    }
}
