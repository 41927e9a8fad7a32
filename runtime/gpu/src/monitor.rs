//! How some GPUs are used, always at hand.
//!
//! A thread asks the driver, because its calls may take long: a GPU that is being reset answers after seconds, and a
//! driver in trouble never.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::nvml::{LIBRARY, Reader, Usage, open};

/// How often the driver is asked. Its own sample period is at most as long, and nobody reads the figures more often.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// Figures that are older are not shown: the driver hangs, or takes so long that they say nothing of now.
const FRESH_FOR: Duration = Duration::from_secs(5);
/// How long a monitor that is dropped waits for its thread: a call takes milliseconds, and one that hangs must not keep
/// the process from ending.
const END_WAIT: Duration = Duration::from_secs(1);

/// Watches GPUs as long as it lives.
#[derive(Debug)]
pub struct Monitor {
    shared: Arc<Shared>,
    /// None where there is nothing to watch.
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    latest: Option<Sample>,
    /// The monitor is dropped.
    is_stopping: bool,
    /// The thread will call the driver no more.
    has_ended: bool,
}

#[derive(Debug)]
struct Sample {
    /// When the driver was asked.
    asked: Instant,
    usage: BTreeMap<String, Usage>,
}

impl Monitor {
    /// Watches the GPUs with these UUIDs. What is no GPU of this machine has no figures.
    #[must_use]
    pub fn start(ids: impl IntoIterator<Item = String>) -> Monitor {
        Monitor::start_with(LIBRARY.into(), ids, ASK_EVERY)
    }

    fn start_with(
        library: OsString,
        ids: impl IntoIterator<Item = String>,
        every: Duration,
    ) -> Monitor {
        let shared = Arc::new(Shared::default());
        let ids: BTreeSet<String> = ids.into_iter().collect();
        if ids.is_empty() {
            let thread = None;
            return Monitor { shared, thread };
        }
        let watched = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("gpu-monitor".to_owned())
            .spawn(move || {
                watched.watch(&library, ids, every);
                watched.state.lock().has_ended = true;
                watched.changed.notify_all();
            })
            .inspect_err(|error| tracing::warn!(%error, "how GPUs are used is not shown"))
            .ok();
        Monitor { shared, thread }
    }

    /// How they are used, by UUID, as the driver said last: those that answered, and none where it hangs.
    #[must_use]
    pub fn latest(&self) -> BTreeMap<String, Usage> {
        self.latest_at(Instant::now())
    }

    fn latest_at(&self, now: Instant) -> BTreeMap<String, Usage> {
        let state = self.shared.state.lock();
        let fresh = state
            .latest
            .as_ref()
            .filter(|sample| now.saturating_duration_since(sample.asked) <= FRESH_FOR);
        fresh.map(|sample| sample.usage.clone()).unwrap_or_default()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        let mut state = self.shared.state.lock();
        state.is_stopping = true;
        self.shared.changed.notify_all();
        let is_under_way = |state: &mut State| !state.has_ended;
        let waited = self
            .shared
            .changed
            .wait_while_for(&mut state, is_under_way, END_WAIT);
        drop(state);
        // The library is unloaded by then, and not while the process ends. A thread that hangs is left to that end.
        if !waited.timed_out() {
            thread
                .join()
                .expect("that it has ended is the last thing that it says");
        }
    }
}

impl Shared {
    /// Asks again and again until the monitor is dropped; not at all where there is no driver.
    fn watch(&self, library: &OsStr, ids: BTreeSet<String>, every: Duration) {
        let Some(nvml) = open(library) else { return };
        let mut reader = Reader::new(&nvml, ids);
        loop {
            let asked = Instant::now();
            let usage = reader.read();
            let mut state = self.state.lock();
            state.latest = Some(Sample { asked, usage });
            self.changed.notify_all();
            let goes_on = |state: &mut State| !state.is_stopping;
            self.changed.wait_while_for(&mut state, goes_on, every);
            if state.is_stopping {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stand_in::StandIn;

    /// How long a test waits for what must come.
    const LIMIT: Duration = Duration::from_secs(60);
    const OFTEN: Duration = Duration::from_millis(1);

    fn watching(stand_in: &StandIn, ids: &[&str]) -> Monitor {
        let ids = ids.iter().map(|id| (*id).to_owned());
        Monitor::start_with(stand_in.library().into_os_string(), ids, OFTEN)
    }

    /// Waits until the thread has said something of which `is_wanted` holds.
    fn wait_for(monitor: &Monitor, is_wanted: impl Fn(&State) -> bool) {
        let mut state = monitor.shared.state.lock();
        let is_missing = |state: &mut State| !is_wanted(state);
        let waited = monitor
            .shared
            .changed
            .wait_while_for(&mut state, is_missing, LIMIT);
        assert!(!waited.timed_out(), "{state:?}");
    }

    fn utilization(state: &State, id: &str) -> Option<f64> {
        state.latest.as_ref()?.usage.get(id)?.utilization
    }

    #[test]
    fn the_latest_figures_are_shown_and_those_of_a_lost_gpu_no_more() {
        let stand_in = StandIn::with("GPU-aa 25 0 1 4 0\nGPU-bb 75 0 2 4 0\n");
        let monitor = watching(&stand_in, &["GPU-aa", "GPU-bb"]);
        wait_for(&monitor, |state| utilization(state, "GPU-bb") == Some(0.75));
        stand_in.says("GPU-aa 50 0 1 4 0\nGPU-bb 75 15 2 4 15\n");
        wait_for(&monitor, |state| utilization(state, "GPU-aa") == Some(0.5));
        let asked = monitor.shared.state.lock().latest.as_ref().unwrap().asked;
        let shown = monitor.latest_at(asked);
        assert_eq!(shown["GPU-aa"].utilization, Some(0.5));
        assert_eq!(shown["GPU-aa"].memory.unwrap().total_bytes, 4);
        assert!(!shown.contains_key("GPU-bb"), "{shown:?}");
    }

    #[test]
    fn old_figures_are_none() {
        let stand_in = StandIn::with("GPU-aa 25 0 1 4 0\n");
        let monitor = watching(&stand_in, &["GPU-aa"]);
        wait_for(&monitor, |state| state.latest.is_some());
        // From here on the driver does not answer.
        stand_in.says("GPU-aa 25 -1 1 4 0\n");
        wait_until_it_hangs(&stand_in);
        let asked = monitor.shared.state.lock().latest.as_ref().unwrap().asked;
        assert_eq!(monitor.latest_at(asked + FRESH_FOR).len(), 1);
        let later = asked + FRESH_FOR + Duration::from_millis(1);
        assert_eq!(monitor.latest_at(later).len(), 0);
    }

    fn wait_until_it_hangs(stand_in: &StandIn) {
        let end = Instant::now() + LIMIT;
        while !stand_in.hangs() {
            assert!(Instant::now() < end, "the driver was not asked");
            std::thread::sleep(OFTEN);
        }
    }

    #[test]
    fn a_driver_that_hangs_from_the_beginning_shows_nothing_and_keeps_nobody() {
        let stand_in = StandIn::with("GPU-aa 25 -1 1 4 0\n");
        let monitor = watching(&stand_in, &["GPU-aa"]);
        wait_until_it_hangs(&stand_in);
        assert!(monitor.latest().is_empty());
        // Comes back although its thread does not.
        drop(monitor);
    }

    #[test]
    fn without_a_driver_or_anything_to_watch_there_are_no_figures() {
        let stand_in = StandIn::without_driver();
        let monitor = watching(&stand_in, &["GPU-aa"]);
        wait_for(&monitor, |state| state.has_ended);
        assert!(monitor.latest().is_empty());
        let idle = watching(&stand_in, &[]);
        assert!(idle.thread.is_none() && idle.latest().is_empty());
    }
}
