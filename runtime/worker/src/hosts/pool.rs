//! Which actor runs in which host process. Pure: inputs come in, [`Action`]s come out, and the
//! agent performs them.
//!
//! Ordinary actors of one job and program share a host. A driver, an isolated actor, and one that
//! uses a GPU get a process of their own, because only a process can be killed while a kernel runs.
//!
//! Invariants:
//! 1. An incarnation is started once; a repeated start is answered with what became of the first.
//! 2. Of one actor only the newest incarnation lives on; an older one is ended when a newer comes.
//! 3. An actor's end is reported once its host said so, or once its process is dead and everything
//!    that it had sent before is read, whichever is first. A GPU actor's end is reported only when
//!    its process is dead, because until then the device is not free.
//! 4. A host without actors is shut down, and killed when it takes too long.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use mobula_core::exit::ExitReason;
use mobula_core::id::{ActorId, HostId, Incarnation, JobId};
use mobula_core::order::{StartActor, WorkerEvent};
use mobula_core::spec::{ActorKind, Program};
use mobula_wire::host::{AgentMessage, HostMessage, HostRole};

use super::action::{Action, Alarm, Key, Launch};
use super::devices::{Devices, Share};
use super::ended::Ended;
use super::process::ProcessEnd;
use crate::options::{ACTORS_MAX, HOST_HELLO_MS_MAX, HOST_SHUTDOWN_MS, STOP_MARGIN_MS};

/// How long the last messages of a dead process may take to be read. They lie in the socket's
/// buffer already; this only bounds a descendant that holds the socket open.
const LAST_WORDS_MS: u64 = 1_000;

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

#[derive(Debug)]
struct Host {
    job: JobId,
    program: Program,
    is_shared: bool,
    actors: BTreeSet<Key>,
    shares: Vec<Share>,
    pid: Option<u32>,
    call_address: Option<String>,
    connection_closed: bool,
    /// No actor is added any more.
    closing: bool,
    /// Why the agent killed it, if it did.
    kill_reason: Option<String>,
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
    shared: BTreeMap<(JobId, Program), HostId>,
    actors: BTreeMap<Key, Placed>,
    /// Actors that wait for a GPU, first come first served.
    waiting: VecDeque<Key>,
    ended: Ended,
    devices: Devices,
    last_host: u64,
    notice_deadline_ms: Option<u64>,
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
            if ended == incarnation {
                let reason = reason.clone();
                self.actions.push(Action::Report(exited(key, reason)));
            }
            return;
        }
        let living: Vec<Key> = self
            .actors
            .range((actor, Incarnation(0))..=(actor, Incarnation(u64::MAX)))
            .map(|(k, _)| *k)
            .collect();
        if living.iter().any(|(_, living)| *living > incarnation) {
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

    /// A host's process was started.
    pub(crate) fn launched(&mut self, id: HostId, pid: u32) {
        let Some(host) = self.hosts.get_mut(&id) else {
            return;
        };
        host.pid = Some(pid);
        if host.closing {
            self.actions.push(Action::Kill(id));
            return;
        }
        let alarm = Alarm::Hello(id);
        self.actions.push(Action::Wake {
            after_ms: HOST_HELLO_MS_MAX,
            alarm,
        });
        self.ready_if_complete(id);
    }

    /// A host's process was not started.
    pub(crate) fn launch_failed(&mut self, id: HostId, reason: &str) {
        let Some(host) = self.remove_host(id) else {
            return;
        };
        for key in host.actors {
            self.end(key, ExitReason::StartFailed(reason.to_owned()));
        }
        self.place_waiting();
    }

    /// A host said hello.
    pub(crate) fn connected(&mut self, id: HostId, call_address: String) {
        let Some(host) = self.hosts.get_mut(&id) else {
            return;
        };
        host.call_address = Some(call_address);
        self.ready_if_complete(id);
    }

    /// A host says something about an actor of its own.
    pub(crate) fn message(&mut self, id: HostId, message: HostMessage) {
        match message {
            HostMessage::Hello { .. } => {}
            HostMessage::Started { actor, incarnation } => {
                let key = (actor, incarnation);
                if let Some(placed) = self.actors.get_mut(&key)
                    && placed.host == Some(id)
                    && placed.phase == Phase::Starting
                {
                    placed.phase = Phase::Running;
                    self.report_started(key);
                }
            }
            HostMessage::Exited {
                actor,
                incarnation,
                reason,
            } => {
                let key = (actor, incarnation);
                let Some(placed) = self.actors.get_mut(&key).filter(|p| p.host == Some(id)) else {
                    return;
                };
                let holds_device = placed.start.spec.resources.gpu_milli > 0;
                if holds_device && self.hosts.get(&id).is_some_and(|host| host.dead.is_none()) {
                    placed.held_reason.get_or_insert(reason);
                    self.close_host(id);
                } else {
                    self.end(key, reason);
                }
            }
        }
    }

    /// A host closed its connection.
    pub(crate) fn disconnected(&mut self, id: HostId) {
        let Some(host) = self.hosts.get_mut(&id) else {
            return;
        };
        host.connection_closed = true;
        if host.dead.is_some() {
            self.settle(id);
        } else {
            // It should be dying. One that lives without its agent could not be stopped any more.
            self.forbid_new_actors(id);
            let alarm = Alarm::Shutdown(id);
            self.actions.push(Action::Wake {
                after_ms: HOST_SHUTDOWN_MS,
                alarm,
            });
        }
    }

    /// A host's process died; `last_output` is the end of its log.
    pub(crate) fn died(&mut self, id: HostId, end: ProcessEnd, last_output: String) {
        let Some(host) = self.hosts.get_mut(&id) else {
            return;
        };
        host.dead = Some((end, last_output));
        let all_is_read = host.connection_closed;
        self.forbid_new_actors(id);
        if all_is_read {
            self.settle(id);
        } else {
            let alarm = Alarm::LastWords(id);
            self.actions.push(Action::Wake {
                after_ms: LAST_WORDS_MS,
                alarm,
            });
        }
    }

    /// The machine will be gone at this time, or will not.
    pub(crate) fn notice(&mut self, deadline_ms: Option<u64>) {
        if self.notice_deadline_ms == deadline_ms {
            return;
        }
        self.notice_deadline_ms = deadline_ms;
        let message = notice_message(deadline_ms);
        for (id, host) in &self.hosts {
            if host.is_ready() && host.dead.is_none() {
                self.actions.push(Action::Send(*id, message.clone()));
            }
        }
    }

    /// Something is due; it may have happened meanwhile.
    pub(crate) fn alarm(&mut self, alarm: Alarm) {
        match alarm {
            Alarm::Hello(id) => {
                let Some(host) = self.hosts.get_mut(&id) else {
                    return;
                };
                if host.call_address.is_none() && host.dead.is_none() {
                    host.kill_reason =
                        Some(format!("host said nothing within {HOST_HELLO_MS_MAX} ms"));
                    self.forbid_new_actors(id);
                    self.actions.push(Action::Kill(id));
                }
            }
            Alarm::Stop(key) => {
                let Some(placed) = self.actors.get_mut(&key) else {
                    return;
                };
                placed.stop_overdue = true;
                if let Some(host) = placed.host {
                    self.kill_if_all_overdue(host);
                }
            }
            Alarm::Shutdown(id) => {
                if self
                    .hosts
                    .get(&id)
                    .is_some_and(|host| host.closing && host.dead.is_none())
                {
                    self.actions.push(Action::Kill(id));
                }
            }
            Alarm::LastWords(id) => {
                if self.hosts.get(&id).is_some_and(|host| host.dead.is_some()) {
                    self.settle(id);
                }
            }
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

    fn place(&mut self, key: Key) {
        let Some(placed) = self.actors.get(&key) else {
            return;
        };
        let start = &placed.start;
        let is_driver = start.spec.kind == ActorKind::Driver;
        let gpu_milli = start.spec.resources.gpu_milli;
        let is_own = is_driver || start.spec.isolated || gpu_milli > 0;
        let shared_key = (start.job, start.program.clone());
        let host = match self.shared.get(&shared_key) {
            Some(host) if !is_own => *host,
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
            visible_devices: self.devices.visible(&shares),
            owner: is_own.then_some(key),
        };
        let host = Host {
            job: start.job,
            program: start.program.clone(),
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
            self.shared.insert((host.job, host.program.clone()), id);
        }
        self.hosts.insert(id, host);
        self.actions.push(Action::Launch(Box::new(launch)));
        id
    }

    fn ready_if_complete(&mut self, id: HostId) {
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

    fn report_started(&mut self, (actor, incarnation): Key) {
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

    fn forbid_new_actors(&mut self, id: HostId) {
        let Some(host) = self.hosts.get_mut(&id) else {
            return;
        };
        host.closing = true;
        let shared_key = (host.job, host.program.clone());
        if self.shared.get(&shared_key) == Some(&id) {
            self.shared.remove(&shared_key);
        }
    }

    fn close_host(&mut self, id: HostId) {
        let Some(host) = self.hosts.get(&id) else {
            return;
        };
        if host.closing {
            return;
        }
        let (is_ready, is_started, is_dead) =
            (host.is_ready(), host.pid.is_some(), host.dead.is_some());
        self.forbid_new_actors(id);
        if is_dead {
            return;
        }
        if is_ready {
            let message = AgentMessage::Shutdown {
                grace_ms: HOST_SHUTDOWN_MS,
            };
            self.actions.push(Action::Send(id, message));
            let after_ms = HOST_SHUTDOWN_MS + STOP_MARGIN_MS;
            let alarm = Alarm::Shutdown(id);
            self.actions.push(Action::Wake { after_ms, alarm });
        } else if is_started {
            self.actions.push(Action::Kill(id));
        }
    }

    /// A host can be killed for actors that do not stop only when no other actor is in it.
    fn kill_if_all_overdue(&mut self, id: HostId) {
        let Some(host) = self.hosts.get(&id).filter(|host| host.dead.is_none()) else {
            return;
        };
        let is_overdue = |key: &Key| self.actors.get(key).is_some_and(|p| p.stop_overdue);
        if host.actors.iter().all(is_overdue) {
            self.forbid_new_actors(id);
            self.actions.push(Action::Kill(id));
        }
    }

    fn remove_host(&mut self, id: HostId) -> Option<Host> {
        self.forbid_new_actors(id);
        let host = self.hosts.remove(&id)?;
        self.devices.give_back(&host.shares);
        Some(host)
    }

    /// The dead host is forgotten, and so are the actors whose end it did not tell of.
    fn settle(&mut self, id: HostId) {
        let Some(host) = self.remove_host(id) else {
            return;
        };
        for key in &host.actors {
            let reason = self.reason_of_death(*key, &host);
            self.end(*key, reason);
        }
        self.place_waiting();
    }

    fn reason_of_death(&self, key: Key, host: &Host) -> ExitReason {
        let Some((end, last_output)) = &host.dead else {
            return ExitReason::NodeLost;
        };
        let Some(placed) = self.actors.get(&key) else {
            return ExitReason::Stopped;
        };
        if placed.stop_requested {
            return ExitReason::Stopped;
        }
        let with_output = |what: String| match last_output.is_empty() {
            true => format!("{what}, with no output"),
            false => format!("{what}; its last output: {last_output}"),
        };
        if let Some(reason) = &host.kill_reason {
            return ExitReason::StartFailed(with_output(reason.clone()));
        }
        let is_driver = placed.start.spec.kind == ActorKind::Driver;
        match (is_driver, end) {
            (true, ProcessEnd::Exited(0)) => ExitReason::Completed,
            (true, ProcessEnd::Exited(code)) => {
                ExitReason::Failed(with_output(format!("driver exited with code {code}")))
            }
            (false, end) if host.call_address.is_none() => {
                ExitReason::StartFailed(with_output(format!("host {end} before it was ready")))
            }
            (false, ProcessEnd::Exited(code)) => ExitReason::HostExited(*code),
            (_, ProcessEnd::Signaled(signal)) => ExitReason::HostSignaled(*signal),
        }
    }

    fn place_waiting(&mut self) {
        // Each is tried once; what still finds no device waits again, in the same order.
        for key in std::mem::take(&mut self.waiting) {
            self.place(key);
        }
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
