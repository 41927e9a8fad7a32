//! What a server writes into its log about requests that it could not answer.
//!
//! Where one fails, thousands a second may: a line for each of them would take more of the machine than the refusal itself, and hide
//! everything else. So each kind of failure has a line a second at the most, which counts those that had none.

use std::collections::HashMap;
use std::mem::{Discriminant, discriminant};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::oip::OipError;

/// Between two lines about the same kind.
const PAUSE: Duration = Duration::from_secs(1);

/// What this process told.
static LOG: LazyLock<FailureLog> = LazyLock::new(FailureLog::default);

/// Writes a line about a failure that is the server's, unless there was one of its kind just now.
pub(super) fn tell(error: &OipError) {
    if let Some(untold) = LOG.turn(error, Instant::now()) {
        let status = error.status();
        tracing::warn!(status, %error, untold, "a request is not answered");
    }
}

#[derive(Default)]
struct FailureLog {
    kinds: Mutex<HashMap<Discriminant<OipError>, Kind>>,
}

struct Kind {
    told: Instant,
    /// How many came since then.
    untold: u64,
}

impl FailureLog {
    /// How many of its kind were left out before this one, if it is told.
    fn turn(&self, error: &OipError, now: Instant) -> Option<u64> {
        // Whole after every single update, so a panic elsewhere does not spoil it.
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(kind) = kinds.get_mut(&discriminant(error)) else {
            let told = Kind {
                told: now,
                untold: 0,
            };
            kinds.insert(discriminant(error), told);
            return Some(0);
        };
        if now.saturating_duration_since(kind.told) < PAUSE {
            kind.untold += 1;
            return None;
        }
        kind.told = now;
        Some(std::mem::take(&mut kind.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_has_a_line_a_second_which_counts_the_others() {
        let log = FailureLog::default();
        let full = |queued| OipError::Overloaded { queued, limit: 256 };
        let start = Instant::now();
        assert_eq!(log.turn(&full(256), start), Some(0));
        for _ in 0..1_000 {
            assert_eq!(log.turn(&full(255), start + PAUSE / 2), None);
        }
        // Another kind is not hidden by them.
        let failed = OipError::Failed {
            reason: "no numbers".to_owned(),
        };
        assert_eq!(log.turn(&failed, start + PAUSE / 2), Some(0));
        assert_eq!(log.turn(&full(256), start + PAUSE), Some(1_000));
        assert_eq!(log.turn(&full(256), start + PAUSE), None);
        assert_eq!(log.turn(&full(256), start + PAUSE * 9), Some(1));
    }
}
