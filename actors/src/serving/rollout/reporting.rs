//! When the head hears the numbers of a step that is not decided: people look at them, and each time is an entry of
//! the log.

use std::time::Duration;

use tokio::time::Instant;

use super::plan::Rollout;
use super::trial::Evidence;

/// How often at the most.
pub(in crate::serving) const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// What was reported last.
#[derive(Debug, Default)]
pub(in crate::serving) struct Reporting {
    last: Option<Reported>,
}

#[derive(Debug)]
struct Reported {
    at: Instant,
    /// The rollout and its step.
    of: (u64, u32),
    requests: u64,
}

impl Reporting {
    /// Whether these numbers are to be reported now: there are others than those of the last report, and that is
    /// some time ago or was about another step.
    pub(in crate::serving) fn is_due(&mut self, rollout: &Rollout, evidence: &Evidence) -> bool {
        let of = (rollout.number, rollout.step);
        let requests = evidence.candidate.requests + evidence.baseline.requests;
        let is_due = match &self.last {
            Some(last) if last.of == of => {
                last.requests != requests && last.at.elapsed() >= REPORT_INTERVAL
            }
            _ => requests > 0,
        };
        if is_due {
            let at = Instant::now();
            self.last = Some(Reported { at, of, requests });
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serving::rollout::plan::Strategy;
    use crate::serving::rollout::plan::tests::begun;

    #[tokio::test(start_paused = true)]
    async fn numbers_are_reported_when_they_change_and_not_too_often() {
        let mut rollout = begun(Strategy::Canary, &[5, 50, 100]);
        let of = |requests| {
            let mut evidence = Evidence::default();
            evidence.candidate.requests = requests;
            evidence
        };
        let mut reporting = Reporting::default();
        assert!(!reporting.is_due(&rollout, &of(0)));
        assert!(reporting.is_due(&rollout, &of(1)));
        assert!(!reporting.is_due(&rollout, &of(2)));
        tokio::time::advance(REPORT_INTERVAL).await;
        assert!(!reporting.is_due(&rollout, &of(1)));
        assert!(reporting.is_due(&rollout, &of(2)));
        rollout.step = 1;
        assert!(reporting.is_due(&rollout, &of(3)));
    }
}
