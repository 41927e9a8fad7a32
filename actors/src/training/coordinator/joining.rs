//! How a trainer comes to take part: it is greeted, gets the state, follows, and gets a seat once it has caught up.
//!
//! Invariants:
//! 1. Who follows without a seat holds nobody up: no shard and no bucket is its own.
//! 2. A trainer that came too late comes again after a pause that grows. Only then the gate is held for it, and the others
//!    stand there for a share of that pause at most, and only where what all such trainers have in common still covers
//!    that (`holds`): otherwise it comes without, and is waited for at a later attempt. It is woken from the pause where no
//!    step begins without it, or its process has ended.
//! 3. Where nobody has a seat any more, who follows gets the copy's state: there are no sums to catch up with.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::Coordinator;
use super::holds::HOLDS_MAX;
use super::membership::STRIKES_MAX;
use crate::training::collective::Collective;
use crate::training::crew::{GREET_PAUSE_FIRST, Preparation, Presence, Slot, TrainerLink};
use crate::training::messages::{Admission, Greeting, Held};
use crate::training::numerics::{Numerics, Probe};
use crate::training::parts::SharedState;
use crate::training::protocol::plan::MemberId;

/// Who follows gets a seat when it lacks no more than such a share of the steps whose sums are kept, or one: as long as
/// it takes to come that near to the others, they are not to wait for it.
const NEAR_SHARE: u64 = 8;
/// How long a trainer is left alone that came too late for the first time. It has loaded its data by then, so that the
/// next time takes less.
const LATE_PAUSE_FIRST: Duration = Duration::from_millis(250);
/// For which share of the pause before it the others may wait for a trainer that came too late, and for which share of the
/// time in which they go on they may for all such trainers together.
pub(super) const HOLD_SHARE: u32 = 4;
/// How long a trainer may follow without catching up.
const FOLLOW_MAX: Duration = Duration::from_secs(60);
/// A trainer took part for long if it did for so many times the steps whose sums are kept, or for a time (`crew/attempts.rs`).
const STEADY_TIMES: u64 = 4;

/// The gate is held for a trainer that came too late before.
#[derive(Debug)]
pub(super) struct HeldGate {
    /// Which trainer.
    index: usize,
    /// No step from here on begins.
    pub(super) limit: u64,
    /// Since when the copy stands there, and for how long it may.
    since: Option<Instant>,
    at_most: Duration,
}

impl<L: TrainerLink, C: Collective> Coordinator<L, C> {
    pub(super) fn greeted(&mut self, index: usize, greeting: Greeting) {
        let stands_still = self.stands_still();
        let slot = self.crew.slot(index);
        if slot
            .incarnation
            .is_some_and(|known| known != greeting.incarnation)
        {
            self.counters.trainer_restarts += 1;
            // What another process did says nothing of this one.
            slot.attempts = Default::default();
            slot.given_up = None;
        }
        slot.incarnation = Some(greeting.incarnation);
        slot.node = greeting.node_name;
        if greeting.notice_ms.is_some() {
            self.crew.let_leave(index);
            return;
        }
        // One that was given up is asked all the same where nobody goes on without it.
        if stands_still && slot.given_up.is_some() {
            slot.refused = None;
        }
        let is_refused = slot.refused == slot.incarnation;
        let strikes = self.strikes.get(&slot.node).copied().unwrap_or_default();
        match greeting.held {
            // It would be wrong again, unless it is started on another machine.
            _ if strikes >= STRIKES_MAX => self.set_aside(index),
            // It would compute the same, or refuse again.
            _ if is_refused => self.set_aside(index),
            // It went on under an earlier coordinator, or lost nothing but the connection.
            Some((member, held)) if self.goes_with_us(&held) => {
                self.follows(index, member, held.step);
            }
            _ => self.bring_in(index),
        }
    }

    /// Whether a trainer that holds this can go on from there: our copy finds the sums that it lacks
    /// itself, and a step that both know is the same. Other bits at other steps show when sums are
    /// exchanged.
    fn goes_with_us(&self, held: &Held) -> bool {
        let far = self.state.step + self.lead_max();
        match held.step.cmp(&self.state.step) {
            std::cmp::Ordering::Less => false,
            std::cmp::Ordering::Equal => held.digest == self.digest,
            std::cmp::Ordering::Greater => held.step <= far,
        }
    }

    /// Sends the present state in the background.
    pub(super) fn prepare(&mut self, index: usize) {
        self.hold_gate_if_due(index);
        self.send_state(index, None);
    }

    /// The present state as bytes.
    pub(super) fn packed_state(&mut self) -> Arc<Vec<u8>> {
        let state = &self.state;
        let packed = self
            .packed
            .get_or_insert_with(|| Arc::new(state.to_bytes()));
        Arc::clone(packed)
    }

    /// Sends the present state, of which those of `shared` give what they can.
    pub(super) fn send_state(&mut self, index: usize, shared: Option<SharedState>) {
        let sent = Held {
            step: self.state.step,
            digest: self.digest.clone(),
        };
        let order = Preparation {
            plan: self.leader.plan().clone(),
            state: self.packed_state(),
            shared,
            probe: (self.spec.numerics == Numerics::Strict).then_some(self.probe),
        };
        self.crew.prepare(index, sent, order);
    }

    /// Holds the gate for a trainer that came too late before. While it is held for another one, and where the others have
    /// stood for too long of late, what is due stays due.
    pub(super) fn hold_gate_if_due(&mut self, index: usize) {
        if self.held_gate.is_some() {
            return;
        }
        let at_most = self.crew.slot(index).attempts.hold_due();
        if at_most.is_zero() {
            return;
        }
        if !self.holds.covers(at_most, Instant::now()) {
            self.log.line(format_args!(
                "trainer-{index} on {} comes without being waited for: that may take {} ms, and the others have stood for \
                 trainers that came too late for as long as they may, 1/{HOLD_SHARE} of the time in which they go on, saved \
                 up to {} s; if it comes too late again, they may have saved enough by then",
                self.crew.slots()[index].node,
                at_most.as_millis(),
                HOLDS_MAX.as_secs()
            ));
            return;
        }
        self.crew.slot(index).attempts.take_hold();
        let limit = self.state.step + self.lead_max();
        self.leader.limit_gate(Some(limit));
        self.held_gate = Some(HeldGate {
            index,
            limit,
            since: None,
            at_most,
        });
    }

    /// A trainer's machine computes other bits than ours, and said so instead of taking part.
    pub(super) fn refused(&mut self, index: usize, computes: Probe) {
        self.counters.trainers_refused += 1;
        let (node, ours) = (&self.crew.slots()[index].node, self.probe);
        self.log.line(format_args!(
            "trainer-{index} on {node} takes no part: of the same shard it computes {computes}, this driver {ours}. \
             It may run another build, or its machine is at fault; `numerics = \"mixed\"` would let it take part, and \
             give up that the result has one hash"
        ));
        let slot = self.crew.slot(index);
        (slot.refused, slot.given_up) = (slot.incarnation, None);
        self.set_aside(index);
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
        self.follows(index, admission.member, admission.held.step);
    }

    /// A trainer holds the state before `step`, and follows: it gets a seat at once, or when it has caught up.
    fn follows(&mut self, index: usize, member: MemberId, step: u64) {
        self.crew.follow(index, member, step);
        self.seat_if_near(index, member, step);
        if self.crew.slots()[index].is_ready() {
            return;
        }
        // Whom to ask may have changed since the state was sent.
        self.publish();
        self.log.line(format_args!(
            "trainer-{index} on {} follows from step {step}, {} steps behind; it takes part when it has caught up",
            self.crew.slots()[index].node,
            self.furthest().saturating_sub(step)
        ));
    }

    /// Gives a trainer that follows a seat, if the others would hardly have to wait for it.
    pub(super) fn seat_if_near(&mut self, index: usize, member: MemberId, at_step: u64) {
        let near = (self.lead_max() / NEAR_SHARE).max(1);
        let is_following = self.crew.slots()[index].presence == Presence::Following;
        if !is_following || at_step.saturating_add(near) < self.furthest() {
            return;
        }
        self.crew.ready(index, self.state.step);
        self.leader.seat([member]);
        self.publish();
        let node = self.crew.slots()[index].node.clone();
        let ready = self.ready_count();
        self.log.line(format_args!(
            "trainer-{index} on {node} takes part from step {at_step}: {ready} trainers"
        ));
        self.look_after_gate();
    }

    /// The step at which the furthest of those stands who take part, as far as it was heard.
    pub(super) fn furthest(&self) -> u64 {
        let ready = self.crew.slots().iter().filter(|slot| slot.is_ready());
        ready.map(|slot| slot.step).fold(self.state.step, u64::max)
    }

    /// Steps after which a trainer took part for long.
    pub(super) fn steady_steps(&self) -> u64 {
        STEADY_TIMES.saturating_mul(self.lead_max())
    }

    /// Whether no step begins until somebody comes: then nobody is spared by leaving a trainer alone.
    pub(super) fn stands_still(&self) -> bool {
        self.leader.plan().hold || self.leader.seated().is_empty()
    }

    /// A trainer is too far behind: it gets the state again, after a pause.
    pub(super) fn too_late(&mut self, index: usize, why: &str) {
        self.unseat(index);
        let (step, stands_still) = (self.state.step, self.stands_still());
        let slot = self.crew.slot(index);
        let attempts = &mut slot.attempts;
        let grown = attempts.comes_late(LATE_PAUSE_FIRST, HOLD_SHARE);
        let pause = if stands_still {
            LATE_PAUSE_FIRST
        } else {
            grown
        };
        attempts.hold_next(pause / HOLD_SHARE);
        let times = attempts.late;
        self.log.line(format_args!(
            "trainer-{index} on {} {why} at step {step}, {times} times in a row by now: it gets the state again in {} ms",
            slot.node,
            pause.as_millis()
        ));
        self.crew.dismiss(index, self.leader.plan().epoch, pause);
        self.crew.slot(index).naps = !stands_still;
        self.publish();
    }

    /// Looks whether those who follow may still catch up, whether those who are left alone are needed, and whether the
    /// gate is held for long enough.
    pub(super) fn look_after_joining(&mut self) {
        if self.stands_still() {
            for index in self.crew.which(|slot| slot.naps) {
                // Nor is it waited for, for the sake of a pause that it did not have.
                self.crew.slot(index).attempts.take_hold();
                self.crew.lose(index, GREET_PAUSE_FIRST);
            }
        }
        let is_following = |slot: &Slot<L>| slot.presence == Presence::Following;
        for index in self.crew.which(is_following) {
            if self.leader.seated().is_empty() {
                self.prepare(index);
            } else if self.crew.slots()[index].following_since.elapsed() >= FOLLOW_MAX {
                self.too_late(index, "has not caught up");
            }
        }
        self.look_after_giving();
        self.look_after_gate();
    }

    /// Lets the gate go when the trainer for which it is held takes part, is gone, or had its time.
    fn look_after_gate(&mut self) {
        let Some(held) = &mut self.held_gate else {
            return;
        };
        let index = held.index;
        let now = Instant::now();
        if self.state.step >= held.limit {
            held.since.get_or_insert(now);
        }
        let stood = held.since.map(|since| now.saturating_duration_since(since));
        let presence = self.crew.slots()[index].presence;
        let comes = matches!(presence, Presence::Preparing | Presence::Following);
        if comes && stood.is_none_or(|stood| stood < held.at_most) {
            return;
        }
        if comes {
            self.log.line(format_args!(
                "trainer-{index} is waited for no longer: steps go on from step {}",
                self.state.step
            ));
        }
        self.release_gate();
    }

    /// Lets the gate go if it is held.
    pub(super) fn release_gate(&mut self) {
        let Some(held) = self.held_gate.take() else {
            return;
        };
        if let Some(since) = held.since {
            let now = Instant::now();
            self.stall.note(since, now);
            self.holds.spend(since, now);
        }
        self.leader.limit_gate(None);
        if self.leader.follow(self.state.step) {
            self.publish();
        }
    }
}
