//! What happens in a run: cluster, workload and faults side by side, then peace, then the checkers.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mobula_wire::control::MetricsRequest;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::cluster::{ClusterError, RealCluster};
use super::counting::Counting;
use super::fault_plan::FaultPlan;
use super::injector::{Injector, Record};
use super::machines::{Isolation, Machines};
use super::outcome::{Check, Outcome, enough, felt};
use super::runner::{RunError, RunOptions};
use super::scenario::Scenario;
use super::silences::{GONE_MAX, Silences, still_there};
use super::takeovers::TakeOvers;
use super::timeline::Timeline;
use super::traffic::{Traffic, submit_jobs, use_registers};
use super::training::Training;
use super::verdict::{check_ended, check_jobs, check_once, check_registers};

/// The list of all jobs is looked at so often, for ends that change.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// A client that is waiting when the run ends is given as long as the SDK tries, and a little.
const LAST_ANSWERS_MAX: Duration = Duration::from_secs(30);

/// A worker's counters are asked for this long.
const METRICS_MAX: Duration = Duration::from_secs(5);

/// Plays the scenario on these machines, and judges what was seen.
pub(super) async fn play(
    scenario: &Scenario,
    options: &RunOptions,
    isolation: Isolation,
    machines: Machines,
    dir: PathBuf,
) -> Result<Outcome, RunError> {
    let observe = &options.observe;
    let failed = |source| RunError::Cluster {
        source,
        dir: dir.clone(),
    };
    let timeline = Timeline::draw(options.seed, scenario, options.length);
    let started = Instant::now();
    let cluster = RealCluster::start(machines, scenario, &dir).await;
    let cluster = Arc::new(cluster.map_err(failed)?);
    observe(&format!(
        "{} heads and {} workers are up after {:.1} s; {} faults are drawn",
        cluster.heads().len(),
        cluster.workers().len(),
        started.elapsed().as_secs_f64(),
        timeline.faults().len()
    ));
    let counting = Counting::start(scenario, &cluster, &dir)
        .await
        .map_err(failed)?;
    let stop = watch::Sender::new(false);
    let plans = &scenario.workload.training;
    let training = Training::start(plans, &cluster, stop.subscribe()).await;
    let mut training = training.map_err(failed)?;
    let marks = dir.join("ran");
    let traffic = Arc::new(Traffic::new(
        options.seed,
        &scenario.workload,
        marks.clone(),
    ));
    let injector = Arc::new(Injector {
        cluster: Arc::clone(&cluster),
        plans: scenario.faults.clone(),
        record: Mutex::new(Record::default()),
        began: Instant::now(),
        counter: counting.job,
        training_job: Box::new(training.job()),
    });
    let mut clients = start_clients(scenario, &cluster, &traffic, &stop)
        .await
        .map_err(failed)?;
    let mut background = JoinSet::new();
    let supervisor = Arc::clone(&injector);
    background.spawn(async move { supervisor.supervise().await });
    let (looker, looking) = (cluster.admin().clone(), Arc::clone(&traffic));
    background.spawn(async move {
        loop {
            tokio::time::sleep(LOOK_INTERVAL).await;
            looking.look(&looker).await;
        }
    });
    hurt(&injector, &scenario.faults, &timeline, observe).await;
    tokio::time::sleep(options.length.saturating_sub(traffic.now())).await;
    let length = traffic.now();
    stop.send_replace(true);
    counting.stop();
    if let Some(router) = cluster.router() {
        router.heal_all();
    }
    observe("healed; waiting until everything has ended and every head agrees");
    let settled = settle(scenario, &cluster, &traffic, &mut clients).await;
    background.shutdown().await;
    let patience = Duration::from_secs(scenario.checks.settle_max_s) + LAST_ANSWERS_MAX;
    let counted = counting.check(&cluster, patience, &traffic).await;
    let stale_refused = stale_refused(&cluster).await;
    let trained = training
        .check(
            patience,
            (scenario.checks.training_jobs_min_per_minute * length.as_secs_f64() / 60.0) as u64,
        )
        .await;
    let record = std::mem::take(&mut *injector.record.lock());
    let next_steps = training.next_steps(&record.done);
    let data_dirs: Vec<PathBuf> = cluster
        .workers()
        .iter()
        .map(|node| node.data_dir())
        .collect();
    let takeovers = TakeOvers::read(&record.killed_drivers, &data_dirs);
    let silenced = &record.silenced_drivers;
    let silences = Silences::read(silenced, &record.killed_drivers, &data_dirs);
    let left = still_there(silenced, GONE_MAX).await;
    let notices = training.notices(&record.done);
    let logs = cluster.heads().iter().map(|head| head.log_file());
    let logs: Vec<String> = logs
        .filter_map(|log| std::fs::read_to_string(log).ok())
        .collect();
    let felt = felt(&record.done, &traffic.acknowledged(), length, &logs);
    let counts = *traffic.counts.lock();
    let mut checks = vec![
        enough(scenario, &counts, record.done.len(), length),
        settled,
        check_registers(&traffic),
        check_jobs(scenario, &traffic, &marks),
        check_once(&traffic),
        check_ended(scenario, &record),
    ];
    checks.extend(counted);
    checks.extend(trained);
    checks.extend(training.check_notices(&scenario.checks, options.seed, length));
    let limits = &scenario.checks;
    checks.extend(silences.checks(limits.takeovers_min_per_minute, length, &left));
    checks.extend(
        [
            within(
                "write gap, p99",
                felt.write_gap.p99_ms,
                limits.write_gap_p99_max_ms,
            ),
            within(
                "counted calls go on",
                counts.increments_gap_ms,
                limits.increments_gap_max_ms,
            ),
            within(
                "heads back and all reconciled",
                felt.reconciled.max_ms,
                limits.reconciled_max_ms,
            ),
        ]
        .into_iter()
        .flatten(),
    );
    let mut faults = BTreeMap::new();
    for done in &record.done {
        *faults.entry(done.kind.as_str()).or_default() += 1;
    }
    Ok(Outcome {
        scenario: scenario.name.clone(),
        seed: options.seed,
        length_s: length.as_secs_f64(),
        isolation,
        load: load(),
        passed: checks.iter().all(|check| check.passed),
        checks,
        faults,
        faults_on_leader: record.done.iter().filter(|done| done.was_leader).count(),
        left_out: record.left_out,
        counts,
        felt,
        next_steps,
        takeovers,
        silences,
        notices,
        stale_refused,
        network: cluster.router().map(super::router::Router::carried),
        done: record.done,
    })
}

/// That a time stays below its limit, where the scenario sets one.
fn within(name: &str, took_ms: u64, limit_ms: Option<u64>) -> Option<Check> {
    let limit_ms = limit_ms?;
    let broken = (took_ms > limit_ms).then(|| format!("{took_ms} ms, the limit is {limit_ms} ms"));
    let broken: Vec<String> = broken.into_iter().collect();
    Some(Check::of(
        name,
        format!("{took_ms} ms of {limit_ms} ms"),
        &broken,
    ))
}

fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

async fn start_clients(
    scenario: &Scenario,
    cluster: &RealCluster,
    traffic: &Arc<Traffic>,
    stop: &watch::Sender<bool>,
) -> Result<JoinSet<()>, ClusterError> {
    let workload = &scenario.workload;
    let mut clients = JoinSet::new();
    for number in 0..workload.register_clients {
        let client = cluster.client().await?;
        let traffic = Arc::clone(traffic);
        let (workload, stop) = (workload.clone(), stop.subscribe());
        clients.spawn(use_registers(traffic, number, client, workload, stop));
    }
    for number in 0..workload.submitters {
        let (client, second) = (cluster.client().await?, cluster.client().await?);
        let traffic = Arc::clone(traffic);
        let (workload, stop) = (workload.clone(), stop.subscribe());
        clients.spawn(submit_jobs(traffic, number, client, second, workload, stop));
    }
    Ok(clients)
}

/// Does all faults in their time; those of one entry one after the other.
async fn hurt(
    injector: &Arc<Injector>,
    plans: &[FaultPlan],
    timeline: &Timeline,
    observe: &Arc<dyn Fn(&str) + Send + Sync>,
) {
    let mut entries = JoinSet::new();
    for entry in 0..plans.len() {
        let of_entry = timeline
            .faults()
            .iter()
            .filter(|fault| fault.entry == entry);
        let faults: Vec<_> = of_entry.copied().collect();
        let (injector, observe) = (Arc::clone(injector), Arc::clone(observe));
        entries.spawn(async move {
            for fault in faults {
                let at = injector.began + fault.at;
                tokio::time::sleep_until(at.into()).await;
                observe(&fault.to_string());
                injector.inject(&fault).await;
            }
        });
    }
    while let Some(ended) = entries.join_next().await {
        if let Err(error) = ended {
            let line = format!("a fault panicked: {error}");
            injector.record.lock().left_out.push(line);
        }
    }
}

/// Waits until nothing is under way any more (I18).
async fn settle(
    scenario: &Scenario,
    cluster: &RealCluster,
    traffic: &Traffic,
    clients: &mut JoinSet<()>,
) -> Check {
    let name = "everything ends and every head agrees in time (I18)";
    let limit = Duration::from_secs(scenario.checks.settle_max_s);
    let began = Instant::now();
    let mut broken = Vec::new();
    let answered = tokio::time::timeout(LAST_ANSWERS_MAX, async {
        while let Some(ended) = clients.join_next().await {
            if let Err(error) = ended {
                traffic
                    .broken
                    .lock()
                    .insert(format!("a client panicked: {error}"));
            }
        }
    });
    if answered.await.is_err() {
        let seconds = LAST_ANSWERS_MAX.as_secs();
        broken.push(format!("{} clients wait after {seconds} s", clients.len()));
        clients.shutdown().await;
    }
    let whole = async {
        cluster.wait_for_voters().await?;
        cluster.wait_for_workers().await
    };
    match tokio::time::timeout(limit, whole).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => broken.push(error.to_string()),
        Err(_) => broken.push(format!(
            "the group is not whole after {} s",
            limit.as_secs()
        )),
    }
    let mut open = None;
    while began.elapsed() < limit + LAST_ANSWERS_MAX {
        open = traffic.look(cluster.admin()).await;
        if open == Some(0) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    match open {
        Some(0) => {}
        Some(open) => broken.push(format!("{open} jobs have not ended")),
        None => broken.push("the list of jobs is not answered".to_owned()),
    }
    let looked_at = format!("after {:.1} s", began.elapsed().as_secs_f64());
    Check::of(name, looked_at, &broken)
}

/// Messages that workers refused because a newer leader had spoken (I4), over all that answer.
async fn stale_refused(cluster: &RealCluster) -> u64 {
    let mut sum = 0;
    for worker in cluster.workers() {
        let node = worker.name().to_owned();
        let asked = cluster.admin().control().read("metrics", |mut api| {
            let request = MetricsRequest { node: node.clone() };
            async move { api.metrics(request).await }
        });
        if let Ok(Ok(reply)) = tokio::time::timeout(METRICS_MAX, asked).await {
            let of_name = |line: &&str| line.starts_with("mobula_worker_stale_messages");
            let line = reply.text.lines().find(of_name);
            let count = line.and_then(|line| line.rsplit(' ').next()?.parse::<u64>().ok());
            sum += count.unwrap_or(0);
        }
    }
    sum
}
