//! For how long a step waited for trainers.

use std::time::Duration;

use tokio::time::Instant;

/// From when until when the present step waited for trainers that were given up in the end, or for one that came.
#[derive(Debug, Default)]
pub(super) struct Stall(Option<(Instant, Instant)>);

impl Stall {
    /// It did from `from` to `until`; what is between two such times counts as well.
    pub(super) fn note(&mut self, from: Instant, until: Instant) {
        let (first, last) = self.0.unwrap_or((from, until));
        self.0 = Some((first.min(from), last.max(until)));
    }

    /// How much of it was after `begun`; the next step has not waited yet.
    pub(super) fn take_since(&mut self, begun: Instant) -> Duration {
        let (from, until) = self.0.take().unwrap_or((begun, begun));
        until.saturating_duration_since(from.max(begun))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_waited_since_it_began_and_only_once_for_several() {
        let begun = Instant::now();
        let at = |ms| begun + Duration::from_millis(ms);
        let mut stall = Stall::default();
        assert_eq!(stall.take_since(begun), Duration::ZERO);
        stall.note(at(100), at(1300));
        stall.note(at(200), at(1500));
        assert_eq!(stall.take_since(at(0)), Duration::from_millis(1400));
        assert_eq!(stall.take_since(at(0)), Duration::ZERO);
        stall.note(at(100), at(1300));
        assert_eq!(stall.take_since(at(1000)), Duration::from_millis(300));
        stall.note(at(100), at(1300));
        assert_eq!(stall.take_since(at(2000)), Duration::ZERO);
    }
}
