//! Batches that a thread which reads and writes computes itself, because handing them over, and their answers back, would take
//! longer than they do: each of both wakes a thread, which is tens of microseconds on a machine that is not busy.
//!
//! Invariants:
//! 1. Only what batches of no less have shown is expected to be brief, and what surprises is not expected again for a while.
//! 2. At most one of a process's threads that read and write computes, and only where there are others.
//! 3. One that does not come back stops nothing else for longer than a few [`LOOK`]s: the others are woken, so that one of them
//!    listens to the sockets that it listened to; and after [`LOOKS_MAX`] of them the process ends, so that what it has is started
//!    anew.

use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::runtime::{Handle, RuntimeFlavor};

/// What is brief: less than a thread takes to hand a batch over and to be handed the answer.
const BRIEF: Duration = Duration::from_micros(50);

/// So many batches in a row were brief before one is expected to be.
const SHOWN_MIN: u32 = 32;

/// How often it is looked whether a thread has come back.
const LOOK: Duration = Duration::from_secs(1);

/// Looks at one batch after which its thread is taken to hang. They are counted, and not timed, so that a process that was
/// stopped for a while does not end when it goes on.
const LOOKS_MAX: u32 = 10;

/// The status of a process that ends because of it (`EX_SOFTWARE` of `sysexits.h`).
const HANGS_STATUS: i32 = 70;

/// The batch that a thread of this process which reads and writes is at; 0 if none is.
static AT_WORK: AtomicU64 = AtomicU64::new(0);

/// Batches that were computed so.
static TURNS: AtomicU64 = AtomicU64::new(0);

/// Starts [`watch`] with the first of them.
static WATCH: Once = Once::new();

/// What is known of how long batches take.
#[derive(Debug, Default)]
pub(super) struct Brevity {
    /// Brief ones since the last that was not, though it was expected to be.
    shown: u32,
    /// Up to this size they have been brief.
    size_bytes_max: usize,
}

impl Brevity {
    /// Batches of so many bytes have shown to be brief.
    #[cfg(test)]
    pub(super) fn of(size_bytes_max: usize) -> Self {
        Brevity {
            shown: SHOWN_MIN,
            size_bytes_max,
        }
    }

    /// Whether a batch of so many bytes should be brief.
    pub(super) fn expects(&self, size_bytes: usize) -> bool {
        self.shown >= SHOWN_MIN && size_bytes <= self.size_bytes_max
    }

    /// A batch of so many bytes took so long.
    pub(super) fn ran(&mut self, size_bytes: usize, taken: Duration) {
        if taken < BRIEF {
            self.shown = self.shown.saturating_add(1);
            self.size_bytes_max = self.size_bytes_max.max(size_bytes);
        } else if size_bytes <= self.size_bytes_max {
            self.shown = 0;
            // Smaller ones may still be.
            self.size_bytes_max = size_bytes.saturating_sub(1);
        }
    }
}

/// Leave to compute on a thread that reads and writes, until this is dropped.
pub(super) struct Turn(());

impl Turn {
    /// None while another thread of this process has it, and where nobody would be left to read and write.
    pub(super) fn take() -> Option<Self> {
        let runtime = Handle::try_current().ok()?;
        let has_others = runtime.runtime_flavor() == RuntimeFlavor::MultiThread
            && runtime.metrics().num_workers() > 1;
        if !has_others {
            return None;
        }
        let turn = TURNS.fetch_add(1, Ordering::Relaxed) + 1;
        AT_WORK
            .compare_exchange(0, turn, Ordering::Acquire, Ordering::Relaxed)
            .ok()?;
        // From here on it is given back whatever happens.
        let taken = Turn(());
        WATCH.call_once(|| watch(runtime));
        Some(taken)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        AT_WORK.store(0, Ordering::Release);
    }
}

/// Looks after the threads of `runtime` for as long as the process lives.
fn watch(runtime: Handle) {
    let looking = move || {
        let mut looks = Looks::default();
        loop {
            std::thread::sleep(LOOK);
            match looks.at(AT_WORK.load(Ordering::Relaxed)) {
                0 => {}
                LOOKS_MAX => {
                    tracing::error!(
                        looks = LOOKS_MAX,
                        "a batch like those that were brief does not come back, on a thread that reads and writes: this \
                         process ends, and what it has is started anew"
                    );
                    std::process::exit(HANGS_STATUS);
                }
                // Whoever wakes for this finds nobody at the sockets, and stays there.
                _ => drop(runtime.spawn(async {})),
            }
        }
    };
    let started = std::thread::Builder::new().name("brief-watch".to_owned());
    if let Err(error) = started.spawn(looking) {
        tracing::error!(%error, "nobody looks after the threads that read and write");
    }
}

/// Looks in a row at which a thread was at the same batch.
#[derive(Debug, Default)]
struct Looks {
    turn: u64,
    count: u32,
}

impl Looks {
    /// How many looks before this one have found the same.
    fn at(&mut self, turn: u64) -> u32 {
        let is_same = turn != 0 && turn == self.turn;
        self.count = if is_same { self.count + 1 } else { 0 };
        self.turn = turn;
        self.count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_micros(51);

    /// A turn, which another test of this process may have.
    fn turn() -> Turn {
        let tries = (0..1_000_000).find_map(|_| {
            std::thread::yield_now();
            Turn::take()
        });
        tries.expect("nobody keeps a turn for long")
    }

    #[test]
    fn what_has_been_brief_often_enough_is_expected_to_be() {
        let mut brevity = Brevity::default();
        for _ in 0..SHOWN_MIN {
            assert!(!brevity.expects(64));
            brevity.ran(64, Duration::ZERO);
        }
        assert!(brevity.expects(64) && brevity.expects(1));
        assert!(!brevity.expects(65));
        // What was expected of nobody is no surprise.
        brevity.ran(640, LONG);
        assert!(brevity.expects(64) && !brevity.expects(640));
        // This is one.
        brevity.ran(64, LONG);
        assert!(!brevity.expects(64) && !brevity.expects(1));
        for _ in 0..SHOWN_MIN {
            brevity.ran(32, Duration::ZERO);
        }
        assert!(brevity.expects(32) && brevity.expects(63 - 31));
        assert!(!brevity.expects(64));
        brevity.ran(64, Duration::ZERO);
        assert!(brevity.expects(64));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn one_thread_at_a_time_has_leave() {
        let first = turn();
        assert!(Turn::take().is_none());
        drop(first);
        // A panic gives it back.
        let panicked = std::panic::catch_unwind(|| {
            let _turn = turn();
            panic!("in its turn");
        });
        assert!(panicked.is_err());
        drop(turn());
    }

    #[tokio::test]
    async fn the_only_thread_that_reads_and_writes_computes_nothing() {
        assert!(Turn::take().is_none());
    }

    #[test]
    fn looks_are_counted_for_one_batch() {
        let mut looks = Looks::default();
        let found: Vec<u32> = [0, 0, 5, 5, 5, 6, 6, 0, 6]
            .into_iter()
            .map(|turn| looks.at(turn))
            .collect();
        assert_eq!(found, [0, 0, 0, 1, 2, 0, 1, 0, 0]);
    }
}
