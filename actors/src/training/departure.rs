//! A driver whose node was given notice: it hands over to the trainers that hold its bits elsewhere, or saves within
//! the grace, or says why it did neither, and leaves. Advice that the node may be taken away makes it save.
//!
//! Invariants:
//! 1. What is chosen is [`preemption`](super::preemption)'s to say; this brings the facts and carries it out.
//! 2. A job that may stop early is handed over only with what was measured up to the step that trainers may come to
//!    without a driver.
//! 3. Others are waited for no longer than a share of the grace.

use std::time::Duration;

use mobula::Notice;
use tokio::sync::watch;
use tokio::time::Instant;

use super::chronicle::Chronicle;
use super::job::{Coordinator, Driver, JobError, now_ms};
use super::messages::Handover;
use super::preemption::{Budget, Facts, Phase, Preemption, Transition};
use super::resume::History;
use super::saving::Saver;
use crate::checkpoint::spread::Spread;

/// How much later than it was given a notice may be heard: a worker looks for its file twice a second.
const NOTICE_LAG_MS: u64 = 500;
/// How long the trainers may take to answer; and the share of the grace that it may be at most.
const WITNESS_MAX: Duration = Duration::from_secs(2);
const WITNESS_SHARE: u64 = 8;
/// The share of the grace that may pass until all hold the state that is handed over or saved together.
const GATHER_SHARE: u64 = 4;
/// How long a driver that has yielded may still be there.
const YIELDED_MAX: Duration = Duration::from_secs(30);
/// Attempts to leave while the head does not know of the notice yet.
const YIELD_ATTEMPTS_MAX: u32 = 10;
const YIELD_PAUSE: Duration = Duration::from_millis(200);

/// What is said of this driver's machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Said {
    /// It goes then.
    Leaves(Notice),
    /// It does not go.
    Stays,
    /// It may go some time, or may no more.
    Advised(bool),
    /// The others hold the state that was waited for, or had their time.
    Gathered,
}

/// Hears what is said of this driver's machine, each change once.
pub(super) struct Ear {
    notices: watch::Receiver<Option<Notice>>,
    advice: watch::Receiver<bool>,
    notice: Option<Notice>,
    is_advised: bool,
}

impl Ear {
    pub(super) fn new(
        notices: watch::Receiver<Option<Notice>>,
        advice: watch::Receiver<bool>,
    ) -> Self {
        Ear {
            notices,
            advice,
            notice: None,
            is_advised: false,
        }
    }

    /// The next thing that is said. Nothing is lost when this is dropped.
    pub(super) async fn next(&mut self) -> Said {
        loop {
            let notice = *self.notices.borrow_and_update();
            if std::mem::replace(&mut self.notice, notice) != notice {
                return notice.map_or(Said::Stays, Said::Leaves);
            }
            let is_advised = *self.advice.borrow_and_update();
            if std::mem::replace(&mut self.is_advised, is_advised) != is_advised {
                return Said::Advised(is_advised);
            }
            let changed = tokio::select! {
                changed = self.notices.changed() => changed,
                changed = self.advice.changed() => changed,
            };
            if changed.is_err() {
                // Nobody is left who could say anything.
                std::future::pending::<()>().await;
            }
        }
    }
}

/// How far a driver is from leaving its machine, told as it goes.
pub(super) struct Departure {
    machine: Preemption,
    chronicle: Chronicle,
    gathering: Option<Gathering>,
}

/// A state that a driver trains on to before it leaves: one that trainers whose machines go too save with it, behind
/// which nobody takes a step that its own save would lack, or after which those who stay wait for the next driver.
#[derive(Debug, Clone, Copy)]
struct Gathering {
    notice: Notice,
    /// After which step that is.
    step: u64,
    /// Until when that is waited for.
    until: Instant,
}

impl Departure {
    pub(super) fn new(chronicle: Chronicle) -> Self {
        Departure {
            machine: Preemption::default(),
            chronicle,
            gathering: None,
        }
    }

    /// Whether a state is trained on to.
    pub(super) fn is_gathering(&self) -> bool {
        self.gathering.is_some()
    }

    /// Ends when the driver's own copy, which stands after `step`, is where it should come to, or has had its time;
    /// never where it should come to nothing.
    pub(super) async fn gathered(&self, step: u64) {
        match self.gathering {
            None => std::future::pending().await,
            Some(gathering) if step >= gathering.step => {}
            Some(gathering) => tokio::time::sleep_until(gathering.until).await,
        }
    }

    /// Has the machine take a step that it may take or not, and tells of it.
    fn go(&mut self, trained_steps: u64, step: impl FnOnce(&mut Preemption) -> Option<Transition>) {
        if let Some(transition) = step(&mut self.machine) {
            self.chronicle.tell(&transition, trained_steps);
        }
    }
}

impl Driver {
    /// Does what is to be done about what is `said`. Answers whether a save would be good now; a driver that leaves
    /// does not come back from this.
    pub(super) async fn heed(
        &self,
        said: Said,
        departure: &mut Departure,
        coordinator: &mut Coordinator,
        saver: &mut Saver,
        history: &History,
    ) -> Result<bool, JobError> {
        let step = coordinator.state().step;
        if matches!(said, Said::Leaves(_) | Said::Advised(true)) {
            saver.hurry();
        }
        match said {
            Said::Leaves(notice) => {
                departure.go(step, |machine| {
                    machine.noticed(notice.deadline_ms, now_ms())
                });
                let others = self.others(notice, coordinator).await;
                departure.gathering = self.gather(notice, &others, coordinator, saver, history);
                if departure.gathering.is_none() {
                    self.leave(notice, others, departure, coordinator, saver, history)
                        .await?;
                    coordinator.disperse();
                }
            }
            Said::Gathered => {
                let Some(Gathering { notice, .. }) = departure.gathering.take() else {
                    return Ok(false);
                };
                // Somebody may have come or gone meanwhile.
                let others = self.others(notice, coordinator).await;
                self.leave(notice, others, departure, coordinator, saver, history)
                    .await?;
                coordinator.disperse();
            }
            Said::Stays => {
                departure.gathering = None;
                coordinator.disperse();
                departure.go(step, Preemption::withdrawn);
                // What was advised before may still stand.
                if *self.cluster.advice().borrow() {
                    departure.go(step, Preemption::advised);
                }
            }
            Said::Advised(true) => departure.go(step, Preemption::advised),
            Said::Advised(false) => departure.go(step, Preemption::advice_withdrawn),
        }
        Ok(said == Said::Advised(true))
    }

    /// Finds out whether it is better to train on for some steps before leaving, and sees to it.
    fn gather(
        &self,
        notice: Notice,
        others: &Others,
        coordinator: &mut Coordinator,
        saver: &Saver,
        history: &History,
    ) -> Option<Gathering> {
        let now_ms = now_ms();
        let wait_ms = notice.deadline_ms.saturating_sub(now_ms) / GATHER_SHARE;
        let step = if !others.alive.is_empty() {
            if self.knows_enough(coordinator, history) {
                return None;
            }
            let step = coordinator.halt();
            self.log.line(format_args!(
                "notice: trainers stop after step {step}; what is measured until then decides when the job stops, and \
                 is handed over with it"
            ));
            step
        } else if others.doomed > 0 && coordinator.can_be_shared() {
            let step = coordinator.gather(self.node());
            self.log.line(format_args!(
                "notice: {} trainers go as well; what they hold after step {step} is saved together",
                others.doomed
            ));
            step
        } else if others.doomed + others.beside > 0 {
            let facts = facts(0, 1, coordinator.state().size_bytes(), saver);
            if !facts.allows(wait_ms, notice.deadline_ms) {
                return None;
            }
            let step = coordinator.gather_here();
            self.log.line(format_args!(
                "notice: no trainer stays that holds these bits; they stop after step {step}, which is saved"
            ));
            step
        } else {
            return None;
        };
        Some(Gathering {
            notice,
            step,
            until: Instant::now() + Duration::from_millis(wait_ms),
        })
    }

    /// Whether a driver that goes on from what trainers hold by then could judge when the job stops: nothing
    /// is measured between what `history` knows and the step that they come to by themselves.
    fn knows_enough(&self, coordinator: &Coordinator, history: &History) -> bool {
        let rule = self.spec.evaluation.as_ref();
        rule.is_none_or(|rule| history.watch.covers(rule, coordinator.gate()))
    }

    /// Gives those who stay what the next driver has to know beside the state. Answers how many of them it can go on
    /// with.
    async fn entrust(
        &self,
        notice: Notice,
        others: &Others,
        coordinator: &Coordinator,
        saver: &Saver,
        history: &History,
    ) -> usize {
        if others.alive.is_empty() {
            return 0;
        }
        if !self.knows_enough(coordinator, history) {
            self.log.line(format_args!(
                "notice: not handed over, for trainers may come to step {} alone, and nobody would know what had to be \
                 measured before",
                coordinator.gate()
            ));
            return 0;
        }
        let handover = Handover {
            step: coordinator.state().step,
            metadata: self.knowledge(coordinator, saver.committed_count(), history),
        };
        let limit = witness_limit(notice);
        let entrusted = coordinator.entrust(&others.alive, &handover, limit).await;
        if self.spec.stops_early() {
            return entrusted;
        }
        // Others lack nothing but numbers for people.
        others.alive.len()
    }

    /// Hands over, saves or gives up, and leaves the node. Returns if it may not leave.
    async fn leave(
        &self,
        notice: Notice,
        others: Others,
        departure: &mut Departure,
        coordinator: &Coordinator,
        saver: &mut Saver,
        history: &History,
    ) -> Result<(), JobError> {
        let step = coordinator.state().step;
        let survivors = self.entrust(notice, &others, coordinator, saver, history);
        let savers = 1 + coordinator.helpers(step).len() as u64;
        let size_bytes = coordinator.state().size_bytes();
        let facts = facts(survivors.await, savers, size_bytes, saver);
        departure.go(step, |machine| machine.choose(&facts));
        let phase = departure.machine.phase();
        let committed = |saver: &Saver| saver.committed_step().unwrap_or(0);
        if phase.saves() {
            let begun = Instant::now();
            let budget = Budget::until(notice.deadline_ms, facts.now_ms, facts.lag_ms);
            if departure.machine.begins_new_save(&facts) {
                saver.offer(self.order(coordinator, saver, history, Spread::default()));
            }
            let deadline = begun + Duration::from_millis(budget.usable_ms);
            let is_saved = saver.flush(Some(deadline)).await?;
            let took_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
            if !is_saved {
                departure.go(step, |machine| machine.ran_out(took_ms));
            }
            self.log.line(format_args!(
                "notice: {took_ms} ms were spent on saving step {step}; the newest checkpoint is of step {}",
                committed(saver),
            ));
        } else if matches!(phase, Phase::Handoff { .. }) {
            self.log.line(format_args!(
                "notice: step {step} is handed over and not saved; the newest checkpoint is of step {}",
                committed(saver),
            ));
        } else {
            self.log.line(format_args!(
                "notice: step {step} is not saved; the newest checkpoint is of step {}",
                committed(saver),
            ));
        }
        self.yield_node(departure, step).await
    }

    /// Trainers that hold this driver's very bits, as they say now.
    async fn others(&self, notice: Notice, coordinator: &Coordinator) -> Others {
        let witnesses = coordinator.witnesses(witness_limit(notice)).await;
        // A trainer beside this driver may not have heard of the notice yet.
        let (beside, elsewhere): (Vec<_>, Vec<_>) = witnesses
            .iter()
            .partition(|witness| witness.node == self.node());
        let (doomed, alive): (Vec<_>, Vec<_>) =
            elsewhere.into_iter().partition(|witness| witness.is_doomed);
        Others {
            alive: alive.iter().map(|witness| witness.slot).collect(),
            doomed: doomed.len(),
            beside: beside.len(),
        }
    }

    /// Has the head start the driver elsewhere. Returns if it may not.
    async fn yield_node(&self, departure: &mut Departure, step: u64) -> Result<(), JobError> {
        // From then on this process may end at any moment.
        departure.chronicle.recorded().await;
        let notices = self.cluster.notices();
        for attempt in 1.. {
            let Err(error) = self.cluster.yield_actor(self.actor, self.incarnation).await else {
                break;
            };
            // The agent tells its hosts and the head at the same time: the head may be behind.
            if attempt == YIELD_ATTEMPTS_MAX || notices.borrow().is_none() {
                if notices.borrow().is_none() {
                    departure.go(step, Preemption::withdrawn);
                }
                self.log.line(format_args!("the driver stays: {error}"));
                return Ok(());
            }
            tokio::time::sleep(YIELD_PAUSE).await;
        }
        departure.go(step, Preemption::detached);
        // The agent ends this process, and the head starts the driver elsewhere, which says so where this one
        // does not get to.
        tokio::time::sleep(YIELDED_MAX).await;
        Err(JobError::NotStopped(self.actor))
    }
}

/// Trainers that hold the driver's very bits.
struct Others {
    /// The slots of those whose machines stay.
    alive: Vec<usize>,
    /// How many have other machines, which go too.
    doomed: usize,
    /// How many are on this machine.
    beside: usize,
}

/// How long trainers may take to answer a driver that leaves.
fn witness_limit(notice: Notice) -> Duration {
    let left_ms = notice.deadline_ms.saturating_sub(now_ms());
    WITNESS_MAX.min(Duration::from_millis(left_ms / WITNESS_SHARE))
}

/// What the choice rests on, of a state of `size_bytes` that so many can save.
fn facts(survivors: usize, savers: u64, size_bytes: u64, saver: &Saver) -> Facts {
    let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    Facts {
        now_ms: now_ms(),
        lag_ms: NOTICE_LAG_MS,
        survivors,
        savers,
        overhead_ms: millis(saver.overhead()),
        missing_bytes: size_bytes,
        bytes_per_second: saver.bytes_per_second(size_bytes),
        running_ms: saver.expected_left().map(millis),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mobula_core::JobId;
    use mobula_storage::blob::{BlobStore, S3Options};

    use super::*;
    use crate::checkpoint::checkpointer::Checkpointer;
    use crate::checkpoint::ledger::memory::MemoryLedger;
    use crate::training::job_log::JobLog;

    /// What a driver that has saved nothing yet does with so many milliseconds of grace, where nobody else holds its
    /// state of `size_bytes`.
    fn first_choice(limit: Option<u64>, size_bytes: u64, grace_ms: u64) -> Transition {
        let open = || BlobStore::open("memory://", &S3Options::default());
        let ledger = Arc::new(MemoryLedger::default());
        let checkpointer = Checkpointer::new(open, ledger, JobId(3), limit);
        let saver = Saver::over(checkpointer, limit, JobLog::Silent);
        let facts = facts(0, 1, size_bytes, &saver);
        let mut machine = Preemption::default();
        let deadline_ms = facts.now_ms + grace_ms;
        machine.noticed(deadline_ms, facts.now_ms).unwrap();
        machine.choose(&facts).unwrap()
    }

    #[test]
    fn a_driver_that_has_saved_nothing_yet_begins_no_upload_that_cannot_end_in_time() {
        let choice = |limit, size_bytes, grace_ms| {
            let transition = first_choice(limit, size_bytes, grace_ms);
            (transition.to.to_string(), transition.needed_ms)
        };
        let abandoned = |needed_ms| ("ABANDON".to_owned(), Some(needed_ms));
        let saved = |needed_ms| ("SAVE_SOLO".to_owned(), Some(needed_ms));
        // A second, and 13 MB at 1 MB/s; of 8 s there are 5.5 usable.
        assert_eq!(
            choice(Some(1_000_000), 13_000_000, 8_000),
            abandoned(14_000)
        );
        assert_eq!(choice(Some(1_000_000), 13_000_000, 30_000), saved(14_000));
        assert_eq!(choice(None, 13_000_000, 8_000), saved(1_325));
        // 400 MB are too much for 8 s wherever they go.
        assert_eq!(choice(None, 400_000_000, 8_000), abandoned(11_000));
    }

    #[tokio::test]
    async fn each_change_of_what_is_said_is_heard_once() {
        let notices = watch::Sender::new(Some(Notice { deadline_ms: 5 }));
        let advice = watch::Sender::new(false);
        let mut ear = Ear::new(notices.subscribe(), advice.subscribe());
        let leaves = |deadline_ms| Said::Leaves(Notice { deadline_ms });
        assert_eq!(ear.next().await, leaves(5));
        let silence = tokio::time::timeout(Duration::from_millis(20), ear.next());
        assert!(silence.await.is_err());
        advice.send_replace(true);
        notices.send_replace(Some(Notice { deadline_ms: 9 }));
        assert_eq!(
            ear.next().await,
            leaves(9),
            "what has a deadline goes first"
        );
        assert_eq!(ear.next().await, Said::Advised(true));
        notices.send_replace(None);
        assert_eq!(ear.next().await, Said::Stays);
        advice.send_replace(false);
        assert_eq!(ear.next().await, Said::Advised(false));
    }
}
