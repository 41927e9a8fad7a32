//! Reading a model and trying it, which may have no end.
//!
//! Nobody knows of a model's files beforehand for how long the libraries that read, optimise and compute them are at work,
//! and no thread can be stopped from outside. So the work has a thread of its own, which is left behind when its time is
//! over.
//!
//! Invariants:
//! 1. Nobody waits for a thread that was left behind, nor for longer than the limit until the work begins, and as long
//!    again until it is done.
//! 2. Of a process no two threads work on the same files, whoever began the first one and does not wait for it any
//!    more. None is begun while `LEFT_BEHIND_MAX` are left behind, whatever kinds of models they read: a replica that is
//!    started again and again does not take one core after the other.

use std::collections::BTreeMap;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use crate::panics::caught;

/// How long a model may take until it has answered its first questions: four times what a request waits for the first
/// replica of an endpoint.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(120);

/// Threads of one process that were left behind. Each takes a core, and memory that nobody counts.
const LEFT_BEHIND_MAX: usize = 4;

/// Those of this process.
static THREADS: LazyLock<Threads> = LazyLock::new(Threads::default);

/// Why a model is not ready.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unready {
    /// It was not ready in time.
    #[error("the model was not ready after {limit_s} s of {doing}, which is the limit: {remedy}")]
    TooSlow {
        /// The limit, in seconds.
        limit_s: u64,
        /// What was done with it.
        doing: &'static str,
        /// What may be wrong, and what to do.
        remedy: &'static str,
    },
    /// The same files were not ready in time before, in this process.
    #[error(
        "a thread of this process still works on this file, and was given up when its time was over: use another version \
         of the model; the thread ends with the process"
    )]
    StillAtWork,
    /// So many models were not ready in time, in this process.
    #[error(
        "{limit} threads of this process work on models that were not ready in time, which is the limit: take the endpoints \
         of those versions down, and have the process started again"
    )]
    TooManyAtWork {
        /// The limit.
        limit: usize,
    },
    /// The system gave no thread.
    #[error("no thread could be started for the model: {0}; try again")]
    Thread(String),
    /// A library panicked.
    #[error("a library gave up on the model: {0}")]
    Panicked(String),
}

/// What a kind of models goes through until one is ready, in the words of [`Unready::TooSlow`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Preparation {
    pub(super) doing: &'static str,
    pub(super) remedy: &'static str,
}

/// Has a model made of these files, on a thread of its own and in time.
pub(super) fn prepared<T: Send + 'static>(
    files: &[&Bytes],
    preparation: Preparation,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Unready> {
    THREADS.within(PREPARE_TIMEOUT, files, preparation, work)
}

/// BLAKE3 of the hashes of a model's files.
type Digest = [u8; 32];

fn digest_of(files: &[&Bytes]) -> Digest {
    let mut of_all = blake3::Hasher::new();
    for file in files {
        of_all.update(blake3::hash(file).as_bytes());
    }
    of_all.finalize().into()
}

/// A thread at work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Thread {
    InTime,
    LeftBehind,
}

/// Threads at work, by what they work on.
#[derive(Clone, Default)]
struct Threads(Arc<Shared>);

#[derive(Default)]
struct Shared {
    at_work: Mutex<BTreeMap<Digest, Thread>>,
    changed: Condvar,
}

impl Threads {
    /// Does `work` on these files on a thread of its own, and waits for it no longer than `limit`.
    fn within<T: Send + 'static>(
        &self,
        limit: Duration,
        files: &[&Bytes],
        preparation: Preparation,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Unready> {
        let digest = digest_of(files);
        self.begin(digest, limit)?;
        let (done, is_done) = sync_channel(1);
        let threads = self.clone();
        let working = move || {
            // Nobody receives what comes too late.
            let _ = done.send(caught(work));
            threads.end(&digest);
        };
        let thread = std::thread::Builder::new().name("model".to_owned());
        let thread = thread.spawn(working).map_err(|error| {
            self.end(&digest);
            Unready::Thread(error.to_string())
        })?;
        match is_done.recv_timeout(limit) {
            Ok(made) => {
                // It has nothing more to do, and has caught its panics.
                let _ = thread.join();
                made.map_err(Unready::Panicked)
            }
            Err(RecvTimeoutError::Disconnected) => {
                self.end(&digest);
                Err(Unready::Panicked("its thread said nothing".to_owned()))
            }
            Err(RecvTimeoutError::Timeout) => {
                if let Some(thread) = self.lock().get_mut(&digest) {
                    *thread = Thread::LeftBehind;
                }
                // Whoever waits for its turn does not get it.
                self.0.changed.notify_all();
                // It may be done since.
                if let Ok(made) = is_done.try_recv() {
                    return made.map_err(Unready::Panicked);
                }
                let limit_s = limit.as_secs();
                tracing::warn!(limit_s, "left a thread behind that prepares a model");
                let Preparation { doing, remedy } = preparation;
                Err(Unready::TooSlow {
                    limit_s,
                    doing,
                    remedy,
                })
            }
        }
    }

    /// Notes that these files are worked on from now on; waits for whoever works on them in time.
    fn begin(&self, digest: Digest, limit: Duration) -> Result<(), Unready> {
        let is_taken =
            |at_work: &mut BTreeMap<Digest, Thread>| at_work.get(&digest) == Some(&Thread::InTime);
        let waited = self
            .0
            .changed
            .wait_timeout_while(self.lock(), limit, is_taken);
        let (mut at_work, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if at_work.contains_key(&digest) {
            return Err(Unready::StillAtWork);
        }
        let left_behind = at_work
            .values()
            .filter(|thread| **thread == Thread::LeftBehind);
        if left_behind.count() >= LEFT_BEHIND_MAX {
            return Err(Unready::TooManyAtWork {
                limit: LEFT_BEHIND_MAX,
            });
        }
        at_work.insert(digest, Thread::InTime);
        Ok(())
    }

    fn end(&self, digest: &Digest) {
        self.lock().remove(digest);
        self.0.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Digest, Thread>> {
        // The map is whole after every single change.
        self.0
            .at_work
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};
    use std::time::Instant;

    use super::*;

    const SHORT: Duration = Duration::from_millis(20);
    const LONG: Duration = Duration::from_secs(60);

    const PREPARATION: Preparation = Preparation {
        doing: "being tried",
        remedy: "make it again",
    };

    const TOO_SLOW: Unready = Unready::TooSlow {
        limit_s: 0,
        doing: "being tried",
        remedy: "make it again",
    };

    fn within<T: Send + 'static>(
        threads: &Threads,
        limit: Duration,
        files: &[&'static str],
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Unready> {
        let files: Vec<Bytes> = files.iter().copied().map(Bytes::from).collect();
        let files: Vec<&Bytes> = files.iter().collect();
        threads.within(limit, &files, PREPARATION, work)
    }

    /// Has no end before the other side of the channel is gone.
    fn endless(released: Receiver<()>) -> impl FnOnce() + Send {
        move || {
            let _ = released.recv();
        }
    }

    #[test]
    fn work_without_an_end_is_left_behind_and_not_begun_again() {
        let threads = Threads::default();
        let (release, released) = channel();
        let files = ["config", "weights"];
        let left = within(&threads, SHORT, &files, endless(released));
        assert_eq!(left, Err(TOO_SLOW));
        let again = within(&threads, LONG, &files, || ());
        assert_eq!(again, Err(Unready::StillAtWork));
        // Any other file makes it another model, and so does another border between the same bytes.
        for other in [
            &["config"][..],
            &["config", "weight"],
            &["configw", "eights"],
        ] {
            assert_eq!(within(&threads, LONG, other, || 7), Ok(7), "{other:?}");
        }
        // A thread that comes back takes nothing any more.
        drop(release);
        let began = Instant::now();
        while within(&threads, LONG, &files, || ()).is_err() {
            assert!(began.elapsed() < LONG, "it never came back");
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_file_is_begun_once_the_thread_that_works_on_it_has_come_back() {
        let threads = Threads::default();
        let (release, released) = channel::<()>();
        let (began, has_begun) = channel();
        let first = {
            let threads = threads.clone();
            std::thread::spawn(move || {
                within(&threads, LONG, &["a"], move || {
                    began.send(()).unwrap();
                    let _ = released.recv();
                })
            })
        };
        has_begun.recv().unwrap();
        // Whoever began it may be gone; it is at work all the same.
        let second = within(&threads, SHORT, &["a"], || ());
        assert_eq!(second, Err(Unready::StillAtWork));
        let third = {
            let threads = threads.clone();
            std::thread::spawn(move || within(&threads, LONG, &["a"], || 3))
        };
        drop(release);
        assert_eq!(first.join().unwrap(), Ok(()));
        assert_eq!(third.join().unwrap(), Ok(3));
        assert!(threads.lock().is_empty());
    }

    #[test]
    fn no_more_than_some_are_left_behind() {
        let threads = Threads::default();
        let mut releases = Vec::new();
        for file in ["a", "b", "c", "d"] {
            let (release, released) = channel();
            releases.push(release);
            let left = within(&threads, SHORT, &[file], endless(released));
            assert_eq!(left, Err(TOO_SLOW));
        }
        assert_eq!(releases.len(), LEFT_BEHIND_MAX);
        let refused = within(&threads, LONG, &["one more"], || ());
        let limit = LEFT_BEHIND_MAX;
        assert_eq!(refused, Err(Unready::TooManyAtWork { limit }));
    }

    #[test]
    fn what_the_work_says_is_what_is_said() {
        let threads = Threads::default();
        let refused: Result<(), &str> = Err("of no use");
        let said = within(&threads, LONG, &["a"], move || refused);
        assert_eq!(said, Ok(refused));
        let panicked = within::<()>(&threads, LONG, &["a"], || panic!("not this"));
        assert_eq!(panicked, Err(Unready::Panicked("not this".to_owned())));
        assert_eq!(
            TOO_SLOW.to_string(),
            "the model was not ready after 0 s of being tried, which is the limit: make it again"
        );
    }
}
