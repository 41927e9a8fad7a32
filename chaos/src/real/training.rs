//! The workload's training: one job after the other, all of the same description, which must all end in
//! the same bits.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use mobula::Cluster;
use mobula::core::id::JobId;
use mobula_actors::training::pauses::Pause;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::cluster::{ClusterError, RealCluster};
use super::fault_plan::FaultKind;
use super::injector::Done;
use super::outcome::Check;
use super::scenario::TrainPlan;

/// How long the job may take that nothing happens to.
const UNDISTURBED_MAX: Duration = Duration::from_secs(120);
/// How often a job that is hit again and again may be started anew.
const DRIVER_RESTARTS: u32 = 1000;
/// The pause after a submission that failed, as it does where nobody leads.
const SUBMIT_PAUSE: Duration = Duration::from_millis(500);

/// How a lost trainer was felt.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct NextStep {
    /// When it was lost, in milliseconds since the workload began.
    pub at_ms: u64,
    /// How long after that the next step was done, in milliseconds.
    pub after_ms: u64,
}

/// What became of the jobs.
#[derive(Debug, Default)]
struct Seen {
    /// The job under way.
    job: Option<JobId>,
    ended: Vec<Ended>,
    broken: Vec<String>,
}

/// What a job's result says.
#[derive(Debug, Clone, Deserialize)]
struct Ended {
    weights_blake3: String,
    restarts: u64,
    trainers_lost: u64,
    /// Steps that had to be taken again.
    lost_steps: u64,
    /// The longest pauses between two steps, the longest first.
    pauses: Vec<Pause>,
}

impl Ended {
    /// How many milliseconds after `at_ms` the next step was done at the latest; none if the job did not
    /// train then.
    fn next_step_ms(&self, at_ms: u64) -> Option<u64> {
        let begun_ms = self
            .pauses
            .iter()
            .map(|pause| pause.until_ms - pause.took_ms);
        let ended_ms = self.pauses.iter().map(|pause| pause.until_ms);
        let is_within = begun_ms.min()? <= at_ms && at_ms < ended_ms.max()?;
        let mut covering = self
            .pauses
            .iter()
            .filter(|pause| pause.until_ms - pause.took_ms <= at_ms && at_ms < pause.until_ms);
        let after = covering.next().map(|pause| pause.until_ms - at_ms);
        let at_most = self.pauses.last()?.took_ms;
        is_within.then(|| after.unwrap_or(at_most))
    }
}

/// Training, where the workload has it.
pub(super) struct Training {
    seen: Arc<Mutex<Seen>>,
    expected: Option<String>,
    task: Option<JoinHandle<()>>,
}

impl Drop for Training {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

impl Training {
    /// Runs the job once, undisturbed: that is what all others are compared with.
    pub(super) async fn start(
        plan: Option<&TrainPlan>,
        cluster: &RealCluster,
        stop: watch::Receiver<bool>,
    ) -> Result<Training, ClusterError> {
        let seen = Arc::new(Mutex::new(Seen::default()));
        let Some(plan) = plan else {
            let (expected, task) = (None, None);
            return Ok(Training {
                seen,
                expected,
                task,
            });
        };
        let client = cluster.client().await?;
        let text = description(plan);
        let api = |reason| ClusterError::Api {
            what: "the undisturbed training job",
            reason,
        };
        let job = submit(&client, &text, 0).await.map_err(api)?;
        let first = tokio::time::timeout(UNDISTURBED_MAX, result_of(&client, job));
        let first = first
            .await
            .unwrap_or_else(|_| Err("it takes too long".into()))
            .map_err(api)?;
        let task = train(client, text, Arc::clone(&seen), stop);
        Ok(Training {
            seen,
            expected: Some(first.weights_blake3),
            task: Some(tokio::spawn(task)),
        })
    }

    /// The job under way.
    pub(super) fn job(&self) -> impl Fn() -> Option<JobId> + Send + Sync + 'static {
        let seen = Arc::clone(&self.seen);
        move || seen.lock().job
    }

    /// How long after each loss of a trainer the next step was done, of jobs whose driver was never lost:
    /// another one remembers no pauses. Where no pause is known, the fault was felt less than the shortest
    /// that is, and counts as that.
    pub(super) fn next_steps(&self, done: &[Done]) -> Vec<NextStep> {
        let seen = self.seen.lock();
        let calm: Vec<&Ended> = seen.ended.iter().filter(|job| job.restarts == 0).collect();
        let losses = done
            .iter()
            .filter(|fault| fault.node.starts_with("trainer-") && fault.kind == FaultKind::Kill);
        let felt = losses.filter_map(|fault| {
            let since = fault.wall.duration_since(UNIX_EPOCH).ok()?;
            let wall_ms = u64::try_from(since.as_millis()).ok()?;
            let after_ms = calm.iter().find_map(|job| job.next_step_ms(wall_ms))?;
            let at_ms = fault.at_ms;
            Some(NextStep { at_ms, after_ms })
        });
        felt.collect()
    }

    /// Whether all jobs ended in the bits of the first. The last one has `limit` to end.
    pub(super) async fn check(&mut self, limit: Duration, jobs_min: u64) -> Option<Check> {
        let expected = self.expected.take()?;
        let mut task = self.task.take()?;
        let mut broken = Vec::new();
        match tokio::time::timeout(limit, &mut task).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => broken.push(format!("the client of training panicked: {error}")),
            Err(_) => {
                task.abort();
                broken.push(format!(
                    "the last job has not ended {} s later",
                    limit.as_secs()
                ));
            }
        }
        let mut seen = self.seen.lock();
        broken.append(&mut seen.broken);
        let others = seen
            .ended
            .iter()
            .filter(|job| job.weights_blake3 != expected);
        broken.extend(others.map(|job| format!("{} instead of {expected}", job.weights_blake3)));
        if (seen.ended.len() as u64) < jobs_min {
            broken.push(format!(
                "{} jobs, at least {jobs_min} were to be",
                seen.ended.len()
            ));
        }
        let lost: u64 = seen.ended.iter().map(|job| job.trainers_lost).sum();
        let restarts: u64 = seen.ended.iter().map(|job| job.restarts).sum();
        let again: u64 = seen.ended.iter().map(|job| job.lost_steps).sum();
        let looked_at = format!(
            "{} jobs ended in {expected}; {lost} trainers and {restarts} drivers were lost, {again} steps \
             taken again",
            seen.ended.len()
        );
        Some(Check::of(
            "training ends in the same bits, whatever dies",
            looked_at,
            &broken,
        ))
    }
}

async fn train(client: Cluster, text: String, seen: Arc<Mutex<Seen>>, stop: watch::Receiver<bool>) {
    let mut number = 0;
    while !*stop.borrow() {
        number += 1;
        let Ok(job) = submit(&client, &text, number).await else {
            tokio::time::sleep(SUBMIT_PAUSE).await;
            continue;
        };
        seen.lock().job = Some(job);
        let ended = result_of(&client, job).await;
        let mut seen = seen.lock();
        seen.job = None;
        match ended {
            Ok(ended) => seen.ended.push(ended),
            Err(error) => seen.broken.push(format!("{job}: {error}")),
        }
    }
}

async fn submit(client: &Cluster, text: &str, number: u64) -> mobula::Result<JobId> {
    let key = format!("storm-{number}");
    let job = client
        .new_job(&key)
        .builtin()
        .args(["train".to_owned(), text.to_owned()])
        .cpus(0.1)
        .max_restarts(DRIVER_RESTARTS)
        // A submission whose answer was lost is sent again, and is the same job.
        .idempotency_key(&key);
    Ok(job.submit().await?.id())
}

/// A job's result, asked for until some head knows it.
async fn result_of(client: &Cluster, job: JobId) -> mobula::Result<Ended> {
    loop {
        match client.job_handle(job).result::<Value>().await {
            Ok(Some(result)) => {
                return serde_json::from_value(result)
                    .map_err(|error| format!("its result is not one of training: {error}").into());
            }
            Ok(None) => return Err("it ended without a result".into()),
            // The job's own end, and not that nobody could be asked.
            Err(mobula::Error::User(reason)) => return Err(reason.into()),
            Err(_) => tokio::time::sleep(SUBMIT_PAUSE).await,
        }
    }
}

fn description(plan: &TrainPlan) -> String {
    format!(
        "name = \"storm\"\nseed = 7\nsteps = {}\nglobal_batch = 64\nvirtual_shards = 8\n\
         checkpoint_every_steps = {}\nworkers = {{ min = 1, max = {} }}\n\n\
         [model.mlp]\nhidden = [96, 64]\n",
        plan.steps, plan.checkpoint_every_steps, plan.trainers_max
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loss_is_felt_until_the_pause_it_fell_into_is_over() {
        let pause = |took_ms, until_ms| Pause { took_ms, until_ms };
        let job = Ended {
            weights_blake3: String::new(),
            restarts: 0,
            trainers_lost: 1,
            lost_steps: 0,
            pauses: vec![pause(300, 1_500), pause(20, 2_000), pause(5, 900)],
        };
        assert_eq!(job.next_step_ms(1_250), Some(250));
        assert_eq!(job.next_step_ms(1_700), Some(5));
        assert_eq!(job.next_step_ms(800), None);
        assert_eq!(job.next_step_ms(2_001), None);
    }
}
