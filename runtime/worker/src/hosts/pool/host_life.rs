//! The life of a host: launched, connected, closing, dead, and settled when all that it had sent is
//! read; and what it says about its actors meanwhile.
//!
//! Invariants, besides those of the [`Pool`] (its 3 and 4 are kept here):
//! 1. A host that closes takes no new actor, and never opens again.
//! 2. A host is forgotten, and its devices are free, only when its process is dead or was never
//!    started; except by `end_all`, whose caller kills the processes itself.
//! 3. A host is killed for an actor that does not stop only when every actor in it is overdue.

use mobula_core::exit::{AGENT_LOST_EXIT_CODE, ExitReason};
use mobula_core::id::{HostId, JobId};
use mobula_core::spec::ActorKind;
use mobula_wire::host::{AgentMessage, HostMessage};

use super::{Host, KillReason, Phase, Pool, notice_message};
use crate::hosts::action::{Action, Alarm, Key};
use crate::hosts::process::ProcessEnd;
use crate::options::{HOST_HELLO_MS_MAX, HOST_SHUTDOWN_MS, STOP_MARGIN_MS};

/// How long the last messages of a dead process may take to be read. They lie in the socket's
/// buffer already; this only bounds a descendant that holds the socket open.
const LAST_WORDS_MS: u64 = 1_000;

impl Pool {
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
            // Answers are for whoever asked, and are taken out before.
            HostMessage::Hello { .. } | HostMessage::Answer { .. } => {}
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

    /// A host's process is stopped and nobody continues it: it is killed, and its actors end of
    /// `reason`. Whose it was, and who lived in it; `None` if it is dead.
    pub(crate) fn kill_stopped(&mut self, id: HostId, reason: String) -> Option<(JobId, Vec<Key>)> {
        let host = self.hosts.get_mut(&id)?;
        if host.dead.is_some() {
            return None;
        }
        host.kill_reason.get_or_insert(KillReason::Stopped(reason));
        let killed = (host.shared_key.job, host.actors.iter().copied().collect());
        self.forbid_new_actors(id);
        self.actions.push(Action::Kill(id));
        Some(killed)
    }

    /// The machine will be gone at this time, or will not.
    pub(crate) fn notice(&mut self, deadline_ms: Option<u64>) {
        if self.notice_deadline_ms == deadline_ms {
            return;
        }
        self.notice_deadline_ms = deadline_ms;
        self.tell_hosts(&notice_message(deadline_ms));
    }

    /// The cloud says that it may take the machine away, or says so no more.
    pub(crate) fn advice(&mut self, stands: bool) {
        if std::mem::replace(&mut self.is_advised, stands) != stands {
            self.tell_hosts(&AgentMessage::Advice { stands });
        }
    }

    /// Tells the hosts where the heads are. One that is being launched has addresses of a moment
    /// ago, and learns better ones from any of them.
    pub(crate) fn heads(&mut self, api_addresses: &[String]) {
        self.tell_hosts(&AgentMessage::Heads {
            api_addresses: api_addresses.to_vec(),
        });
    }

    fn tell_hosts(&mut self, message: &AgentMessage) {
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
                    let reason = format!("host said nothing within {HOST_HELLO_MS_MAX} ms");
                    host.kill_reason = Some(KillReason::Silent(reason));
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

    fn forbid_new_actors(&mut self, id: HostId) {
        let Some(host) = self.hosts.get_mut(&id) else {
            return;
        };
        host.closing = true;
        if self.shared.get(&host.shared_key) == Some(&id) {
            self.shared.remove(&host.shared_key);
        }
    }

    pub(super) fn close_host(&mut self, id: HostId) {
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
    pub(super) fn kill_if_all_overdue(&mut self, id: HostId) {
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
        match (&host.kill_reason, end) {
            (Some(KillReason::Silent(reason)), _) => {
                return ExitReason::StartFailed(with_output(reason.clone()));
            }
            // It may have been continued at the last moment, and have ended otherwise.
            (Some(KillReason::Stopped(reason)), ProcessEnd::Signaled(libc::SIGKILL)) => {
                return ExitReason::Unavailable(reason.clone());
            }
            (Some(KillReason::Stopped(_)) | None, _) => {}
        }
        let is_driver = placed.start.spec.kind == ActorKind::Driver;
        match (is_driver, end) {
            (true, ProcessEnd::Exited(0)) => ExitReason::Completed,
            (true, ProcessEnd::Exited(AGENT_LOST_EXIT_CODE)) => {
                ExitReason::HostExited(AGENT_LOST_EXIT_CODE)
            }
            (true, ProcessEnd::Exited(code)) => {
                ExitReason::Failed(with_output(format!("driver exited with code {code}")))
            }
            (_, ProcessEnd::OutOfMemory(found)) => ExitReason::OutOfMemory {
                limit_bytes: found.limit_bytes,
                used_bytes: found.used_bytes,
            },
            (false, end) if host.call_address.is_none() => {
                ExitReason::StartFailed(with_output(format!("host {end} before it was ready")))
            }
            (false, ProcessEnd::Exited(code)) => ExitReason::HostExited(*code),
            (_, ProcessEnd::Signaled(signal)) => ExitReason::HostSignaled(*signal),
        }
    }
}
