//! Who takes part in a job's steps: leaving, being lost, being slow, being wrong. How one comes is in `joining`.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::{Coordinator, CoordinatorError};
use crate::training::collective::Collective;
use crate::training::crew::{
    GREET_PAUSE_FIRST, LinkError, Presence, REFUSALS_MAX, Slot, TrainerLink,
};
use crate::training::job::now_ms;
use crate::training::messages::{News, TrainerError};
use crate::training::protocol::exchange::Report;
use crate::training::protocol::leader::{StateDigest, judge};
use crate::training::protocol::plan::MemberId;

/// How long a trainer with notice stays that is one of the last or could help to save: longer than a driver takes to hear that
/// its own machine goes too, which is seldom said to all at the same moment. And the share of the grace that it may be at most.
const STAY_MAX: Duration = Duration::from_secs(2);
const STAY_SHARE: u32 = 8;
/// How often a trainer with notice that stays is listened to.
const DOOMED_PAUSE: Duration = Duration::from_millis(100);
/// How often a trainer that takes no part is asked who it is, beside listening for the end of its process: as on a machine
/// that was mended, it may be another one.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);
/// How long a trainer is left alone that cannot reach its data.
const HINDERED_PAUSE: Duration = Duration::from_secs(5);
/// How long a member is left out that others do not reach: if the way is still cut, it costs as much again.
const UNREACHED_PAUSE: Duration = Duration::from_secs(30);
/// The longest pause before a trainer that failed or takes no part is asked again, while no step begins without it.
const STANDING_PAUSE_MAX: Duration = Duration::from_secs(2);
/// How often trainers of one machine may be found with other bits. From then on none there takes part under this driver: to
/// give them the state again mends no machine.
pub(super) const STRIKES_MAX: u32 = 3;

impl<L: TrainerLink, C: Collective> Coordinator<L, C> {
    /// A trainer has said something, if only that it lives.
    pub(super) fn heard(&mut self, index: usize, news: &News) {
        let slot = self.crew.slot(index);
        slot.heard_at = Instant::now();
        (slot.news_number, slot.step) = (news.number, news.step);
        (slot.spent, slot.cpu) = (news.spent, news.cpu);
        slot.gpu = news.gpu_utilization;
        let member = news.member;
        if slot.member != Some(member) {
            self.lose(index, "it has taken over a state from somebody else");
            return;
        }
        match news.notice_ms {
            None => {
                self.crew.slot(index).stays_until = None;
                self.crew.listen(index);
            }
            Some(deadline_ms) if self.stays(index, deadline_ms) => {
                self.crew.listen_after(index, DOOMED_PAUSE);
            }
            Some(_) => {
                self.let_leave(index);
                return;
            }
        }
        for report in &news.reports {
            self.reported(member, *report);
        }
        // One that leaves soon is nobody to give shards to.
        if news.notice_ms.is_none() {
            self.seat_if_near(index, member, news.step);
        }
    }

    /// What the copy, or a trainer, has to say of others.
    pub(super) fn reported(&mut self, from: MemberId, report: Report) {
        match report {
            // The end of a process is seen by listening to it; this is for members that we reach and that
            // do not reach each other.
            Report::Unreachable { peer } => self.unreached.failed(from, peer, Instant::now()),
            Report::Reached { peer } => self.unreached.reached(from, peer),
            Report::Dissent { step, .. } => {
                if self.judging.insert(step) {
                    self.crew.ask_digests(step);
                }
            }
            Report::Slow { peer, step } => self.slow(peer, step),
            Report::Behind { .. } if from == self.me => self.rewind(),
            Report::Behind { .. } => {
                let index = from.slot as usize;
                // The same may have been said of several buckets.
                if self.crew.slots()[index].member == Some(from) {
                    self.too_late(index, "is too far behind to find the sums that it lacks");
                }
            }
        }
    }

    /// Whether a trainer whose machine goes stays for now: the driver saves what it has done, perhaps with its help, or has
    /// hardly had the time to hear that its own machine goes as well. Nothing waits for such a trainer; it goes on as long
    /// as it can.
    pub(super) fn stays(&mut self, index: usize, deadline_ms: u64) -> bool {
        if self.keeps_doomed {
            return true;
        }
        // What it has done is with those who go on. Where nobody does, steps that the copy has not followed yet would go
        // with it.
        if !self.can_be_shared() && self.another_goes_on(index) {
            return false;
        }
        let left = Duration::from_millis(deadline_ms.saturating_sub(now_ms()));
        let stay = STAY_MAX.min(left / STAY_SHARE);
        let now = Instant::now();
        let slot = self.crew.slot(index);
        now < *slot.stays_until.get_or_insert(now + stay)
    }

    /// Whether another trainer takes part whose machine stays, as far as it has said.
    fn another_goes_on(&self, index: usize) -> bool {
        let mut others = self.crew.slots().iter().enumerate();
        others.any(|(other, slot)| other != index && slot.is_ready() && slot.stays_until.is_none())
    }

    fn let_leave(&mut self, index: usize) {
        self.counters.handoffs += 1;
        self.log.line(format_args!(
            "trainer-{index} leaves {} at step {}: the node will be taken away",
            self.crew.slots()[index].node,
            self.state.step
        ));
        self.unseat(index);
        self.crew.let_leave(index);
        self.publish();
    }

    pub(super) fn failed(
        &mut self,
        index: usize,
        error: &LinkError,
    ) -> Result<(), CoordinatorError> {
        match error {
            LinkError::Trainer(TrainerError::Stale { current, .. })
                if current.driver_incarnation() > self.me.incarnation =>
            {
                return Err(CoordinatorError::Fenced(current.driver_incarnation()));
            }
            LinkError::Trainer(TrainerError::Unfit(reason)) => {
                let (node, reason) = (self.crew.slots()[index].node.clone(), reason.clone());
                return Err(CoordinatorError::Unfit {
                    slot: index,
                    node,
                    reason,
                });
            }
            LinkError::Trainer(TrainerError::Unprepared) => {
                self.lose(index, "it was started again");
            }
            LinkError::Trainer(TrainerError::OtherBits { computes, .. }) => {
                self.refused(index, *computes);
            }
            LinkError::Trainer(TrainerError::Hindered(reason)) => {
                self.lose_for(index, reason, HINDERED_PAUSE);
            }
            LinkError::Trainer(other) => self.refuses(index, &other.to_string()),
            LinkError::Lost(reason) => self.lose(index, reason),
        }
        Ok(())
    }

    /// A trainer is lost, or did not come so far as to take part: it is asked again after a pause that grows while it
    /// does not take part for long.
    pub(super) fn lose(&mut self, index: usize, reason: &str) {
        self.settle(index);
        let attempts = &mut self.crew.slot(index).attempts;
        let pause = attempts.fails(GREET_PAUSE_FIRST);
        self.lose_to_nap(index, reason, pause);
    }

    /// A trainer that was reached does not do as it was told. What it refuses again and again it will not do, so that it
    /// is given up then, unless nobody goes on without it.
    pub(super) fn refuses(&mut self, index: usize, reason: &str) {
        self.settle(index);
        let is_needed = self.is_needed(index);
        let slot = self.crew.slot(index);
        let pause = slot.attempts.refuses(GREET_PAUSE_FIRST);
        if pause.is_none() {
            slot.given_up = Some(reason.to_owned());
        }
        match pause {
            None if !is_needed => self.give_up(index, reason),
            pause => self.lose_to_nap(index, reason, pause.unwrap_or(STANDING_PAUSE_MAX)),
        }
    }

    fn lose_to_nap(&mut self, index: usize, reason: &str, grown: Duration) {
        // Where nobody goes on without it, it may soon try again.
        let is_needed = self.is_needed(index);
        let pause = if is_needed {
            grown.min(STANDING_PAUSE_MAX)
        } else {
            grown
        };
        self.lose_for(index, reason, pause);
        // One that is asked at once has nothing to be woken from.
        self.crew.slot(index).naps = !is_needed && pause > GREET_PAUSE_FIRST;
    }

    /// A trainer takes no part any more until its process is another one, or nobody goes on without it.
    fn give_up(&mut self, index: usize, reason: &str) {
        let slot = self.crew.slot(index);
        slot.refused = slot.incarnation;
        let node = slot.node.clone();
        self.log.line(format_args!(
            "trainer-{index} on {node} is given up at step {}: {reason}; it did not do as it was told {REFUSALS_MAX} \
             times, with {REFUSALS_MAX} at most, and takes no part until its process is another one: drain the machine \
             (`mobula nodes drain {node}`), then it starts elsewhere",
            self.state.step
        ));
        self.lose_for(index, reason, REFUSED_PAUSE);
        self.crew.slot(index).naps = true;
    }

    /// Leaves a trainer alone that takes no part, until its process is another one.
    pub(super) fn set_aside(&mut self, index: usize) {
        let is_needed = self.is_needed(index);
        let pause = if is_needed {
            STANDING_PAUSE_MAX
        } else {
            REFUSED_PAUSE
        };
        self.crew.lose(index, pause);
        self.crew.slot(index).naps = !is_needed;
    }

    /// Whether no step begins without this trainer, be it there or not.
    fn is_needed(&self, index: usize) -> bool {
        let seated = self.leader.seated().iter();
        let others = seated.filter(|member| member.slot as usize != index);
        others.count() < self.spec.workers.min.max(1) as usize
    }

    /// Judges whether a trainer took part for long, if it does: whatever comes now ends that.
    fn settle(&mut self, index: usize) {
        let (step, steady) = (self.state.step, self.steady_steps());
        let attempts = &mut self.crew.slot(index).attempts;
        attempts.unseated(step, Instant::now(), steady);
    }

    /// Takes a trainer's seat away. Answers how many of its shards go to others, or nothing if it had no seat.
    pub(super) fn unseat(&mut self, index: usize) -> Option<usize> {
        self.settle(index);
        let member = self.crew.slots()[index].member?;
        // That nobody reached it says nothing of those who did not.
        self.unreached.forget(member);
        self.leader.unseat(member)
    }

    /// Gives a trainer up, and asks for it again after `pause`.
    fn lose_for(&mut self, index: usize, reason: &str, pause: Duration) {
        let unseated = self.unseat(index);
        let slot = &self.crew.slots()[index];
        if let Some(shards) = unseated {
            self.stall.note(slot.heard_at, Instant::now());
            self.counters.trainers_lost += 1;
            self.counters.reassigned_shards += shards as u64;
            self.log.line(format_args!(
                "trainer-{index} on {} is lost at step {}: {reason}; {shards} shards of this step \
                 go to the others",
                slot.node, self.state.step
            ));
        }
        self.crew.lose(index, pause);
        self.publish();
    }

    /// Where members that we all reach do not reach each other, and no step gets done for that: the one
    /// that most speak of, or that speaks of most, is left out for a while.
    pub(super) fn separate(&mut self) {
        let now = Instant::now();
        if let Some(worst) = self.unreached.worst(self.leader.seated(), self.me, now) {
            self.lose_for(
                worst.slot as usize,
                "others do not reach it",
                UNREACHED_PAUSE,
            );
        }
    }

    /// A trainer takes long at `step`: others compute its shards too.
    pub(super) fn slow(&mut self, peer: MemberId, step: u64) {
        // Of a step that is over it does not matter any more.
        if step < self.state.step {
            return;
        }
        let given = self.leader.back_up(peer, step);
        if given == 0 {
            return;
        }
        self.counters.slow_orders += 1;
        self.log.line(format_args!(
            "trainer-{} takes much longer than usual for step {step}: others compute its {given} \
             shards too",
            peer.slot
        ));
        self.publish();
    }

    /// Trainers have different bits: whoever is in the minority is wrong.
    pub(super) fn judge(
        &mut self,
        step: u64,
        said: &BTreeMap<MemberId, StateDigest>,
    ) -> Result<(), CoordinatorError> {
        self.judging.remove(&step);
        let Some(own) = self.member.digest_before(step) else {
            // Our copy is not there yet. It will be, and the difference is reported again.
            return Ok(());
        };
        let Some(wrong) = judge(said, own) else {
            return Err(CoordinatorError::Outvoted {
                step,
                count: said.len(),
                ours: self.digest.clone(),
            });
        };
        for member in wrong {
            let index = member.slot as usize;
            if self.crew.slots()[index].member != Some(member) {
                continue;
            }
            self.counters.digest_mismatches += 1;
            self.unseat(index);
            self.quarantine(index, step);
        }
        self.publish();
        Ok(())
    }

    /// A trainer held other bits before `step`: it gets the state again, unless its machine has done that too often.
    fn quarantine(&mut self, index: usize, step: u64) {
        let node = self.crew.slots()[index].node.clone();
        let strikes = self.strikes.entry(node.clone()).or_default();
        *strikes += 1;
        if *strikes < STRIKES_MAX {
            self.log.line(format_args!(
                "trainer-{index} on {node} has other parameters than the others before step {step}: \
                 its sums are refused and it gets the state again"
            ));
            self.prepare(index);
            return;
        }
        self.log.line(format_args!(
            "trainer-{index} on {node} has other parameters than the others before step {step}, which is no. {strikes} \
             on that machine, with {STRIKES_MAX} at most: no trainer there takes part any more under this driver. Its \
             memory, processor or GPU is likely to be at fault: drain it (`mobula nodes drain {node}`), then its \
             trainers start elsewhere and take part"
        ));
        let is_there = |slot: &Slot<L>| slot.node == node && slot.presence != Presence::Away;
        let there = self.crew.which(is_there);
        for index in &there {
            self.unseat(*index);
        }
        let epoch = self.leader.plan().epoch;
        for index in there {
            self.crew.dismiss(index, epoch, REFUSED_PAUSE);
            self.crew.slot(index).naps = true;
        }
    }

    /// What people have to know of machines on which no trainer takes part any more, behind what a step waits for.
    pub(super) fn struck_machines(&self) -> String {
        let struck = self.strikes.iter();
        let struck = struck.filter(|(_, strikes)| **strikes >= STRIKES_MAX);
        let names: Vec<&str> = struck.map(|(node, _)| node.as_str()).collect();
        if names.is_empty() {
            return String::new();
        }
        format!(
            "; none on {} does any more, where trainers had other parameters than the others {STRIKES_MAX} times: drain \
             such a machine (`mobula nodes drain NAME`), then its trainers start elsewhere",
            names.join(", ")
        )
    }

    /// What people have to know of trainers that refuse too often, behind what a step waits for.
    pub(super) fn given_up(&self) -> String {
        let slots = self.crew.slots().iter().enumerate();
        let reasons = slots.filter_map(|(index, slot)| {
            let reason = slot.given_up.as_ref()?;
            let node = &slot.node;
            Some(format!(
                "; trainer-{index} on {node} did not do as it was told {REFUSALS_MAX} times or more: {reason}"
            ))
        });
        reasons.collect()
    }

    /// Our copy is so far behind the trainers that nobody has the sums that it lacks, which is so only if
    /// nobody gave their state to a driver that was started anew. They take those steps again.
    pub(super) fn rewind(&mut self) {
        self.log.line(format_args!(
            "the trainers are further than this driver can follow from step {}: they take those \
             steps again",
            self.state.step
        ));
        for index in self.crew.which(Slot::follows) {
            self.unseat(index);
            self.prepare(index);
        }
        self.publish();
    }
}
