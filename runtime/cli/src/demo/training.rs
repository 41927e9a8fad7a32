//! A training job that is watched through its own output, and disturbed on the way.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_core::id::JobId;
use mobula_wire::control::{Actor, Node, PreemptNodeRequest};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Deserialize;

use super::report::Progress;
use crate::nodes;

/// The registered type of the actors that train.
const TRAINER_TYPE: &str = "mobula.trainer";

/// How long is waited for a process of the cluster to be seen in a certain state.
const SEEN_LIMIT: Duration = Duration::from_secs(30);

/// How often is looked.
const POLL: Duration = Duration::from_millis(50);

/// What a training job says at its end.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct TrainingResult {
    pub(super) weights_blake3: String,
    pub(super) accuracy: f64,
    pub(super) steps: u64,
    pub(super) restarts: u64,
    pub(super) lost_steps: u64,
    pub(super) samples_per_second: f64,
}

/// Submits a built-in training job.
pub(super) async fn submit(cluster: &Cluster, name: &str, spec: &str) -> anyhow::Result<JobId> {
    let handle = cluster
        .new_job(name)
        .builtin()
        .args(["train".to_owned(), spec.to_owned()])
        .cpus(0.1)
        .max_restarts(10)
        .submit()
        .await?;
    Ok(handle.id())
}

/// Something to do to the cluster once a job has come so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Fault {
    /// Take away the node of one of its trainers.
    PreemptTrainerNode { grace: Duration },
    /// Kill the host process of one of its trainers.
    KillTrainerHost,
    /// Kill the process of its driver.
    KillDriver,
}

/// Between the first and the last step at which a fault may come, as shares of the job. A line of progress takes its time to get
/// here, in which the job goes on, and it must not be over before the last fault.
const FAULTS_WITHIN: (f64, f64) = (0.1, 0.7);

/// Faults on a job with three workers, and when they come as shares of its steps, drawn from `seed`: one
/// preemption, because two workers must be left, and one to three kills.
pub(super) fn drawn_faults(seed: u64, grace: Duration) -> Vec<(f64, Fault)> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut faults = vec![Fault::PreemptTrainerNode { grace }, Fault::KillTrainerHost];
    for _ in 0..rng.random_range(0..=2) {
        faults.push(if rng.random() {
            Fault::KillTrainerHost
        } else {
            Fault::KillDriver
        });
    }
    let (from, to) = FAULTS_WITHIN;
    let mut drawn: Vec<(f64, Fault)> = faults
        .into_iter()
        .map(|fault| (rng.random_range(from..to), fault))
        .collect();
    drawn.sort_by(|(one, _), (other, _)| one.total_cmp(other));
    drawn
}

/// Follows a job to its end. `faults` are done when its steps pass the given fractions, in order;
/// what was done is answered.
pub(super) async fn follow(
    cluster: &Cluster,
    job: JobId,
    steps: u64,
    faults: Vec<(f64, Fault)>,
    progress: &Progress,
) -> anyhow::Result<(TrainingResult, Vec<String>)> {
    let handle = cluster.job_handle(job);
    let mut logs = handle.logs(true).await?;
    let mut pending = faults.into_iter().peekable();
    let mut killed = Killed::default();
    let mut done = Vec::new();
    let mut text = String::new();
    while let Some(chunk) = logs.next_chunk().await? {
        text.push_str(&String::from_utf8_lossy(&chunk));
        while let Some(end) = text.find('\n') {
            let line: String = text.drain(..=end).collect();
            let Some(step) = step_of(&line) else { continue };
            progress.at(step, steps);
            while let Some((_, fault)) = pending.next_if(|(at, _)| step as f64 >= at * steps as f64)
            {
                let what = carry_out(cluster, job, fault, &mut killed).await?;
                progress.say(&format!("step {step}: {what}"));
                done.push(what);
            }
        }
    }
    let ended = handle.wait().await?;
    if ended.state != "succeeded" {
        bail!(
            "{job} {}: {}",
            ended.state,
            ended.exit_reason.unwrap_or_default()
        );
    }
    if pending.peek().is_some() {
        bail!("{job} ended before every fault was carried out");
    }
    let result = ended.result_json.context("the job stored no result")?;
    Ok((serde_json::from_str(&result)?, done))
}

/// The step that a line of a training job's output reports: `step 120/400 …`.
fn step_of(line: &str) -> Option<u64> {
    let rest = &line[line.find("step ")? + "step ".len()..];
    let (step, _) = rest.split_once('/')?;
    step.trim().parse().ok()
}

/// Processes that were killed. The head's tables say that they run until somebody has seen that they do not.
#[derive(Debug, Default)]
struct Killed(BTreeSet<u32>);

impl Killed {
    /// Whether it is said to run, and was not killed here.
    fn may_run(&self, actor: &Actor) -> bool {
        actor.state == "running" && actor.pid.is_some_and(|pid| !self.0.contains(&pid))
    }

    /// Kills the process of an actor; false if it has ended by itself.
    fn kill(&mut self, actor: &Actor) -> anyhow::Result<bool> {
        let pid = actor.pid.context("a running actor has a process")?;
        self.0.insert(pid);
        // SAFETY: kill takes two numbers and touches no memory of ours.
        if unsafe { libc::kill(pid.cast_signed(), libc::SIGKILL) } == 0 {
            return Ok(true);
        }
        let error = std::io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ESRCH) => Ok(false),
            _ => bail!("pid {pid} cannot be killed: {error}"),
        }
    }
}

async fn carry_out(
    cluster: &Cluster,
    job: JobId,
    fault: Fault,
    killed: &mut Killed,
) -> anyhow::Result<String> {
    match fault {
        Fault::PreemptTrainerNode { grace } => {
            let (_, node) = running_trainer(cluster, job, killed).await?;
            cluster
                .control()
                .mutate("preempt a node", |mut client, stamp| {
                    let request = PreemptNodeRequest {
                        stamp: Some(stamp),
                        node: node.id,
                        name: String::new(),
                        grace_ms: grace.as_millis() as u64,
                    };
                    async move { client.preempt_node(request).await }
                })
                .await?;
            Ok(format!(
                "preempted {} with {} s of grace",
                node.name,
                grace.as_secs()
            ))
        }
        Fault::KillTrainerHost => loop {
            let (trainer, node) = running_trainer(cluster, job, killed).await?;
            if killed.kill(&trainer)? {
                let pid = trainer.pid.unwrap_or_default();
                return Ok(format!(
                    "killed trainer {pid} on {} with SIGKILL",
                    node.name
                ));
            }
        },
        Fault::KillDriver => loop {
            let driver = running_driver(cluster, job, killed).await?;
            if killed.kill(&driver)? {
                let pid = driver.pid.unwrap_or_default();
                return Ok(format!("killed the driver {pid} with SIGKILL"));
            }
        },
    }
}

async fn running_driver(cluster: &Cluster, job: JobId, killed: &Killed) -> anyhow::Result<Actor> {
    let deadline = Instant::now() + SEEN_LIMIT;
    loop {
        let mut actors = cluster.list_actors(Some(job)).await?.into_iter();
        let driver = actors.find(|a| a.type_name == "driver" && killed.may_run(a));
        match driver {
            Some(driver) => return Ok(driver),
            None if Instant::now() >= deadline => bail!("the driver of {job} does not run"),
            None => tokio::time::sleep(POLL).await,
        }
    }
}

/// A trainer of the job that runs on a healthy node; one that does not also run the driver, if
/// there is one.
async fn running_trainer(
    cluster: &Cluster,
    job: JobId,
    killed: &Killed,
) -> anyhow::Result<(Actor, Node)> {
    let deadline = Instant::now() + SEEN_LIMIT;
    loop {
        let actors = cluster.list_actors(Some(job)).await?;
        let nodes = nodes::list(cluster).await?;
        let driver_node = actors
            .iter()
            .find(|a| a.type_name == "driver")
            .and_then(|a| a.node);
        let mut candidates: Vec<(Actor, Node)> = actors
            .into_iter()
            .filter(|actor| actor.type_name == TRAINER_TYPE && killed.may_run(actor))
            .filter_map(|actor| {
                let node = nodes.iter().find(|n| Some(n.id) == actor.node)?;
                (node.state == "alive").then(|| (actor, node.clone()))
            })
            .collect();
        candidates.sort_by_key(|(actor, node)| (Some(node.id) == driver_node, actor.id));
        if let Some(found) = candidates.into_iter().next() {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            bail!("no trainer of {job} runs on a healthy node");
        }
        tokio::time::sleep(POLL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_draws_one_preemption_and_at_least_one_kill() {
        let mut drivers = 0;
        for seed in 0..100 {
            let faults = drawn_faults(seed, Duration::from_secs(1));
            assert_eq!(faults, drawn_faults(seed, Duration::from_secs(1)));
            assert!((2..=4).contains(&faults.len()), "{faults:?}");
            assert!(faults.is_sorted_by_key(|(at, _)| *at), "{faults:?}");
            let (from, to) = FAULTS_WITHIN;
            assert!(
                faults.iter().all(|(at, _)| (from..to).contains(at)),
                "{faults:?}"
            );
            let count = |wanted: &dyn Fn(&Fault) -> bool| {
                faults.iter().filter(|(_, fault)| wanted(fault)).count()
            };
            let preemptions = count(&|fault| matches!(fault, Fault::PreemptTrainerNode { .. }));
            assert_eq!(preemptions, 1, "{faults:?}");
            assert!(count(&|fault| *fault == Fault::KillTrainerHost) >= 1);
            drivers += count(&|fault| *fault == Fault::KillDriver);
        }
        assert!(drivers > 20, "{drivers}");
    }

    #[test]
    fn steps_are_read_from_the_jobs_own_output() {
        assert_eq!(step_of("step 120/400 loss 0.1\n"), Some(120));
        assert_eq!(step_of("[12:00] step 7/9"), Some(7));
        assert_eq!(step_of("checkpoint at 7"), None);
    }
}
