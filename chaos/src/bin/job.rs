//! The job of the scenarios: it leaves one line in a file each time it really runs, and stores its
//! key as its result.

use std::io::Write;

use mobula::prelude::*;

#[mobula::main]
async fn main(cluster: Cluster) -> mobula::Result<()> {
    let ledger = variable("MOBULA_CHAOS_LEDGER")?;
    let key = variable("MOBULA_CHAOS_KEY")?;
    // One write of one short line: lines of jobs that run at the same time stay whole.
    let mut file = std::fs::File::options()
        .create(true)
        .append(true)
        .open(&ledger)?;
    file.write_all(format!("{key}\n").as_bytes())?;
    cluster.set_result(&key).await
}

fn variable(name: &str) -> mobula::Result<String> {
    std::env::var(name)
        .map_err(|_| format!("{name} is not set: this program is a job of mobula-chaos").into())
}
