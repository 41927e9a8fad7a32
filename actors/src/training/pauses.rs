//! The longest pauses between two steps: what a loss, a cut or a slow store was felt as.
//!
//! Invariant: of all pauses that were noted, the longest [`PAUSES_MAX`] are kept.

use std::collections::BTreeSet;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Pauses that are kept.
pub const PAUSES_MAX: usize = 64;

/// A time between the ends of two steps. The longer one is the greater one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Pause {
    /// Its length in milliseconds.
    pub took_ms: u64,
    /// When the later step ended, in milliseconds since 1970.
    pub until_ms: u64,
}

/// The longest pauses of a run.
#[derive(Debug, Clone, Default)]
pub struct Pauses(BTreeSet<Pause>);

impl Pauses {
    /// Takes note of a pause that ended now, at `now_ms` since 1970.
    pub fn note(&mut self, took: Duration, now_ms: u64) {
        let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        self.0.insert(Pause {
            took_ms,
            until_ms: now_ms,
        });
        if self.0.len() > PAUSES_MAX {
            self.0.pop_first();
        }
    }

    /// The longest, the longest first.
    #[must_use]
    pub fn longest(&self) -> Vec<Pause> {
        self.0.iter().rev().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_are_kept() {
        let mut pauses = Pauses::default();
        for number in 0..1000 {
            // Every length from 0 to 999, in a mixed order.
            pauses.note(Duration::from_millis(number * 7 % 1000), number);
        }
        let kept: Vec<u64> = pauses.longest().iter().map(|pause| pause.took_ms).collect();
        assert_eq!(kept, (936..1000).rev().collect::<Vec<_>>());
    }
}
