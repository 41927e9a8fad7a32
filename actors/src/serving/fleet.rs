//! The replicas behind an endpoint: how many there are, and which of them gets a request. What becomes of it then is in
//! `answering`.
//!
//! Invariants:
//! 1. Each replica has a batcher of its own, with a bounded queue; a replica that failed gets no
//!    requests until it has answered a probe, and one that fails again and again none for a while.
//! 2. Of two replicas the one with fewer rows in flight is chosen (power of two choices), unless the request prefers one
//!    (`affinity`).
//! 3. A replica that is wanted no more gets no new requests, and is gone with its last one.
//! 4. Dropping a fleet ends its tasks.

pub(super) mod affinity;
mod answering;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;

use tokio::sync::watch;

use super::guard::outlier::Outliers;
use super::guard::traffic::Traffic;
use super::lane::Lane;
use super::replica_settings::Batching;

pub(super) use self::answering::Terms;
pub use super::lane::{BATCH_ROWS_MAX, BATCH_TIMEOUT, Backend, BackendFailure, Berth};

/// How long a request may take with its second try, if it does not say itself.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a request may take at the most, whatever it says.
pub const DEADLINE_MAX: Duration = Duration::from_secs(60);

/// How long a request waits for the first replica of an endpoint that had none: a process is started, and
/// loads the model.
pub(super) const WAKE_TIMEOUT: Duration = Duration::from_secs(30);

/// The replicas of one version of an endpoint.
pub struct Fleet<B> {
    lanes: RwLock<Vec<Arc<Lane<B>>>>,
    /// Lanes that are wanted no more and may have requests.
    leaving: Mutex<Vec<Weak<Lane<B>>>>,
    openings: Arc<watch::Sender<u64>>,
    /// Whether there was no replica, and none has answered since.
    is_waking: AtomicBool,
    /// Requests that wait for a replica.
    held: AtomicUsize,
    ticket: AtomicU64,
    outliers: Mutex<Outliers>,
    batching: Batching,
    traffic: Arc<Traffic>,
}

impl<B: Backend> Fleet<B> {
    /// A fleet of `replicas`, none of which takes requests yet.
    #[must_use]
    pub fn new(replicas: u32) -> Self {
        Fleet::sharing(replicas, Batching::default(), Arc::default())
    }

    /// The same as part of an endpoint's traffic, with requests joined as it says.
    #[must_use]
    pub fn sharing(replicas: u32, batching: Batching, traffic: Arc<Traffic>) -> Self {
        let fleet = Fleet {
            lanes: RwLock::default(),
            leaving: Mutex::default(),
            openings: Arc::new(watch::Sender::new(0)),
            is_waking: AtomicBool::new(replicas == 0),
            held: AtomicUsize::new(0),
            ticket: AtomicU64::new(0),
            outliers: Mutex::default(),
            batching,
            traffic,
        };
        fleet.resize(replicas);
        fleet
    }

    /// Has so many replicas from now on. The berths of new ones, with their numbers.
    pub fn resize(&self, replicas: u32) -> Vec<(u32, Arc<Berth<B>>)> {
        let mut lanes = self.lanes.write().unwrap_or_else(PoisonError::into_inner);
        let known = lanes.len() as u32;
        if replicas == 0 {
            self.is_waking.store(true, Ordering::Relaxed);
        }
        if replicas < known {
            let leaving = lanes.split_off(replicas as usize);
            let leaving: Vec<Weak<Lane<B>>> = leaving.iter().map(Arc::downgrade).collect();
            lock(&self.leaving).extend(leaving);
            lock(&self.outliers).keep(replicas);
        }
        let new: Vec<Arc<Lane<B>>> = (known + 1..=replicas)
            .map(|number| {
                let (openings, traffic) = (Arc::clone(&self.openings), Arc::clone(&self.traffic));
                Arc::new(Lane::new(number, &self.batching, openings, traffic))
            })
            .collect();
        lanes.extend(new.iter().cloned());
        new.iter()
            .map(|lane| (lane.number, Arc::clone(&lane.berth)))
            .collect()
    }

    fn lanes(&self) -> Vec<Arc<Lane<B>>> {
        let lanes = self.lanes.read().unwrap_or_else(PoisonError::into_inner);
        lanes.clone()
    }

    /// Each replica's number, counted from 1, with its berth.
    pub fn berths(&self) -> impl Iterator<Item = (u32, Arc<Berth<B>>)> {
        self.lanes()
            .into_iter()
            .map(|lane| (lane.number, Arc::clone(&lane.berth)))
    }

    /// How many replicas take requests.
    #[must_use]
    pub fn open_count(&self) -> usize {
        self.lanes().iter().filter(|lane| lane.is_open()).count()
    }

    /// How many replicas there should be.
    #[must_use]
    pub fn replica_count(&self) -> usize {
        self.lanes().len()
    }

    /// How many requests wait for a replica.
    #[must_use]
    pub fn pending_count(&self) -> usize {
        let queued: usize = self.lanes().iter().map(|lane| lane.queued()).sum();
        queued + self.held.load(Ordering::Relaxed)
    }

    /// The memory that the processes of its replicas have in use, in percent: the most that any of them said.
    #[must_use]
    pub fn memory_percent(&self) -> u8 {
        let lanes = self.lanes();
        let open = lanes.iter().filter(|lane| lane.is_open());
        open.map(|lane| lane.memory_percent()).max().unwrap_or(0)
    }

    /// Whether it has no replica and gets one with the first request.
    #[must_use]
    pub fn is_asleep(&self) -> bool {
        self.replica_count() == 0
    }

    /// Whether no request is left with a replica that is wanted no more.
    pub fn is_drained(&self) -> bool {
        let mut leaving = lock(&self.leaving);
        leaving.retain(|lane| lane.strong_count() > 0);
        leaving.is_empty()
    }

    /// What passes through the endpoint that it is part of.
    #[must_use]
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Looks at the replicas that take requests, other than `except` and those that are ejected if there are others.
    fn among<T>(
        &self,
        except: Option<u32>,
        look: impl FnOnce(&[&Arc<Lane<B>>]) -> Option<T>,
    ) -> Option<T> {
        let lanes = self.lanes.read().unwrap_or_else(PoisonError::into_inner);
        let open: Vec<&Arc<Lane<B>>> = lanes.iter().filter(|lane| lane.is_open()).collect();
        if !open.is_empty() {
            self.is_waking.store(false, Ordering::Relaxed);
        }
        let now_ms = self.traffic.now_ms();
        let outliers = lock(&self.outliers);
        let others: Vec<&Arc<Lane<B>>> = open
            .iter()
            .copied()
            .filter(|lane| Some(lane.number) != except)
            .filter(|lane| !outliers.is_ejected(lane.number, now_ms))
            .collect();
        drop(outliers);
        look(if others.is_empty() { &open } else { &others })
    }

    /// The less busy of two replicas that take requests, other than `except` if there is another.
    fn choose(&self, except: Option<u32>) -> Option<Arc<Lane<B>>> {
        self.among(except, |candidates| {
            let count = candidates.len();
            if count < 2 {
                return candidates.first().copied().cloned();
            }
            let hash = mixed(self.ticket.fetch_add(1, Ordering::Relaxed));
            let one = (hash >> 32) as usize % count;
            // Any of the others, each as likely.
            let other = (one + 1 + (hash & 0xFFFF_FFFF) as usize % (count - 1)) % count;
            let load = |at: usize| candidates[at].rows_in_flight.load(Ordering::Relaxed);
            let less_busy = if load(other) < load(one) { other } else { one };
            Some(Arc::clone(candidates[less_busy]))
        })
    }

    fn failed(&self, lane: &Lane<B>) {
        let open = self.open_count();
        let now_ms = self.traffic.now_ms();
        if let Some(lasts_ms) = lock(&self.outliers).failed(lane.number, open, now_ms) {
            self.traffic.count(|counts| counts.ejections += 1);
            tracing::warn!(replica = lane.number, lasts_ms, "a replica is ejected");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whole after every single update, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Spreads neighbouring numbers over all bits (the finalizer of SplitMix64). Which replicas are
/// compared needs no secrecy, only evenness.
fn mixed(ticket: u64) -> u64 {
    let mut z = ticket.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
#[path = "fleet_tests.rs"]
mod tests;
