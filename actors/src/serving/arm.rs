//! The versions that an endpoint answers with: one as a rule, two while one is tried.
//!
//! Invariants:
//! 1. An arm lives as long as a request is with it, and its tasks as long as the arm.
//! 2. Requests of a trial are compared only while the candidate answers, so that both sides are counted
//!    over the same time.

use std::convert::Infallible;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use super::cache::responses::Responses;
use super::feed::Feed;
use super::fleet::{Backend, Fleet};
use super::rollout::split::{self, Side};
use super::rollout::trial::{Outcome, Trial};
use super::statistics::ModelStatistics;

/// Where a version comes from, as far as it is known.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Origin {
    /// BLAKE3 of its file.
    pub digest: Option<String>,
    /// The keys that signed its latest change of stage.
    pub signers: Vec<String>,
}

/// One version with its replicas.
pub struct Arm<B> {
    version: u64,
    origin: watch::Receiver<Origin>,
    fleet: Fleet<B>,
    feed: Feed,
    statistics: Mutex<ModelStatistics>,
    responses: Responses,
    /// Find the replicas and feed the monitor; aborted when dropped.
    tasks: Mutex<JoinSet<()>>,
    /// Dropped with the arm.
    _gone: oneshot::Sender<Infallible>,
}

/// Resolves when an arm is gone with its last request.
pub type WhenGone = oneshot::Receiver<Infallible>;

impl<B: Backend> Arm<B> {
    /// The arm of a version, and what tells of its end.
    #[must_use]
    pub fn new(
        version: u64,
        origin: watch::Receiver<Origin>,
        fleet: Fleet<B>,
        feed: Feed,
        tasks: JoinSet<()>,
    ) -> (Self, WhenGone) {
        let (gone, when_gone) = oneshot::channel();
        let arm = Arm {
            version,
            origin,
            fleet,
            feed,
            statistics: Mutex::default(),
            responses: Responses::default(),
            tasks: Mutex::new(tasks),
            _gone: gone,
        };
        (arm, when_gone)
    }

    /// Runs a task of this arm, as long as the arm lives.
    pub fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        // Those of replicas that are wanted no more have ended.
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    /// The version of the model.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Where the version comes from.
    #[must_use]
    pub fn origin(&self) -> Origin {
        self.origin.borrow().clone()
    }

    /// Its replicas.
    #[must_use]
    pub fn fleet(&self) -> &Fleet<B> {
        &self.fleet
    }

    /// Where its monitor's rows are offered.
    #[must_use]
    pub fn feed(&self) -> &Feed {
        &self.feed
    }

    /// What it has answered.
    pub fn statistics(&self) -> MutexGuard<'_, ModelStatistics> {
        // Counters are whole after every single update, so a panic elsewhere does not spoil them.
        self.statistics
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The answers of this version that are given again.
    #[must_use]
    pub fn responses(&self) -> &Responses {
        &self.responses
    }

    /// Whether any of its replicas takes requests.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.fleet.open_count() > 0
    }
}

/// A candidate that gets some of the requests.
pub struct Tried<B> {
    /// Its replicas.
    pub arm: Arc<Arm<B>>,
    /// What keys are hashed with.
    pub seed: String,
    /// Its share of the requests, in percent.
    pub weight_percent: u32,
    /// What came of this step so far.
    pub trial: Arc<Mutex<Trial>>,
}

/// Where requests go.
pub struct Routes<B> {
    /// The active version.
    pub active: Arc<Arm<B>>,
    /// The version that is tried, if one is.
    pub tried: Option<Tried<B>>,
}

/// Where one request goes.
pub struct Assigned<B> {
    /// The version that shall answer.
    pub arm: Arc<Arm<B>>,
    /// The version that answers if that one cannot.
    pub second: Option<Arc<Arm<B>>>,
    /// Where to count what came of it.
    pub counted: Option<(Arc<Mutex<Trial>>, Side)>,
}

impl<B: Backend> Routes<B> {
    /// The arm of a version, if it is one of these.
    #[must_use]
    pub fn arm(&self, version: &str) -> Option<&Arc<Arm<B>>> {
        self.arms().find(|arm| arm.version.to_string() == version)
    }

    /// All versions, the active one first.
    #[must_use]
    pub fn versions(&self) -> Vec<String> {
        self.arms().map(|arm| arm.version.to_string()).collect()
    }

    /// The arms, the active one first.
    pub fn arms(&self) -> impl Iterator<Item = &Arc<Arm<B>>> {
        [&self.active]
            .into_iter()
            .chain(self.tried.as_ref().map(|tried| &tried.arm))
    }

    /// Where a request with this key goes.
    #[must_use]
    pub fn assign(&self, key: &str) -> Assigned<B> {
        let active = Assigned {
            arm: Arc::clone(&self.active),
            second: None,
            counted: None,
        };
        let Some(tried) = self.tried.as_ref().filter(|tried| tried.arm.is_open()) else {
            return active;
        };
        let side = split::side(split::bucket(&tried.seed, key), tried.weight_percent);
        let counted = Some((Arc::clone(&tried.trial), side));
        match side {
            Side::Baseline | Side::Stable => Assigned { counted, ..active },
            Side::Candidate | Side::CandidateUncompared => Assigned {
                arm: Arc::clone(&tried.arm),
                second: Some(active.arm),
                counted,
            },
        }
    }
}

impl<B> Assigned<B> {
    /// Counts what came of the request.
    pub fn count(&self, outcome: Outcome<'_>) {
        if let Some((trial, side)) = &self.counted {
            lock(trial).record(*side, outcome);
        }
    }
}

/// A trial, for one look or one count.
pub fn lock(trial: &Mutex<Trial>) -> MutexGuard<'_, Trial> {
    // Counters are whole after every single update, so a panic elsewhere does not spoil them.
    trial.lock().unwrap_or_else(PoisonError::into_inner)
}
