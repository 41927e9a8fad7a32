//! The table of hosts and actors, and the leader's orders. Pure: inputs come in, [`Action`]s come
//! out, and the agent performs them.
//!
//! In which host an actor runs is decided in [`placement`]; what becomes of a host, and what it
//! says, is followed in [`host_life`].
//!
//! Invariants:
//! 1. An incarnation is started once; a repeated start is answered with what became of the first, and
//!    that of an older one with its end.
//! 2. Of one actor only the newest incarnation lives on; an older one is ended when a newer comes.
//! 3. An actor's end is reported once its host said so, or once its process is dead and everything
//!    that it had sent before is read, whichever is first. A GPU actor's end is reported only when
//!    its process is dead, because until then the device is not free.
//! 4. A host without actors is shut down, and killed when it takes too long.

mod host_life;
mod placement;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use mobula_core::exit::ExitReason;
use mobula_core::id::{ActorId, HostId, Incarnation, JobId};
use mobula_core::order::{StartActor, WorkerEvent};
use mobula_core::spec::Program;
use mobula_wire::host::AgentMessage;

use super::action::{Action, Alarm, Key};
use super::devices::{Devices, Share};
use super::ended::Ended;
use super::process::ProcessEnd;
use crate::options::{ACTORS_MAX, STOP_MARGIN_MS};

pub(crate) use placement::SHARED_ACTORS_MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Its host is not ready, or no device is free.
    Pending,
    /// Its host was told to start it.
    Starting,
    /// Its host said that it runs.
    Running,
}

#[derive(Debug)]
struct Placed {
    start: Box<StartActor>,
    /// None while it waits for a GPU.
    host: Option<HostId>,
    phase: Phase,
    stop_requested: bool,
    stop_overdue: bool,
    /// Why it ended, while its process is still to die.
    held_reason: Option<ExitReason>,
}

/// Whose process a host is: those with the same one share it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct SharedKey {
    job: JobId,
    program: Program,
    /// Slots for tasks have processes of their own, for a task may end its process.
    is_for_tasks: bool,
}

/// Why the agent killed a host, in words.
#[derive(Debug)]
enum KillReason {
    /// It never said hello.
    Silent(String),
    /// Somebody had stopped it, and nobody continued it.
    Stopped(String),
}

#[derive(Debug)]
struct Host {
    shared_key: SharedKey,
    is_shared: bool,
    actors: BTreeSet<Key>,
    shares: Vec<Share>,
    pid: Option<u32>,
    call_address: Option<String>,
    connection_closed: bool,
    /// No actor is added any more.
    closing: bool,
    /// Why the agent killed it, where its actors are to say so.
    kill_reason: Option<KillReason>,
    dead: Option<(ProcessEnd, String)>,
}

impl Host {
    fn is_ready(&self) -> bool {
        self.pid.is_some() && self.call_address.is_some()
    }
}

/// The table of hosts and actors.
#[derive(Debug)]
pub(crate) struct Pool {
    hosts: BTreeMap<HostId, Host>,
    shared: BTreeMap<SharedKey, HostId>,
    actors: BTreeMap<Key, Placed>,
    /// Actors that wait for a GPU, in the order of their coming.
    waiting: VecDeque<Key>,
    ended: Ended,
    devices: Devices,
    last_host: u64,
    notice_deadline_ms: Option<u64>,
    is_advised: bool,
    actions: Vec<Action>,
}

impl Pool {
    pub(crate) fn new(devices: Devices) -> Pool {
        Pool {
            hosts: BTreeMap::new(),
            shared: BTreeMap::new(),
            actors: BTreeMap::new(),
            waiting: VecDeque::new(),
            ended: Ended::default(),
            devices,
            last_host: 0,
            notice_deadline_ms: None,
            is_advised: false,
            actions: Vec::new(),
        }
    }

    /// What to do now, in order; taken after each input.
    pub(crate) fn take_actions(&mut self) -> Vec<Action> {
        std::mem::take(&mut self.actions)
    }

    /// How many actors live here.
    pub(crate) fn actor_count(&self) -> usize {
        self.actors.len()
    }

    /// How many actors wait for a GPU.
    pub(crate) fn waiting_count(&self) -> usize {
        self.waiting.len()
    }

    /// Whose code a host runs.
    pub(crate) fn job_of(&self, host: HostId) -> Option<JobId> {
        self.hosts.get(&host).map(|host| host.shared_key.job)
    }

    /// Where a host takes calls, once it has said so.
    pub(crate) fn call_address(&self, host: HostId) -> Option<&str> {
        self.hosts.get(&host)?.call_address.as_deref()
    }

    /// How many hosts there are, dead ones included whose last words are not read yet.
    pub(crate) fn host_count(&self) -> usize {
        self.hosts.len()
    }

    /// Whether there is such a host.
    pub(crate) fn has_host(&self, host: HostId) -> bool {
        self.hosts.contains_key(&host)
    }

    /// The leader wants this incarnation to run.
    pub(crate) fn start(&mut self, start: Box<StartActor>) {
        let (actor, incarnation) = (start.actor, start.incarnation);
        let key = (actor, incarnation);
        if let Some(placed) = self.actors.get(&key) {
            if placed.phase == Phase::Running && placed.held_reason.is_none() {
                self.report_started(key);
            }
            return;
        }
        if let Some((ended, reason)) = self.ended.newest(actor)
            && ended >= incarnation
        {
            let reason = if ended == incarnation {
                reason.clone()
            } else {
                ExitReason::NodeLost
            };
            self.actions.push(Action::Report(exited(key, reason)));
            return;
        }
        let living: Vec<Key> = self
            .actors
            .range((actor, Incarnation(0))..=(actor, Incarnation(u64::MAX)))
            .map(|(k, _)| *k)
            .collect();
        if living.iter().any(|(_, living)| *living > incarnation) {
            // Late, and nobody waits for an answer; or of heads that were restored from a backup, which
            // know nothing of the newer one and would wait for ever.
            let reason = ExitReason::NodeLost;
            self.actions.push(Action::Report(exited(key, reason)));
            return;
        }
        for older in living {
            self.stop(older.0, older.1, 0);
        }
        if self.actors.len() >= ACTORS_MAX {
            let reason = format!("{ACTORS_MAX} actors run on this worker, which is its limit");
            self.finish(key, ExitReason::StartFailed(reason));
            return;
        }
        let gpu_milli = start.spec.resources.gpu_milli;
        if gpu_milli > 0 && !self.devices.could_ever_take(gpu_milli) {
            let reason = format!("asks {gpu_milli} thousandths of a gpu, this worker has fewer");
            self.finish(key, ExitReason::StartFailed(reason));
            return;
        }
        let placed = Placed {
            start,
            host: None,
            phase: Phase::Pending,
            stop_requested: false,
            stop_overdue: false,
            held_reason: None,
        };
        self.actors.insert(key, placed);
        self.place(key);
    }

    /// The leader wants this incarnation to end.
    pub(crate) fn stop(&mut self, actor: ActorId, incarnation: Incarnation, grace_ms: u64) {
        let key = (actor, incarnation);
        let Some(placed) = self.actors.get_mut(&key) else {
            match self.ended.newest(actor) {
                Some((ended, reason)) if ended == incarnation => {
                    let reason = reason.clone();
                    self.actions.push(Action::Report(exited(key, reason)));
                }
                Some((ended, _)) if ended > incarnation => {}
                // It never came here: from now on it will not, and the leader need not wait.
                _ => self.finish(key, ExitReason::Stopped),
            }
            return;
        };
        placed.stop_requested = true;
        match (placed.phase, placed.host) {
            (Phase::Pending, _) | (_, None) => self.end(key, ExitReason::Stopped),
            (_, Some(host)) => {
                let message = AgentMessage::Stop {
                    actor,
                    incarnation,
                    grace_ms,
                };
                self.actions.push(Action::Send(host, message));
                let alarm = Alarm::Stop(key);
                let after_ms = grace_ms.saturating_add(STOP_MARGIN_MS);
                self.actions.push(Action::Wake { after_ms, alarm });
            }
        }
    }

    /// The leader wants nothing but these incarnations: what else lives is ended without grace.
    pub(crate) fn keep_only(&mut self, standing: &[Key]) {
        let standing: BTreeSet<&Key> = standing.iter().collect();
        let unwanted: Vec<Key> = self
            .actors
            .keys()
            .filter(|key| !standing.contains(key))
            .copied()
            .collect();
        for (actor, incarnation) in unwanted {
            self.stop(actor, incarnation, 0);
        }
    }

    /// Ends every actor with `reason` at once, without waiting for its host; the agent kills those.
    pub(crate) fn end_all(&mut self, reason: &ExitReason) -> Vec<HostId> {
        let keys: Vec<Key> = self.actors.keys().copied().collect();
        for key in keys {
            self.actors.remove(&key);
            self.finish(key, reason.clone());
        }
        self.waiting.clear();
        self.shared.clear();
        let hosts = std::mem::take(&mut self.hosts);
        for host in hosts.values() {
            self.devices.give_back(&host.shares);
        }
        hosts.into_keys().collect()
    }

    /// The actor has ended: forget it, remember the end, and see what its host is still for.
    fn end(&mut self, key: Key, reason: ExitReason) {
        let Some(placed) = self.actors.remove(&key) else {
            return;
        };
        self.waiting.retain(|waiting| *waiting != key);
        self.finish(key, placed.held_reason.unwrap_or(reason));
        let Some(id) = placed.host else { return };
        let Some(host) = self.hosts.get_mut(&id) else {
            return;
        };
        host.actors.remove(&key);
        if host.actors.is_empty() {
            self.close_host(id);
        } else {
            self.kill_if_all_overdue(id);
        }
    }

    fn finish(&mut self, key: Key, reason: ExitReason) {
        self.ended.insert(key.0, key.1, reason.clone());
        self.actions.push(Action::Report(exited(key, reason)));
    }
}

fn exited((actor, incarnation): Key, reason: ExitReason) -> WorkerEvent {
    WorkerEvent::ActorExited {
        actor,
        incarnation,
        reason,
    }
}

fn notice_message(deadline_ms: Option<u64>) -> AgentMessage {
    match deadline_ms {
        Some(deadline_ms) => AgentMessage::Notice { deadline_ms },
        None => AgentMessage::NoticeWithdrawn,
    }
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
