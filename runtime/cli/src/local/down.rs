//! `mobula local down`.

use std::path::Path;
use std::time::Duration;

use super::process::end;
use super::record::{CLUSTER_FILE, ClusterRecord};

/// How long a worker may take to end: its actors get a moment to say goodbye.
const WORKER_GRACE: Duration = Duration::from_secs(3);

/// How long a head may take to end.
const HEAD_GRACE: Duration = Duration::from_secs(5);

pub(crate) async fn run(data_dir: &Path) -> anyhow::Result<()> {
    let Some(record) = ClusterRecord::read(data_dir)? else {
        println!("there is no cluster in {}", data_dir.display());
        return Ok(());
    };
    let count = record
        .processes
        .iter()
        .filter(|process| process.is_alive())
        .count();
    stop_all(&record).await?;
    println!(
        "stopped {count} {}; the data stays in {}",
        if count == 1 { "process" } else { "processes" },
        data_dir.display()
    );
    Ok(())
}

/// Ends all processes, workers first, and removes the record.
pub(crate) async fn stop_all(record: &ClusterRecord) -> anyhow::Result<()> {
    for (role, grace) in [("worker", WORKER_GRACE), ("head", HEAD_GRACE)] {
        let ends = record
            .processes
            .iter()
            .filter(|process| process.role == role)
            .map(|process| tokio::spawn(end(process.pid, process.start_time, grace)))
            .collect::<Vec<_>>();
        for ended in ends {
            ended.await?;
        }
    }
    match std::fs::remove_file(record.data_dir.join(CLUSTER_FILE)) {
        Ok(()) => Ok(()),
        // An ephemeral cluster's directory may be gone already.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error.into()),
    }
}
