//! What a driver does about notices, told twice: in the job's log, and in the replicated table, where it outlives
//! the driver.
//!
//! Invariants:
//! 1. Training never waits for the table: a step is sent in the background, and waited for only by a driver that is
//!    about to leave, within a bound.
//! 2. Steps are sent in their order, each until it is known to be there; said twice it counts once.
//! 3. At most [`STEPS_PER_COMMAND`] wait; the oldest is dropped for one more, and is in the log still.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use mobula_core::{Incarnation, JobId};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::job::now_ms;
use super::job_log::JobLog;
use super::preemption::Transition;
use crate::checkpoint::ledger::{CheckpointError, Ledger};
use crate::checkpoint::preemptions::{
    PreemptionPhase, PreemptionStep, STEPS_PER_COMMAND, WHY_BYTES_MAX,
};
use crate::checkpoint::state::CheckpointCommand;

/// How long a driver that leaves waits for the table, and a new one for what is there of the one before.
const RECORD_MAX: Duration = Duration::from_secs(1);
/// The pause before the table is tried again.
const PAUSE: Duration = Duration::from_millis(50);

/// Who leaves, and where that is recorded.
pub(super) struct Chronicle {
    ledger: Arc<dyn Ledger>,
    job: JobId,
    incarnation: Incarnation,
    node: String,
    log: JobLog,
    /// The number of the last step.
    number: u32,
    waiting: VecDeque<PreemptionStep>,
    /// At most one: up to which step it records.
    attempts: JoinSet<Attempt>,
}

type Attempt = ((Incarnation, u32), Result<(), CheckpointError>);

impl Chronicle {
    /// What the start `incarnation` of a job's driver on `node` does.
    pub(super) fn new(
        ledger: Arc<dyn Ledger>,
        job: JobId,
        incarnation: Incarnation,
        node: &str,
        log: JobLog,
    ) -> Self {
        Chronicle {
            ledger,
            job,
            incarnation,
            node: node.to_owned(),
            log,
            number: 0,
            waiting: VecDeque::new(),
            attempts: JoinSet::new(),
        }
    }

    /// Tells a step that was taken after so many training steps.
    pub(super) fn tell(&mut self, transition: &Transition, trained_steps: u64) {
        self.log.line(format_args!("{transition}"));
        self.number += 1;
        let deadline_ms = transition.to.deadline_ms();
        self.queue(PreemptionStep {
            incarnation: self.incarnation,
            number: self.number,
            node: self.node.clone(),
            from: transition.from.name(),
            to: transition.to.name(),
            deadline_ms: deadline_ms.or(transition.from.deadline_ms()),
            trained_steps,
            needed_ms: transition.needed_ms,
            usable_ms: transition.usable_ms,
            why: shortened(&transition.why),
            said_ms: now_ms(),
        });
        self.send();
    }

    /// Says how the driver before this one ended, if that had begun to leave: this one goes on after
    /// `trained_steps`.
    pub(super) async fn take_over(&mut self, trained_steps: u64) {
        let asked = tokio::time::timeout(RECORD_MAX, self.ledger.preemptions(self.job)).await;
        let known = match asked {
            Ok(Ok(known)) => known,
            Ok(Err(error)) => return self.untold(&error.to_string()),
            Err(_) => return self.untold("the head does not answer"),
        };
        let Some(last) = known.unfinished_before(self.incarnation) else {
            return;
        };
        let closing = |number, from, to, why: String| PreemptionStep {
            number,
            from,
            to,
            trained_steps,
            why: shortened(&why),
            said_ms: now_ms(),
            ..last.clone()
        };
        let goes_on = format!(
            "driver incarnation {} on {} goes on after step {trained_steps}, it left after step {}",
            self.incarnation, self.node, last.trained_steps
        );
        let mut from = last.to;
        let has_chosen = matches!(
            from,
            PreemptionPhase::Handoff
                | PreemptionPhase::SaveShared
                | PreemptionPhase::SaveSolo
                | PreemptionPhase::Abandon
        );
        let mut steps = Vec::new();
        if has_chosen {
            let why = "the head started the driver elsewhere".to_owned();
            let to = PreemptionPhase::Detached;
            steps.push(closing(last.number + 1, from, to, why));
            from = to;
        }
        let number = last.number + 1 + steps.len() as u32;
        steps.push(closing(number, from, PreemptionPhase::Gone, goes_on));
        for step in steps {
            self.log.line(format_args!(
                "notice of driver incarnation {}: {step}",
                step.incarnation
            ));
            self.queue(step);
        }
        self.send();
    }

    /// Waits until nothing is left to be recorded, as long as a driver that leaves can afford. Answers whether
    /// nothing is.
    pub(super) async fn recorded(&mut self) -> bool {
        let end = Instant::now() + RECORD_MAX;
        loop {
            match tokio::time::timeout_at(end, self.attempts.join_next()).await {
                Err(_) => break,
                Ok(Some(attempt)) => {
                    let attempt = attempt.expect("an attempt does not panic, and is not aborted");
                    self.settle(attempt);
                }
                Ok(None) => {}
            }
            if self.waiting.is_empty() {
                return true;
            }
            if self.attempts.is_empty() {
                if Instant::now() + PAUSE >= end {
                    break;
                }
                tokio::time::sleep(PAUSE).await;
                self.send();
            }
        }
        self.untold("the head does not answer");
        false
    }

    fn queue(&mut self, step: PreemptionStep) {
        if self.waiting.len() == STEPS_PER_COMMAND {
            self.waiting.pop_front();
        }
        self.waiting.push_back(step);
    }

    /// Sends what waits in the background, unless something is on its way.
    fn send(&mut self) {
        while let Some(attempt) = self.attempts.try_join_next() {
            self.settle(attempt.expect("an attempt does not panic, and is not aborted"));
        }
        let Some(last) = self.waiting.back().filter(|_| self.attempts.is_empty()) else {
            return;
        };
        let (last, ledger) = (last.key(), Arc::clone(&self.ledger));
        let command = CheckpointCommand::Preempted {
            job: self.job,
            incarnation: self.incarnation,
            steps: self.waiting.iter().cloned().collect(),
        };
        self.attempts
            .spawn(async move { (last, ledger.apply(&command).await) });
    }

    fn settle(&mut self, (last, outcome): Attempt) {
        match outcome {
            Ok(()) => self.waiting.retain(|step| step.key() > last),
            Err(CheckpointError::Unavailable(_)) => {}
            Err(error) => {
                // It would be refused again.
                self.untold(&error.to_string());
                self.waiting.clear();
            }
        }
    }

    fn untold(&self, reason: &str) {
        self.log.line(format_args!(
            "notice: the head does not know all of this: {reason}"
        ));
    }
}

/// A reason that the table takes.
fn shortened(why: &str) -> String {
    why[..why.floor_char_boundary(WHY_BYTES_MAX)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::ledger::memory::MemoryLedger;
    use crate::training::preemption::{Facts, Preemption};

    fn chronicle(ledger: &Arc<MemoryLedger>, incarnation: u64) -> Chronicle {
        let ledger = Arc::clone(ledger) as Arc<dyn Ledger>;
        let incarnation = Incarnation(incarnation);
        Chronicle::new(ledger, JobId(1), incarnation, "worker-1", JobLog::Silent)
    }

    /// A notice of a driver that chooses to hand over, with a `survivor` or without.
    fn notice(chronicle: &mut Chronicle, survivors: usize) {
        let mut machine = Preemption::default();
        let facts = Facts {
            now_ms: 0,
            lag_ms: 0,
            survivors,
            savers: 1,
            overhead_ms: 10,
            missing_bytes: 9_000,
            bytes_per_second: 1_000,
            running_ms: None,
        };
        chronicle.tell(&machine.noticed(8_000, 0).unwrap(), 40);
        chronicle.tell(&machine.choose(&facts).unwrap(), 40);
    }

    async fn recorded(ledger: &MemoryLedger) -> Vec<(u64, String)> {
        let known = ledger.preemptions(JobId(1)).await.unwrap();
        let steps = known.steps.iter();
        steps
            .map(|step| (step.incarnation.0, step.to.to_string()))
            .collect()
    }

    #[tokio::test]
    async fn what_a_driver_does_is_there_after_it_and_its_successor_says_how_it_ended() {
        let ledger = Arc::new(MemoryLedger::default());
        let mut first = chronicle(&ledger, 3);
        notice(&mut first, 2);
        assert!(first.recorded().await);
        drop(first);
        let mut second = chronicle(&ledger, 7);
        second.take_over(44).await;
        assert!(second.recorded().await);
        let expected = ["NOTICED", "HANDOFF", "DETACHED", "GONE"];
        assert_eq!(
            recorded(&ledger).await,
            expected.map(|to| (3, to.to_owned()))
        );
        let known = ledger.preemptions(JobId(1)).await.unwrap();
        let gone = known.steps.last().unwrap();
        assert!(gone.why.contains("goes on after step 44"), "{gone}");
        // A third one finds nothing that is open.
        let mut third = chronicle(&ledger, 9);
        third.take_over(50).await;
        assert!(third.recorded().await);
        assert_eq!(recorded(&ledger).await.len(), 4);
    }

    #[tokio::test]
    async fn what_was_given_up_is_recorded_with_what_was_needed_and_had() {
        let ledger = Arc::new(MemoryLedger::default());
        let mut chronicle = chronicle(&ledger, 3);
        notice(&mut chronicle, 0);
        assert!(chronicle.recorded().await);
        let known = ledger.preemptions(JobId(1)).await.unwrap();
        let last = known.steps.last().unwrap();
        assert_eq!(last.to, PreemptionPhase::Abandon);
        // 9 s for the bytes; of 8 s there are 2 left out.
        assert_eq!((last.needed_ms, last.usable_ms), (Some(9_010), Some(6_000)));
        assert_eq!((last.trained_steps, last.deadline_ms), (40, Some(8_000)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_is_away_holds_nobody_up_and_hears_it_later() {
        let ledger = Arc::new(MemoryLedger::default());
        *ledger.is_away.lock() = true;
        let mut chronicle = chronicle(&ledger, 3);
        notice(&mut chronicle, 1);
        let begun = Instant::now();
        assert!(!chronicle.recorded().await);
        assert!(begun.elapsed() <= RECORD_MAX);
        *ledger.is_away.lock() = false;
        assert!(chronicle.recorded().await);
        assert_eq!(recorded(&ledger).await.len(), 2);
    }

    #[tokio::test]
    async fn a_driver_that_was_replaced_records_nothing_more() {
        let ledger = Arc::new(MemoryLedger::default());
        notice(&mut chronicle(&ledger, 3), 1);
        let mut newer = chronicle(&ledger, 5);
        notice(&mut newer, 1);
        assert!(newer.recorded().await);
        let known = recorded(&ledger).await;
        let mut old = chronicle(&ledger, 3);
        notice(&mut old, 1);
        assert!(old.recorded().await, "nothing is left to be said");
        assert_eq!(recorded(&ledger).await, known);
    }
}
