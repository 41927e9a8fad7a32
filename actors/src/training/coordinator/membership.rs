//! Who takes part in a job's steps: joining, leaving, being lost, being slow, being wrong.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Coordinator, CoordinatorError};
use crate::training::collective::Collective;
use crate::training::crew::{GREET_PAUSE_FIRST, LinkError, Preparation, Slot, TrainerLink};
use crate::training::job::now_ms;
use crate::training::messages::{Admission, Greeting, Held, News, TrainerError};
use crate::training::numerics::{Numerics, Probe};
use crate::training::protocol::exchange::Report;
use crate::training::protocol::leader::{StateDigest, judge};
use crate::training::protocol::plan::MemberId;

/// How long a trainer with notice stays that could help to save: longer than a driver takes to hear that its own
/// machine goes too, which is seldom said to all at the same moment. And the share of the grace that it may be at most.
const STAY_MAX: Duration = Duration::from_secs(2);
const STAY_SHARE: u32 = 8;
/// How often a trainer with notice that stays is listened to.
const DOOMED_PAUSE: Duration = Duration::from_millis(100);
/// How often is looked whether a trainer that was refused was started anew, as on a machine that was mended.
const REFUSED_PAUSE: Duration = Duration::from_secs(30);
/// How long a trainer is left alone that cannot reach its data.
const HINDERED_PAUSE: Duration = Duration::from_secs(5);
/// How long a member is left out that others do not reach: if the way is still cut, it costs as much again.
const UNREACHED_PAUSE: Duration = Duration::from_secs(30);

impl<L: TrainerLink, C: Collective> Coordinator<L, C> {
    pub(super) fn greeted(&mut self, index: usize, greeting: Greeting) {
        let slot = self.crew.slot(index);
        if slot
            .incarnation
            .is_some_and(|known| known != greeting.incarnation)
        {
            self.counters.trainer_restarts += 1;
        }
        slot.incarnation = Some(greeting.incarnation);
        slot.node = greeting.node_name;
        if greeting.notice_ms.is_some() {
            self.crew.let_leave(index);
            return;
        }
        let is_refused = slot.refused == slot.incarnation;
        match greeting.held {
            // It would compute the same again.
            None if is_refused => self.crew.lose(index, REFUSED_PAUSE),
            // It went on under an earlier coordinator, or lost nothing but the connection.
            Some((member, held)) if self.goes_with_us(&held) => {
                self.joined(index, member, held.step);
            }
            _ => self.prepare(index),
        }
    }

    /// Whether a trainer that holds this can go on from there: our copy finds the sums that it lacks
    /// itself, and a step that both know is the same. Other bits at other steps show when sums are
    /// exchanged.
    fn goes_with_us(&self, held: &Held) -> bool {
        let far = self.state.step + self.leader.shape().lead_max;
        match held.step.cmp(&self.state.step) {
            std::cmp::Ordering::Less => false,
            std::cmp::Ordering::Equal => held.digest == self.digest,
            std::cmp::Ordering::Greater => held.step <= far,
        }
    }

    /// Sends the present state in the background.
    pub(super) fn prepare(&mut self, index: usize) {
        let sent = Held {
            step: self.state.step,
            digest: self.digest.clone(),
        };
        let state = &self.state;
        let packed = self
            .packed
            .get_or_insert_with(|| Arc::new(state.to_bytes()));
        let order = Preparation {
            plan: self.leader.plan().clone(),
            state: Arc::clone(packed),
            probe: (self.spec.numerics == Numerics::Strict).then_some(self.probe),
        };
        self.crew.prepare(index, sent, order);
    }

    /// A trainer's machine computes other bits than ours, and said so instead of taking part.
    fn refused(&mut self, index: usize, computes: Probe) {
        self.counters.trainers_refused += 1;
        let (node, ours) = (&self.crew.slots()[index].node, self.probe);
        self.log.line(format_args!(
            "trainer-{index} on {node} takes no part: of the same shard it computes {computes}, this driver {ours}. \
             It may run another build, or its machine is at fault; `numerics = \"mixed\"` would let it take part, and \
             give up that the result has one hash"
        ));
        let slot = self.crew.slot(index);
        slot.refused = slot.incarnation;
        self.crew.lose(index, REFUSED_PAUSE);
    }

    /// A trainer holds the state, and may take part.
    pub(super) fn admitted(&mut self, index: usize, admission: &Admission) {
        if admission.probe != self.probe {
            self.counters.trainers_mixed += 1;
            let (node, ours) = (&self.crew.slots()[index].node, self.probe);
            self.log.line(format_args!(
                "trainer-{index} on {node} computes {} of a shard of which this driver computes {ours}: from here on \
                 the result depends on who computes which shard",
                admission.probe
            ));
        }
        self.joined(index, admission.member, admission.held.step);
    }

    /// A trainer holds the state, and follows: it gets a seat.
    pub(super) fn joined(&mut self, index: usize, member: MemberId, at_step: u64) {
        self.crew.ready(index, member);
        self.leader.seat([member]);
        self.publish();
        let node = self.crew.slots()[index].node.clone();
        let ready = self.ready_count();
        self.log.line(format_args!(
            "trainer-{index} on {node} takes part from step {at_step}: {ready} trainers"
        ));
    }

    /// A trainer has said something, if only that it lives.
    pub(super) fn heard(&mut self, index: usize, news: &News) {
        let slot = self.crew.slot(index);
        slot.news_number = news.number;
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
                self.let_leave(index, member);
                return;
            }
        }
        for report in &news.reports {
            self.reported(member, *report);
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
            Report::Slow { peer } => self.slow(peer),
            Report::Behind { .. } if from == self.me => self.rewind(),
            Report::Behind { .. } => {
                self.leader.unseat(from);
                self.publish();
                self.prepare(from.slot as usize);
            }
        }
    }

    /// Whether a trainer whose machine goes stays for now: the driver saves with its help, or has hardly had the time
    /// to hear that its own machine goes as well. Nothing waits for such a trainer; it goes on as long as it can.
    pub(super) fn stays(&mut self, index: usize, deadline_ms: u64) -> bool {
        if self.keeps_doomed {
            return true;
        }
        if !self.can_be_shared() {
            return false;
        }
        let left = Duration::from_millis(deadline_ms.saturating_sub(now_ms()));
        let stay = STAY_MAX.min(left / STAY_SHARE);
        let now = Instant::now();
        let slot = self.crew.slot(index);
        now < *slot.stays_until.get_or_insert(now + stay)
    }

    fn let_leave(&mut self, index: usize, member: MemberId) {
        self.counters.handoffs += 1;
        self.log.line(format_args!(
            "trainer-{index} leaves {} at step {}: the node will be taken away",
            self.crew.slots()[index].node,
            self.state.step
        ));
        self.crew.let_leave(index);
        self.leader.unseat(member);
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
            LinkError::Trainer(other) => self.lose(index, &other.to_string()),
            LinkError::Lost(reason) => self.lose(index, reason),
        }
        Ok(())
    }

    pub(super) fn lose(&mut self, index: usize, reason: &str) {
        self.lose_for(index, reason, GREET_PAUSE_FIRST);
    }

    /// Gives a trainer up, and asks for it again after `pause`.
    fn lose_for(&mut self, index: usize, reason: &str, pause: Duration) {
        let slot = &self.crew.slots()[index];
        let member = slot.member;
        if let Some(shards) = member.and_then(|member| self.leader.unseat(member)) {
            self.counters.trainers_lost += 1;
            self.counters.reassigned_shards += shards as u64;
            self.log.line(format_args!(
                "trainer-{index} on {} is lost at step {}: {reason}; {shards} shards of this step \
                 go to the others",
                slot.node, self.state.step
            ));
        }
        // That nobody reached it says nothing of those who did not.
        if let Some(member) = member {
            self.unreached.forget(member);
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

    /// A trainer takes long: others compute its shards too.
    pub(super) fn slow(&mut self, peer: MemberId) {
        let given = self.leader.back_up(peer);
        if given == 0 {
            return;
        }
        self.counters.slow_orders += 1;
        self.log.line(format_args!(
            "trainer-{} takes much longer than usual for step {}: others compute its {given} \
             shards too",
            peer.slot, self.state.step
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
            self.leader.unseat(member);
            self.log.line(format_args!(
                "trainer-{index} on {} has other parameters than the others before step {step}: \
                 its sums are refused and it gets the state again",
                self.crew.slots()[index].node,
            ));
            self.prepare(index);
        }
        self.publish();
        Ok(())
    }

    /// Our copy is so far behind the trainers that nobody has the sums that it lacks, which is so only if
    /// nobody gave their state to a driver that was started anew. They take those steps again.
    pub(super) fn rewind(&mut self) {
        self.log.line(format_args!(
            "the trainers are further than this driver can follow from step {}: they take those \
             steps again",
            self.state.step
        ));
        for index in self.crew.which(Slot::is_ready) {
            if let Some(member) = self.crew.slots()[index].member {
                self.leader.unseat(member);
            }
            self.prepare(index);
        }
        self.publish();
    }
}
