//! When the head hears why a step is not decided: people look at it, and each time is an entry of the log.

use std::time::Duration;

use tokio::time::Instant;

use super::plan::Rollout;
use super::trial::Evidence;

/// How often at the most.
pub(in crate::serving) const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// How often also where nothing has changed: by this a wait for replicas is known to go on.
pub(super) const REPEAT_INTERVAL: Duration = Duration::from_secs(15);

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
    reason: String,
}

impl Reporting {
    /// Whether this is to be reported now: numbers or reason are others than in the last report, and that is some time
    /// ago or was about another step. From time to time what is the same is reported again.
    pub(in crate::serving) fn is_due(&mut self, rollout: &Rollout, evidence: &Evidence) -> bool {
        let of = (rollout.number, rollout.step);
        let requests = evidence.candidate.requests + evidence.baseline.requests;
        let is_due = match &self.last {
            Some(last) if last.of == of => {
                let is_other = last.requests != requests || last.reason != evidence.reason;
                let ago = last.at.elapsed();
                ago >= REPEAT_INTERVAL || is_other && ago >= REPORT_INTERVAL
            }
            _ => true,
        };
        if is_due {
            self.last = Some(Reported {
                at: Instant::now(),
                of,
                requests,
                reason: evidence.reason.clone(),
            });
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
        assert!(reporting.is_due(&rollout, &of(1)));
        assert!(!reporting.is_due(&rollout, &of(2)));
        tokio::time::advance(REPORT_INTERVAL).await;
        assert!(!reporting.is_due(&rollout, &of(1)));
        assert!(reporting.is_due(&rollout, &of(2)));
        rollout.step = 1;
        assert!(reporting.is_due(&rollout, &of(3)));
    }

    #[tokio::test(start_paused = true)]
    async fn why_a_step_holds_is_reported_without_requests_too_and_now_and_then_again() {
        let rollout = begun(Strategy::BlueGreen, &[0, 100]);
        let because = |reason: &str| Evidence {
            reason: reason.to_owned(),
            ..Evidence::default()
        };
        let mut reporting = Reporting::default();
        assert!(reporting.is_due(&rollout, &because("0 of 2 replicas answer")));
        assert!(!reporting.is_due(&rollout, &because("1 of 2 replicas answer")));
        tokio::time::advance(REPORT_INTERVAL).await;
        assert!(reporting.is_due(&rollout, &because("1 of 2 replicas answer")));
        tokio::time::advance(REPEAT_INTERVAL - Duration::from_millis(1)).await;
        assert!(!reporting.is_due(&rollout, &because("1 of 2 replicas answer")));
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(reporting.is_due(&rollout, &because("1 of 2 replicas answer")));
    }
}
