//! Commands through a head: proposed, written and fsynced to the Raft log on a real disk, applied,
//! answered. Beside it what the disk does by itself: as many bytes, one fsync.

use std::fs::File;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;

use mobula_benches::SystemClock;
use mobula_benches::measure::{Samples, Settings, repeat, repeat_async};
use mobula_benches::report::Report;
use mobula_chaos::tally::{self, Tally};
use mobula_core::config::{LimitsConfig, RaftConfig, TokensConfig};
use mobula_core::id::SessionId;
use mobula_head::raft::RaftHandle;
use mobula_head::{Head, HeadOptions};
use mobula_wire::session::StorageLocation;
use tokio::sync::oneshot;

/// What a command carries: as a small report of a worker does.
const PAYLOAD_BYTES: usize = 128;

const PROPOSERS: [usize; 3] = [1, 16, 256];

/// The head and the bare disk take turns: a shared disk is fast in one second and slow in another.
const ROUNDS: u32 = 10;

async fn start_head(dir: &Path) -> Result<Head, Box<dyn std::error::Error>> {
    let any_port = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let head = Head::start(HeadOptions {
        data_dir: dir.join("head"),
        name: None,
        join: None,
        wants_to_vote: true,
        api_listen: any_port,
        cluster_listen: any_port,
        storage: StorageLocation {
            url: format!("file://{}", dir.join("store").display()),
            endpoint: None,
            region: None,
            allow_http: false,
            access_key_env: String::new(),
            secret_key_env: String::new(),
        },
        raft: RaftConfig::default(),
        limits: LimitsConfig::default(),
        tokens: TokensConfig::default(),
        modules: vec![Arc::new(Tally)],
        controllers: Vec::new(),
        sweep: None,
        clock: Arc::new(SystemClock),
    })
    .await?;
    let mut leadership = head.raft().leadership();
    leadership.wait_for(|now| now.is_leader).await?;
    Ok(head)
}

async fn propose(raft: &RaftHandle) {
    let payload = vec![7; PAYLOAD_BYTES];
    let outcome = raft
        .propose(SessionId::INTERNAL, 0, tally::ID, payload)
        .await;
    outcome
        .expect("this head leads, and is not overloaded")
        .result
        .expect("a tally refuses nothing");
}

/// Appends and fsyncs again and again, as a log does.
fn disk(settings: Settings, dir: &Path, bytes: usize) -> std::io::Result<Samples> {
    let mut file = File::create(dir.join("limit"))?;
    let block = vec![7; bytes];
    file.write_all(&block)?;
    file.sync_data()?;
    Ok(repeat(settings, || {
        file.write_all(&block)
            .and_then(|()| file.sync_data())
            .expect("it was possible before");
    }))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Some(settings) = Settings::from_args() else {
        return Ok(());
    };
    // Beside the build's output and not in /tmp, which may be memory.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let mut report = Report::new("commands of 128 bytes through one head");
    let head = start_head(dir.path()).await?;
    let raft = head.raft();
    for proposers in PROPOSERS {
        let (mut ours, mut limit) = (Samples::new(), Samples::new());
        for _ in 0..ROUNDS {
            let round = settings.round_of(ROUNDS);
            let before = tally::count(&raft.read().await?);
            let samples = repeat_async(round, proposers, || propose(&raft)).await;
            let applied = tally::count(&raft.read().await?) - before;
            let counted = samples.count();
            assert!(applied >= counted, "{applied} of {counted} are there");
            ours.merge(&samples);
            // While the head is idle, on the same disk.
            limit.merge(&disk(round, dir.path(), proposers * PAYLOAD_BYTES)?);
        }
        report.add(format!("{proposers} at a time"), ours);
        let records = limit.per_second() * proposers as f64;
        let note = format!("{records:.0} records/s in blocks of {proposers}");
        report.add_with(format!("limit: fsync of {proposers} together"), limit, note);
    }
    let reads = repeat_async(settings, 16, async || {
        raft.read().await.expect("this head leads");
    });
    report.add("linearizable reads, 16 at a time", reads.await);
    let (stop, stopped) = oneshot::channel::<()>();
    drop(stop);
    // The sender is gone, so this is over at once.
    head.run(async { drop(stopped.await) }).await?;
    report.print();
    Ok(())
}
