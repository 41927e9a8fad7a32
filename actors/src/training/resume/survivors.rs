//! Which trainers live on after their driver, and what they hold.
//!
//! Invariant: no trainer that runs is passed over because it is slow to answer, as long as no other one is known to hold
//! more than the checkpoint.

use std::future::Future;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::training::crew::{LinkError, TrainerLink};
use crate::training::link::ClusterLink;
use crate::training::messages::{Greeting, Held};

/// How long those are waited for who need not be: trainers answer at once, also while they compute. Others are being
/// started, and hold nothing.
const ANSWER_MAX: Duration = Duration::from_millis(1500);
/// How long those are waited for of whom the head says that they run. One that is silent for longer does not go on by
/// itself.
const LIVING_MAX: Duration = Duration::from_secs(30);
/// How often a trainer is greeted again that could not be reached, and the head asked whether it runs.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The way to a trainer that may have outlived its driver.
pub(super) trait Survivor: Clone + Send + Sync + 'static {
    /// Waits until it is there, within a bound.
    fn greet(&self) -> impl Future<Output = Result<Greeting, LinkError>> + Send;
    /// Whether it may run now.
    fn runs(&self) -> impl Future<Output = bool> + Send;
}

impl Survivor for ClusterLink {
    async fn greet(&self) -> Result<Greeting, LinkError> {
        TrainerLink::greet(self).await
    }

    async fn runs(&self) -> bool {
        ClusterLink::runs(self).await
    }
}

/// What trainers still hold, each by its number. Waits for those that run until one holds more than `from`.
pub(super) async fn held<S: Survivor>(trainers: &[S], from: u64) -> Vec<(usize, Held)> {
    let begun = Instant::now();
    let mut asked = JoinSet::new();
    for (slot, trainer) in trainers.iter().enumerate() {
        let trainer = trainer.clone();
        asked.spawn(async move { (slot, last_word(&trainer).await) });
    }
    let mut held: Vec<(usize, Held)> = Vec::new();
    loop {
        let is_found = held.iter().any(|(_, one)| one.step > from);
        let limit = if is_found { ANSWER_MAX } else { LIVING_MAX };
        match tokio::time::timeout_at(begun + limit, asked.join_next()).await {
            Ok(Some(Ok((slot, said)))) => held.extend(said.map(|one| (slot, one))),
            // Only we abort tasks, by dropping all of them.
            Ok(Some(Err(error))) => std::panic::resume_unwind(error.into_panic()),
            Ok(None) | Err(_) => return held,
        }
    }
}

/// What a trainer holds, as it says itself; nothing once it is known not to run.
async fn last_word<S: Survivor>(trainer: &S) -> Option<Held> {
    let greeted = async {
        loop {
            match trainer.greet().await {
                Ok(greeting) => return greeting.held.map(|(_, held)| held),
                Err(error) => tracing::debug!(%error, "a trainer does not say what it holds"),
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    let over = async {
        tokio::time::sleep(ANSWER_MAX).await;
        while trainer.runs().await {
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    tokio::select! {
        held = greeted => held,
        () = over => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::protocol::plan::MemberId;

    /// A trainer that holds this step, answers after so long, or never, and runs or does not.
    #[derive(Clone)]
    struct Scripted {
        step: u64,
        answers_after: Option<Duration>,
        runs: bool,
    }

    impl Survivor for Scripted {
        async fn greet(&self) -> Result<Greeting, LinkError> {
            match self.answers_after {
                Some(pause) => tokio::time::sleep(pause).await,
                None => std::future::pending().await,
            }
            let held = Held {
                step: self.step,
                digest: String::new(),
            };
            Ok(Greeting {
                incarnation: 1,
                node_name: String::new(),
                held: Some((MemberId::default(), held)),
                notice_ms: None,
            })
        }

        async fn runs(&self) -> bool {
            self.runs
        }
    }

    fn trainer(step: u64, answers_after_ms: Option<u64>, runs: bool) -> Scripted {
        Scripted {
            step,
            answers_after: answers_after_ms.map(Duration::from_millis),
            runs,
        }
    }

    /// The steps that are held after a checkpoint of step 10, and how long it took to know.
    async fn found(trainers: &[Scripted]) -> (Vec<(usize, u64)>, Duration) {
        let begun = Instant::now();
        let held = held(trainers, 10).await;
        let steps = held.into_iter().map(|(slot, one)| (slot, one.step));
        (steps.collect(), begun.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn the_only_replica_left_counts_however_long_it_takes_to_answer() {
        let starting = trainer(0, None, false);
        let (steps, took) = found(&[starting, trainer(90, Some(20_000), true)]).await;
        assert_eq!(steps, [(1, 90)]);
        assert!(took < Duration::from_secs(21), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_trainers_that_do_not_run_or_once_a_replica_is_found() {
        let starting = trainer(0, None, false);
        let (steps, took) = found(&[starting.clone(), starting]).await;
        assert!(
            steps.is_empty() && took <= ANSWER_MAX + LOOK_EVERY,
            "{took:?}"
        );
        let stopped = trainer(0, None, true);
        let (steps, took) = found(&[trainer(90, Some(1), true), stopped.clone()]).await;
        assert_eq!(steps, [(0, 90)]);
        assert!(took <= ANSWER_MAX + LOOK_EVERY, "{took:?}");
        // One that holds no more than the checkpoint is none to go on from.
        let (steps, took) = found(&[trainer(10, Some(1), true), stopped]).await;
        assert_eq!(steps, [(0, 10)]);
        assert_eq!(took, LIVING_MAX);
    }
}
