//! Machines: each has, where this process may make them, a network and mounts of its own.
//!
//! A machine is a thread. It leaves the network and mount namespaces of this process, and what it
//! starts inherits its own.
//!
//! Invariants:
//! 1. Nothing of a machine outlives it or this process, however that ends: its namespaces have no
//!    names and go with their last process, and its processes are killed by the kernel when the
//!    thread that started them ends.
//! 2. Work on one machine is done one piece after the other.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use super::device;

/// Pieces of work that may wait: whoever asks for one waits for its answer, so few.
const WORK_WAITING_MAX: usize = 16;

type Work = Box<dyn FnOnce() + Send>;

/// A place where processes run.
#[derive(Debug)]
pub struct Machine {
    address: Ipv4Addr,
    work: Option<SyncSender<Work>>,
    thread: Option<JoinHandle<()>>,
}

/// Why a machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The kernel refused something.
    #[error("no namespaces and no network device can be made here ({what}: {reason}): run as root")]
    Refused {
        /// Which step.
        what: &'static str,
        /// The kernel's reason.
        reason: io::Error,
    },
    /// No thread.
    #[error("no thread can be started for a machine: {0}")]
    Thread(io::Error),
}

impl Machine {
    /// A machine that shares this one's network, at its loopback address.
    pub fn shared() -> Result<Machine, MachineError> {
        Ok(Machine::start(Ipv4Addr::LOCALHOST, || Ok(()))?.0)
    }

    /// A machine of its own at `address`, and its network card.
    pub fn isolated(address: Ipv4Addr) -> Result<(Machine, File), MachineError> {
        Machine::start(address, move || {
            let refused = |what| move |reason| MachineError::Refused { what, reason };
            leave_namespaces().map_err(refused("unshare"))?;
            device::open(address).map_err(refused("/dev/net/tun"))
        })
    }

    fn start<T: Send + 'static>(
        address: Ipv4Addr,
        prepare: impl FnOnce() -> Result<T, MachineError> + Send + 'static,
    ) -> Result<(Machine, T), MachineError> {
        let (work, queue) = sync_channel::<Work>(WORK_WAITING_MAX);
        let (prepared, is_prepared) = sync_channel(1);
        let thread = std::thread::Builder::new()
            .name(format!("machine {address}"))
            .spawn(move || {
                let outcome = prepare();
                let is_ready = outcome.is_ok();
                if prepared.send(outcome).is_ok() && is_ready {
                    for piece in queue {
                        piece();
                    }
                }
            })
            .map_err(MachineError::Thread)?;
        let value = is_prepared
            .recv()
            .expect("a machine says how its preparation went")?;
        let machine = Machine {
            address,
            work: Some(work),
            thread: Some(thread),
        };
        Ok((machine, value))
    }

    /// Where the others reach it.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Does something on the machine: with its network and its mounts. Waits for the answer.
    pub fn run<T: Send + 'static>(&self, piece: impl FnOnce() -> T + Send + 'static) -> T {
        let (answer, answered) = sync_channel(1);
        let work = self.work.as_ref().expect("there until it is dropped");
        let sent = work.send(Box::new(move || {
            // Whoever asked waits below.
            let _ = answer.send(piece());
        }));
        sent.expect("a machine's thread lives as long as the machine");
        answered
            .recv()
            .expect("work on a machine does not panic, and answers")
    }

    /// Starts a process on the machine. It is killed when the machine goes.
    pub fn spawn(&self, mut command: Command) -> io::Result<Child> {
        self.run(move || {
            let runner = std::process::id();
            command.process_group(0);
            // SAFETY: between fork and exec only system calls without pointers are made.
            unsafe {
                command.pre_exec(move || {
                    if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == -1 {
                        return Err(io::Error::last_os_error());
                    }
                    // The runner may have died before the signal was armed.
                    if u32::try_from(libc::getppid()) != Ok(runner) {
                        return Err(io::Error::from_raw_os_error(libc::ESRCH));
                    }
                    Ok(())
                });
            }
            command.spawn()
        })
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.work = None;
        if let Some(thread) = self.thread.take() {
            // It ends when its queue does; that a piece of work panicked was told by whoever asked.
            let _ = thread.join();
        }
    }
}

/// The calling thread gets a network without any device, and mounts that nobody else sees.
fn leave_namespaces() -> io::Result<()> {
    // SAFETY: unshare takes a number, and mount gets texts that end with a zero byte, or null where
    // that is allowed.
    unsafe {
        if libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS) == -1 {
            return Err(io::Error::last_os_error());
        }
        let private = libc::MS_REC | libc::MS_PRIVATE;
        let none = std::ptr::null();
        if libc::mount(none, c"/".as_ptr(), none, private, none.cast()) == -1 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faults::Target;
    use std::process::Stdio;
    use std::time::Duration;

    #[test]
    fn processes_end_with_their_machine() {
        let machine = Machine::shared().unwrap();
        let mut command = Command::new("sleep");
        command.arg("600").stdin(Stdio::null());
        let mut child = machine.spawn(command).unwrap();
        let target = Target::running(child.id()).unwrap();
        assert!(target.is_alive());
        drop(machine);
        target.wait_until_gone(Duration::from_secs(20)).unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn work_is_done_in_order_and_answered() {
        let machine = Machine::shared().unwrap();
        let thread = || std::thread::current().name().unwrap_or_default().to_owned();
        assert_eq!(machine.run(thread), "machine 127.0.0.1");
        assert_eq!(machine.run(|| 7), 7);
    }
}
