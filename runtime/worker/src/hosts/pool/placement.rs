//! In which host an actor runs, and its start there.
//!
//! Ordinary actors of one job and program share a host, and its slots for tasks share another: a
//! task that ends its process takes tasks along, which are executed again, but no actor. A driver,
//! an isolated actor, and one that uses a GPU get a process of their own, because only a process can
//! be killed while a kernel runs.
//!
//! Invariants:
//! 1. An actor is told to start once, and only in a host that is ready.
//! 2. An actor that finds no free device waits without a host. Whenever a host has given its
//!    devices back, those that wait are tried in the order of their coming; one that fits may so
//!    overtake one that does not.

use std::collections::BTreeSet;

use mobula_core::id::HostId;
use mobula_core::order::{StartActor, WorkerEvent};
use mobula_core::spec::ActorKind;
use mobula_wire::host::{AgentMessage, HostRole};

use super::{Host, Phase, Pool, SharedKey, notice_message};
use crate::hosts::action::{Action, Key, Launch};
use crate::hosts::devices::Share;

/// Actors that share a process: beyond this, one process's loss takes too much with it, and the
/// next ones get another. Below what a host itself accepts.
pub(crate) const SHARED_ACTORS_MAX: usize = 8192;

fn shared_key(start: &StartActor) -> SharedKey {
    SharedKey {
        job: start.job,
        program: start.program.clone(),
        is_for_tasks: start.spec.kind.is_task_slot(),
    }
}

impl Pool {
    pub(super) fn place(&mut self, key: Key) {
        let Some(placed) = self.actors.get(&key) else {
            return;
        };
        let start = &placed.start;
        let is_driver = start.spec.kind == ActorKind::Driver;
        let gpu_milli = start.spec.resources.gpu_milli;
        let is_own = is_driver || start.spec.isolated || gpu_milli > 0;
        let shared_key = shared_key(start);
        let host = match self.shared.get(&shared_key) {
            Some(host) if !is_own && self.has_room(*host) => *host,
            _ => {
                let Some(shares) = self.devices.take(gpu_milli) else {
                    self.waiting.push_back(key);
                    return;
                };
                self.launch(key, is_own, shares)
            }
        };
        if let Some(placed) = self.actors.get_mut(&key) {
            placed.host = Some(host);
        }
        if let Some(entry) = self.hosts.get_mut(&host) {
            entry.actors.insert(key);
            let is_ready = entry.is_ready();
            self.actions.push(Action::Logs(key, host));
            if is_ready {
                self.start_in_host(key, host);
            }
        }
    }

    fn has_room(&self, host: HostId) -> bool {
        let host = self.hosts.get(&host);
        host.is_some_and(|host| host.actors.len() < SHARED_ACTORS_MAX)
    }

    fn launch(&mut self, key: Key, is_own: bool, shares: Vec<Share>) -> HostId {
        self.last_host += 1;
        let id = HostId(self.last_host);
        let start = &self.actors.get(&key).expect("the caller found it").start;
        let role = match start.spec.kind {
            ActorKind::Driver => HostRole::Driver {
                actor: start.actor,
                incarnation: start.incarnation,
                args: start.args.clone(),
            },
            ActorKind::Actor { .. } => HostRole::Actors,
        };
        let launch = Launch {
            host: id,
            job: start.job,
            program: start.program.clone(),
            role,
            env: start.env.clone(),
            files: start.files.clone(),
            secrets: start.secrets.clone(),
            resources: is_own.then(|| start.spec.resources.clone()),
            visible_devices: self.devices.visible(&shares),
            owner: is_own.then_some(key),
        };
        let host = Host {
            shared_key: shared_key(start),
            is_shared: !is_own,
            actors: BTreeSet::new(),
            shares,
            pid: None,
            call_address: None,
            connection_closed: false,
            closing: false,
            kill_reason: None,
            dead: None,
        };
        if host.is_shared {
            self.shared.insert(host.shared_key.clone(), id);
        }
        self.hosts.insert(id, host);
        self.actions.push(Action::Launch(Box::new(launch)));
        id
    }

    pub(super) fn place_waiting(&mut self) {
        // Each is tried once; what still finds no device waits again, in the same order.
        for key in std::mem::take(&mut self.waiting) {
            self.place(key);
        }
    }

    pub(super) fn ready_if_complete(&mut self, id: HostId) {
        let Some(host) = self.hosts.get(&id).filter(|host| host.is_ready()) else {
            return;
        };
        if host.closing {
            return;
        }
        let keys: Vec<Key> = host.actors.iter().copied().collect();
        for key in keys {
            self.start_in_host(key, id);
        }
        if self.notice_deadline_ms.is_some() {
            let message = notice_message(self.notice_deadline_ms);
            self.actions.push(Action::Send(id, message));
        }
        if self.is_advised {
            let message = AgentMessage::Advice { stands: true };
            self.actions.push(Action::Send(id, message));
        }
    }

    fn start_in_host(&mut self, key: Key, id: HostId) {
        let Some(placed) = self.actors.get_mut(&key) else {
            return;
        };
        if placed.phase != Phase::Pending {
            return;
        }
        if placed.start.spec.kind == ActorKind::Driver {
            // The process itself is the driver.
            placed.phase = Phase::Running;
            self.report_started(key);
        } else {
            placed.phase = Phase::Starting;
            let message = AgentMessage::Start(placed.start.clone());
            self.actions.push(Action::Send(id, message));
        }
    }

    pub(super) fn report_started(&mut self, (actor, incarnation): Key) {
        let host = self
            .actors
            .get(&(actor, incarnation))
            .and_then(|placed| placed.host);
        let Some(id) = host else { return };
        let Some(host) = self.hosts.get(&id) else {
            return;
        };
        if let (Some(pid), Some(call_address)) = (host.pid, host.call_address.clone()) {
            let event = WorkerEvent::ActorStarted {
                actor,
                incarnation,
                host: id,
                call_address,
                pid,
            };
            self.actions.push(Action::Report(event));
        }
    }
}
