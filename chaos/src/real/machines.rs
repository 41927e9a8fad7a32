//! The machines of a run, and the network between them.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use super::cluster::ClusterError;
use super::disk::Disk;
use super::machine::Machine;
use super::node::{Node, Role};
use super::router::Router;
use super::scenario::Scenario;

/// The network of isolated machines: 10.77.0.0/24, in namespaces that nobody else sees.
const HEADS_FROM: u8 = 1;
const WORKERS_FROM: u8 = 101;
const CLIENTS: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 250);

/// Whether machines have a network of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Isolation {
    /// Each has a network namespace.
    Namespaces,
    /// All share the loopback of this machine.
    Loopback,
}

impl Isolation {
    /// What this user may do on this system.
    #[must_use]
    pub fn available() -> Isolation {
        match Machine::isolated(CLIENTS) {
            Ok(_) => Isolation::Namespaces,
            Err(_) => Isolation::Loopback,
        }
    }
}

/// Machines, made but empty: what must not be done on a thread that serves others.
pub(super) struct Machines {
    pub(super) clients: Machine,
    pub(super) heads: Vec<Node>,
    pub(super) workers: Vec<Node>,
    pub(super) router: Option<Router>,
}

impl Machines {
    /// Makes all of a scenario's machines, disks and the network between them.
    pub(super) fn make(
        scenario: &Scenario,
        isolation: Isolation,
        seed: u64,
        program: &Path,
        dir: &Path,
    ) -> Result<Machines, ClusterError> {
        let mut cards: BTreeMap<Ipv4Addr, File> = BTreeMap::new();
        let mut machine = |address: Ipv4Addr| -> Result<Machine, ClusterError> {
            if isolation == Isolation::Loopback {
                return Ok(Machine::shared()?);
            }
            let (machine, card) = Machine::isolated(address)?;
            cards.insert(address, card);
            Ok(machine)
        };
        let clients = machine(CLIENTS)?;
        let mut make = |role: Role, number: u32| -> Result<Node, ClusterError> {
            let (word, from) = match role {
                Role::Head => ("head", HEADS_FROM),
                Role::Worker => ("worker", WORKERS_FROM),
            };
            let name = format!("{word}-{number}");
            // A scenario has so few machines that this never leaves its range.
            let host = from + u8::try_from(number - 1).unwrap_or(u8::MAX - from);
            let machine = machine(Ipv4Addr::new(10, 77, 0, host))?;
            let data_dir = dir.join(&name);
            std::fs::create_dir_all(&data_dir).map_err(|reason| ClusterError::File {
                path: data_dir.clone(),
                reason,
            })?;
            let disk = match (role, scenario.cluster.head_disk_mib) {
                (Role::Head, Some(mib)) => {
                    let image = dir.join(format!("{name}.img"));
                    Some(Disk::mount(&machine, image, data_dir, mib)?)
                }
                _ => None,
            };
            Ok(Node::new(name, role, program, dir, machine, disk))
        };
        let heads = (1..=scenario.cluster.heads).map(|n| make(Role::Head, n));
        let heads = heads.collect::<Result<Vec<_>, _>>()?;
        let workers = (1..=scenario.cluster.workers).map(|n| make(Role::Worker, n));
        let workers = workers.collect::<Result<Vec<_>, _>>()?;
        let router = match isolation {
            Isolation::Loopback => None,
            Isolation::Namespaces => {
                let started = Router::start(seed, cards);
                Some(started.map_err(|reason| ClusterError::File {
                    path: PathBuf::from("/dev/net/tun"),
                    reason,
                })?)
            }
        };
        Ok(Machines {
            clients,
            heads,
            workers,
            router,
        })
    }

    /// The machine on which the workload's clients are.
    pub(super) fn clients(&self) -> &Machine {
        &self.clients
    }
}
