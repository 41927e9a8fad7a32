//! Jobs are submitted by several clients at once while the head is killed and stopped: every
//! acknowledged job is there exactly once, ran exactly once, and has exactly one end.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use mobula::Cluster;
use mobula::core::error::Executed;
use mobula_chaos::checker::jobs::{JobLedger, SeenJob};
use mobula_chaos::checker::linearizable::check_by_key;
use mobula_chaos::checker::model::{MadeOnce, MadeOnceInput};
use mobula_chaos::history::{History, Operation, Pending};
use mobula_chaos::schedule::{Fault, Plan, Schedule, seed_from_env};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::sync::watch;

use crate::cluster::{HEAD, HurtCluster};

const JOBS: usize = 30;
const CLIENTS: usize = 4;

/// Each job is submitted by this many clients, as by one that retries through another connection.
const SUBMITS_EACH: usize = 2;

/// Submissions and looks that end, over all clients.
const OPERATIONS: u64 = (JOBS * SUBMITS_EACH * 2) as u64;

/// A client's own attempts, each of which the SDK tries again for 15 s.
const ATTEMPTS_MAX: u32 = 8;

/// How long everything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(200);

/// How often the cluster's jobs are looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

type Asked = (String, MadeOnceInput);
type Told = Option<u64>;

/// What the clients of one run share.
#[derive(Clone)]
struct Run {
    history: History<Asked, Told>,
    ended: watch::Sender<u64>,
    in_flight: Arc<AtomicUsize>,
    program: String,
    ledger_file: String,
}

impl Run {
    fn begin(&self, client: usize, key: &str, input: MadeOnceInput) -> Pending<Asked, Told> {
        let client = u32::try_from(client).unwrap();
        self.history.begin(client, (key.to_owned(), input)).unwrap()
    }

    /// Submits until it is acknowledged; the job.
    async fn submit(&self, client: usize, cluster: &Cluster, key: &str) -> u64 {
        for _ in 0..ATTEMPTS_MAX {
            let pending = self.begin(client, key, MadeOnceInput::Make);
            let job = cluster
                .new_job(key)
                .program(&self.program)
                .env("MOBULA_CHAOS_LEDGER", &self.ledger_file)
                .env("MOBULA_CHAOS_KEY", key)
                .cpus(0.5)
                .idempotency_key(key);
            match job.submit().await {
                Ok(handle) => {
                    pending.returned(Some(handle.id().0));
                    return handle.id().0;
                }
                Err(error) => {
                    println!("client {client}, {key}: {error}");
                    match error.executed() {
                        Executed::No => pending.not_executed(),
                        Executed::Yes | Executed::Unknown => pending.unknown(),
                    }
                }
            }
        }
        panic!("{key} was not acknowledged in {ATTEMPTS_MAX} attempts");
    }

    /// Looks whether the job of `key` is there.
    async fn look(&self, client: usize, cluster: &Cluster, key: &str) {
        let pending = self.begin(client, key, MadeOnceInput::Look);
        match cluster.list_jobs().await {
            Ok(jobs) => {
                let found = jobs.iter().find(|job| job.name == key);
                pending.returned(found.map(|job| job.id));
            }
            // It changes nothing: not having been answered says nothing.
            Err(_) => pending.not_executed(),
        }
    }

    /// One client: submits its keys in its order, and looks at one of them after each.
    async fn client(
        self,
        client: usize,
        cluster: Cluster,
        keys: Vec<String>,
        seed: u64,
    ) -> Vec<(String, u64)> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed ^ client as u64);
        let mut acknowledged = Vec::new();
        for key in &keys {
            self.in_flight.fetch_add(1, Ordering::Relaxed);
            let job = self.submit(client, &cluster, key).await;
            self.ended.send_modify(|ended| *ended += 1);
            acknowledged.push((key.clone(), job));
            self.look(client, &cluster, &keys[rng.random_range(0..keys.len())])
                .await;
            self.ended.send_modify(|ended| *ended += 1);
            self.in_flight.fetch_sub(1, Ordering::Relaxed);
        }
        acknowledged
    }
}

/// Which keys each client submits, in which order.
fn deal(seed: u64) -> Vec<Vec<String>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut hands = vec![Vec::new(); CLIENTS];
    for number in 0..JOBS {
        // Two clients next to each other in a ring: never the same one twice.
        let first = rng.random_range(0..CLIENTS);
        for offset in 0..SUBMITS_EACH {
            hands[(first + offset) % CLIENTS].push(format!("chaos-{number:02}"));
        }
    }
    for hand in &mut hands {
        hand.shuffle(&mut rng);
    }
    hands
}

/// One look at all jobs, until one is answered.
async fn look_at_all(cluster: &Cluster) -> Vec<SeenJob> {
    loop {
        let Ok(jobs) = cluster.list_jobs().await else {
            continue;
        };
        let seen = jobs.iter().map(|job| SeenJob {
            id: job.id,
            key: job.name.clone(),
            end: job.ended_ms.map(|at| {
                let (result, reason) = (&job.result_json, &job.exit_reason);
                format!("{} at {at} with {result:?}, {reason:?}", job.state)
            }),
        });
        return seen.collect();
    }
}

/// Looks at all jobs, again and again, until each of `count` has ended.
async fn watch_until_ended(cluster: &Cluster, ledger: &mut JobLedger, count: usize) {
    loop {
        let seen = look_at_all(cluster).await;
        let ended = seen.iter().filter(|job| job.end.is_some()).count();
        ledger.look(seen);
        if ended >= count {
            return;
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Puts each fault onto the head when its moment has come; how many operations were under way then.
async fn hurt(cluster: &mut HurtCluster, schedule: &Schedule, run: &Run) -> usize {
    let mut progress = run.ended.subscribe();
    let mut met = 0;
    for event in schedule.events() {
        let come = progress.wait_for(|ended| *ended >= event.progress).await;
        drop(come.expect("this run holds the sender"));
        let in_flight = run.in_flight.load(Ordering::Relaxed);
        println!(
            "{}: {}, {in_flight} operations are under way",
            event.target, event.fault
        );
        met += in_flight;
        cluster.hurt_head(event.fault).await;
    }
    met
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_acknowledged_job_is_there_once_and_ends_once_while_the_head_dies() {
    run_scenario(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_acknowledged_job_is_there_once_and_ends_once_while_leaders_of_three_die() {
    run_scenario(3).await;
}

async fn run_scenario(heads: u32) {
    let seed = seed_from_env().unwrap();
    let plan = Plan {
        kills: 3,
        pauses: 1,
        progress: 4..OPERATIONS - 10,
        targets: vec![HEAD.to_owned()],
    };
    let schedule = Schedule::draw(seed, &plan).unwrap();
    println!("{schedule}");
    let outcome = tokio::time::timeout(LIMIT, scenario(heads, &schedule)).await;
    outcome.unwrap_or_else(|_| panic!("not done within {} s; {schedule}", LIMIT.as_secs()));
}

async fn scenario(heads: u32, schedule: &Schedule) {
    let mut cluster = HurtCluster::up(heads, 2);
    let run = Run {
        history: History::new(),
        ended: watch::Sender::new(0),
        in_flight: Arc::default(),
        program: env!("CARGO_BIN_EXE_mobula-chaos-job").to_owned(),
        ledger_file: cluster.dir().join("ran").display().to_string(),
    };
    let mut clients = tokio::task::JoinSet::new();
    for (number, keys) in deal(schedule.seed()).into_iter().enumerate() {
        let connected = cluster.client().await;
        clients.spawn(run.clone().client(number, connected, keys, schedule.seed()));
    }
    let met = hurt(&mut cluster, schedule, &run).await;
    let mut ledger = JobLedger::default();
    while let Some(acknowledged) = clients.join_next().await {
        for (key, job) in acknowledged.unwrap() {
            ledger.acknowledged(&key, job);
        }
    }
    assert!(
        met > 0,
        "no fault met an operation: this run shows nothing; {schedule}"
    );
    assert_eq!(ledger.acknowledged_count(), JOBS);
    assert_eq!(*run.ended.borrow(), OPERATIONS);

    let watcher = cluster.client().await;
    watch_until_ended(&watcher, &mut ledger, JOBS).await;
    // What has ended stays so, also for a head that only knows it from its disk.
    let down = Duration::ZERO;
    cluster.hurt_head(Fault::Kill { down }).await;
    let seen = look_at_all(&watcher).await;
    for job in &seen {
        let end = job.end.as_deref().unwrap_or("under way");
        let result = format!("with Some(\"\\\"{}\\\"\")", job.key);
        let is_right = end.starts_with("succeeded") && end.contains(&result);
        assert!(is_right, "job {} of {}: {end}; {schedule}", job.id, job.key);
    }
    ledger.look(seen);
    for key in std::fs::read_to_string(&run.ledger_file).unwrap().lines() {
        ledger.ran(key);
    }
    let broken = ledger.check(0);
    let broken: Vec<String> = broken.iter().map(ToString::to_string).collect();
    assert!(broken.is_empty(), "{}\n{schedule}", broken.join("\n"));

    let operations = run.history.operations();
    println!(
        "{} operations are checked, {met} met a fault",
        operations.len()
    );
    let by_key = operations.into_iter().map(|operation| {
        let (key, input) = operation.input;
        let Operation {
            client,
            began,
            ended,
            ..
        } = operation;
        (
            key,
            Operation {
                client,
                input,
                began,
                ended,
            },
        )
    });
    check_by_key(&MadeOnce, by_key).unwrap_or_else(|error| panic!("{error}; {schedule}"));
}
