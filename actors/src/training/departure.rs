//! A driver whose node was given notice: it saves within the grace, or says why it did not, and
//! leaves.

use std::time::Duration;

use mobula::Notice;
use tokio::sync::watch;
use tokio::time::Instant;

use super::job::{Coordinator, Driver, JobError, now_ms};
use super::preemption::{Budget, Facts, Preemption, Transition};
use super::resume::History;
use super::saving::Saver;

/// How much later than it was given a notice may be heard: a worker looks for its file twice a second.
const NOTICE_LAG_MS: u64 = 500;
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
        coordinator: &Coordinator,
        saver: &mut Saver,
        history: &History,
    ) -> Result<(), JobError> {
        let mut machine = Preemption::default();
        self.tell(machine.noticed(notice.deadline_ms, now_ms()));
        let facts = self.facts(coordinator, saver);
        self.tell(machine.choose(&facts));
        let step = coordinator.state().step;
        if machine.phase().saves() {
            let begun = Instant::now();
            let budget = Budget::until(notice.deadline_ms, facts.now_ms, facts.lag_ms);
            if machine.begins_new_save(&facts) {
                saver.offer(self.order(coordinator, saver, history));
            }
            let deadline = begun + Duration::from_millis(budget.usable_ms);
            let is_saved = saver.flush(Some(deadline)).await?;
            let took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
            if !is_saved {
                self.tell(machine.ran_out(took_ms));
            }
            self.log.line(format_args!(
                "notice: {took_ms} ms were spent on saving step {step}; the newest checkpoint is of step {}",
                saver.committed_step().unwrap_or(0),
            ));
        } else {
            self.log.line(format_args!(
                "notice: step {step} is not saved; the newest checkpoint is of step {}",
                saver.committed_step().unwrap_or(0),
            ));
        }
        self.yield_node(&mut machine).await
    }

    /// What the choice rests on. Nobody else is known to hold these bits for sure: an order that would
    /// prove it may take longer than the grace.
    fn facts(&self, coordinator: &Coordinator, saver: &Saver) -> Facts {
        let millis = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        let size_bytes = coordinator.state().size_bytes();
        let usual_ms = millis(saver.expected_time()).max(1);
        Facts {
            now_ms: now_ms(),
            lag_ms: NOTICE_LAG_MS,
            survivors: 0,
            savers: 1,
            overhead_ms: 0,
            missing_bytes: size_bytes,
            bytes_per_second: (size_bytes.saturating_mul(1000) / usual_ms).max(1),
            running_ms: saver.expected_left().map(millis),
        }
    }

    fn tell(&self, transition: Option<Transition>) {
        if let Some(transition) = transition {
            self.log.line(format_args!("{transition}"));
        }
    }

    /// Has the head start the driver elsewhere. Returns if it may not.
    async fn yield_node(&self, machine: &mut Preemption) -> Result<(), JobError> {
        let notices = self.cluster.notices();
        for attempt in 1.. {
            let Err(error) = self.cluster.yield_actor(self.actor, self.incarnation).await else {
                break;
            };
            // The agent tells its hosts and the head at the same time: the head may be behind.
            if attempt == YIELD_ATTEMPTS_MAX || notices.borrow().is_none() {
                if notices.borrow().is_none() {
                    self.tell(machine.withdrawn());
                }
                self.log.line(format_args!("the driver stays: {error}"));
                return Ok(());
            }
            tokio::time::sleep(YIELD_PAUSE).await;
        }
        self.tell(machine.detached());
        // The agent ends this process, and the head starts the driver elsewhere.
        tokio::time::sleep(YIELDED_MAX).await;
        Err(JobError::NotStopped(self.actor))
    }
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
