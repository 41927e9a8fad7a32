//! The agent's processes: launched, connected, certified, watched, killed.
//!
//! Invariants:
//! 1. Every process that was started is watched until the kernel has said how it ended.
//! 2. Who connects as a host is believed only if its process id is that of the process that was
//!    launched.

use std::time::Duration;

use mobula_core::id::{HostId, Incarnation};
use mobula_core::span::Span;
use mobula_wire::host::AgentMessage;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{Agent, Input};
use crate::hosts::action::{Key, Launch};
use crate::hosts::connection::Connected;
use crate::hosts::launcher::Launched;
use crate::hosts::process::{HostProcess, ProcessEnd};
use crate::hosts::renewal::HostCertificate;
use crate::hosts::stopped::Look;
use crate::spans::now_us;

/// A killed process is dead within milliseconds; one that the kernel cannot end yet (it waits for a
/// device or a network disk) must not hold up the agent for ever.
const KILL_WAIT: Duration = Duration::from_secs(5);

/// Actors that one line of the log names.
const NAMES_MAX: usize = 16;

impl Agent {
    pub(super) fn handle_connected(&mut self, connected: Connected) {
        let host = connected.host;
        let Some(process) = self.processes.get(&host) else {
            if self.pool.has_host(host) && !self.early.contains_key(&host) {
                self.early.insert(host, connected);
            }
            return;
        };
        if !connected.pids.contains(&process.pid()) || self.streams.contains_key(&host) {
            tracing::warn!(%host, "refused a process that says it is this host");
            return;
        }
        if connected.accept.send(()).is_ok() {
            self.streams.insert(host, connected.messages);
            self.pool.connected(host, connected.call_address);
        }
    }

    pub(super) fn handle_launched(&mut self, host: HostId, result: Result<Launched, String>) {
        self.launched(host, result.is_ok());
        match result {
            Ok(Launched {
                process,
                certificate,
            }) if self.pool.has_host(host) => {
                self.renewals.hold(host, certificate);
                let pid = process.pid();
                tracing::info!(%host, pid, "host started");
                self.processes.insert(host, process.clone());
                self.watch(host, process);
                self.pool.launched(host, pid);
            }
            Ok(Launched {
                process: unwanted, ..
            }) => {
                // Its actors ended, or the node became another incarnation, while it started.
                unwanted.kill();
                self.watch(host, unwanted);
            }
            Err(reason) => {
                tracing::warn!(%host, reason, "host could not be started");
                self.forget(host);
                self.logs.close(host);
                self.pool.launch_failed(host, &reason);
            }
        }
        if let Some(connected) = self.early.remove(&host) {
            self.handle_connected(connected);
        }
    }

    pub(super) fn renew_due(&mut self) {
        while let Some((host, certificate)) = self.renewals.take_due(Instant::now()) {
            let (launcher, to_self) = (self.launcher.clone(), self.to_self.clone());
            self.tasks.spawn(async move {
                let result = launcher.renew(host, certificate).await;
                // Nobody needs a certificate when the agent has ended.
                let _ = to_self.send(Input::HostCertified(host, result)).await;
            });
        }
    }

    pub(super) fn handle_certified(
        &mut self,
        host: HostId,
        result: Result<HostCertificate, String>,
    ) {
        if !self.processes.contains_key(&host) {
            return;
        }
        let told = result.and_then(|certificate| {
            let stream = self.streams.get(&host).ok_or("it is not connected yet")?;
            let certificate_pem = certificate.credentials.certificate_pem().to_owned();
            stream
                .try_send(AgentMessage::Certificate { certificate_pem })
                .map_err(|_| "it does not read its messages")?;
            Ok(certificate)
        });
        match told {
            Ok(certificate) => self.renewals.hold(host, certificate),
            Err(reason) => {
                tracing::warn!(%host, reason, "the host has no next certificate yet");
                self.renewals.failed(host);
            }
        }
    }

    pub(super) fn handle_died(&mut self, host: HostId, end: ProcessEnd) {
        // A group's kill counts only for a process that a kill ended.
        let end = match (end, self.launcher.limits.leave(host)) {
            (ProcessEnd::Signaled(libc::SIGKILL), Some(found)) => ProcessEnd::OutOfMemory(found),
            (end, _) => end,
        };
        tracing::info!(%host, %end, "host ended");
        let certificate = self.renewals.forget(host);
        // One that exits well has said farewell.
        if end != ProcessEnd::Exited(0)
            && let Some(certificate) = certificate
            && let Some(address) = self.pool.call_address(host)
        {
            self.graves.raise(host, address, &certificate.credentials);
        }
        self.forget(host);
        self.metrics.ended_host(match end {
            ProcessEnd::Exited(0) => "exited",
            ProcessEnd::Exited(_) => "failed",
            ProcessEnd::Signaled(_) => "signaled",
            ProcessEnd::OutOfMemory(_) => "out_of_memory",
        });
        let last_output = self.logs.tail(host);
        self.logs.close(host);
        self.pool.died(host, end, last_output);
    }

    pub(super) fn forget(&mut self, host: HostId) {
        let launcher = self.launcher.clone();
        self.tasks.spawn(async move { launcher.forget(host).await });
    }

    /// A launch is over: what it took is kept.
    pub(super) fn launched(&mut self, host: HostId, is_started: bool) {
        let Some((job, start_us)) = self.launching.remove(&host) else {
            return;
        };
        let end_us = now_us();
        if is_started {
            let seconds = end_us.saturating_sub(start_us) as f64 / 1e6;
            self.metrics.started_host(seconds);
        } else {
            self.metrics.failed_launch();
        }
        let span = Span::new("launch a process", "host", job, start_us, end_us);
        self.spans.push(span.with("host", host.to_string()));
    }

    pub(super) fn launch(&mut self, launch: Launch) {
        let Some(welcome) = self.welcome.clone() else {
            // Only orders lead to launches, and orders come after a welcome.
            self.pool
                .launch_failed(launch.host, "the worker has no session yet");
            return;
        };
        self.launching.insert(launch.host, (launch.job, now_us()));
        let incarnation: Incarnation = welcome.incarnation;
        let log = self
            .logs
            .assign(launch.host, launch.job, launch.owner, incarnation);
        let (launcher, to_self) = (self.launcher.clone(), self.to_self.clone());
        self.tasks.spawn(async move {
            let result = launcher.launch(&launch, &welcome, &log).await;
            // If the agent has ended, dropping the spawner kills the process.
            let _ = to_self.send(Input::HostLaunched(launch.host, result)).await;
        });
    }

    pub(super) fn watch(&mut self, host: HostId, process: HostProcess) {
        let to_self = self.to_self.clone();
        self.tasks.spawn(async move {
            let end = process.wait().await.unwrap_or_else(|error| {
                tracing::error!(%host, %error, "cannot wait for a host; killing it");
                process.kill();
                ProcessEnd::Signaled(libc::SIGKILL)
            });
            // Nobody needs to know when the agent has ended.
            let _ = to_self.send(Input::HostDied(host, end)).await;
        });
    }

    /// Looks at every process, and kills those that somebody stopped and nobody continues.
    pub(super) fn kill_stopped(&mut self) {
        let Some(limit) = self.stopped.limit() else {
            return;
        };
        let looks = self.processes.iter().filter_map(|(host, process)| {
            let look = Look::at(process.pid())?;
            Some((*host, look))
        });
        for (host, stopped_for) in self.stopped.look(Instant::now(), looks) {
            let (limit_ms, stopped_s) = (limit.as_millis(), stopped_for.as_secs_f64());
            let reason = format!(
                "its process was stopped (SIGSTOP or job control) for {stopped_s:.0} s and not \
                 continued, so its worker killed it; worker.stopped_process_limit_ms is {limit_ms}"
            );
            let Some((job, actors)) = self.pool.kill_stopped(host, reason) else {
                continue;
            };
            self.metrics.killed_stopped_host();
            let (actors, stopped_ms) = (names_of(&actors), stopped_for.as_millis());
            tracing::warn!(
                %host, %job, actors, stopped_ms, limit_ms,
                "killing a host process that somebody stopped (SIGSTOP or job control) and nobody \
                 continued, so that its actors are started again; worker.stopped_process_limit_ms \
                 sets the limit, and 0 lets stopped processes be"
            );
        }
    }

    pub(super) fn kill_one(&self, host: HostId) {
        if let Some(process) = self.processes.get(&host) {
            process.kill();
        }
    }

    /// Kills hosts and waits until they are dead.
    pub(super) async fn kill(&mut self, hosts: &[HostId]) {
        let mut waits = JoinSet::new();
        for host in hosts {
            self.streams.remove(host);
            self.early.remove(host);
            self.renewals.forget(*host);
            self.logs.close(*host);
            if let Some(process) = self.processes.remove(host) {
                process.kill();
                waits.spawn(async move { process.wait().await });
            }
        }
        let all_dead = async { while waits.join_next().await.is_some() {} };
        if tokio::time::timeout(KILL_WAIT, all_dead).await.is_err() {
            tracing::error!("a killed host is still not dead; its incarnation fences it");
        }
    }
}

/// The first of them, and how many more there are.
fn names_of(actors: &[Key]) -> String {
    let first = actors.iter().take(NAMES_MAX);
    let mut names: Vec<String> = first
        .map(|(actor, incarnation)| format!("{actor}{incarnation}"))
        .collect();
    if actors.len() > NAMES_MAX {
        names.push(format!("{} more", actors.len() - NAMES_MAX));
    }
    names.join(", ")
}
