//! What nodes have given to actors, and the sums of it.
//!
//! A placement pass asks what each node has left, and a node may run a hundred thousand actors; so
//! the sums are kept, not made anew.
//!
//! Invariants:
//! 1. A node's [`Usage`] and its counts by key are the sums of its leases: they change together,
//!    here and nowhere else (I10).
//! 2. What is zero has no row.

use std::collections::BTreeMap;

use mobula_core::control::{Reader, Txn};
use mobula_core::{ActorId, Incarnation, JobId, NodeId, Resources};
use serde::{Deserialize, Serialize};

use crate::placement::gpu::GpuShare;
use crate::row::{self, LEASES, USAGE, USAGE_BY_KEY};

/// What a node has given to one incarnation of an actor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Lease {
    pub(crate) job: JobId,
    pub(crate) incarnation: Incarnation,
    pub(crate) resources: Resources,
    pub(crate) gpus: Vec<GpuShare>,
    pub(crate) affinity_key: Option<String>,
    pub(crate) spread_key: Option<String>,
}

/// Everything that a node has given away.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Usage {
    pub(crate) actors: u32,
    pub(crate) resources: Resources,
    /// Thousandths of each device, up to the last that is in use.
    pub(crate) gpu_milli: Vec<u64>,
    /// Rows that count this node's actors by a key.
    keys: u32,
}

/// Why a placement key is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum KeyKind {
    Affinity = 1,
    Spread = 2,
}

/// A placement key of a job, as it is counted.
pub(crate) type CountedKey = (KeyKind, JobId, String);

impl Lease {
    fn keys(&self) -> impl Iterator<Item = (KeyKind, &str)> {
        let affinity = self.affinity_key.as_deref();
        let spread = self.spread_key.as_deref();
        let affinity = affinity.map(|key| (KeyKind::Affinity, key));
        affinity
            .into_iter()
            .chain(spread.map(|key| (KeyKind::Spread, key)))
    }
}

impl Usage {
    fn add(&mut self, lease: &Lease) {
        self.actors += 1;
        self.resources = self.resources.plus(&lease.resources);
        self.resources.custom.retain(|_, amount| *amount > 0);
        for share in &lease.gpus {
            let device = share.device as usize;
            if self.gpu_milli.len() <= device {
                self.gpu_milli.resize(device + 1, 0);
            }
            self.gpu_milli[device] += u64::from(share.milli);
        }
    }

    fn subtract(&mut self, lease: &Lease) {
        const COUNTED: &str = "what is given back was counted when it was given";
        self.actors = self.actors.checked_sub(1).expect(COUNTED);
        self.resources = self.resources.minus(&lease.resources).expect(COUNTED);
        self.resources.custom.retain(|_, amount| *amount > 0);
        for share in &lease.gpus {
            let device = self.gpu_milli.get_mut(share.device as usize);
            let used = device.expect(COUNTED);
            *used = used.checked_sub(u64::from(share.milli)).expect(COUNTED);
        }
        while self.gpu_milli.last() == Some(&0) {
            self.gpu_milli.pop();
        }
    }
}

/// What `node` has given away, in order of the actors' ids.
pub(crate) fn of_node(
    reader: &dyn Reader,
    node: NodeId,
) -> impl Iterator<Item = (ActorId, Lease)> + '_ {
    row::scan(reader, LEASES, &node.to_key()).map(|(key, value)| {
        (
            ActorId(row::number_at(&key, 1)),
            row::from_bytes(LEASES, &value),
        )
    })
}

/// The sum of what `node` has given away.
pub(crate) fn usage(reader: &dyn Reader, node: NodeId) -> Usage {
    row::get(reader, USAGE, &node.to_key()).unwrap_or_default()
}

/// How many of `node`'s actors have each placement key, in order of the keys.
pub(crate) fn usage_by_key(
    reader: &dyn Reader,
    node: NodeId,
    usage: &Usage,
) -> Vec<(CountedKey, u32)> {
    if usage.keys == 0 {
        return Vec::new();
    }
    row::scan(reader, USAGE_BY_KEY, &node.to_key())
        .map(|(_, value)| {
            let CountRow {
                is_spread,
                job,
                key,
                actors,
            } = row::from_bytes(USAGE_BY_KEY, &value);
            let kind = match is_spread {
                true => KeyKind::Spread,
                false => KeyKind::Affinity,
            };
            ((kind, job, key), actors)
        })
        .collect()
}

#[derive(Serialize, Deserialize)]
struct CountRow {
    is_spread: bool,
    job: JobId,
    key: String,
    actors: u32,
}

/// Gives an actor what it asked for.
pub(crate) fn grant(txn: &mut dyn Txn, node: NodeId, actor: ActorId, lease: &Lease) {
    row::put(txn, LEASES, &row::pair(node.0, actor.0), lease);
    let mut usage = usage(txn, node);
    usage.add(lease);
    for (kind, key) in lease.keys() {
        if count(txn, node, (kind, lease.job, key), |actors| actors + 1) == 1 {
            usage.keys += 1;
        }
    }
    row::put(txn, USAGE, &node.to_key(), &usage);
}

/// Takes back what an actor had.
pub(crate) fn release(txn: &mut dyn Txn, node: NodeId, actor: ActorId) {
    let key = row::pair(node.0, actor.0);
    let lease: Lease = row::get(txn, LEASES, &key).expect("an actor on a node has a lease there");
    txn.delete(LEASES, &key);
    let mut usage = usage(txn, node);
    usage.subtract(&lease);
    for (kind, key) in lease.keys() {
        if count(txn, node, (kind, lease.job, key), |actors| actors - 1) == 0 {
            usage.keys -= 1;
        }
    }
    if usage == Usage::default() {
        txn.delete(USAGE, &node.to_key());
    } else {
        row::put(txn, USAGE, &node.to_key(), &usage);
    }
}

/// Changes how many of the node's actors have a key; returns the new count.
fn count(
    txn: &mut dyn Txn,
    node: NodeId,
    (kind, job, key): (KeyKind, JobId, &str),
    change: impl Fn(u32) -> u32,
) -> u32 {
    let mut at = node.to_key().to_vec();
    at.push(kind as u8);
    at.extend(job.0.to_be_bytes());
    at.extend(key.as_bytes());
    let before: Option<CountRow> = row::get(txn, USAGE_BY_KEY, &at);
    let actors = change(before.map_or(0, |before| before.actors));
    if actors == 0 {
        txn.delete(USAGE_BY_KEY, &at);
    } else {
        let after = CountRow {
            is_spread: kind == KeyKind::Spread,
            job,
            key: key.to_owned(),
            actors,
        };
        row::put(txn, USAGE_BY_KEY, &at, &after);
    }
    actors
}

/// What the kept sums must be, made anew from the leases: for checks.
pub(crate) fn sums(reader: &dyn Reader, node: NodeId) -> (Usage, BTreeMap<CountedKey, u32>) {
    let mut usage = Usage::default();
    let mut by_key = BTreeMap::new();
    for (_, lease) in of_node(reader, node) {
        usage.add(&lease);
        for (kind, key) in lease.keys() {
            let counted = (kind, lease.job, key.to_owned());
            *by_key.entry(counted).or_default() += 1;
        }
    }
    usage.keys = u32::try_from(by_key.len()).expect("live actors are bounded far below");
    (usage, by_key)
}
