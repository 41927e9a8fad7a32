//! The router's end of an experiment: it counts, stores what it counted, looks what follows, and tells the head.
//!
//! Invariants:
//! 1. No request is assigned before the head knows that this router counts, and before the router knows what was
//!    counted already: each key of it, and not only the sums.
//! 2. What was told and not taken is told again as long as it is so. Until then nothing else is told, but that a
//!    guardrail is violated or a sentinel was answered wrongly.
//! 3. A look is at a copy that is in the store already, and copies are taken by the clock: what dies with a router was
//!    not looked at, so the router that counts it again takes no chance twice. Guardrails and sentinels alone are looked at
//!    all the time and do not wait for the store.
//! 4. Nothing here waits for the store: counts are read, stored and removed beside the router's loop, which sees at each
//!    look how far that is. What comes of it for another experiment or count is dropped.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use mobula::{Cluster, StorageLocation};
use mobula_core::id::Incarnation;
use mobula_storage::blob::{BlobError, BlobStore};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Plan;
use super::command::Command;
use super::findings::{Decision, Findings};
use super::plan::{Ending, Experiment};
use super::sentinels::Asking;
use super::shelf::{self, NotCleared, NotRead};
use super::tally::Tally;
use crate::drift::vitals::sentinels::Sentinels;
use crate::serving::arm::{Routes, lock};
use crate::serving::client;
use crate::serving::fleet::Backend;
use crate::serving::loading::Loading;
use crate::serving::rollout::plan::Cleanup;
use crate::serving::rollout::reporting::REPORT_INTERVAL;
use crate::serving::rollout::trial::shortened;
use crate::serving::sentinels::AnswerCounts;
use crate::serving::sentinels::state::Standing;
use crate::storage::open_blobs;

/// How fast counts are stored on average: one of a million keys has nine megabytes, which take no less than nine
/// seconds.
const STORED_BYTES_PER_SECOND: u32 = 1 << 20;

/// The count that this router goes on with.
struct Current {
    number: u64,
    /// Which one it is within the experiment.
    count: u32,
    plan: Arc<Plan>,
    tally: Arc<Mutex<Tally>>,
    /// When the last copy was taken.
    copied: Option<Instant>,
    /// How long after it the next one may be.
    pause: Duration,
    /// The copy that is being stored, if there is one.
    storing: JoinSet<Result<Look, BlobError>>,
    /// What the head is told until it knows it.
    told: Option<Look>,
    /// How many keys and values the last copy in the store is about.
    stored_values: u64,
    /// What the head knows to be in the store, and what was that before and may not be removed yet.
    stored: Option<[u8; 32]>,
    replaced: Option<[u8; 32]>,
}

/// What follows from a copy that is in the store.
struct Look {
    stored: [u8; 32],
    size_bytes: usize,
    values: u64,
    ending: Option<Ending>,
    findings: Findings,
}

/// What the head has to be told.
#[derive(Debug)]
enum Word {
    /// The experiment is over.
    Over(Ending, Findings),
    /// The numbers so far, and the hash of the copy that they follow from.
    SoFar(Findings, [u8; 32]),
}

/// Reads a stored count: by its experiment, which one it is within that, and its hash.
type Reading = Loading<(u64, u32, [u8; 32]), Result<Tally, NotRead>>;

/// Follows an endpoint's experiments.
pub(in crate::serving) struct Comparing {
    cluster: Cluster,
    storage: StorageLocation,
    router: Incarnation,
    current: Option<Current>,
    asking: Asking,
    reading: Reading,
    /// Removes the counts of the experiment of this number.
    clearing: Loading<u64, Result<(), NotCleared>>,
}

impl Comparing {
    pub(in crate::serving) fn new(
        cluster: Cluster,
        storage: StorageLocation,
        router: Incarnation,
    ) -> Self {
        Comparing {
            cluster,
            storage,
            router,
            current: None,
            asking: Asking::new(),
            reading: Loading::new(),
            clearing: Loading::new(),
        }
    }

    /// What this router counts in an experiment; `None` while the head does not know that it does, or the store has not
    /// said what was counted before.
    pub(in crate::serving) async fn count(
        &mut self,
        experiment: &Experiment,
    ) -> Option<(Arc<Plan>, Arc<Mutex<Tally>>)> {
        // What is in the endpoint's folder from now on is this experiment's.
        self.clearing.forget();
        if experiment.counting != Some(self.router) {
            self.forget();
            self.tell(Command::Count {
                endpoint: experiment.plan.endpoint.clone(),
                experiment: experiment.number,
                router: self.router,
            })
            .await;
            return None;
        }
        let known = self.current.as_ref();
        let known = known.map(|current| (current.number, current.count));
        if known != Some((experiment.number, experiment.counts)) {
            // Nothing follows from another count meanwhile.
            self.current = None;
            let tally = self.go_on(experiment).await?;
            self.current = Some(Current::new(experiment, tally));
        }
        let current = self.current.as_ref()?;
        Some((Arc::clone(&current.plan), Arc::clone(&current.tally)))
    }

    /// What was counted before this router, once it is read. If that can never be read again, the head is told to begin
    /// another count.
    async fn go_on(&mut self, experiment: &Experiment) -> Option<Tally> {
        let plan = &experiment.plan;
        let open = || open_blobs(&self.storage);
        match counted_before(&mut self.reading, experiment, open)? {
            Ok(tally) => Some(tally),
            Err(error) if error.is_final() => {
                tracing::error!(
                    endpoint = plan.endpoint,
                    experiment = experiment.number,
                    %error,
                    "what an experiment has counted is lost, so its count begins anew"
                );
                self.tell(Command::CountAnew {
                    endpoint: plan.endpoint.clone(),
                    experiment: experiment.number,
                    count: experiment.counts,
                    router: self.router,
                })
                .await;
                None
            }
            Err(error) => {
                tracing::warn!(
                    endpoint = plan.endpoint,
                    experiment = experiment.number,
                    %error,
                    "an experiment rests until the store says what was counted; it is asked again"
                );
                None
            }
        }
    }

    /// Forgets what was counted of an experiment that is over.
    pub(in crate::serving) fn forget(&mut self) {
        self.current = None;
        self.asking = Asking::new();
        self.reading.forget();
    }

    /// The experiment's treatment has these sentinels.
    pub(in crate::serving) fn ask(&mut self, experiment: &Experiment, sentinels: Arc<Sentinels>) {
        self.asking.at(experiment.number, sentinels);
    }

    /// What the treatment has answered to its sentinels since this was last asked, with its version.
    pub(in crate::serving) fn take_counts(&mut self) -> Option<(u64, AnswerCounts)> {
        self.asking.take_counts()
    }

    /// Looks what follows from what was counted and from what the treatment has answered to its sentinels, and tells the
    /// head. How far it is asked, while nothing ends the experiment.
    pub(in crate::serving) async fn judge<B: Backend>(
        &mut self,
        experiment: &Experiment,
        routes: &Routes<B>,
    ) -> Option<Standing> {
        let current = self.current.as_mut()?;
        match current.word(experiment, routes, &mut self.asking) {
            Some(Word::Over(ending, findings)) => {
                self.conclude(experiment, ending, findings).await;
                return None;
            }
            Some(Word::SoFar(findings, stored)) => {
                let report = Command::Report {
                    endpoint: experiment.plan.endpoint.clone(),
                    experiment: experiment.number,
                    router: self.router,
                    findings,
                    stored,
                };
                self.tell(report).await;
            }
            None if current.is_due() => match open_blobs(&self.storage) {
                Ok(blobs) => current.store(blobs),
                Err(error) => tracing::warn!(
                    endpoint = current.plan.endpoint,
                    %error,
                    "a count cannot be stored; it is tried again"
                ),
            },
            None => {}
        }
        self.asking.standing()
    }

    /// Says that the treatment cannot be compared.
    pub(in crate::serving) async fn refuse(&self, experiment: &Experiment, reason: &str) {
        let findings = Findings {
            decision: Decision::Control,
            ..Findings::because(shortened(reason))
        };
        self.conclude(experiment, Ending::Unfit, findings).await;
    }

    /// Says that nothing is left of the treatment, nor of what was counted, once that is removed.
    pub(in crate::serving) async fn say_drained(&mut self, experiment: &Experiment) {
        if experiment.cleanup != Cleanup::Draining {
            return;
        }
        let endpoint = &experiment.plan.endpoint;
        let cleared = self.clearing.hear(endpoint, experiment.number, || {
            let (opened, endpoint) = (open_blobs(&self.storage), endpoint.clone());
            async move {
                let blobs = opened?;
                shelf::clear(&blobs, &endpoint).await
            }
        });
        match cleared {
            None => return,
            Some(Ok(())) => {}
            // The treatment's replicas do not wait long for the store: what stays goes with the endpoint's next
            // experiment.
            Some(Err(error)) => {
                tracing::warn!(endpoint, %error, "the counts of an experiment stay in the store for now");
            }
        }
        self.tell(Command::Drained {
            endpoint: endpoint.clone(),
            experiment: experiment.number,
            revision: experiment.revision,
            router: self.router,
        })
        .await;
    }

    async fn conclude(&self, experiment: &Experiment, ending: Ending, findings: Findings) {
        tracing::info!(
            endpoint = experiment.plan.endpoint,
            experiment = experiment.number,
            ?ending,
            decision = ?findings.decision,
            reason = findings.reason,
            "an experiment is over"
        );
        self.tell(Command::Conclude {
            endpoint: experiment.plan.endpoint.clone(),
            experiment: experiment.number,
            router: self.router,
            ending,
            findings,
        })
        .await;
    }

    async fn tell(&self, command: Command) {
        if let Err(error) = client::experiment(&self.cluster, command).await {
            // What is still so at the next look is said again.
            tracing::debug!(%error, "the head did not take a word about an experiment");
        }
    }
}

impl Current {
    fn new(experiment: &Experiment, tally: Tally) -> Self {
        Current {
            number: experiment.number,
            count: experiment.counts,
            plan: Arc::new(experiment.plan.clone()),
            copied: None,
            pause: REPORT_INTERVAL,
            storing: JoinSet::new(),
            told: None,
            stored_values: tally.counted(),
            stored: experiment.stored,
            replaced: None,
            tally: Arc::new(Mutex::new(tally)),
        }
    }

    /// What the head has to be told now, if there is something.
    fn word<B: Backend>(
        &mut self,
        experiment: &Experiment,
        routes: &Routes<B>,
        asking: &mut Asking,
    ) -> Option<Word> {
        let counted = lock(&self.tally).judge();
        let (ending, findings) = asking.look(routes, counted);
        if let Some(ending @ (Ending::Guardrail | Ending::Sentinel)) = ending {
            return Some(Word::Over(ending, findings));
        }
        self.hear(experiment);
        let look = self.told.as_ref()?;
        let findings = asking.noted(look.findings.clone());
        Some(match look.ending {
            Some(ending) => Word::Over(ending, findings),
            None => Word::SoFar(findings, look.stored),
        })
    }

    /// Sees whether a copy is in the store by now, and whether the head knows it.
    fn hear(&mut self, experiment: &Experiment) {
        match self.storing.try_join_next() {
            Some(Ok(Ok(look))) => {
                // It was removed before this one was written.
                self.replaced = None;
                self.pause = pause_after(look.size_bytes);
                self.stored_values = look.values;
                self.told = Some(look);
            }
            Some(Ok(Err(error))) => tracing::warn!(
                endpoint = self.plan.endpoint,
                %error,
                "a count is not in the store, and nothing follows from it until it is; it is tried again"
            ),
            Some(Err(error)) => {
                tracing::error!(endpoint = self.plan.endpoint, %error, "a count was not stored");
            }
            None => {}
        }
        let is_known = |look: &mut Look| experiment.stored == Some(look.stored);
        if let Some(known) = self.told.take_if(is_known) {
            self.replaced = self.stored.replace(known.stored);
        }
    }

    /// Whether it is time for a copy.
    fn is_due(&self) -> bool {
        let is_time = self
            .copied
            .is_none_or(|copied| copied.elapsed() >= self.pause);
        is_time && self.storing.is_empty() && lock(&self.tally).counted() != self.stored_values
    }

    /// Has the copy removed that was replaced before, and another one stored.
    fn store(&mut self, blobs: BlobStore) {
        // Requests wait for as long as the memory takes to be copied, some milliseconds for a million keys.
        let tally = lock(&self.tally).clone();
        self.copied = Some(Instant::now());
        let (endpoint, replaced) = (self.plan.endpoint.clone(), self.replaced);
        self.storing.spawn(async move {
            if let Some(replaced) = replaced {
                // None is written without it: where nothing can be removed, copies of megabytes would add up.
                shelf::remove(&blobs, &endpoint, replaced).await?;
            }
            store(&blobs, &endpoint, &tally).await
        });
    }
}

/// What was counted before, if the store has said it by now or does not need to be asked.
fn counted_before(
    reading: &mut Reading,
    experiment: &Experiment,
    open: impl FnOnce() -> Result<BlobStore, BlobError>,
) -> Option<Result<Tally, NotRead>> {
    let (plan, alpha) = (&experiment.plan, experiment.alpha());
    let Some(stored) = experiment.stored else {
        reading.forget();
        return Some(Ok(Tally::new(plan.clone(), alpha)));
    };
    let key = (experiment.number, experiment.counts, stored);
    reading.hear(&plan.endpoint, key, || {
        let (opened, plan) = (open(), plan.clone());
        async move {
            let blobs = opened?;
            shelf::read(&blobs, &plan, alpha, stored).await
        }
    })
}

/// Stores a copy, and looks what follows from it.
async fn store(blobs: &BlobStore, endpoint: &str, tally: &Tally) -> Result<Look, BlobError> {
    let bytes = Bytes::from(tally.to_bytes());
    let size_bytes = bytes.len();
    let stored = shelf::write(blobs, endpoint, bytes).await?;
    let (ending, findings) = tally.judge();
    Ok(Look {
        stored,
        size_bytes,
        values: tally.counted(),
        ending,
        findings,
    })
}

/// How long after a copy of so many bytes the next one may be taken.
fn pause_after(size_bytes: usize) -> Duration {
    let seconds = size_bytes as f64 / f64::from(STORED_BYTES_PER_SECOND);
    REPORT_INTERVAL.max(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
#[path = "comparing_tests.rs"]
mod tests;
