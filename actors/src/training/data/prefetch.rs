//! Reads the next step's samples beside the present step's arithmetic.
//!
//! Invariants:
//! 1. It is a hint: what it reads is what [`Dataset::gather`] would, and what it has not read is read when it
//!    is needed. A failure to read is left to that second reading, which says what failed.
//! 2. At most one step's shards are held, and at most one request waits; a newer one takes its place.
//! 3. Its thread ends with it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex};

use super::super::permutation::DataOrder;
use super::{Batch, Dataset};

/// Reads ahead on a thread of its own.
#[derive(Debug)]
pub(in super::super) struct Prefetch {
    shared: Arc<Shared>,
    /// Present until it is dropped.
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    wanted: Option<(u64, Range<u32>)>,
    /// The step whose samples are read or being read.
    step: u64,
    ready: BTreeMap<u32, Batch>,
    ended: bool,
}

impl Prefetch {
    pub(in super::super) fn new(data: Dataset, order: DataOrder) -> Self {
        let shared = Arc::new(Shared::default());
        let worker = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("prefetch".to_owned())
            .spawn(move || worker.work(&data, &order));
        Prefetch {
            shared,
            // Without a thread everything is read when it is needed.
            thread: thread.ok(),
        }
    }

    /// Asks for the samples of these shards.
    pub(in super::super) fn ask(&self, step: u64, shards: Range<u32>) {
        self.shared.state.lock().wanted = Some((step, shards));
        self.shared.changed.notify_all();
    }

    /// The samples of a shard, if they are here.
    pub(in super::super) fn take(&self, step: u64, shard: u32) -> Option<Batch> {
        let mut state = self.shared.state.lock();
        match state.step == step {
            true => state.ready.remove(&shard),
            false => None,
        }
    }
}

impl Drop for Prefetch {
    fn drop(&mut self) {
        self.shared.state.lock().ended = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // It ends after one batch at most; that it panicked hurts nobody.
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn work(&self, data: &Dataset, order: &DataOrder) {
        while let Some((step, shards)) = self.next() {
            for shard in shards {
                let batch = data.gather(&order.shard(step, shard));
                let mut state = self.state.lock();
                if state.ended || state.wanted.is_some() {
                    break;
                }
                if let Ok(batch) = batch {
                    state.ready.insert(shard, batch);
                    self.changed.notify_all();
                }
            }
        }
    }

    /// Waits for a request; none when it is over.
    fn next(&self) -> Option<(u64, Range<u32>)> {
        let mut state = self.state.lock();
        loop {
            if state.ended {
                return None;
            }
            if let Some((step, shards)) = state.wanted.take() {
                state.step = step;
                state.ready.clear();
                return Some((step, shards));
            }
            self.changed.wait(&mut state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn what_was_read_ahead_is_what_would_be_read_and_is_given_once() {
        let data = Dataset::digits().unwrap();
        let order = DataOrder {
            seed: 7,
            sample_count: data.len() as u64,
            global_batch: 32,
            virtual_shards: 4,
        };
        let prefetch = Prefetch::new(data.clone(), order);
        assert!(prefetch.take(3, 1).is_none());
        prefetch.ask(3, 1..3);
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut state = prefetch.shared.state.lock();
        while state.ready.len() < 2 {
            assert!(Instant::now() < deadline, "nothing is read");
            prefetch
                .shared
                .changed
                .wait_for(&mut state, Duration::from_secs(1));
        }
        drop(state);
        let expected = data.gather(&order.shard(3, 2)).unwrap();
        assert!(prefetch.take(4, 2).is_none());
        assert_eq!(prefetch.take(3, 2).unwrap(), expected);
        assert!(prefetch.take(3, 2).is_none() && prefetch.take(3, 3).is_none());
    }
}
