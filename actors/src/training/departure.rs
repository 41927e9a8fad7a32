//! A driver whose node was given notice: it saves within the grace, or says why it did not, and
//! leaves.

use std::time::Duration;

use mobula::Notice;
use tokio::sync::watch;
use tokio::time::Instant;

use super::coordinator::Coordinator;
use super::job::{Driver, JobError, now_ms};
use super::link::ClusterLink;
use super::resume::History;
use super::saving::Saver;

/// Time before the end of a notice that is not counted on: the machine may go a little early.
const MARGIN_MIN: Duration = Duration::from_secs(2);
const MARGIN_PERCENT: u32 = 15;
/// How long a driver that has yielded may still be there.
const YIELDED_MAX: Duration = Duration::from_secs(30);
/// Attempts to leave while the head does not know of the notice yet.
const YIELD_ATTEMPTS_MAX: u32 = 10;
const YIELD_PAUSE: Duration = Duration::from_millis(200);

impl Driver {
    /// Saves if the grace allows it, and leaves the node. Returns if the notice was withdrawn.
    pub(super) async fn leave(
        &self,
        notice: Notice,
        coordinator: &Coordinator<ClusterLink>,
        saver: &mut Saver,
        history: &History,
    ) -> Result<(), JobError> {
        let step = coordinator.state().step;
        let left = Duration::from_millis(notice.deadline_ms.saturating_sub(now_ms()));
        let usable = usable_time(left);
        let needed = saver.expected_time();
        if usable < needed {
            self.log.line(format_args!(
                "notice: {} ms are left and {} ms of them usable, a checkpoint of step {step} \
                 needs {} ms: not saving, the newest checkpoint is of step {}",
                left.as_millis(),
                usable.as_millis(),
                needed.as_millis(),
                saver.committed_step().unwrap_or(0),
            ));
        } else {
            let begun = Instant::now();
            saver.offer(self.order(coordinator, saver, history));
            let saved = saver.flush(Some(begun + usable)).await?;
            self.log.line(format_args!(
                "notice: {} ms were left; the checkpoint of step {step} {} after {} ms",
                left.as_millis(),
                if saved {
                    "is committed"
                } else {
                    "is not committed, the grace is over"
                },
                begun.elapsed().as_millis(),
            ));
        }
        self.yield_node().await
    }

    /// Has the head start the driver elsewhere. Returns if it may not.
    async fn yield_node(&self) -> Result<(), JobError> {
        let notices = self.cluster.notices();
        for attempt in 1.. {
            let Err(error) = self.cluster.yield_actor(self.actor, self.incarnation).await else {
                break;
            };
            // The agent tells its hosts and the head at the same time: the head may be behind.
            if attempt == YIELD_ATTEMPTS_MAX || notices.borrow().is_none() {
                self.log.line(format_args!("the driver stays: {error}"));
                return Ok(());
            }
            tokio::time::sleep(YIELD_PAUSE).await;
        }
        // The agent ends this process, and the head starts the driver elsewhere.
        tokio::time::sleep(YIELDED_MAX).await;
        Err(JobError::NotStopped(self.actor))
    }
}

/// What can be counted on of the time that is left.
fn usable_time(left: Duration) -> Duration {
    left.saturating_sub(MARGIN_MIN.max(left * MARGIN_PERCENT / 100))
}

/// Waits for a notice other than the one that was `seen`.
pub(super) async fn new_notice(
    notices: &mut watch::Receiver<Option<Notice>>,
    seen: Option<Notice>,
) -> Notice {
    loop {
        let standing = *notices.borrow_and_update();
        match standing {
            Some(notice) if standing != seen => return notice,
            _ => {}
        }
        if notices.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_margin_is_a_share_of_a_long_grace_and_two_seconds_of_a_short_one() {
        let usable = |seconds| usable_time(Duration::from_secs(seconds)).as_secs_f64();
        assert_eq!(
            [usable(1), usable(2), usable(10), usable(100)],
            [0.0, 0.0, 8.0, 85.0]
        );
    }

    #[tokio::test]
    async fn a_notice_is_acted_on_once_and_again_when_it_changes() {
        let (sender, mut receiver) = watch::channel(Some(Notice { deadline_ms: 5 }));
        let first = new_notice(&mut receiver, None).await;
        assert_eq!(first.deadline_ms, 5);
        let again = new_notice(&mut receiver, Some(first));
        assert!(
            tokio::time::timeout(Duration::from_millis(20), again)
                .await
                .is_err()
        );
        sender.send_replace(None);
        sender.send_replace(Some(Notice { deadline_ms: 9 }));
        assert_eq!(new_notice(&mut receiver, Some(first)).await.deadline_ms, 9);
    }
}
