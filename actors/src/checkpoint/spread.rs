//! A save that takes its time, so that training keeps the machine: its bytes cost memory bandwidth, and each snapshot
//! makes the next update write elsewhere.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

/// A time over which a save's bytes are sent, until somebody is in a hurry. Clones hear of that too.
#[derive(Debug, Clone, Default)]
pub struct Spread {
    over: Duration,
    hurry: Arc<watch::Sender<bool>>,
}

impl Spread {
    /// Over so long, from when the first byte is sent; zero is as fast as the store takes them.
    #[must_use]
    pub fn over(over: Duration) -> Self {
        Spread {
            over,
            hurry: Arc::default(),
        }
    }

    /// From now on as fast as the store takes them. Whether they were held back until now.
    pub fn hurry(&self) -> bool {
        !self.hurry.send_replace(true) && !self.over.is_zero()
    }

    /// Whether bytes are held back.
    #[must_use]
    pub fn holds_back(&self) -> bool {
        !self.over.is_zero() && !*self.hurry.borrow()
    }
}

/// The turns of an upload's batches.
pub(super) struct Turns {
    spread: Spread,
    begun: Instant,
    total_bytes: u64,
    dealt_bytes: u64,
}

impl Turns {
    /// Those of an upload of so many bytes that begins now.
    pub(super) fn new(spread: &Spread, total_bytes: u64) -> Self {
        Turns {
            spread: spread.clone(),
            begun: Instant::now(),
            total_bytes,
            dealt_bytes: 0,
        }
    }

    /// Takes note of a batch that begins.
    pub(super) fn begin(&mut self, bytes: u64) {
        self.dealt_bytes += bytes;
    }

    /// When the next batch may begin; nothing: now.
    pub(super) fn next(&self) -> Option<Instant> {
        if !self.spread.holds_back() || self.total_bytes == 0 {
            return None;
        }
        let share = self.dealt_bytes as f64 / self.total_bytes as f64;
        let at = self.begun + self.spread.over.mul_f64(share.min(1.0));
        Some(at).filter(|at| *at > Instant::now())
    }

    /// Waits until `at`, or until somebody is in a hurry; for ever where there is no such time.
    pub(super) async fn wait(&self, at: Option<Instant>) {
        let Some(at) = at else {
            return std::future::pending().await;
        };
        let mut hurry = self.spread.hurry.subscribe();
        // It ends at that time, or at that word; the sender lives as long as this does.
        let _ = tokio::time::timeout_at(at, hurry.wait_for(|hurry| *hurry)).await;
    }

    /// Whether batches are held back at all.
    pub(super) fn are_spread(&self) -> bool {
        self.spread.holds_back()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn each_batch_waits_for_what_was_sent_before_it_and_not_for_what_is_lost() {
        let begun = Instant::now();
        let mut turns = Turns::new(&Spread::over(Duration::from_secs(10)), 1000);
        assert_eq!(turns.next(), None, "the first begins at once");
        turns.begin(250);
        let at = turns.next().unwrap();
        assert_eq!(at, begun + Duration::from_millis(2500));
        turns.wait(Some(at)).await;
        assert_eq!((Instant::now(), turns.next()), (at, None));
        // Pieces that are sent again, because another failed, do not make it longer than it was to be.
        turns.begin(2000);
        assert_eq!(turns.next(), Some(begun + Duration::from_secs(10)));
    }

    #[tokio::test(start_paused = true)]
    async fn one_word_ends_all_waiting() {
        let spread = Spread::over(Duration::from_secs(10));
        let mut turns = Turns::new(&spread, 2);
        turns.begin(1);
        let at = turns.next().unwrap();
        let begun = Instant::now();
        let hurried = async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert!(spread.clone().hurry(), "it was held back until then");
            assert!(!spread.hurry());
        };
        tokio::join!(turns.wait(Some(at)), hurried);
        assert_eq!(begun.elapsed(), Duration::from_secs(1));
        assert_eq!(turns.next(), None);
        assert!(!Spread::default().holds_back() && !Spread::default().hurry());
    }
}
