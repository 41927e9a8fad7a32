//! Faults on processes of this machine: kill, stop and continue.
//!
//! Invariants:
//! 1. A [`Target`] is one process for ever. It holds a pidfd, so a signal goes to that process or
//!    to nobody; and the start time that it is adopted with is compared after the pidfd is open, so
//!    a process id that was given to another process in between is refused.
//! 2. A [`Paused`] process is continued when its guard goes, also when a test panics.

use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Why a fault could not be put onto a process.
#[derive(Debug, thiserror::Error)]
pub enum FaultError {
    /// There is no such process, or it has ended.
    #[error("process {pid} is not there (any more): it cannot be hurt")]
    Gone {
        /// The process id.
        pid: u32,
    },
    /// Another process has this id now.
    #[error(
        "process {pid} was started at tick {found}, and the one meant at tick {expected}: the id \
         was given away, and nothing was done"
    )]
    Reused {
        /// The process id.
        pid: u32,
        /// When the one meant was started, in clock ticks since boot.
        expected: u64,
        /// When the one that is there was started.
        found: u64,
    },
    /// The kernel refused.
    #[error("the kernel refuses {what} for process {pid}: {reason}")]
    Refused {
        /// What was asked.
        what: &'static str,
        /// The process id.
        pid: u32,
        /// The kernel's reason.
        reason: Errno,
    },
    /// The process did not end in time.
    #[error("process {pid} still runs {} ms after it was asked to end", waited.as_millis())]
    StillRuns {
        /// The process id.
        pid: u32,
        /// How long it was waited for.
        waited: Duration,
    },
}

/// When a process was started, in clock ticks since boot (field 22 of `/proc/PID/stat`, proc(5));
/// `None` where there is no such process, or only its zombie.
#[must_use]
pub fn start_time_of(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, so fields are counted behind its end.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    match *fields.first()? {
        "Z" | "X" => None,
        _ => fields.get(19)?.parse().ok(),
    }
}

/// One process, whatever becomes of its id.
#[derive(Debug)]
pub struct Target {
    pid: u32,
    start_time: u64,
    pidfd: OwnedFd,
}

impl Target {
    /// The process that has this id now, say one that the caller has just started.
    pub fn running(pid: u32) -> Result<Self, FaultError> {
        let start_time = start_time_of(pid).ok_or(FaultError::Gone { pid })?;
        Target::adopt(pid, start_time)
    }

    /// The process with this id that was started at this time, as `cluster.json` records it.
    pub fn adopt(pid: u32, start_time: u64) -> Result<Self, FaultError> {
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let opened = pidfd_open(raw.ok_or(FaultError::Gone { pid })?, PidfdFlags::empty());
        let pidfd = opened.map_err(|reason| match reason {
            Errno::SRCH => FaultError::Gone { pid },
            _ => FaultError::Refused {
                what: "a pidfd",
                pid,
                reason,
            },
        })?;
        // Only now: from here on the process cannot be replaced behind the descriptor.
        let found = start_time_of(pid).ok_or(FaultError::Gone { pid })?;
        if found != start_time {
            return Err(FaultError::Reused {
                pid,
                expected: start_time,
                found,
            });
        }
        Ok(Target {
            pid,
            start_time,
            pidfd,
        })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// When it was started, in clock ticks since boot.
    #[must_use]
    pub fn start_time(&self) -> u64 {
        self.start_time
    }

    /// Whether it runs; a stopped process counts, a zombie does not.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        start_time_of(self.pid) == Some(self.start_time)
    }

    /// Kills it with SIGKILL.
    pub fn kill(&self) -> Result<(), FaultError> {
        self.signal("SIGKILL", Signal::KILL)
    }

    /// Asks it to end with SIGTERM.
    pub fn terminate(&self) -> Result<(), FaultError> {
        self.signal("SIGTERM", Signal::TERM)
    }

    /// Stops it with SIGSTOP until the guard goes: it keeps its sockets and says nothing.
    pub fn pause(&self) -> Result<Paused<&Target>, FaultError> {
        Target::pause_held(self)
    }

    /// The same with a guard that holds the process as its caller does, say by an `Arc`.
    pub fn pause_held<T: Deref<Target = Target>>(held: T) -> Result<Paused<T>, FaultError> {
        held.signal("SIGSTOP", Signal::STOP)?;
        Ok(Paused { target: held })
    }

    /// Waits until it has ended.
    pub fn wait_until_gone(&self, limit: Duration) -> Result<(), FaultError> {
        let still_runs = || FaultError::StillRuns {
            pid: self.pid,
            waited: limit,
        };
        let timeout = Timespec::try_from(limit).map_err(|_| still_runs())?;
        // A pidfd becomes readable when its process ends.
        match poll(
            &mut [PollFd::new(&self.pidfd, PollFlags::IN)],
            Some(&timeout),
        ) {
            Ok(0) => Err(still_runs()),
            Ok(_) => Ok(()),
            Err(reason) => Err(FaultError::Refused {
                what: "to wait",
                pid: self.pid,
                reason,
            }),
        }
    }

    fn signal(&self, what: &'static str, signal: Signal) -> Result<(), FaultError> {
        pidfd_send_signal(&self.pidfd, signal).map_err(|reason| match reason {
            Errno::SRCH => FaultError::Gone { pid: self.pid },
            _ => FaultError::Refused {
                what,
                pid: self.pid,
                reason,
            },
        })
    }
}

/// A process that is stopped for as long as this lives.
#[derive(Debug)]
#[must_use = "the process goes on as soon as this is dropped"]
pub struct Paused<T: Deref<Target = Target>> {
    target: T,
}

impl<T: Deref<Target = Target>> Paused<T> {
    /// Lets it go on.
    pub fn resume(self) {
        drop(self);
    }
}

impl<T: Deref<Target = Target>> Drop for Paused<T> {
    fn drop(&mut self) {
        // It may have been killed meanwhile: then there is nothing to continue.
        let _ = self.target.signal("SIGCONT", Signal::CONT);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Child, Command, Stdio};

    const LIMIT: Duration = Duration::from_secs(20);

    /// A process that repeats what it is told.
    fn echo() -> Child {
        Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    }

    fn state_of(pid: u32) -> String {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let (_, fields) = stat.rsplit_once(')').unwrap();
        fields.split_whitespace().next().unwrap().to_owned()
    }

    fn wait_for_state(pid: u32, accept: impl Fn(&str) -> bool) {
        let deadline = std::time::Instant::now() + LIMIT;
        while !accept(&state_of(pid)) {
            assert!(std::time::Instant::now() < deadline, "{}", state_of(pid));
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_killed_process_is_gone_and_cannot_be_hurt_again() {
        let mut child = echo();
        let target = Target::running(child.id()).unwrap();
        assert!(target.is_alive());
        let error = target.wait_until_gone(Duration::ZERO).unwrap_err();
        assert!(matches!(error, FaultError::StillRuns { .. }), "{error}");
        target.kill().unwrap();
        target.wait_until_gone(LIMIT).unwrap();
        child.wait().unwrap();
        assert!(!target.is_alive());
        let error = target.kill().unwrap_err();
        assert!(matches!(error, FaultError::Gone { .. }), "{error}");
        assert!(Target::running(child.id()).is_err());
    }

    #[test]
    fn a_paused_process_goes_on_when_the_guard_goes() {
        let mut child = echo();
        let target = Target::running(child.id()).unwrap();
        let paused = target.pause().unwrap();
        wait_for_state(child.id(), |state| state == "T");
        assert!(target.is_alive());
        paused.resume();
        let mut input = child.stdin.take().unwrap();
        writeln!(input, "still here").unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        assert_eq!(line, "still here\n");
        target.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn another_process_under_the_same_id_is_left_alone() {
        let mut child = echo();
        let started = start_time_of(child.id()).unwrap();
        let error = Target::adopt(child.id(), started + 1).unwrap_err();
        assert!(matches!(error, FaultError::Reused { .. }), "{error}");
        let target = Target::adopt(child.id(), started).unwrap();
        assert!(target.is_alive());
        target.kill().unwrap();
        child.wait().unwrap();
    }
}
