//! What clients do while the cluster is hurt, and what they were told.
//!
//! Invariants:
//! 1. What was asked is recorded before it is sent, and what was answered when it is known.
//! 2. Nothing is sent again here: the SDK does that, with the same stamp. What it gives up on has an
//!    unknown outcome unless it says otherwise.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mobula::Cluster;
use mobula::core::error::{ErrorCode, Executed};
use mobula_actors::registry::{NewVersion, client as registry};
use parking_lot::Mutex;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use super::job;
use super::scenario::Workload;
use crate::checker::jobs::{JobLedger, SeenJob};
use crate::checker::model::{MadeOnceInput, RegisterInput};
use crate::history::History;

/// Operations on one register before the next begins under a new name: so a history of any length
/// is checked in pieces of bounded size. The registry holds a thousand names.
const OPERATIONS_PER_REGISTER: u64 = 800;

/// Of the submissions with a key, how many percent are sent by a second client at the same time.
const TWICE_PERCENT: u32 = 30;

/// Drivers start again as often as need be: how often they may is for the checks to say.
const DRIVER_RESTARTS: u32 = 1_000;

/// What is asked of a register, by the register's name.
pub(super) type RegisterAsked = (String, RegisterInput);
/// Version and value.
pub(super) type RegisterTold = (u64, u64);
/// What is asked of a job, by its key.
pub(super) type JobAsked = (String, MadeOnceInput);
/// Its id.
pub(super) type JobTold = Option<u64>;

/// How many operations ended how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Counts {
    /// Jobs whose submission was acknowledged.
    pub jobs_acknowledged: u64,
    /// Of these, stopped again.
    pub jobs_stopped: u64,
    /// Writes to registers that were acknowledged.
    pub register_writes: u64,
    /// Reads of registers that were answered.
    pub register_reads: u64,
    /// Operations that surely had no effect.
    pub refused: u64,
    /// Operations of unknown outcome.
    pub unknown: u64,
    /// Calls to the counter that were answered.
    pub increments: u64,
    /// The longest that none was answered, in milliseconds.
    pub increments_gap_ms: u64,
}

/// What all clients of a run share.
#[derive(Debug)]
pub(super) struct Traffic {
    began: Instant,
    seed: u64,
    marks: PathBuf,
    pub(super) ledger: Mutex<JobLedger>,
    pub(super) jobs: History<JobAsked, JobTold>,
    pub(super) registers: History<RegisterAsked, RegisterTold>,
    pub(super) counts: Mutex<Counts>,
    /// When writes were acknowledged, since the begin.
    acknowledged: Mutex<Vec<Duration>>,
    /// What was seen on the way and must not be.
    pub(super) broken: Mutex<BTreeSet<String>>,
    /// Operations that each register's place has had.
    used: Mutex<Vec<u64>>,
}

impl Traffic {
    pub(super) fn new(seed: u64, workload: &Workload, marks: PathBuf) -> Traffic {
        Traffic {
            began: Instant::now(),
            seed,
            marks,
            ledger: Mutex::default(),
            jobs: History::new(),
            registers: History::new(),
            counts: Mutex::default(),
            acknowledged: Mutex::default(),
            broken: Mutex::default(),
            used: Mutex::new(vec![0; workload.registers as usize]),
        }
    }

    /// Since the workload's begin.
    pub(super) fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// When writes were acknowledged, in order.
    pub(super) fn acknowledged(&self) -> Vec<Duration> {
        let mut moments = self.acknowledged.lock().clone();
        moments.sort_unstable();
        moments
    }

    fn note_write(&self) {
        self.acknowledged.lock().push(self.now());
    }

    fn note_failure(&self, executed: Executed) {
        let mut counts = self.counts.lock();
        match executed {
            Executed::No => counts.refused += 1,
            Executed::Yes | Executed::Unknown => counts.unknown += 1,
        }
    }

    /// One look at all of the cluster's jobs, where some head answers; how many have not ended.
    pub(super) async fn look(&self, cluster: &Cluster) -> Option<usize> {
        let jobs = cluster.list_jobs().await.ok()?;
        let is_ours = |name: &str| name.starts_with(KEY_PREFIX);
        let ours = jobs.iter().filter(|job| is_ours(&job.name));
        let seen: Vec<SeenJob> = ours
            .map(|job| SeenJob {
                id: job.id,
                key: job.name.clone(),
                end: job.ended_ms.map(|at| {
                    let result = job.result_json.as_deref().unwrap_or("nothing");
                    let reason = job.exit_reason.as_deref().unwrap_or("no reason");
                    format!("{} at {at} with {result}, {reason}", job.state)
                }),
            })
            .collect();
        let open = seen.iter().filter(|job| job.end.is_none()).count();
        self.ledger.lock().look(seen);
        Some(open)
    }
}

/// How the names of a run's jobs begin.
const KEY_PREFIX: &str = "chaos-";

/// One client of registers, until `stop` is true.
pub(super) async fn use_registers(
    traffic: Arc<Traffic>,
    number: u32,
    cluster: Cluster,
    workload: Workload,
    mut stop: watch::Receiver<bool>,
) {
    let mut rng = client_rng(traffic.seed, 1, number);
    let rate = workload.register_operations_per_second / f64::from(workload.register_clients);
    let Some(mut ticks) = pace(rate) else { return };
    while next(&mut ticks, &mut stop).await {
        let place = rng.random_range(0..workload.registers as usize);
        let used = {
            let mut used = traffic.used.lock();
            used[place] += 1;
            used[place]
        };
        let name = format!("chaos-register-{place}-{}", used / OPERATIONS_PER_REGISTER);
        if rng.random() {
            // Of no other write.
            let value = (u64::from(number) << 40) | (place as u64) << 32 | used;
            write(&traffic, number, &cluster, name, value).await;
        } else {
            read(&traffic, number, &cluster, name).await;
        }
    }
}

async fn write(traffic: &Traffic, client: u32, cluster: &Cluster, name: String, value: u64) {
    let asked = (name.clone(), RegisterInput::Write(value));
    let Ok(pending) = traffic.registers.begin(client, asked) else {
        return;
    };
    let new = NewVersion {
        model: name,
        digest: format!("{value:064x}"),
        size_bytes: 0,
        weights_blake3: format!("{value:064x}"),
        dataset_blake3: format!("{:064x}", 0),
        job: 0,
        metrics: std::collections::BTreeMap::new(),
        training_json: String::new(),
    };
    match registry::register(cluster, new).await {
        Ok(version) => {
            pending.returned((version.version, value));
            traffic.counts.lock().register_writes += 1;
            traffic.note_write();
        }
        Err(error) => {
            traffic.note_failure(error.executed());
            match error.executed() {
                Executed::No => pending.not_executed(),
                Executed::Yes | Executed::Unknown => pending.unknown(),
            }
        }
    }
}

async fn read(traffic: &Traffic, client: u32, cluster: &Cluster, name: String) {
    let asked = (name.clone(), RegisterInput::Read);
    let Ok(pending) = traffic.registers.begin(client, asked) else {
        return;
    };
    let told = match registry::version(cluster, &name, None).await {
        Ok(newest) => u64::from_str_radix(&newest.description.digest, 16)
            .map(|value| (newest.version, value))
            .map_err(|_| format!("register {name} holds `{}`", newest.description.digest)),
        // Nobody has written it yet.
        Err(error) if error.code() == Some(ErrorCode::NotFound) => Ok((0, 0)),
        Err(error) => {
            // It changes nothing: not having been answered says nothing.
            pending.not_executed();
            traffic.note_failure(error.executed());
            return;
        }
    };
    match told {
        Ok(told) => {
            pending.returned(told);
            traffic.counts.lock().register_reads += 1;
        }
        Err(broken) => {
            pending.not_executed();
            traffic.broken.lock().insert(broken);
        }
    }
}

/// One client that submits jobs, until `stop` is true. `second` is another connection, through which
/// some of them are submitted again.
pub(super) async fn submit_jobs(
    traffic: Arc<Traffic>,
    number: u32,
    cluster: Cluster,
    second: Cluster,
    workload: Workload,
    mut stop: watch::Receiver<bool>,
) {
    let mut rng = client_rng(traffic.seed, 2, number);
    let rate = workload.submits_per_second / f64::from(workload.submitters);
    let Some(mut ticks) = pace(rate) else { return };
    let mut count = 0_u64;
    while next(&mut ticks, &mut stop).await {
        count += 1;
        let key = format!("{KEY_PREFIX}{number}-{count}");
        let is_keyed = rng.random();
        let is_twice = is_keyed && rng.random_ratio(TWICE_PERCENT, 100);
        let is_stopped = rng.random_ratio(workload.stops_percent, 100);
        traffic.ledger.lock().submitted(&key);
        let first = submit(&traffic, number, &cluster, &key, is_keyed);
        let job = if is_twice {
            let (first, again) =
                tokio::join!(first, submit(&traffic, number, &second, &key, is_keyed));
            first.or(again)
        } else {
            first.await
        };
        let Some(job) = job else { continue };
        if is_stopped {
            // Whatever becomes of this: from here on it may end without having run.
            traffic.ledger.lock().may_not_run(&key);
            match cluster
                .job_handle(mobula::core::id::JobId(job))
                .stop()
                .await
            {
                Ok(()) => {
                    traffic.counts.lock().jobs_stopped += 1;
                    traffic.note_write();
                }
                Err(error) => traffic.note_failure(error.executed()),
            }
            continue;
        }
        // What was acknowledged is seen by whoever looks afterwards, through any head (I1, I2).
        match second
            .job_handle(mobula::core::id::JobId(job))
            .status()
            .await
        {
            Err(error) if error.code() == Some(ErrorCode::NotFound) => {
                let broken = format!("job {job} of {key} was acknowledged and then not found (I1)");
                traffic.broken.lock().insert(broken);
            }
            Ok(_) | Err(_) => {}
        }
    }
}

/// Submits once; the job, where that was acknowledged.
async fn submit(
    traffic: &Traffic,
    client: u32,
    cluster: &Cluster,
    key: &str,
    is_keyed: bool,
) -> Option<u64> {
    let asked = (key.to_owned(), MadeOnceInput::Make);
    let pending = traffic.jobs.begin(client, asked).ok()?;
    let mut job = cluster
        .new_job(key)
        .builtin()
        .args(job::mark_arguments(&traffic.marks, key))
        .cpus(0.1)
        .max_restarts(DRIVER_RESTARTS);
    if is_keyed {
        job = job.idempotency_key(key);
    }
    match job.submit().await {
        Ok(handle) => {
            let id = handle.id().0;
            pending.returned(Some(id));
            traffic.ledger.lock().acknowledged(key, id);
            traffic.counts.lock().jobs_acknowledged += 1;
            traffic.note_write();
            Some(id)
        }
        Err(error) => {
            traffic.note_failure(error.executed());
            match error.executed() {
                Executed::No => pending.not_executed(),
                Executed::Yes | Executed::Unknown => pending.unknown(),
            }
            None
        }
    }
}

/// Draws of one client are its own, so that they do not depend on how clients interleave.
fn client_rng(seed: u64, kind: u64, number: u32) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream((kind << 32) | u64::from(number));
    rng
}

/// Ticks at this rate; what was missed is not made up for. `None` for no rate at all.
fn pace(rate: f64) -> Option<tokio::time::Interval> {
    if rate <= 0.0 {
        return None;
    }
    let mut ticks = interval(Duration::from_secs_f64(1.0 / rate));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    Some(ticks)
}

/// Waits for the next tick; false when it is time to stop.
async fn next(ticks: &mut tokio::time::Interval, stop: &mut watch::Receiver<bool>) -> bool {
    tokio::select! {
        // Also when the sender is gone.
        _ = stop.wait_for(|stop| *stop) => false,
        _ = ticks.tick() => true,
    }
}
