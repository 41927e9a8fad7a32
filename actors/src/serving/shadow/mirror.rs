//! The queue of copies between the callers' requests and a shadowed candidate.
//!
//! Invariants:
//! 1. Nothing that a caller waits for waits for a copy: one that finds no room is shed, and counted.
//! 2. At most `WAITING_MAX` copies wait and `AT_ONCE_MAX` are with the candidate, each for a bounded time.
//! 3. Copies are no load of the endpoint's: neither its replicas nor its second tries are reckoned by them.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::compare::compare;
use super::plan::Plan;
use super::trial::{Copied, ShadowTrial};
use crate::serving::arm::{Arm, lock};
use crate::serving::endpoint_service::EndpointService;
use crate::serving::fleet::Backend;
use crate::serving::oip::{OipError, Tensor};
use crate::serving::rollout::split::BUCKETS;
use crate::serving::rows::Row;

/// Copies that wait: with full batches of rows of 64 values, 2 MiB.
const WAITING_MAX: usize = 64;

/// Copies that are with the candidate: fewer than a replica takes into one batch's queue, so that a candidate
/// that is slow sheds here.
const AT_ONCE_MAX: usize = 16;

/// How long a copy may take: as long as a request that does not say itself.
pub(in crate::serving) const COPY_TIMEOUT: Duration = Duration::from_secs(5);

/// A candidate that is shadowed.
pub struct Shadowed<B> {
    /// Its replicas.
    pub arm: Arc<Arm<B>>,
    /// What keys are hashed with.
    pub seed: String,
    /// How it is shadowed.
    pub plan: Arc<Plan>,
    /// What came of it so far.
    pub trial: Arc<Mutex<ShadowTrial>>,
}

impl<B> Shadowed<B> {
    /// Below which bucket a key's requests are copied.
    #[must_use]
    pub fn share(&self) -> u32 {
        self.plan.percent * (BUCKETS / 100)
    }
}

impl<B> Clone for Shadowed<B> {
    fn clone(&self) -> Self {
        Shadowed {
            arm: Arc::clone(&self.arm),
            seed: self.seed.clone(),
            plan: Arc::clone(&self.plan),
            trial: Arc::clone(&self.trial),
        }
    }
}

/// A request, and what its caller got.
pub struct RequestCopy<B> {
    /// The candidate.
    pub shadowed: Shadowed<B>,
    /// The request.
    pub rows: Vec<Row>,
    /// The answer.
    pub answered: Vec<Tensor>,
    /// How long the caller waited.
    pub waited: Duration,
}

/// Where copies are offered.
pub struct Mirror<B> {
    queue: mpsc::Sender<RequestCopy<B>>,
}

/// Where they come out.
pub struct Copies<B> {
    queue: mpsc::Receiver<RequestCopy<B>>,
}

/// A mirror and its other end.
#[must_use]
pub fn mirror<B>() -> (Mirror<B>, Copies<B>) {
    let (sender, queue) = mpsc::channel(WAITING_MAX);
    (Mirror { queue: sender }, Copies { queue })
}

impl<B> Mirror<B> {
    /// Takes a copy if there is room; it is not made otherwise.
    pub fn offer(
        &self,
        shadowed: &Shadowed<B>,
        waited: Duration,
        copy: impl FnOnce() -> (Vec<Row>, Vec<Tensor>),
    ) {
        let Ok(place) = self.queue.try_reserve() else {
            lock(&shadowed.trial).record(waited, Copied::Shed);
            return;
        };
        let (rows, answered) = copy();
        place.send(RequestCopy {
            shadowed: shadowed.clone(),
            rows,
            answered,
            waited,
        });
    }
}

/// Has copies answered and compared until the service's mirror is gone.
pub async fn compare_copies<B: Backend>(service: Arc<EndpointService<B>>, mut copies: Copies<B>) {
    let mut under_way = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = under_way.join_next(), if !under_way.is_empty() => {}
            copy = copies.queue.recv(), if under_way.len() < AT_ONCE_MAX => {
                let Some(copy) = copy else {
                    return;
                };
                under_way.spawn(compare_copy(Arc::clone(&service), copy));
            }
        }
    }
}

async fn compare_copy<B: Backend>(service: Arc<EndpointService<B>>, copy: RequestCopy<B>) {
    let RequestCopy {
        shadowed,
        rows,
        answered,
        waited,
    } = copy;
    let started = Instant::now();
    let got = service.answer_copy(&shadowed.arm, rows).await;
    let took = started.elapsed();
    let mut trial = lock(&shadowed.trial);
    match got {
        Ok(got) => match compare(&shadowed.plan, &answered, &got) {
            Ok(()) => trial.record(waited, Copied::Same(took)),
            Err(difference) => {
                trial.record(waited, Copied::Different(took, &difference.to_string()));
            }
        },
        // Not executed: it says nothing about an answer.
        Err(
            OipError::Overloaded { .. } | OipError::WouldBeLate { .. } | OipError::ShuttingDown,
        ) => trial.record(waited, Copied::Shed),
        Err(error) => trial.record(waited, Copied::Failed(&error.to_string())),
    }
}

#[cfg(test)]
#[path = "mirror_tests.rs"]
mod tests;
