//! Commands of clients to one and to three heads: SDK, TLS, gRPC, the log on every disk, fsync, apply,
//! answer. Beside it the disk's own fsync.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use mobula::Cluster;
use mobula_actors::registry::{NewVersion, client as registry};
use mobula_benches::measure::{Settings, repeat};
use mobula_benches::results::Results;
use mobula_chaos::real::{Isolation, Scenario, cluster::RealCluster};
use tokio::task::JoinSet;

use crate::{Options, Outcome};

const CLIENTS: [u32; 3] = [1, 16, 256];

/// About what one command adds to the log.
const RECORD_BYTES: usize = 256;

/// Heads without workers, and nothing that goes wrong.
const QUIET: &str = "
title = \"quiet\"
[cluster]
heads = 3
workers = 0
[workload]
submitters = 0
submits_per_second = 0
register_clients = 0
registers = 0
register_operations_per_second = 0
[checks]
jobs_min_per_minute = 0
register_operations_min_per_minute = 0
faults_min_per_minute = 0
";

pub(crate) async fn measure(options: &Options, results: &mut Results) -> Outcome {
    for heads in [1, 3] {
        let mut scenario = Scenario::from_toml(QUIET, "quiet")?;
        scenario.cluster.heads = heads;
        let dir = tempfile::tempdir()?;
        let started = RealCluster::up(
            &scenario,
            Isolation::Loopback,
            1,
            &options.mobula,
            dir.path(),
        );
        let cluster = started.await?;
        for count in CLIENTS {
            let mut clients = Vec::new();
            for _ in 0..count {
                clients.push(cluster.client().await?);
            }
            let (per_second, latencies) = write_from(clients, options.round, heads).await?;
            let name = format!("commands, {heads} head(s), {count} client(s)");
            results.rate(&name, per_second, &latencies);
        }
        let client = cluster.client().await?;
        let reads = read_from(client, &model_of(heads, 1, 0, 0), options.round).await?;
        let per_second = reads.len() as f64 / options.round.as_secs_f64();
        let name = format!("linearizable reads, {heads} head(s), 1 client");
        results.rate(&name, per_second, &reads);
    }
    for count in CLIENTS {
        let (per_second, latencies) = fsync(count as usize, options.round)?;
        let name = format!("limit: fsync of {count} record(s) together");
        results.rate(&name, per_second, &latencies);
    }
    Ok(())
}

/// Up to a minute. A histogram that grows by itself does not when it is told to saturate.
fn latencies() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("the bounds and digits are allowed")
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The model whose version a client writes: a model has 10 000 versions at most.
fn model_of(heads: u32, clients: usize, client: usize, written: u64) -> String {
    format!("bench-{heads}-{clients}-{client}-{}", written / 9_000)
}

/// Each client writes one version of its own model after the other.
async fn write_from(
    clients: Vec<Cluster>,
    round: Duration,
    heads: u32,
) -> Result<(f64, Histogram<u64>), Box<dyn std::error::Error + Send + Sync>> {
    let count = clients.len();
    let mut tasks: JoinSet<mobula::Result<Histogram<u64>>> = JoinSet::new();
    let start = Instant::now();
    for (number, client) in clients.into_iter().enumerate() {
        tasks.spawn(async move {
            let mut taken = latencies();
            let mut written = 0_u64;
            while start.elapsed() < round {
                written += 1;
                let digest = format!("{:064x}", (number as u64) << 40 | written);
                let new = NewVersion {
                    model: model_of(heads, count, number, written),
                    weights_blake3: digest.clone(),
                    dataset_blake3: digest.clone(),
                    digest,
                    size_bytes: 0,
                    job: 0,
                    metrics: Default::default(),
                    training_json: String::new(),
                };
                let began = Instant::now();
                registry::register(&client, new).await?;
                taken.saturating_record(nanoseconds(began.elapsed()));
            }
            Ok(taken)
        });
    }
    let mut all = latencies();
    while let Some(ended) = tasks.join_next().await {
        all.add(ended??)?;
    }
    Ok((all.len() as f64 / start.elapsed().as_secs_f64(), all))
}

/// One row of a model again and again.
async fn read_from(
    client: Cluster,
    model: &str,
    round: Duration,
) -> mobula::Result<Histogram<u64>> {
    let mut taken = latencies();
    let start = Instant::now();
    while start.elapsed() < round {
        let began = Instant::now();
        registry::version(&client, model, Some(1)).await?;
        taken.saturating_record(nanoseconds(began.elapsed()));
    }
    Ok(taken)
}

/// On the disk of the heads' data directories.
fn fsync(records: usize, round: Duration) -> std::io::Result<(f64, Histogram<u64>)> {
    let dir = tempfile::tempdir()?;
    let mut file = File::create(Path::new(dir.path()).join("limit"))?;
    let block = vec![7; records * RECORD_BYTES];
    let mut taken = latencies();
    let settings = Settings {
        warm_up: round / 10,
        length: round,
    };
    let samples = repeat(settings, || {
        let began = Instant::now();
        file.write_all(&block)
            .and_then(|()| file.sync_data())
            .expect("a file that was just made takes bytes");
        taken.saturating_record(nanoseconds(began.elapsed()));
    });
    Ok((samples.per_second() * records as f64, taken))
}
