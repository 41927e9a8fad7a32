//! Host processes that somebody has stopped (SIGSTOP, job control): which of them have stood still for
//! so long that they are to be killed.
//!
//! A stopped process keeps its sockets, its memory and its devices, and says nothing: to everybody else
//! it is a slow one, and nobody replaces it. Only the kernel tells the two apart.
//!
//! Invariants:
//! 1. Only a process that was stopped at every look counts: one that was seen to run begins anew.
//! 2. Time counts only as far as somebody looked: an agent that stood still itself, with its whole
//!    machine say, saw nothing of that time, and holds it against nobody.
//! 3. A process that a debugger holds is none of these, nor is one that computes or waits for long.

use std::collections::BTreeMap;
use std::time::Duration;

use mobula_core::id::HostId;
use tokio::time::Instant;

/// How often processes are looked at: one look reads a line for each of them.
pub(crate) const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The most that counts between two looks. A busy agent looks a little late; one that looks later than
/// this stood still itself.
const LOOK_GAP_MAX: Duration = Duration::from_secs(2);

/// What the kernel says of a process at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Look {
    /// When it was started, in clock ticks since boot: whoever has its id later has another one.
    started_ticks: u64,
    /// Whether it is stopped by a signal. One that a debugger holds is not.
    is_stopped: bool,
}

impl Look {
    /// Looks at a process; `None` where there is none, or no kernel that says so.
    pub(crate) fn at(pid: u32) -> Option<Look> {
        let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
        // Its name may be no text.
        Look::parse(&String::from_utf8_lossy(&stat))
    }

    /// Reads `/proc/<pid>/stat`.
    fn parse(stat: &str) -> Option<Look> {
        // The name in parentheses may hold anything; what follows it does not.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        // `T` is stopped; `t` is held by a debugger.
        let is_stopped = fields.next()? == "T";
        // Field 22 of the line, and the state was field 3.
        let started_ticks = fields.nth(18)?.parse().ok()?;
        Some(Look {
            started_ticks,
            is_stopped,
        })
    }
}

/// A process that was stopped at the last look.
#[derive(Debug, Clone, Copy)]
struct Seen {
    started_ticks: u64,
    /// From the first look at which it was stopped to the last.
    stopped_for: Duration,
}

/// The processes that were stopped at the last look.
#[derive(Debug)]
pub(crate) struct StoppedProcesses {
    limit: Option<Duration>,
    looked_at: Option<Instant>,
    seen: BTreeMap<HostId, Seen>,
}

impl StoppedProcesses {
    /// A process may be stopped for `limit_ms` milliseconds; with 0 for as long as anybody likes.
    pub(crate) fn new(limit_ms: u64) -> StoppedProcesses {
        StoppedProcesses {
            limit: Some(Duration::from_millis(limit_ms)).filter(|limit| !limit.is_zero()),
            looked_at: None,
            seen: BTreeMap::new(),
        }
    }

    /// How long a process may be stopped, if there is a limit.
    pub(crate) fn limit(&self) -> Option<Duration> {
        self.limit
    }

    /// Takes in one look at every process. Those that are to be killed, and for how long they have been
    /// stopped at least; each is named once, and once more if it is still stopped a whole limit later.
    pub(crate) fn look(
        &mut self,
        now: Instant,
        looks: impl IntoIterator<Item = (HostId, Look)>,
    ) -> Vec<(HostId, Duration)> {
        let Some(limit) = self.limit else {
            return Vec::new();
        };
        let passed = self
            .looked_at
            .replace(now)
            .map_or(Duration::ZERO, |before| {
                now.saturating_duration_since(before)
            })
            .min(LOOK_GAP_MAX);
        let before = std::mem::take(&mut self.seen);
        let mut due = Vec::new();
        for (host, look) in looks {
            if !look.is_stopped {
                continue;
            }
            let started_ticks = look.started_ticks;
            let stopped_for = before
                .get(&host)
                .filter(|seen| seen.started_ticks == started_ticks)
                .map_or(Duration::ZERO, |seen| seen.stopped_for + passed);
            if stopped_for >= limit {
                due.push((host, stopped_for));
            } else {
                let seen = Seen {
                    started_ticks,
                    stopped_for,
                };
                self.seen.insert(host, seen);
            }
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    use rustix::process::{Pid, Signal, kill_process};

    const STOPPED: Look = Look {
        started_ticks: 7,
        is_stopped: true,
    };
    const RUNNING: Look = Look {
        started_ticks: 7,
        is_stopped: false,
    };

    /// Looks once a second for `seconds`, at what `state` says of the one process; when it was due.
    fn due_after(limit_ms: u64, seconds: u64, state: impl Fn(u64) -> Look) -> Vec<(u64, Duration)> {
        let began = Instant::now();
        let mut stopped = StoppedProcesses::new(limit_ms);
        let mut found = Vec::new();
        for second in 0..=seconds {
            let now = began + Duration::from_secs(second);
            let due = stopped.look(now, [(HostId(1), state(second))]);
            found.extend(
                due.into_iter()
                    .map(|(_, stopped_for)| (second, stopped_for)),
            );
        }
        found
    }

    #[test]
    fn one_that_is_stopped_for_as_long_as_the_limit_is_due_once() {
        let five = Duration::from_secs(5);
        assert_eq!(due_after(5_000, 9, |_| STOPPED), [(5, five)]);
        assert!(due_after(5_000, 4, |_| STOPPED).is_empty());
        // Where the kernel could not end it, it is tried again.
        let again = due_after(5_000, 11, |_| STOPPED);
        assert_eq!(again, [(5, five), (11, five)]);
    }

    #[test]
    fn one_that_ran_in_between_begins_anew() {
        let resumed = |second: u64| if second == 4 { RUNNING } else { STOPPED };
        let five = Duration::from_secs(5);
        assert!(due_after(5_000, 9, resumed).is_empty());
        assert_eq!(due_after(5_000, 10, resumed), [(10, five)]);
    }

    #[test]
    fn another_process_with_its_id_is_another_one() {
        let other = Look {
            started_ticks: 8,
            ..STOPPED
        };
        let replaced = |second: u64| if second < 4 { STOPPED } else { other };
        let five = Duration::from_secs(5);
        assert!(due_after(5_000, 8, replaced).is_empty());
        assert_eq!(due_after(5_000, 9, replaced), [(9, five)]);
    }

    #[test]
    fn time_in_which_nobody_looked_does_not_count() {
        let began = Instant::now();
        let mut stopped = StoppedProcesses::new(5_000);
        let mut look = |second| {
            let now = began + Duration::from_secs(second);
            stopped.look(now, [(HostId(1), STOPPED)])
        };
        assert!(look(0).is_empty());
        // The machine was asleep for an hour, and its processes with it.
        assert!(look(3_600).is_empty());
        assert!(look(3_601).is_empty());
        assert!(look(3_602).is_empty());
        assert_eq!(look(3_603), [(HostId(1), Duration::from_secs(5))]);
    }

    #[test]
    fn without_a_limit_nobody_is_due() {
        assert_eq!(StoppedProcesses::new(0).limit(), None);
        assert!(due_after(0, 100_000, |_| STOPPED).is_empty());
    }

    #[test]
    fn each_process_has_its_own_time() {
        let began = Instant::now();
        let mut stopped = StoppedProcesses::new(2_000);
        let mut look = |second, hosts: &[u64]| {
            let now = began + Duration::from_secs(second);
            let looks = hosts.iter().map(|host| (HostId(*host), STOPPED));
            let due = stopped.look(now, looks.collect::<Vec<_>>());
            due.into_iter().map(|(host, _)| host).collect::<Vec<_>>()
        };
        assert!(look(0, &[1]).is_empty());
        assert!(look(1, &[1, 2]).is_empty());
        assert_eq!(look(2, &[1, 2]), [HostId(1)]);
        // The first one is dead.
        assert_eq!(look(3, &[2]), [HostId(2)]);
    }

    #[test]
    fn a_line_of_the_kernel_is_read_whatever_the_process_is_called() {
        let line = |name: &str, state: &str| {
            format!(
                "812 ({name}) {state} 1 812 812 0 -1 4194304 100 0 0 0 5 6 0 0 20 0 9 0 424242 \
                 1000000 300 18446744073709551615\n"
            )
        };
        for name in ["mobula", "a b", "tricky) T 1 (", ")", "", ") R 1 2 3"] {
            let stopped = Look::parse(&line(name, "T")).unwrap();
            let expected = Look {
                started_ticks: 424_242,
                is_stopped: true,
            };
            assert_eq!(stopped, expected, "{name}");
            // A debugger holds it; it runs, sleeps, waits for a disk, is dead.
            for state in ["t", "R", "S", "D", "Z", "I"] {
                let other = Look::parse(&line(name, state)).unwrap();
                assert!(!other.is_stopped, "{name} {state}");
            }
        }
        for broken in ["", "812", "812 (a", "812 (a)", "812 (a) T 1 2"] {
            assert_eq!(Look::parse(broken), None, "{broken}");
        }
        assert_eq!(Look::at(u32::MAX), None);
    }

    /// A process that ends with the test.
    struct Sleeper(Child);

    impl Drop for Sleeper {
        fn drop(&mut self) {
            // Both fail only if it has ended already.
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn the_kernel_says_who_is_stopped() {
        let sleeper = Sleeper(Command::new("/bin/sleep").arg("1000").spawn().unwrap());
        let id = sleeper.0.id();
        let pid = Pid::from_raw(i32::try_from(id).unwrap()).unwrap();
        let before = Look::at(id).unwrap();
        assert!(!before.is_stopped);
        kill_process(pid, Signal::STOP).unwrap();
        // Signals are taken in a moment later.
        let deadline = Instant::now() + Duration::from_secs(20);
        let stopped = loop {
            let look = Look::at(id).unwrap();
            if look.is_stopped {
                break look;
            }
            assert!(Instant::now() < deadline, "it is not stopped");
            std::thread::yield_now();
        };
        assert_eq!(stopped.started_ticks, before.started_ticks);
    }
}
