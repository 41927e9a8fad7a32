//! What changes cost the callers: a rolling update, a candidate that is broken, replicas that come when they are wanted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use mobula::{Cluster, StorageLocation};
use mobula_actors::registry::{NewVersion, VersionFile};
use mobula_actors::serving::rollout::command::Command;
use mobula_actors::serving::rollout::plan::{Cleanup, Phase};
use mobula_actors::serving::rollout::{Guardrails, Rollout, Strategy};
use mobula_actors::storage::open_blobs;
use mobula_actors::{registry, serving};
use mobula_benches::results::Results;

use crate::endpoint::{Digits, MODEL};
use crate::load::{self, Arrivals, Connection, Outcomes};
use crate::{Outcome, tell_the_rest};

/// How long a change may take.
const LIMIT: Duration = Duration::from_secs(180);

/// How often is asked whether a change is over.
const POLL: Duration = Duration::from_millis(50);

/// Callers while versions change.
const CALLERS: usize = 8;

/// Requests a second while a candidate is broken, and its share of them in percent.
const CANARY: (f64, u32) = (200.0, 5);

/// Starts from nothing that are timed.
const AWAKENINGS: usize = 5;

/// How long is asked before a worker is drained.
const BEFORE_DRAIN: Duration = Duration::from_secs(1);

/// Callers who want eight replicas, of which each shall have sixteen requests at once.
const CROWD: usize = 256;

/// Everything here, one after the other; versions are rolled to and fro until so many requests were answered meanwhile.
pub(crate) async fn measure(results: &mut Results, digits: &Digits, requests: u64) -> Outcome {
    let cluster = digits.client().await?;
    digits.train_another().await?;
    rolling_updates(results, digits, &cluster, requests).await?;
    broken_candidate(results, digits, &cluster).await?;
    from_nothing(results, digits).await?;
    to_eight(results, digits).await?;
    drain(results, digits).await
}

/// Another version in service under load, whatever its latencies: old and new replicas share the machine here.
async fn rolling_updates(
    results: &mut Results,
    digits: &Digits,
    cluster: &Cluster,
    requests: u64,
) -> Outcome {
    let guardrails = Guardrails {
        latency_increase_max_percent: 100_000,
        ..Guardrails::STANDARD
    };
    let row = format!("rolling updates of 2 replicas, {CALLERS} callers");
    let (mut answered, mut not_answered, mut updates) = (0, 0, 0);
    while answered < requests {
        updates += 1;
        let version = 1 + updates % 2;
        let steps = vec![25, 50, 75, 100];
        let started = Instant::now();
        start(cluster, version, Strategy::Rolling, steps, guardrails).await?;
        let (is_over, goes_on) = flag();
        let load = load::closed_while(&digits.target, CALLERS, goes_on);
        let (rollout, outcomes) = beside(load, &is_over, over(cluster)).await?;
        if rollout.phase != Phase::Promoted {
            return Err(format!("a rolling update ended as {rollout:?}").into());
        }
        answered += outcomes.answered.len();
        not_answered += outcomes.refused.len() + outcomes.unanswered;
        if updates == 1 {
            results.rate(&row, outcomes.answered_per_second(), &outcomes.answered);
            let took = started.elapsed().as_secs_f64();
            results.figure(&format!("{row}: until the first was over"), took, "s");
        }
    }
    results.figure(&format!("{row}: updates"), updates as f64, "updates");
    results.figure(&format!("{row}: answered"), answered as f64, "requests");
    let name = format!("{row}: without an answer or refused");
    results.figure(&name, not_answered as f64, "requests");
    Ok(())
}

/// A worker with a half of the replicas, and perhaps the router, is left by all of them under load, which comes by way of the other
/// worker's ingress.
async fn drain(results: &mut Results, digits: &Digits) -> Outcome {
    let target = digits.through_ingress()?;
    let (is_over, goes_on) = flag();
    let load = load::closed_while(&target, CALLERS, goes_on);
    let drained = async {
        tokio::time::sleep(BEFORE_DRAIN).await;
        tokio::task::block_in_place(|| digits.drain_another())
    };
    let (took, outcomes) = beside(load, &is_over, drained).await?;
    let row = format!("a worker is drained, {CALLERS} callers by way of another's ingress");
    results.rate(&row, outcomes.answered_per_second(), &outcomes.answered);
    results.figure(
        &format!("{row}: until nothing ran there"),
        took.as_secs_f64(),
        "s",
    );
    let not_answered = outcomes.refused.len() + outcomes.unanswered;
    let name = format!("{row}: without an answer or refused");
    results.figure(&name, not_answered as f64, "requests");
    Ok(())
}

/// A version whose weights are no numbers, as a canary.
async fn broken_candidate(results: &mut Results, digits: &Digits, cluster: &Cluster) -> Outcome {
    let (per_second, percent) = CANARY;
    let broken = register_broken(cluster).await?;
    let guardrails = Guardrails::STANDARD;
    start(
        cluster,
        broken,
        Strategy::Canary,
        vec![percent, 100],
        guardrails,
    )
    .await?;
    let arrivals = Arrivals {
        per_second,
        seed: 7,
        connections: load::CONNECTIONS,
    };
    let (is_over, goes_on) = flag();
    let load = load::open_while(&digits.target, arrivals, goes_on);
    let (rollout, outcomes) = beside(load, &is_over, over(cluster)).await?;
    let last = rollout.decisions.last();
    let evidence = last.and_then(|last| last.evidence.as_ref());
    let (Phase::RolledBack, Some(last), Some(evidence)) = (rollout.phase, last, evidence) else {
        return Err(format!("the broken candidate's rollout ended as {rollout:?}").into());
    };
    let row = format!("broken candidate, {percent} % of {per_second} requests a second");
    let took_ms = last.at_ms.saturating_sub(rollout.started_ms) as f64;
    results.figure(
        &format!("{row}: from its start to the rollback"),
        took_ms,
        "ms",
    );
    let failed = evidence.candidate.errors as f64;
    results.figure(&format!("{row}: its bad answers"), failed, "requests");
    // The active version answers what the candidate does not.
    let not_answered = outcomes.refused.len() + outcomes.unanswered;
    let name = format!("{row}: requests without an answer or refused");
    results.figure(&name, not_answered as f64, "requests");
    Ok(())
}

/// The first answer of an endpoint whose replicas have all ended.
async fn from_nothing(results: &mut Results, digits: &Digits) -> Outcome {
    let scaling = [
        "--replicas",
        "0..1",
        "--idle-after",
        "1s",
        "--window",
        "1s",
        "--down-window",
        "1s",
    ];
    let target = digits.another("idle", &scaling)?;
    let mut first = Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3)?;
    for _ in 0..AWAKENINGS {
        replicas(digits, "idle", 0).await?;
        let mut connection = Connection::open(&target).await?;
        let asked = Instant::now();
        let answer = connection.ask(&target.request).await?;
        if answer.status != 200 {
            return Err(format!("the first request after idleness got {answer:?}").into());
        }
        first.saturating_record(u64::try_from(asked.elapsed().as_nanos())?);
    }
    for (name, share) in [("p50", 0.5), ("longest", 1.0)] {
        let name = format!("from 0 replicas to the first answer, {AWAKENINGS} times, {name}");
        results.figure(&name, first.value_at_quantile(share) as f64 / 1e6, "ms");
    }
    Ok(())
}

/// From one replica to eight, where their number may double each second.
async fn to_eight(results: &mut Results, digits: &Digits) -> Outcome {
    let scaling = ["--replicas", "1..8", "--window", "10s", "--up-window", "1s"];
    let target = digits.another("crowd", &scaling)?;
    let started = Instant::now();
    let (is_over, goes_on) = flag();
    let load = load::closed_while(&target, CROWD, goes_on);
    let running = async {
        replicas(digits, "crowd", 8).await?;
        Ok(started.elapsed())
    };
    let (took, outcomes) = beside(load, &is_over, running).await?;
    let row = format!("from 1 replica to 8, {CROWD} callers");
    results.figure(&format!("{row}: until 8 run"), took.as_secs_f64(), "s");
    tell_the_rest(results, &row, &outcomes);
    Ok(())
}

/// A flag, and what a load asks it: whether to go on.
fn flag() -> (
    Arc<AtomicBool>,
    impl Fn(Duration) -> bool + Clone + Send + 'static,
) {
    let is_over = Arc::new(AtomicBool::new(false));
    let shared = Arc::clone(&is_over);
    (is_over, move |_| !shared.load(Ordering::Relaxed))
}

/// Waits for a change, sets the flag that ends the load beside it, and waits for that.
async fn beside<T>(
    load: impl Future<Output = Outcome<Outcomes>>,
    is_over: &AtomicBool,
    change: impl Future<Output = Outcome<T>>,
) -> Outcome<(T, Outcomes)> {
    let change = async {
        let changed = change.await;
        is_over.store(true, Ordering::Relaxed);
        changed
    };
    let (outcomes, changed) = tokio::join!(load, change);
    Ok((changed?, outcomes?))
}

async fn start(
    cluster: &Cluster,
    version: u64,
    strategy: Strategy,
    steps: Vec<u32>,
    guardrails: Guardrails,
) -> Outcome {
    let start = Command::Start {
        endpoint: MODEL.to_owned(),
        model: MODEL.to_owned(),
        version: Some(version),
        strategy,
        steps,
        guardrails,
        min_samples: 200,
    };
    serving::client::roll_out(cluster, start).await?;
    Ok(())
}

/// Waits until the newest rollout is decided and nothing is left of the version that lost.
async fn over(cluster: &Cluster) -> Outcome<Rollout> {
    let deadline = Instant::now() + LIMIT;
    loop {
        let rollout = serving::client::routing(cluster, MODEL).await?.rollout;
        let rollout = rollout.ok_or("a rollout was begun")?;
        if rollout.cleanup == Cleanup::Done {
            return Ok(rollout);
        }
        if Instant::now() > deadline {
            return Err(format!("not over within {} s: {rollout:?}", LIMIT.as_secs()).into());
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Waits until an endpoint has so many replicas.
async fn replicas(digits: &Digits, endpoint: &str, wanted: u64) -> Outcome {
    let deadline = Instant::now() + LIMIT;
    loop {
        let running = tokio::task::block_in_place(|| digits.replicas_running(endpoint))?;
        if running == wanted {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(format!("{endpoint} has {running} replicas, not {wanted}").into());
        }
        tokio::time::sleep(POLL).await;
    }
}

/// Registers a version whose weights are no numbers; its number.
async fn register_broken(cluster: &Cluster) -> Outcome<u64> {
    let found = registry::client::version(cluster, MODEL, Some(1)).await?;
    let good = found.description;
    // A local cluster keeps its bytes in a folder: the rest is for S3.
    let blobs = open_blobs(&StorageLocation {
        url: cluster.status().await?.storage_url,
        endpoint: None,
        region: None,
        allow_http: false,
        access_key_env: String::new(),
        secret_key_env: String::new(),
    })?;
    let mut file = VersionFile::load(&blobs, &good.digest, good.size_bytes).await?;
    file.parameters.fill(f32::NAN);
    // What it answers to known rows then: its sentinels would find a file that says otherwise before any request came.
    file.reference.predictions.fill(0);
    let stored = file.store(&blobs).await?;
    let new = NewVersion {
        digest: stored.digest,
        size_bytes: stored.size_bytes,
        ..good
    };
    Ok(registry::client::register(cluster, new).await?.version)
}
