//! Trainers that give the state to one that joins, so that not all of it comes from the driver.
//!
//! Some of those who take part are asked to keep the state after a step that they have not taken yet. When the driver's copy
//! comes to that step it says the hash of each part and of the whole, and who joins takes the parts from all of them at once
//! ([`parts`](crate::training::parts)). What none of them gives comes from the driver.
//!
//! Invariants:
//! 1. The copy says what the bytes are: a giver with other bits gives nothing.
//! 2. Who joins waits for the copy to come to that step for a bounded time, and not at all where no step begins, where
//!    steps take too long for that, where fewer than [`GIVERS_MIN`] would give, or where the state is a single part: then the
//!    driver gives the copy's state.
//! 3. One such state is kept at a time, by at most [`GIVERS_MAX`] trainers and for at most [`TAKERS_MAX`], until nobody is on
//!    the way to it any more, or another driver has come.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;

use super::Coordinator;
use crate::training::collective::Collective;
use crate::training::crew::{Presence, Slot, TrainerLink};
use crate::training::messages::KeepOrder;
use crate::training::parts::{SharedState, parts_of};

/// Trainers that must give a state, and that are asked to. From one it would come no sooner than from the driver.
const GIVERS_MIN: usize = 2;
const GIVERS_MAX: usize = 4;
/// Trainers that a state is given to in this way; the driver gives one to those who come beyond.
const TAKERS_MAX: usize = 4;
/// How far ahead of the others the step is after which they keep the state: such a share of the steps whose sums are kept, or
/// so many, but no further than the gate, which nobody passes. Those who have passed it when they are asked do not give.
const AHEAD_SHARE: u64 = 2;
const AHEAD_MIN: u64 = 8;
/// How long who joins waits for the copy to come to that step, which is chosen so near that it usually takes this share of
/// that.
const COMING_MAX: Duration = Duration::from_secs(10);
const COMING_SHARE: u32 = 2;
/// Steps that must usually fit into that time, lest the wait be in vain.
const COMING_STEPS: u32 = 3;
/// The share of the last step in how long one takes as usual.
const USUAL_SHARE: u32 = 4;

/// A state that trainers keep for those who join.
#[derive(Debug)]
pub(super) struct Giving {
    /// The step after which it is.
    pub(super) step: u64,
    /// Which order asked for it.
    pub(super) order: KeepOrder,
    /// Who was asked to keep it, and who said that it does.
    asked: Vec<usize>,
    pub(super) keeps: BTreeSet<usize>,
    /// Who waits for it, or is on the way to it.
    pub(super) takers: BTreeSet<usize>,
    /// Until when the copy may come to that step.
    until: Instant,
}

impl<L: TrainerLink, C: Collective> Coordinator<L, C> {
    /// Brings in a trainer that was greeted and needs a state: one that others will give, or the present one.
    pub(super) fn bring_in(&mut self, index: usize) {
        self.hold_gate_if_due(index);
        if self.others_will_give(index) {
            self.crew.await_state(index);
        } else {
            self.send_state(index, None);
        }
    }

    /// Whether others will give a state to a trainer that joins; asks them to keep it if they were not asked yet.
    fn others_will_give(&mut self, index: usize) -> bool {
        if let Some(giving) = &mut self.giving {
            let is_among = giving.takers.contains(&index) || giving.takers.len() < TAKERS_MAX;
            let is_coming = giving.step > self.state.step && is_among;
            if is_coming {
                giving.takers.insert(index);
            }
            return is_coming;
        }
        let Some(steps_in_time) = self.steps_in_time() else {
            return false;
        };
        if self.state.size_bytes() <= self.part_bytes as u64 || self.stands_still() {
            return false;
        }
        let ahead = (self.lead_max() / AHEAD_SHARE).max(AHEAD_MIN);
        let ahead = ahead.min(steps_in_time);
        let step = self.gate().min(self.furthest() + ahead);
        // One with notice may be gone by then.
        let may_give = |slot: &Slot<L>| slot.is_ready() && slot.stays_until.is_none();
        let mut asked = self.crew.which(may_give);
        asked.truncate(GIVERS_MAX);
        if asked.len() < GIVERS_MIN || step <= self.state.step || step >= self.spec.steps {
            return false;
        }
        let order = self.crew.ask_to_share(&asked, step);
        self.giving = Some(Giving {
            step,
            order,
            asked,
            keeps: BTreeSet::new(),
            takers: BTreeSet::from([index]),
            until: Instant::now() + COMING_MAX,
        });
        true
    }

    /// Steps that are taken while somebody waits for a state, as they usually go; nothing where they take too long for that.
    fn steps_in_time(&self) -> Option<u64> {
        let Some(usual) = self.usual_step.filter(|usual| !usual.is_zero()) else {
            return Some(u64::MAX);
        };
        if usual > COMING_MAX / COMING_STEPS {
            return None;
        }
        let steps = (COMING_MAX / COMING_SHARE).as_nanos() / usual.as_nanos();
        Some(u64::try_from(steps).unwrap_or(u64::MAX).max(1))
    }

    /// A step took so long, without what it waited for trainers.
    pub(super) fn note_usual_step(&mut self, took: Duration) {
        let usual = self.usual_step.unwrap_or(took);
        self.usual_step = Some((usual * (USUAL_SHARE - 1) + took) / USUAL_SHARE);
    }

    /// A trainer has said whether it keeps the state that `order` asked for.
    pub(super) fn shares(&mut self, index: usize, order: KeepOrder, does: bool) {
        let giving = self.giving.as_mut();
        if let Some(giving) = giving.filter(|it| it.order == order && does) {
            giving.keeps.insert(index);
        }
    }

    /// The copy has come to another step: those who wait for the state after it are told who gives it.
    pub(super) fn give_if_due(&mut self) {
        let Some(giving) = self.giving.as_ref() else {
            return;
        };
        if giving.step != self.state.step {
            return;
        }
        let slots = self.crew.slots();
        let keepers = giving.keeps.iter().copied();
        let from: Vec<usize> = keepers.filter(|index| slots[*index].is_ready()).collect();
        let takers = giving.takers.iter().copied();
        let takers: Vec<usize> = takers
            .filter(|index| slots[*index].presence == Presence::Preparing)
            .collect();
        if from.len() < GIVERS_MIN || takers.is_empty() {
            self.end_giving();
            for index in takers {
                self.send_state(index, None);
            }
            return;
        }
        let parts = parts_of(&self.packed_state(), self.part_bytes);
        self.log.line(format_args!(
            "the state after step {} goes to trainers {takers:?} in {} parts, from trainers {from:?}",
            self.state.step,
            parts.len()
        ));
        let shared = SharedState {
            step: self.state.step,
            parts,
            from: from.iter().map(|index| *index as u32).collect(),
        };
        for index in takers {
            self.send_state(index, Some(shared.clone()));
        }
    }

    /// Looks whether the copy comes to the step in time, and whether somebody still needs the state.
    pub(super) fn look_after_giving(&mut self) {
        let stands_still = self.stands_still();
        let Some(giving) = &mut self.giving else {
            return;
        };
        let slots = self.crew.slots();
        let is_on_the_way = |index: &usize| slots[*index].presence == Presence::Preparing;
        giving.takers.retain(is_on_the_way);
        let is_late = stands_still || Instant::now() >= giving.until;
        if giving.takers.is_empty() {
            self.end_giving();
        } else if giving.step > self.state.step && is_late {
            let takers = std::mem::take(&mut giving.takers);
            self.end_giving();
            for index in takers {
                self.send_state(index, None);
            }
        }
    }

    fn end_giving(&mut self) {
        if let Some(giving) = self.giving.take() {
            self.crew.end_sharing(&giving.asked, giving.order);
        }
    }
}
