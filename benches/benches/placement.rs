//! A placement pass over a thousand nodes with a thousand pending actors, on tables in memory.

use std::hint::black_box;

use mobula_benches::measure::{Settings, repeat};
use mobula_benches::report::Report;
use mobula_core::control::{ApplyContext, StateModule};
use mobula_core::label::Labels;
use mobula_core::spec::{ActorKind, ActorSpec, PlacementPolicy, RestartPolicy};
use mobula_core::{JobId, Resources};
use mobula_scheduler::memory_txn::MemoryTables;
use mobula_scheduler::{Command, Response, Scheduler, placement_pass};

const NODES: u64 = 1000;
const ACTORS: usize = 1000;
const NOW_MS: u64 = 1_000;

/// A cluster's tables, and the log index of their last command.
#[derive(Clone, Default)]
struct Tables {
    tables: MemoryTables,
    index: u64,
}

impl Tables {
    fn apply(&mut self, command: &Command) -> Response {
        self.index += 1;
        let context = ApplyContext {
            index: self.index,
            term: 1,
            now_ms: NOW_MS,
        };
        // Straight into the tables: a refusal would end the bench, so there is nothing to undo.
        let applied = Scheduler
            .apply(&context, &mut self.tables, &command.encode())
            .expect("the commands of this bench are within every limit");
        Response::decode(&applied.response).expect("the scheduler's own answer decodes")
    }

    /// Passes until everything is placed; how many passes that took.
    fn place_all(&mut self) -> usize {
        let mut passes = 0;
        while let Some(command) = placement_pass(&self.tables, NOW_MS) {
            self.apply(&command);
            passes += 1;
        }
        passes
    }
}

fn actor(number: usize) -> ActorSpec {
    ActorSpec {
        kind: ActorKind::Actor {
            type_name: "bench".to_owned(),
        },
        name: None,
        init: Vec::new(),
        // A few sizes, as jobs have them.
        resources: Resources::cpu_milli(500 * (1 + number as u64 % 4)),
        placement: PlacementPolicy::default(),
        restart: RestartPolicy::NEVER,
        isolated: false,
        mailbox_capacity: 16,
        detached: false,
    }
}

fn cluster() -> Tables {
    let mut tables = Tables::default();
    for number in 0..NODES {
        tables.apply(&Command::RegisterNode {
            name: format!("node-{number}"),
            boot_id: "boot".to_owned(),
            capacity: Resources::cpu_milli(1000 * (2 + number % 7)),
            labels: Labels::new(),
            version: "0".to_owned(),
        });
    }
    tables.apply(&Command::CreateActors {
        job: JobId::SYSTEM,
        actors: (0..ACTORS).map(actor).collect(),
        gang: false,
        get_or_create: false,
        creator: None,
    });
    tables
}

fn main() {
    let Some(settings) = Settings::from_args() else {
        return;
    };
    let tables = cluster();
    let mut report = Report::new("placement of 1000 pending actors on 1000 nodes, in memory");
    let one = repeat(settings, || {
        black_box(placement_pass(&tables.tables, NOW_MS));
    });
    report.add("one pass (256 decisions)", one);
    let mut passes = 0;
    let all = repeat(settings, || passes = tables.clone().place_all());
    let note = format!("{passes} passes; copying the tables first is in it");
    report.add_with("all placed and applied", all, note);
    let copies = repeat(settings, || {
        black_box(tables.clone());
    });
    report.add_with(
        "limit: copying the tables",
        copies,
        format!("{} rows", tables.tables.row_count()),
    );
    report.print();
}
