//! The versions that an endpoint answers with: one as a rule, two while one is tried.
//!
//! Invariants:
//! 1. An arm lives as long as a request is with it, and its tasks as long as the arm.
//! 2. Requests of a trial are compared only while the candidate answers, so that both sides are counted
//!    over the same time.

use std::borrow::Cow;
use std::convert::Infallible;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use super::access::keyring::now_ms;
use super::access::rules::{Rule, first_met};
use super::batcher::BatchAnswer;
use super::cache::responses::Responses;
use super::experiment::Plan;
use super::experiment::tally::{Tally, Unit, Variant, variant};
use super::feed::Feed;
use super::fleet::{Backend, Fleet};
use super::oip::{InferRequest, OipError};
use super::rollout::split::{self, Side};
use super::rollout::trial::{Outcome, Trial};
use super::rows::Row;
use super::shadow::mirror::Shadowed;
use super::statistics::{Cached, FailureReason, ModelStatistics, RequestTimes};

/// Requests that may wait for each replica while one of low priority is taken: a sixteenth of its queue, so that it costs
/// others a fraction of a batch.
const LOW_PRIORITY_QUEUED_MAX: usize = 16;

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

    /// Counts an answered request, and whether its answer was known.
    pub fn record(&self, answer: &BatchAnswer<Row>, times: RequestTimes, cached: Option<Cached>) {
        let mut statistics = self.statistics();
        match cached {
            Some(Cached::Hit(looked)) => return statistics.record_cache_hit(times, looked),
            Some(Cached::Miss(looked)) => statistics.record_cache_miss(looked),
            None => {}
        }
        statistics.record_success(answer.outputs.len() as u64, times, now_ms());
        if answer.is_first_in_batch {
            statistics.record_execution(answer.batch_rows as u64, times);
        }
    }

    /// Takes a request of low priority, if few others wait.
    ///
    /// # Errors
    /// [`OipError::Overloaded`].
    pub fn take_low_priority(&self) -> Result<(), OipError> {
        let queued = self.fleet.pending_count();
        let limit = LOW_PRIORITY_QUEUED_MAX * self.fleet.open_count().max(1);
        if queued < limit {
            return Ok(());
        }
        Err(OipError::Overloaded {
            queued: queued as u64,
            limit: limit as u64,
        })
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

/// One version's attempt at a request: counted as failed when it is over, also that of a caller who goes away.
pub struct Attempt<'a, B: Backend> {
    arm: &'a Arm<B>,
    began: Instant,
    compute_input: Duration,
    /// Why; `None` once it is answered.
    failed: Option<FailureReason>,
}

impl<'a, B: Backend> Attempt<'a, B> {
    /// A request begins whose inputs took so long.
    #[must_use]
    pub fn begin(arm: &'a Arm<B>, compute_input: Duration) -> Self {
        Attempt {
            arm,
            began: Instant::now(),
            compute_input,
            failed: Some(FailureReason::Canceled),
        }
    }

    /// It is over, with this error if it has one.
    pub fn end(mut self, error: Option<&OipError>) {
        self.failed = error.map(FailureReason::of);
    }
}

impl<B: Backend> Drop for Attempt<'_, B> {
    fn drop(&mut self) {
        if let Some(reason) = self.failed {
            let taken = self.compute_input + self.began.elapsed();
            self.arm.statistics().record_failure(taken, reason);
        }
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

/// A version that is compared with the active one.
pub struct Compared<B> {
    /// Its replicas.
    pub arm: Arc<Arm<B>>,
    /// Who meets which version.
    pub plan: Arc<Plan>,
    /// What came of it so far.
    pub tally: Arc<Mutex<Tally>>,
}

/// Where requests go.
pub struct Routes<B> {
    /// The active version.
    pub active: Arc<Arm<B>>,
    /// The version that is tried, if one is.
    pub tried: Option<Tried<B>>,
    /// The version that it is compared with, if an experiment is under way; never beside one that is tried.
    pub compared: Option<Compared<B>>,
    /// The candidate that copies of requests go to, if there is one; never beside one that is tried.
    pub shadowed: Option<Shadowed<B>>,
}

/// Who sends a request.
#[derive(Debug, Clone, Copy)]
pub enum Asker<'a> {
    /// Somebody with a key.
    Key(&'a str),
    /// Somebody without one, by the number of the request.
    Unknown(u64),
}

impl<'a> Asker<'a> {
    /// What is hashed for it.
    fn key(self) -> Cow<'a, str> {
        match self {
            Asker::Key(key) => Cow::Borrowed(key),
            Asker::Unknown(number) => Cow::Owned(number.to_string()),
        }
    }
}

/// Where to count what comes of a request.
pub enum Counted {
    /// At a step of a rollout.
    Step(Arc<Mutex<Trial>>, Side),
    /// In an experiment.
    Experiment(Arc<Mutex<Tally>>, Unit, Variant),
}

/// Where one request goes.
pub struct Assigned<B> {
    /// The version that shall answer.
    pub arm: Arc<Arm<B>>,
    /// The version that answers if that one cannot.
    pub second: Option<Arc<Arm<B>>>,
    /// Where to count what came of it.
    pub counted: Option<Counted>,
    /// Who gets a copy of it, once it is answered.
    pub copied: Option<Shadowed<B>>,
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
            .chain(self.compared.as_ref().map(|compared| &compared.arm))
    }

    /// Where a rule sends a request that names no version, and what the rule says.
    #[must_use]
    pub fn assign_by_rule(
        &self,
        rules: &[Rule],
        request: &InferRequest,
        asker: Asker<'_>,
    ) -> Option<(Assigned<B>, String)> {
        let arm_of = |version: u64| self.arms().find(|arm| arm.version == version);
        // The active version also where it is asleep: it wakes up with its first request.
        let answers = |version| {
            arm_of(version).is_some_and(|arm| arm.is_open() || Arc::ptr_eq(arm, &self.active))
        };
        let rule = first_met(rules, request, &asker.key(), answers)?;
        let arm = Arc::clone(arm_of(rule.version)?);
        let is_active = Arc::ptr_eq(&arm, &self.active);
        let assigned = Assigned {
            arm,
            second: (!is_active).then(|| Arc::clone(&self.active)),
            // Whom a rule picks is no sample of all.
            counted: None,
            copied: None,
        };
        Some((assigned, rule.to_string()))
    }

    /// Where a request goes.
    #[must_use]
    pub fn assign(&self, asker: Asker<'_>) -> Assigned<B> {
        let key = &*asker.key();
        let open = |arm: &Arc<Arm<B>>| arm.is_open();
        if let Some(tried) = self.tried.as_ref().filter(|tried| open(&tried.arm)) {
            let side = split::side(split::bucket(&tried.seed, key), tried.weight_percent);
            let counted = Counted::Step(Arc::clone(&tried.trial), side);
            return match side {
                Side::Baseline => self.by_active(Some(counted)),
                Side::Candidate => self.by(&tried.arm, counted),
            };
        }
        if let Some(shadowed) = self
            .shadowed
            .as_ref()
            .filter(|shadowed| open(&shadowed.arm))
        {
            let is_copied = split::bucket(&shadowed.seed, key) < shadowed.share();
            return Assigned {
                copied: is_copied.then(|| shadowed.clone()),
                ..self.by_active(None)
            };
        }
        let compared = self.compared.as_ref();
        let Some(compared) = compared.filter(|compared| open(&compared.arm)) else {
            return self.by_active(None);
        };
        let Some(variant) = variant(&compared.plan, key) else {
            return self.by_active(None);
        };
        let unit = match asker {
            Asker::Key(key) => Unit::of(key),
            Asker::Unknown(_) => Unit::Request,
        };
        let counted = Counted::Experiment(Arc::clone(&compared.tally), unit, variant);
        match variant {
            Variant::Control => self.by_active(Some(counted)),
            Variant::Treatment => self.by(&compared.arm, counted),
        }
    }

    fn by_active(&self, counted: Option<Counted>) -> Assigned<B> {
        Assigned {
            counted,
            ..Assigned::uncounted(Arc::clone(&self.active))
        }
    }

    /// By a version that is not the active one, which answers what that one does not.
    fn by(&self, arm: &Arc<Arm<B>>, counted: Counted) -> Assigned<B> {
        Assigned {
            arm: Arc::clone(arm),
            second: Some(Arc::clone(&self.active)),
            counted: Some(counted),
            copied: None,
        }
    }
}

impl<B> Assigned<B> {
    /// To one version alone, as nobody's sample.
    #[must_use]
    pub fn uncounted(arm: Arc<Arm<B>>) -> Self {
        Assigned {
            arm,
            second: None,
            counted: None,
            copied: None,
        }
    }

    /// Counts what came of the request.
    pub fn count(&self, outcome: Outcome<'_>) {
        match &self.counted {
            Some(Counted::Step(trial, side)) => lock(trial).record(*side, outcome),
            Some(Counted::Experiment(tally, unit, variant)) => {
                lock(tally).record(*unit, *variant, outcome);
            }
            None => {}
        }
    }
}

/// A trial or a tally, for one look or one count.
pub fn lock<T>(counted: &Mutex<T>) -> MutexGuard<'_, T> {
    // Counters are whole after every single update, so a panic elsewhere does not spoil them.
    counted.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "arm_tests.rs"]
mod tests;
