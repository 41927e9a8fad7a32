//! The workload's training: one job after the other, and all of one description must end in the same bits.

use std::sync::Arc;
use std::time::Duration;

use mobula::Cluster;
use mobula::core::id::JobId;
use mobula_actors::checkpoint::client::preemptions;
use mobula_actors::training::pauses::Pause;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::cluster::{ClusterError, RealCluster};
use super::departures::{Departures, Notices, StepsOf, Ways, check_again, check_ways};
use super::fault_plan::FaultKind;
use super::gaps::{Times, unix_ms};
use super::injector::Done;
use super::notices::Taken;
use super::outcome::Check;
use super::scenario::{Checks, TrainPlan};

/// How long the job may take that nothing happens to.
const UNDISTURBED_MAX: Duration = Duration::from_secs(120);
/// How often a job that is hit again and again may be started anew.
const DRIVER_RESTARTS: u32 = 1000;
/// The pause after a submission that failed, as it does where nobody leads.
const SUBMIT_PAUSE: Duration = Duration::from_millis(500);
/// How often is asked what a job's drivers did about notices, before that counts as not known.
const ASK_ATTEMPTS: u32 = 20;

/// How a lost trainer, or a lost driver, was felt.
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
    ended: Vec<Trained>,
    broken: Vec<String>,
}

/// A job that ended.
#[derive(Debug)]
struct Trained {
    job: JobId,
    /// Which of the descriptions was its.
    plan: usize,
    ended: Ended,
    /// What its drivers did about notices; absent where nobody could be asked.
    departures: Option<Departures>,
}

impl Trained {
    fn steps(&self) -> StepsOf {
        StepsOf {
            job: self.job,
            steps: self.ended.steps,
            lost_steps: self.ended.lost_steps,
            lost_steps_known: self.ended.lost_steps_known,
            restarts: self.ended.restarts,
            departures: self.departures.clone(),
        }
    }
}

/// What a job's result says.
#[derive(Debug, Clone, Deserialize)]
struct Ended {
    weights_blake3: String,
    /// Steps taken.
    steps: u64,
    restarts: u64,
    trainers_lost: u64,
    /// Steps that had to be taken again.
    lost_steps: u64,
    /// Whether all drivers knew how many.
    lost_steps_known: bool,
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
    /// The hash of each description.
    expected: Vec<String>,
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
    /// Runs a job of each description once, undisturbed: that is what all others are compared with.
    pub(super) async fn start(
        plans: &[TrainPlan],
        cluster: &RealCluster,
        stop: watch::Receiver<bool>,
    ) -> Result<Training, ClusterError> {
        let mut training = Training {
            seen: Arc::new(Mutex::new(Seen::default())),
            expected: Vec::new(),
            task: None,
        };
        if plans.is_empty() {
            return Ok(training);
        }
        let client = cluster.client().await?;
        let texts: Vec<String> = plans.iter().map(description).collect();
        let api = |reason| ClusterError::Api {
            what: "the undisturbed training job",
            reason,
        };
        for (number, text) in texts.iter().enumerate() {
            let key = format!("undisturbed-{number}");
            let job = submit(&client, text, &key).await.map_err(api)?;
            let first = tokio::time::timeout(UNDISTURBED_MAX, result_of(&client, job));
            let first = first
                .await
                .unwrap_or_else(|_| Err("it takes too long".into()))
                .map_err(api)?;
            training.expected.push(first.weights_blake3);
        }
        let task = train(client, texts, Arc::clone(&training.seen), stop);
        training.task = Some(tokio::spawn(task));
        Ok(training)
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
        let ended = seen.ended.iter().map(|job| &job.ended);
        let calm: Vec<&Ended> = ended.filter(|job| job.restarts == 0).collect();
        let losses = done
            .iter()
            .filter(|fault| fault.node.starts_with("trainer-") && fault.kind == FaultKind::Kill);
        let felt = losses.filter_map(|fault| {
            let wall_ms = unix_ms(fault.wall)?;
            let after_ms = calm.iter().find_map(|job| job.next_step_ms(wall_ms))?;
            let at_ms = fault.at_ms;
            Some(NextStep { at_ms, after_ms })
        });
        felt.collect()
    }

    /// What notices took, and what jobs did about them; nothing where there was none.
    pub(super) fn notices(&self, done: &[Done]) -> Option<Notices> {
        let given: Vec<&Done> = done
            .iter()
            .filter(|fault| fault.kind == FaultKind::Notice)
            .collect();
        if given.is_empty() || self.expected.is_empty() {
            return None;
        }
        let seen = self.seen.lock();
        let known = || given.iter().filter_map(|fault| fault.taken);
        // The driver stays, and remembers when which step was done.
        let calm = given
            .iter()
            .filter(|fault| fault.taken.is_some_and(|taken| !taken.driver));
        let next_step = calm.filter_map(|fault| {
            let wall_ms = unix_ms(fault.wall)?;
            let after_ms = seen
                .ended
                .iter()
                .find_map(|job| job.ended.next_step_ms(wall_ms))?;
            Some(Duration::from_millis(after_ms))
        });
        let has_all = |taken: &Taken| taken.driver && taken.trainers_elsewhere == 0;
        let mut notices = Notices {
            given: given.len(),
            to_all_workers: known().filter(|taken| taken.machines > 1).count(),
            known: known().count(),
            with_trainer: known().filter(|taken| taken.trainers > 0).count(),
            with_driver: known().filter(|taken| taken.driver).count(),
            with_both: known()
                .filter(|taken| taken.driver && taken.trainers > 0)
                .count(),
            with_all: known()
                .filter(|taken| taken.trainers > 0 && has_all(taken))
                .count(),
            jobs: 0,
            steps: 0,
            steps_again: 0,
            ways: Ways::default(),
            next_step: Times::of(next_step.collect()),
            next_driver: Times::default(),
        };
        let jobs: Vec<StepsOf> = seen.ended.iter().map(Trained::steps).collect();
        notices.count_jobs(&jobs);
        Some(notices)
    }

    /// What a scenario asks of the jobs' steps and of how drivers left. To be asked when the last job has ended.
    pub(super) fn check_notices(&self, asked: &Checks, seed: u64, length: Duration) -> Vec<Check> {
        let seen = self.seen.lock();
        let jobs: Vec<StepsOf> = seen.ended.iter().map(Trained::steps).collect();
        let again = asked.steps_again_max;
        let mut checks: Vec<Check> = again
            .map(|limit| check_again(&jobs, limit, seed))
            .into_iter()
            .collect();
        if asked.departures_min_per_minute > 0.0 {
            let ways = Ways::of(&jobs);
            let minutes = length.as_secs_f64() / 60.0;
            checks.extend(check_ways(&ways, asked.departures_min_per_minute, minutes));
        }
        checks
    }

    /// Whether all jobs ended in the bits of the first of their description. The last one has `limit` to end.
    pub(super) async fn check(&mut self, limit: Duration, jobs_min: u64) -> Option<Check> {
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
        broken.extend(seen.ended.iter().filter_map(|job| {
            let (found, expected) = (&job.ended.weights_blake3, &self.expected[job.plan]);
            (found != expected).then(|| format!("{}: {found} instead of {expected}", job.job))
        }));
        if (seen.ended.len() as u64) < jobs_min {
            broken.push(format!(
                "{} jobs, at least {jobs_min} were to be",
                seen.ended.len()
            ));
        }
        let sum =
            |of: fn(&Ended) -> u64| -> u64 { seen.ended.iter().map(|job| of(&job.ended)).sum() };
        let lost = sum(|job| job.trainers_lost);
        let restarts = sum(|job| job.restarts);
        let again = sum(|job| job.lost_steps);
        // How many trainers there are changes no bit.
        let mut expected = self.expected.clone();
        expected.dedup();
        let expected = expected.join(" or ");
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

/// Trains by one description after the other, over and over.
async fn train(
    client: Cluster,
    texts: Vec<String>,
    seen: Arc<Mutex<Seen>>,
    stop: watch::Receiver<bool>,
) {
    let mut number = 0;
    let mut jobs = texts.iter().enumerate().cycle();
    let mut next = jobs.next();
    while let Some((plan, text)) = next.filter(|_| !*stop.borrow()) {
        number += 1;
        let Ok(job) = submit(&client, text, &format!("storm-{number}")).await else {
            tokio::time::sleep(SUBMIT_PAUSE).await;
            continue;
        };
        next = jobs.next();
        seen.lock().job = Some(job);
        let ended = result_of(&client, job).await;
        seen.lock().job = None;
        let departures = departures_of(&client, job).await;
        let mut seen = seen.lock();
        match ended {
            Ok(ended) => seen.ended.push(Trained {
                job,
                plan,
                ended,
                departures,
            }),
            Err(error) => seen.broken.push(format!("{job}: {error}")),
        }
    }
}

/// What a job's drivers did about notices, as the head keeps it.
async fn departures_of(client: &Cluster, job: JobId) -> Option<Departures> {
    for _ in 0..ASK_ATTEMPTS {
        match preemptions(client, job).await {
            Ok(known) => return Some(Departures::of(&known)),
            Err(_) => tokio::time::sleep(SUBMIT_PAUSE).await,
        }
    }
    None
}

async fn submit(client: &Cluster, text: &str, key: &str) -> mobula::Result<JobId> {
    let job = client
        .new_job(key)
        .builtin()
        .args(["train".to_owned(), text.to_owned()])
        .cpus(0.1)
        .max_restarts(DRIVER_RESTARTS)
        // A submission whose answer was lost is sent again, and is the same job.
        .idempotency_key(key);
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
         checkpoint_every_steps = {}\nworkers = {{ min = {}, max = {} }}\n\n\
         [model.mlp]\nhidden = {:?}\n",
        plan.steps, plan.checkpoint_every_steps, plan.trainers_min, plan.trainers_max, plan.hidden
    )
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use mobula_actors::training::spec::TrainSpec;

    use super::super::scenario::Scenario;
    use super::*;

    #[test]
    fn a_loss_is_felt_until_the_pause_it_fell_into_is_over() {
        let pause = |took_ms, until_ms| Pause { took_ms, until_ms };
        let job = Ended {
            weights_blake3: String::new(),
            steps: 10,
            restarts: 0,
            trainers_lost: 1,
            lost_steps: 0,
            lost_steps_known: true,
            pauses: vec![pause(300, 1_500), pause(20, 2_000), pause(5, 900)],
        };
        assert_eq!(job.next_step_ms(1_250), Some(250));
        assert_eq!(job.next_step_ms(1_700), Some(5));
        assert_eq!(job.next_step_ms(800), None);
        assert_eq!(job.next_step_ms(2_001), None);
    }

    #[test]
    fn a_description_is_what_it_was_before_there_were_several() {
        let storm = Scenario::built_in("train-storm").unwrap();
        let text = description(&storm.workload.training[0]);
        let expected = "name = \"storm\"\nseed = 7\nsteps = 1500\nglobal_batch = 64\nvirtual_shards = 8\n\
                        checkpoint_every_steps = 100\nworkers = { min = 1, max = 3 }\n\n\
                        [model.mlp]\nhidden = [96, 64]\n";
        assert_eq!(text, expected);
        let scenario = Scenario::built_in("train-notices").unwrap();
        for plan in &scenario.workload.training {
            let spec = TrainSpec::from_toml(&description(plan), "job.toml");
            assert!(spec.is_ok(), "{spec:?}");
        }
    }

    #[test]
    fn a_notice_is_counted_by_what_it_took() {
        let notice = |machines, trainers, trainers_elsewhere, driver| Done {
            kind: FaultKind::Notice,
            node: "worker-1".to_owned(),
            was_leader: false,
            at_ms: 0,
            healed_ms: 0,
            reconciled_ms: None,
            taken: Some(Taken {
                machines,
                trainers,
                trainers_elsewhere,
                driver,
            }),
            wall: UNIX_EPOCH + Duration::from_millis(1_250),
        };
        let pause = |took_ms, until_ms| Pause { took_ms, until_ms };
        let ended = Ended {
            weights_blake3: String::new(),
            steps: 10,
            restarts: 1,
            trainers_lost: 0,
            lost_steps: 2,
            lost_steps_known: true,
            pauses: vec![pause(300, 1_500), pause(20, 2_000)],
        };
        let trained = Trained {
            job: JobId(5),
            plan: 0,
            ended,
            departures: None,
        };
        let seen = Seen {
            ended: vec![trained],
            ..Seen::default()
        };
        let training = Training {
            seen: Arc::new(Mutex::new(seen)),
            expected: vec![String::new()],
            task: None,
        };
        let done = [
            notice(1, 1, 2, false),
            notice(1, 0, 2, true),
            notice(1, 1, 1, true),
            notice(1, 1, 0, true),
            notice(4, 3, 0, true),
        ];
        let found = training.notices(&done).unwrap();
        assert_eq!((found.given, found.known, found.to_all_workers), (5, 5, 1));
        assert_eq!((found.with_trainer, found.with_driver), (4, 4));
        assert_eq!((found.with_both, found.with_all), (3, 2));
        assert_eq!((found.jobs, found.steps, found.steps_again), (1, 10, 2));
        // Only the first left the driver where it was.
        assert_eq!((found.next_step.count, found.next_step.max_ms), (1, 250));
        assert!(training.notices(&[]).is_none());
    }
}
