//! How many connections the gRPC port serves, and whose.
//!
//! Each costs a file descriptor and some 100 KiB. Without a bound a flood of them takes the descriptors that
//! the head needs for its log, its tables and its workers.
//!
//! Invariants:
//! 1. Who shows a certificate of the cluster has places of its own. Strangers, who may be anybody and bring
//!    a token at best, take none of them.
//! 2. Of the places for strangers, and of the handshakes, one address has half at the most.
//! 3. A place is given back with its connection, which a stranger does not keep without using it (`requests.rs`).

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Connections with a certificate: as many as the QUIC endpoint serves, where each worker has one.
const CERTIFIED_MAX: usize = 4096;

/// Connections without: 200 MiB.
const ANONYMOUS_MAX: usize = 2048;

/// How long a connection without a certificate stays open while nobody asks for anything. Whoever comes back later connects
/// again, which takes two round trips.
const ANONYMOUS_IDLE_MAX: Duration = Duration::from_secs(120);

/// Handshakes at one time: each costs some 100 KiB and a signature, so 256 is 25 MiB and well above
/// what a fleet that reconnects at once needs.
pub(super) const HANDSHAKES_MAX: usize = 256;

/// How many connections the port serves at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// Those that show a certificate of the cluster.
    pub certified: usize,
    /// Those that show none.
    pub anonymous: usize,
    /// Of these, those from one address; for IPv6 from one network of 64 bits, which one customer has.
    pub anonymous_of_address: usize,
    /// Handshakes with one address, which have not shown anything yet.
    pub handshakes_of_address: usize,
    /// How long those without a certificate stay open while nobody asks for anything.
    pub anonymous_idle: Duration,
}

impl ConnectionLimits {
    /// What this process has file descriptors for: it takes half of them at the most. Raises the number that
    /// it may open to what it is allowed to, as the usual 1024 are meant for programs that use `select`.
    #[must_use]
    pub fn of_this_process() -> Self {
        let files = open_files_max();
        let anonymous = ANONYMOUS_MAX.min(files / 6);
        ConnectionLimits {
            certified: CERTIFIED_MAX.min(files / 3),
            anonymous,
            anonymous_of_address: anonymous / 2,
            handshakes_of_address: HANDSHAKES_MAX / 2,
            anonymous_idle: ANONYMOUS_IDLE_MAX,
        }
    }
}

fn open_files_max() -> usize {
    let before = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: before.maximum,
        maximum: before.maximum,
    };
    let now = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => before.maximum,
        Err(_) => before.current,
    };
    // None: without a limit.
    now.map_or(usize::MAX, |files| {
        usize::try_from(files).unwrap_or(usize::MAX)
    })
}

/// The connections of a port.
#[derive(Debug, Clone)]
pub struct ApiConnections(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limits: ConnectionLimits,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    certified: usize,
    anonymous: usize,
    anonymous_by_network: BTreeMap<IpAddr, usize>,
    handshakes_by_network: BTreeMap<IpAddr, usize>,
    refused: u64,
}

/// How many connections there are, and were refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionCounts {
    /// Those that showed a certificate.
    pub certified: usize,
    /// Those that showed none.
    pub anonymous: usize,
    /// Refused since the port was opened, during the handshake and behind it.
    pub refused: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Handshake,
    Certified,
    Anonymous,
}

/// One of the places; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    connections: ApiConnections,
    network: IpAddr,
    kind: Kind,
}

impl ApiConnections {
    pub(super) fn new(limits: ConnectionLimits) -> Self {
        ApiConnections(Arc::new(Shared {
            limits,
            taken: Mutex::default(),
        }))
    }

    /// How many there are now.
    #[must_use]
    pub fn counts(&self) -> ConnectionCounts {
        let taken = self.0.taken.lock();
        ConnectionCounts {
            certified: taken.certified,
            anonymous: taken.anonymous,
            refused: taken.refused,
        }
    }

    /// A place for a handshake, if this address has not too many.
    pub(super) fn enter(&self, address: IpAddr) -> Option<Place> {
        self.take(Kind::Handshake, network_of(address))
    }

    fn take(&self, kind: Kind, network: IpAddr) -> Option<Place> {
        let limits = &self.0.limits;
        let mut taken = self.0.taken.lock();
        let count = |of: &BTreeMap<IpAddr, usize>| of.get(&network).copied().unwrap_or(0);
        let has_room = match kind {
            Kind::Handshake => count(&taken.handshakes_by_network) < limits.handshakes_of_address,
            Kind::Certified => taken.certified < limits.certified,
            Kind::Anonymous => {
                taken.anonymous < limits.anonymous
                    && count(&taken.anonymous_by_network) < limits.anonymous_of_address
            }
        };
        if !has_room {
            taken.refused += 1;
            return None;
        }
        match kind {
            Kind::Handshake => *taken.handshakes_by_network.entry(network).or_default() += 1,
            Kind::Certified => taken.certified += 1,
            Kind::Anonymous => {
                taken.anonymous += 1;
                *taken.anonymous_by_network.entry(network).or_default() += 1;
            }
        }
        Some(Place {
            connections: self.clone(),
            network,
            kind,
        })
    }
}

impl Place {
    /// The handshake is over: a place for the connection, if there is one for its kind.
    pub(super) fn settle(self, is_certified: bool) -> Option<Place> {
        let kind = match is_certified {
            true => Kind::Certified,
            false => Kind::Anonymous,
        };
        self.connections.take(kind, self.network)
    }

    /// How long the connection may stay open while nobody asks for anything; none if for ever.
    pub(super) fn idle_max(&self) -> Option<Duration> {
        match self.kind {
            Kind::Handshake | Kind::Certified => None,
            Kind::Anonymous => Some(self.connections.0.limits.anonymous_idle),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.connections.0.taken.lock();
        match self.kind {
            Kind::Handshake => one_less(&mut taken.handshakes_by_network, self.network),
            Kind::Certified => taken.certified -= 1,
            Kind::Anonymous => {
                taken.anonymous -= 1;
                one_less(&mut taken.anonymous_by_network, self.network);
            }
        }
    }
}

/// Addresses without a place have no entry: there are more addresses than memory.
fn one_less(of: &mut BTreeMap<IpAddr, usize>, network: IpAddr) {
    if let Some(count) = of.get_mut(&network) {
        *count -= 1;
        if *count == 0 {
            of.remove(&network);
        }
    }
}

/// Whom an address belongs to, as far as that can be seen.
fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => {
            let network = (address.to_bits() >> 64) << 64;
            Ipv6Addr::from_bits(network).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: ConnectionLimits = ConnectionLimits {
        certified: 2,
        anonymous: 3,
        anonymous_of_address: 2,
        handshakes_of_address: 2,
        anonymous_idle: ANONYMOUS_IDLE_MAX,
    };

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn connect(connections: &ApiConnections, from: &str, is_certified: bool) -> Option<Place> {
        connections.enter(address(from))?.settle(is_certified)
    }

    #[test]
    fn strangers_take_no_places_of_members_and_one_address_not_all_of_strangers() {
        let connections = ApiConnections::new(LIMITS);
        let first = connect(&connections, "10.0.0.1", false).unwrap();
        let _second = connect(&connections, "10.0.0.1", false).unwrap();
        assert!(connect(&connections, "10.0.0.1", false).is_none());
        let _third = connect(&connections, "10.0.0.2", false).unwrap();
        assert!(connect(&connections, "10.0.0.3", false).is_none());
        let members = [1, 2].map(|_| connect(&connections, "10.0.0.1", true).unwrap());
        assert!(connect(&connections, "10.0.0.4", true).is_none());
        let counts = connections.counts();
        assert_eq!((counts.certified, counts.anonymous), (2, 3));
        assert_eq!(counts.refused, 3);
        // Each that ends makes room for one of its kind.
        drop(first);
        assert!(connect(&connections, "10.0.0.4", true).is_none());
        let _again = connect(&connections, "10.0.0.1", false).unwrap();
        drop(members);
        assert_eq!(connections.counts().certified, 0);
    }

    #[test]
    fn one_address_does_not_have_all_handshakes_and_none_is_remembered() {
        let connections = ApiConnections::new(LIMITS);
        let dawdling = [1, 2].map(|_| connections.enter(address("2001:db8::1")).unwrap());
        // The same customer's network.
        assert!(connections.enter(address("2001:db8::ffff:0:2")).is_none());
        assert!(connections.enter(address("2001:db8:0:1::1")).is_some());
        drop(dawdling);
        assert!(connections.0.taken.lock().handshakes_by_network.is_empty());
        let mapped = network_of(address("::ffff:10.0.0.1"));
        assert_eq!(mapped, address("10.0.0.1"));
    }

    #[test]
    fn a_process_takes_half_of_its_file_descriptors_at_the_most() {
        let limits = ConnectionLimits::of_this_process();
        assert!(limits.certified > 0 && limits.anonymous_of_address > 0);
        assert!(limits.certified + limits.anonymous <= open_files_max() / 2);
    }
}
