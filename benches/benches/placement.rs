//! A placement pass over a thousand nodes with a thousand pending actors, on tables in memory.

use std::hint::black_box;

use mobula_benches::measure::{Settings, repeat};
use mobula_benches::report::Report;
use mobula_benches::tables::Tables;
use mobula_core::label::Labels;
use mobula_core::spec::ActorSpec;
use mobula_core::{JobId, Resources};
use mobula_scheduler::Command;

const NODES: u64 = 1000;
const ACTORS: usize = 1000;

fn actor(number: usize) -> ActorSpec {
    ActorSpec {
        // A few sizes, as jobs have them.
        resources: Resources::cpu_milli(500 * (1 + number as u64 % 4)),
        mailbox_capacity: 16,
        ..ActorSpec::of_type("bench")
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
        black_box(tables.placement_pass());
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
        format!("{} rows", tables.rows.row_count()),
    );
    report.print();
}
