//! Connections kept by address.
//!
//! Invariants:
//! 1. At most one attempt to connect is under way for an address and class; who comes meanwhile
//!    waits for it and shares its outcome.
//! 2. After a failure the next attempt waits, longer each time up to a bound; who comes meanwhile is
//!    told so at once instead of queueing.
//! 3. The number of kept connections is bounded: dead ones go first, then the one unused longest.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::Instant;

use crate::endpoint::{ConnectError, Connection, Endpoint, LaneClass};
use crate::identity::Role;

/// How much a pool holds and how patient it is.
#[derive(Debug, Clone, Copy)]
pub struct PoolLimits {
    /// Addresses kept at most.
    pub connections_max: usize,
    /// The wait after a first failure.
    pub backoff_initial: Duration,
    /// The longest wait.
    pub backoff_max: Duration,
}

impl PoolLimits {
    /// Peers of one process: a thousand is more than any host talks to, and the wait is short
    /// enough that a restarted peer is found again within a second.
    pub const PEERS: PoolLimits = PoolLimits {
        connections_max: 1024,
        backoff_initial: Duration::from_millis(50),
        backoff_max: Duration::from_secs(1),
    };
}

/// Why the pool has no connection.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PoolError {
    /// The attempt failed.
    #[error(transparent)]
    Connect(ConnectError),
    /// The last attempt failed a moment ago.
    #[error("{failures} attempts failed, the next is due in {retry_in_ms} ms; the last: {last}")]
    BackingOff {
        /// Failures in a row.
        failures: u32,
        /// When to ask again, in milliseconds.
        retry_in_ms: u64,
        /// The last failure.
        last: ConnectError,
    },
    /// The address now belongs to somebody else than was asked for.
    #[error("{address} is a {found}, expected a {expected}")]
    OtherRole {
        /// The address.
        address: SocketAddr,
        /// What was asked for.
        expected: Role,
        /// What is there.
        found: Role,
    },
}

/// A bounded set of connections from one endpoint. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Pool {
    endpoint: Endpoint,
    limits: PoolLimits,
    entries: Arc<Mutex<Entries>>,
}

type Entries = BTreeMap<(SocketAddr, LaneClass), Arc<Entry>>;

#[derive(Debug)]
struct Entry {
    used_at: Mutex<Instant>,
    state: AsyncMutex<State>,
}

#[derive(Debug)]
enum State {
    Idle,
    Connected(Connection),
    Failed {
        failures: u32,
        retry_at: Instant,
        last: ConnectError,
    },
}

impl Pool {
    /// An empty pool on `endpoint`.
    #[must_use]
    pub fn new(endpoint: Endpoint, limits: PoolLimits) -> Self {
        Pool {
            endpoint,
            limits,
            entries: Arc::default(),
        }
    }

    /// The connection to the process of role `expected` at `address`: the one kept if it lives, a
    /// new one otherwise.
    pub async fn connection(
        &self,
        address: SocketAddr,
        class: LaneClass,
        expected: Role,
    ) -> Result<Connection, PoolError> {
        let entry = self.entry(address, class);
        let mut state = entry.state.lock().await;
        let failures = match &*state {
            State::Connected(connection) if !connection.is_closed() => {
                let found = connection.peer().role;
                return match found == expected {
                    true => Ok(connection.clone()),
                    false => Err(PoolError::OtherRole {
                        address,
                        expected,
                        found,
                    }),
                };
            }
            State::Failed {
                failures,
                retry_at,
                last,
            } => {
                let wait = retry_at.saturating_duration_since(Instant::now());
                if !wait.is_zero() {
                    return Err(PoolError::BackingOff {
                        failures: *failures,
                        retry_in_ms: wait.as_millis() as u64,
                        last: last.clone(),
                    });
                }
                *failures
            }
            State::Idle | State::Connected(_) => 0,
        };
        match self.endpoint.connect(address, class, expected).await {
            Ok(connection) => {
                *state = State::Connected(connection.clone());
                Ok(connection)
            }
            Err(error) => {
                let failures = failures.saturating_add(1);
                let retry_at = Instant::now() + self.backoff(failures);
                *state = State::Failed {
                    failures,
                    retry_at,
                    last: error.clone(),
                };
                Err(PoolError::Connect(error))
            }
        }
    }

    /// Drops what is kept for `address`: its process is known to be gone, or a new one to be there.
    pub fn forget(&self, address: SocketAddr) {
        let mut entries = self.entries.lock();
        for class in [LaneClass::Control, LaneClass::Bulk] {
            entries.remove(&(address, class));
        }
    }

    fn backoff(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(16);
        self.limits
            .backoff_initial
            .saturating_mul(1 << doublings)
            .min(self.limits.backoff_max)
    }

    fn entry(&self, address: SocketAddr, class: LaneClass) -> Arc<Entry> {
        let now = Instant::now();
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.get(&(address, class)) {
            *entry.used_at.lock() = now;
            return entry.clone();
        }
        if entries.len() >= self.limits.connections_max {
            entries.retain(|_, entry| entry.is_wanted(now));
        }
        while entries.len() >= self.limits.connections_max.max(1) {
            let oldest = entries
                .iter()
                .min_by_key(|(_, entry)| *entry.used_at.lock());
            let Some(key) = oldest.map(|(key, _)| *key) else {
                break;
            };
            entries.remove(&key);
        }
        let entry = Arc::new(Entry {
            used_at: Mutex::new(now),
            state: AsyncMutex::new(State::Idle),
        });
        entries.insert((address, class), entry.clone());
        entry
    }
}

impl Entry {
    /// Connected, being connected, or in its wait after a failure.
    fn is_wanted(&self, now: Instant) -> bool {
        match self.state.try_lock().as_deref() {
            Ok(State::Connected(connection)) => !connection.is_closed(),
            Ok(State::Failed { retry_at, .. }) => *retry_at > now,
            Ok(State::Idle) => false,
            Err(_) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::ClusterCa;
    use crate::testing::{credentials, loopback, rebind};

    async fn serve(endpoint: Endpoint) {
        let mut kept = Vec::new();
        while let Some(connection) = endpoint.accept().await {
            kept.push(connection);
        }
    }

    #[tokio::test]
    async fn one_attempt_serves_all_and_a_restarted_peer_is_found_again() {
        let ca = ClusterCa::create("demo").unwrap();
        let peer = Endpoint::bind(loopback(), &credentials(&ca, Role::Node)).unwrap();
        let address = peer.local_address();
        let serving = tokio::spawn(serve(peer.clone()));
        let ours = Endpoint::bind_client(loopback(), &credentials(&ca, Role::Head)).unwrap();
        let pool = Pool::new(ours, PoolLimits::PEERS);
        let get = || pool.connection(address, LaneClass::Control, Role::Node);
        let (a, b) = tokio::join!(get(), get());
        let (a, b) = (a.unwrap(), b.unwrap());
        assert!(a.is_same_as(&b), "one connection serves both");
        assert!(matches!(
            pool.connection(address, LaneClass::Control, Role::Host)
                .await,
            Err(PoolError::OtherRole {
                found: Role::Node,
                ..
            })
        ));

        peer.close("restarting").await;
        serving.await.unwrap();
        drop(peer);
        a.closed().await;
        let again = rebind(address, &credentials(&ca, Role::Node)).await;
        let serving = tokio::spawn(serve(again.clone()));
        let c = get().await.unwrap();
        assert!(!c.is_same_as(&a));
        again.close("done").await;
        serving.await.unwrap();
    }

    #[tokio::test]
    async fn failures_back_off_and_are_told_at_once() {
        let (ca, other) = (
            ClusterCa::create("demo").unwrap(),
            ClusterCa::create("other").unwrap(),
        );
        let stranger = Endpoint::bind(loopback(), &credentials(&other, Role::Node)).unwrap();
        let serving = tokio::spawn(serve(stranger.clone()));
        let ours = Endpoint::bind_client(loopback(), &credentials(&ca, Role::Head)).unwrap();
        let limits = PoolLimits {
            backoff_initial: Duration::from_secs(3600),
            backoff_max: Duration::from_secs(3600),
            ..PoolLimits::PEERS
        };
        let pool = Pool::new(ours, limits);
        let get = || pool.connection(stranger.local_address(), LaneClass::Control, Role::Node);
        assert!(matches!(
            get().await,
            Err(PoolError::Connect(ConnectError::WrongPeer { .. }))
        ));
        assert!(matches!(
            get().await,
            Err(PoolError::BackingOff { failures: 1, .. })
        ));
        pool.forget(stranger.local_address());
        assert!(matches!(
            get().await,
            Err(PoolError::Connect(ConnectError::WrongPeer { .. }))
        ));
        stranger.close("done").await;
        serving.await.unwrap();
    }

    #[tokio::test]
    async fn the_pool_is_bounded_and_its_waits_too() {
        let ca = ClusterCa::create("demo").unwrap();
        let ours = Endpoint::bind_client(loopback(), &credentials(&ca, Role::Head)).unwrap();
        let pool = Pool::new(
            ours,
            PoolLimits {
                connections_max: 2,
                ..PoolLimits::PEERS
            },
        );
        for port in 1..10 {
            pool.entry(([127, 0, 0, 1], port).into(), LaneClass::Control);
            assert!(pool.entries.lock().len() <= 2);
        }
        assert_eq!(pool.backoff(1), Duration::from_millis(50));
        assert_eq!(pool.backoff(2), Duration::from_millis(100));
        assert_eq!(pool.backoff(u32::MAX), Duration::from_secs(1));
    }
}
