//! How many tasks are under way to one slot at once.
//!
//! A slot runs one task at a time. While its answer travels back and the next task travels there
//! the slot would stand idle, which costs nothing beside a task of a second and everything beside
//! one of a microsecond. So a slot is given ahead what it does in [`AHEAD`]; more would only keep
//! tasks from other slots that become free.

use std::collections::HashMap;
use std::time::Duration;

use tokio::time::Instant;

/// Work that may lie in front of a slot: some round trips between two machines, and little enough
/// that no other slot stands idle for long because of it.
const AHEAD: Duration = Duration::from_millis(2);

/// Tasks under way to one slot: beyond this a round trip is spread over so many that it no longer
/// counts.
pub(crate) const IN_FLIGHT_MAX: usize = 512;

/// Tasks whose duration is remembered; a program has rarely more.
const NAMES_MAX: usize = 256;

/// What is known about one slot's speed.
pub(crate) struct Pace {
    /// How long each task takes there, by name; in seconds.
    seconds: HashMap<&'static str, f64>,
    /// When it answered last.
    answered: Option<Instant>,
}

impl Pace {
    pub(crate) fn new() -> Self {
        Pace {
            seconds: HashMap::new(),
            answered: None,
        }
    }

    /// How many tasks of this name may be under way at once: one until something is known.
    pub(crate) fn depth(&self, name: &str) -> usize {
        match self.seconds.get(name) {
            None => 1,
            // Saturates where a task takes no time at all.
            Some(seconds) => ((AHEAD.as_secs_f64() / seconds) as usize)
                .saturating_add(1)
                .min(IN_FLIGHT_MAX),
        }
    }

    /// A task was answered at `now` that had been pushed at `pushed`.
    pub(crate) fn answered(&mut self, name: &'static str, pushed: Instant, now: Instant) {
        // Behind another one, its own time began with the answer before it.
        let began = self.answered.map_or(pushed, |before| before.max(pushed));
        self.answered = Some(now);
        let sample = now.duration_since(began).as_secs_f64();
        if self.seconds.len() >= NAMES_MAX && !self.seconds.contains_key(name) {
            self.seconds.clear();
        }
        self.seconds
            .entry(name)
            .and_modify(|known| {
                // Down at once, up slowly: the first ones are dear because code and connection are
                // cold, and now and then one is held up by something else.
                let weight = if sample < *known { 0.5 } else { 0.1 };
                *known += weight * (sample - *known);
            })
            .or_insert(sample);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(takes: Duration, count: u32) -> usize {
        let mut pace = Pace::new();
        let start = Instant::now();
        for n in 0..count {
            // All are pushed at the start and answered one after the other.
            pace.answered("t", start, start + takes * (n + 1));
        }
        pace.depth("t")
    }

    #[test]
    fn small_tasks_fill_the_way_and_large_ones_wait_for_a_free_slot() {
        assert_eq!(Pace::new().depth("t"), 1);
        assert_eq!(after(Duration::from_secs(1), 3), 1);
        assert_eq!(after(Duration::from_millis(1), 3), 3);
        assert_eq!(after(Duration::from_micros(100), 3), 21);
        assert_eq!(after(Duration::ZERO, 3), IN_FLIGHT_MAX);
    }

    #[test]
    fn a_cold_start_is_soon_forgotten() {
        let mut pace = Pace::new();
        let start = Instant::now();
        let mut now = start + Duration::from_millis(50);
        pace.answered("t", start, now);
        for _ in 0..12 {
            now += Duration::from_micros(10);
            pace.answered("t", start, now);
        }
        assert!(pace.depth("t") > 50, "{}", pace.depth("t"));
    }
}
