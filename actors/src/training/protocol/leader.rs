//! The leader: knows who is there, and says in plans who computes and adds what.
//!
//! It holds no gradient and no state, takes part in no step, and may be away: the members go on with the
//! plan that they have, up to its gate. A leader that comes after another one begins with a higher epoch
//! and asks everybody who and where they are.
//!
//! Invariants:
//! 1. Every plan that differs has a higher epoch, above all epochs of earlier leaders.
//! 2. A member gets a seat only after it has said that it holds the state and follows the steps.
//! 3. A member that is lost, leaves or holds other bits has no seat in the next plan.
//! 4. There is a plan with seats whenever a member could have one: below the minimum it holds, so that
//!    the step that has begun is finished.
//! 5. A member that takes long is backed up for that step; only one that does so again soon, for more of them.

use std::collections::{BTreeMap, BTreeSet};

use super::plan::{MemberId, Plan};
use crate::training::messages::Epoch;

/// Steps for which a member that takes long again and again is backed up at once, at most: then it is looked whether it
/// still does.
const BACKUP_STEPS_MAX: u64 = 64;

/// Sixteen bytes of a state's BLAKE3.
pub type StateDigest = [u8; 16];

/// What a leader has to know of the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaderShape {
    /// Shards of a step.
    pub shard_count: u32,
    /// Buckets of a gradient.
    pub bucket_count: u32,
    /// Members below which no step begins.
    pub members_min: u32,
    /// Steps that members may be ahead of the driver's own copy.
    pub lead_max: u64,
    /// Steps of the job.
    pub steps: u64,
}

/// Makes plans.
#[derive(Debug, Clone)]
pub struct Leader {
    shape: LeaderShape,
    seated: BTreeSet<MemberId>,
    plan: Plan,
    /// Where the driver's copy stands.
    at: u64,
    /// Who was backed up last, and when.
    slow: BTreeMap<MemberId, Backup>,
    /// Whether the gate stays where it is.
    is_halted: bool,
    /// The step that the gate does not go beyond for now.
    gate_limit: Option<u64>,
}

/// When a member was backed up: for so many steps, the last of which was this one.
#[derive(Debug, Clone, Copy)]
struct Backup {
    last_step: u64,
    steps: u64,
}

impl Leader {
    /// A leader whose plans have the epochs from `first_epoch` on. The driver's copy stands at `step`.
    #[must_use]
    pub fn new(shape: LeaderShape, first_epoch: Epoch, step: u64) -> Self {
        let plan = Plan {
            epoch: first_epoch,
            hold: true,
            gate: gate(&shape, step),
            ..Plan::default()
        };
        Leader {
            shape,
            seated: BTreeSet::new(),
            plan,
            at: step,
            slow: BTreeMap::new(),
            is_halted: false,
            gate_limit: None,
        }
    }

    /// What it knows of the job.
    #[must_use]
    pub fn shape(&self) -> &LeaderShape {
        &self.shape
    }

    /// The plan that stands.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Who has a seat.
    #[must_use]
    pub fn seated(&self) -> &BTreeSet<MemberId> {
        &self.seated
    }

    /// `members` hold the state and follow the steps: they get seats. An older start of one of them is
    /// gone.
    pub fn seat(&mut self, members: impl IntoIterator<Item = MemberId>) {
        for member in members {
            self.seated.retain(|other| other.slot != member.slot);
            self.seated.insert(member);
        }
        self.slow.retain(|member, _| self.seated.contains(member));
        self.plan.deal(
            &self.seated,
            self.shape.shard_count,
            self.shape.bucket_count,
        );
        self.publish();
    }

    /// A member is lost, leaves, or holds other bits. Answers how many shards go to others, or nothing if
    /// it had no seat.
    pub fn unseat(&mut self, member: MemberId) -> Option<usize> {
        if !self.seated.remove(&member) {
            return None;
        }
        self.slow.remove(&member);
        let shards = self.plan.shards_of(member).count();
        self.plan.end_backups(self.at);
        self.plan
            .remove_all_but(&self.seated, self.shape.shard_count);
        self.publish();
        Some(shards)
    }

    /// A member takes long at `step`: others compute its shards too, in that step; in twice as many steps as the last
    /// time, where that is hardly longer ago than it lasted. Answers how many shards that concerns.
    pub fn back_up(&mut self, slow: MemberId, step: u64) -> usize {
        let before = self.slow.get(&slow);
        let before = before.filter(|one| step <= one.last_step.saturating_add(one.steps));
        let steps = before.map_or(1, |one| (2 * one.steps).min(BACKUP_STEPS_MAX));
        let last_step = step.saturating_add(steps - 1);
        let given = self.plan.back_up(slow, step, last_step);
        if given > 0 {
            self.slow.insert(slow, Backup { last_step, steps });
            self.plan.end_backups(self.at);
            self.publish();
        }
        given
    }

    /// The driver's copy stands at `step`: the gate opens further. Answers whether it did, which is once
    /// in many steps.
    pub fn follow(&mut self, step: u64) -> bool {
        self.at = self.at.max(step);
        if self.is_halted {
            return false;
        }
        let limit = self.gate_limit.unwrap_or(u64::MAX);
        let gate = gate(&self.shape, step).min(limit);
        let is_far = gate >= self.plan.gate + self.shape.lead_max.div_ceil(2);
        let is_last = gate > self.plan.gate && gate >= self.shape.steps.min(limit);
        if is_far || is_last {
            self.plan.gate = gate;
        }
        is_far || is_last
    }

    /// Leaves the gate where it is, or no more: members come to it and no further. Whoever ends that has to
    /// [`Leader::follow`], for members that stand at the gate take no step that would.
    pub fn halt(&mut self, is_halted: bool) {
        self.is_halted = is_halted;
    }

    /// Opens the gate no further than to `limit`, for somebody who comes and would be left behind; without one, as far
    /// as ever. Whoever takes a limit away has to [`Leader::follow`], as after [`Leader::halt`].
    pub fn limit_gate(&mut self, limit: Option<u64>) {
        self.gate_limit = limit;
    }

    fn publish(&mut self) {
        self.plan.epoch = self.plan.epoch.next();
        self.plan.hold = (self.seated.len() as u64) < u64::from(self.shape.members_min);
    }
}

fn gate(shape: &LeaderShape, step: u64) -> u64 {
    step.saturating_add(shape.lead_max).min(shape.steps)
}

/// Whose bits are right, of those who said what they hold after the same step: those of the most, and in
/// doubt `own`. `None` if most hold the same other bits than `own`.
#[must_use]
pub fn judge(
    said: &BTreeMap<MemberId, StateDigest>,
    own: StateDigest,
) -> Option<BTreeSet<MemberId>> {
    let mut votes: BTreeMap<StateDigest, usize> = BTreeMap::from([(own, 1)]);
    for digest in said.values() {
        *votes.entry(*digest).or_default() += 1;
    }
    let own_votes = votes[&own];
    let outvoted = votes
        .iter()
        .any(|(digest, count)| *digest != own && *count > own_votes && 2 * count > said.len() + 1);
    (!outvoted).then(|| {
        let wrong = said.iter().filter(|(_, digest)| **digest != own);
        wrong.map(|(member, _)| *member).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn member(slot: u32, incarnation: u64) -> MemberId {
        MemberId {
            slot,
            incarnation,
            entry: 1,
        }
    }

    fn leader(members_min: u32) -> Leader {
        let shape = LeaderShape {
            shard_count: 16,
            bucket_count: 5,
            members_min,
            lead_max: 10,
            steps: 100,
        };
        Leader::new(shape, Epoch::first_of(3), 0)
    }

    #[test]
    fn losing_a_member_moves_only_what_was_its() {
        let mut leader = leader(2);
        leader.seat([member(0, 1), member(1, 1), member(2, 1)]);
        let before = leader.plan().clone();
        assert_eq!(leader.unseat(member(1, 1)), Some(5));
        assert_eq!(leader.unseat(member(1, 1)), None);
        let after = leader.plan();
        assert!(after.epoch > before.epoch && !after.hold);
        for seat in &after.seats {
            let had = &before.seat(seat.member).unwrap().shards;
            assert!(seat.shards.is_superset(had));
            assert!(seat.shards.len() <= had.len() + 3);
        }
        for bucket in 0..5 {
            let owner = before.owner(bucket).unwrap();
            assert!(owner == member(1, 1) || after.owner(bucket) == Some(owner));
        }
        leader.unseat(member(0, 1));
        assert!(leader.plan().hold);
        assert_eq!(leader.plan().shards_of(member(2, 1)).count(), 16);
        leader.unseat(member(2, 1));
        assert!(leader.plan().seats.is_empty() && leader.plan().owner(0).is_none());
    }

    #[test]
    fn a_new_start_takes_the_place_of_the_old_one_and_a_slow_one_is_backed_up_once() {
        let mut leader = leader(1);
        leader.seat([member(0, 1), member(1, 1)]);
        leader.seat([member(1, 2)]);
        assert_eq!(leader.seated().len(), 2);
        assert!(leader.plan().seat(member(1, 1)).is_none());
        assert_eq!(leader.back_up(member(1, 2), 3), 8);
        assert_eq!(leader.plan().shards_of(member(0, 1)).count(), 8);
        assert_eq!(leader.plan().backups_of(member(0, 1), 3).count(), 8);
        let epoch = leader.plan().epoch;
        assert_eq!(leader.back_up(member(1, 2), 3), 0);
        assert_eq!(leader.plan().epoch, epoch);
        leader.unseat(member(0, 1));
        assert_eq!(leader.back_up(member(1, 2), 3), 0);
    }

    #[test]
    fn a_backup_lasts_for_its_step_and_for_more_of_them_where_it_is_needed_again_soon() {
        let mut leader = leader(1);
        let [quick, slow] = [member(0, 1), member(1, 1)];
        leader.seat([quick, slow]);
        let last_step = |leader: &Leader, from| {
            let is_computed = |step: &u64| leader.plan().backups_of(quick, *step).count() == 8;
            (from..).take_while(is_computed).last()
        };
        for (step, last) in [(5, 5), (6, 7), (9, 12), (17, 17), (90, 90)] {
            assert_eq!(leader.back_up(slow, step), 8, "step {step}");
            assert_eq!(last_step(&leader, step), Some(last), "step {step}");
        }
        let mut step = 200;
        for steps in [1, 2, 4, 8, 16, 32, 64, 64] {
            assert_eq!(leader.back_up(slow, step), 8);
            assert_eq!(last_step(&leader, step), Some(step + steps - 1));
            step += steps;
        }
        // What is over burdens nobody.
        leader.follow(step);
        leader.seat([member(2, 1)]);
        leader.back_up(slow, step);
        leader.follow(step + 1000);
        leader.unseat(member(2, 1));
        let mut seats = leader.plan().seats.iter();
        assert!(seats.all(|seat| seat.backups.is_empty()));
    }

    #[test]
    fn who_computes_beside_a_member_that_is_lost_takes_its_shards_over() {
        let mut leader = leader(1);
        leader.seat([member(0, 1), member(1, 1), member(2, 1)]);
        leader.back_up(member(1, 1), 0);
        let backups = |leader: &Leader, slot| -> BTreeSet<u32> {
            leader.plan().backups_of(member(slot, 1), 0).collect()
        };
        let before = [0, 2].map(|slot| backups(&leader, slot));
        assert_eq!(before[0].len() + before[1].len(), 5);
        leader.unseat(member(1, 1));
        for (slot, had) in [0, 2].into_iter().zip(before) {
            assert!(backups(&leader, slot).is_empty());
            let shards = &leader.plan().seat(member(slot, 1)).unwrap().shards;
            assert!(shards.is_superset(&had));
        }
    }

    #[test]
    fn the_gate_moves_seldom_and_ends_at_the_last_step() {
        let mut leader = leader(1);
        assert_eq!(leader.plan().gate, 10);
        let moves = (1..=100).filter(|step| leader.follow(*step)).count();
        assert_eq!(leader.plan().gate, 100);
        assert!(moves <= 20, "{moves}");
    }

    #[test]
    fn a_gate_that_is_halted_stays_and_opens_again() {
        let mut leader = leader(1);
        leader.halt(true);
        assert!((1..=10).all(|step| !leader.follow(step)));
        assert_eq!(leader.plan().gate, 10);
        leader.halt(false);
        assert!(leader.follow(10));
        assert_eq!(leader.plan().gate, 20);
    }

    #[test]
    fn a_gate_with_a_limit_opens_up_to_it_and_no_further() {
        let mut leader = leader(1);
        leader.limit_gate(Some(12));
        let moves: Vec<u64> = (1..=12).filter(|step| leader.follow(*step)).collect();
        assert_eq!((leader.plan().gate, moves), (12, vec![2]));
        leader.limit_gate(None);
        assert!(leader.follow(12));
        assert_eq!(leader.plan().gate, 22);
    }

    #[test]
    fn the_minority_is_wrong_and_a_copy_of_ones_own_counts_as_one() {
        let (a, b, c) = (member(0, 1), member(1, 1), member(2, 1));
        let wrong = |said: &[(MemberId, u8)]| {
            let said = said.iter().map(|(id, byte)| (*id, [*byte; 16])).collect();
            judge(&said, [7; 16])
        };
        assert_eq!(wrong(&[(a, 7), (b, 9)]), Some(BTreeSet::from([b])));
        assert_eq!(wrong(&[(a, 9)]), Some(BTreeSet::from([a])));
        assert_eq!(wrong(&[(a, 9), (b, 9)]), None);
        assert_eq!(
            wrong(&[(a, 9), (b, 8), (c, 9)]),
            Some(BTreeSet::from([a, b, c]))
        );
    }

    proptest! {
        #[test]
        fn every_shard_and_bucket_has_somebody_whoever_comes_and_goes(
            changes in prop::collection::vec((0u32..6, 0u32..3), 1..40),
        ) {
            let mut leader = leader(1);
            let mut epoch = leader.plan().epoch;
            for (number, (slot, change)) in (0u64..).zip(changes) {
                leader.follow(number);
                let there = leader.seated().iter().find(|m| m.slot == slot).copied();
                match (change, there) {
                    (0, _) => leader.seat([member(slot, number)]),
                    (1, Some(there)) => {
                        leader.unseat(there);
                    }
                    (_, Some(there)) => {
                        if leader.back_up(there, number) == 0 {
                            continue;
                        }
                    }
                    (_, None) => continue,
                }
                let plan = leader.plan();
                prop_assert!(plan.epoch > epoch);
                epoch = plan.epoch;
                prop_assert_eq!(plan.seats.is_empty(), leader.seated().is_empty());
                let mut shards: Vec<u32> =
                    plan.seats.iter().flat_map(|seat| seat.shards.iter().copied()).collect();
                shards.sort_unstable();
                if !plan.seats.is_empty() {
                    prop_assert_eq!(shards, (0..16).collect::<Vec<_>>());
                    prop_assert_eq!(plan.owners.len(), 5);
                }
                for owner in &plan.owners {
                    prop_assert!(plan.seat(*owner).is_some());
                }
            }
        }
    }
}
