//! `mobula local status`.

use std::path::Path;
use std::process::ExitCode;

use super::record::ClusterRecord;
use crate::args::Format;
use crate::output::{print_json, print_table};

/// Succeeds only if every process runs.
pub(crate) fn run(data_dir: &Path, format: Format) -> anyhow::Result<ExitCode> {
    let Some(record) = ClusterRecord::read(data_dir)? else {
        eprintln!(
            "there is no cluster in {}: start one with `mobula local up`",
            data_dir.display()
        );
        return Ok(ExitCode::FAILURE);
    };
    let all_alive = record
        .processes
        .iter()
        .all(super::record::ProcessRecord::is_alive);
    if format.json {
        let mut value = serde_json::to_value(&record)?;
        for (process, shown) in record
            .processes
            .iter()
            .zip(value["processes"].as_array_mut().into_iter().flatten())
        {
            shown["alive"] = process.is_alive().into();
        }
        print_json(&value)?;
    } else {
        let rows: Vec<Vec<String>> = record
            .processes
            .iter()
            .map(|process| {
                vec![
                    process.name.clone(),
                    process.pid.to_string(),
                    if process.is_alive() {
                        "running"
                    } else {
                        "gone"
                    }
                    .to_owned(),
                    process.addresses.join(" "),
                    process.log.display().to_string(),
                ]
            })
            .collect();
        println!("cluster {} in {}", record.cluster_id, data_dir.display());
        print_table(&["NAME", "PID", "STATE", "ADDRESSES", "LOG"], &rows);
    }
    Ok(if all_alive {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
