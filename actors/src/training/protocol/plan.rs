//! What the leader publishes: who computes which shards, and who adds which buckets.
//!
//! Invariants:
//! 1. A plan with seats gives every shard to exactly one of them, and every bucket.
//! 2. When members are lost, nothing of the others' changes but what they get in addition.
//! 3. When members join, every seat gets neighbouring shards, so that it sends few sums.
//! 4. What is computed beside a slow member is so up to a step that the plan names: all members know without another
//!    plan when it ends.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::training::messages::Epoch;
use crate::training::reduction::shard_map;

/// The slot of the driver's copy: it asks others for sums, and nobody can ask it.
pub const DRIVER_SLOT: u32 = u32::MAX;

/// A trainer, from when it took a state over until it loses it or takes another one over: as long as it
/// keeps what others gave it.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct MemberId {
    /// Which trainer of the job.
    pub slot: u32,
    /// Its start: another one has other memory.
    pub incarnation: u64,
    /// How many states it had taken over in that start, with this one.
    pub entry: u64,
}

impl MemberId {
    /// Whether this is the driver's copy, which has no seat and cannot be asked.
    #[must_use]
    pub fn is_driver(self) -> bool {
        self.slot == DRIVER_SLOT
    }
}

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "trainer-{}/{}.{}",
            self.slot, self.incarnation, self.entry
        )
    }
}

/// A member that computes, and its shards (ascending).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seat {
    /// The member.
    pub member: MemberId,
    /// Its shards.
    pub shards: BTreeSet<u32>,
    /// Shards of others, who take long, that it computes too after its own; each up to this step.
    pub backups: BTreeMap<u32, u64>,
}

impl Seat {
    /// Shards that it computes at `step`.
    fn load(&self, step: u64) -> usize {
        let backups = self.backups.values().filter(|last| **last >= step);
        self.shards.len() + backups.count()
    }
}

/// Who does what, from now until the next plan.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Plan {
    /// Grows with each plan.
    pub epoch: Epoch,
    /// Who computes, in the order of members.
    pub seats: Vec<Seat>,
    /// The owner of each bucket; none where nobody has a seat.
    pub owners: Vec<MemberId>,
    /// No step begins as long as this stands: fewer trainers are there than the job asks for. One that
    /// has begun is finished.
    pub hold: bool,
    /// No step from here on begins: whoever follows the members must not be left behind.
    pub gate: u64,
}

impl Plan {
    /// The seat of `member`.
    #[must_use]
    pub fn seat(&self, member: MemberId) -> Option<&Seat> {
        self.seats.iter().find(|seat| seat.member == member)
    }

    /// The shards of `member`; none if it has no seat.
    pub fn shards_of(&self, member: MemberId) -> impl Iterator<Item = u32> {
        self.seat(member)
            .into_iter()
            .flat_map(|seat| seat.shards.iter().copied())
    }

    /// The shards of others that `member` computes at `step` beside them.
    pub fn backups_of(&self, member: MemberId, step: u64) -> impl Iterator<Item = u32> {
        self.seat(member)
            .into_iter()
            .flat_map(|seat| &seat.backups)
            .filter(move |(_, last)| **last >= step)
            .map(|(shard, _)| *shard)
    }

    /// Who adds bucket `index`.
    #[must_use]
    pub fn owner(&self, index: u32) -> Option<MemberId> {
        self.owners.get(index as usize).copied()
    }

    /// Divides shards and buckets among `members` anew: each gets neighbours.
    pub(super) fn deal(&mut self, members: &BTreeSet<MemberId>, shards: u32, buckets: u32) {
        let count = members.len().min(shards as usize) as u32;
        if count == 0 {
            (self.seats, self.owners) = (Vec::new(), Vec::new());
            return;
        }
        self.seats = members
            .iter()
            .zip(shard_map(shards, count))
            .map(|(member, shards)| Seat {
                member: *member,
                shards: shards.collect(),
                backups: BTreeMap::new(),
            })
            .collect();
        let owner = |bucket: u32| {
            let seat = u64::from(bucket) * u64::from(count) / u64::from(buckets);
            self.seats[seat as usize].member
        };
        self.owners = (0..buckets).map(owner).collect();
    }

    /// Takes the seats of all but `members` away; what they had goes to those who compute it beside them, who may
    /// have it already, or to those who have least.
    pub(super) fn remove_all_but(&mut self, members: &BTreeSet<MemberId>, shards: u32) {
        let had: BTreeSet<u32> = (0..shards).collect();
        self.seats.retain(|seat| members.contains(&seat.member));
        if self.seats.is_empty() {
            self.owners.clear();
            return;
        }
        let kept: BTreeSet<u32> = self
            .seats
            .iter()
            .flat_map(|seat| seat.shards.iter().copied())
            .collect();
        for shard in had.difference(&kept) {
            let mut seats = self.seats.iter();
            let backing = seats.position(|seat| seat.backups.contains_key(shard));
            let poorest = || (0..self.seats.len()).min_by_key(|at| self.seats[*at].shards.len());
            let heir = backing.or_else(poorest).expect("there are seats");
            let heir = &mut self.seats[heir];
            heir.backups.remove(shard);
            heir.shards.insert(*shard);
        }
        let mut loads: BTreeMap<MemberId, usize> =
            self.seats.iter().map(|seat| (seat.member, 0)).collect();
        for owner in &self.owners {
            loads.entry(*owner).and_modify(|load| *load += 1);
        }
        for owner in &mut self.owners {
            if loads.contains_key(owner) {
                continue;
            }
            let poorest = loads.iter_mut().min_by_key(|(_, load)| **load);
            let (member, load) = poorest.expect("there are seats");
            *load += 1;
            *owner = *member;
        }
    }

    /// Has others compute from `step` to `last_step` what `slow` computes, beside it, where nobody does so yet: the
    /// bits are the same. Answers how many shards were given out; none if there is nobody else.
    pub(super) fn back_up(&mut self, slow: MemberId, step: u64, last_step: u64) -> usize {
        let Some(shards) = self.seat(slow).map(|seat| seat.shards.clone()) else {
            return 0;
        };
        let mut given = 0;
        for shard in shards {
            let computes = |seat: &Seat| seat.backups.get(&shard).is_some_and(|last| *last >= step);
            if self.seats.iter().any(computes) {
                continue;
            }
            let others = self.seats.iter_mut().filter(|seat| seat.member != slow);
            if let Some(seat) = others.min_by_key(|seat| seat.load(step)) {
                seat.backups.insert(shard, last_step);
                given += 1;
            }
        }
        given
    }

    /// Forgets what was computed beside slow members and is over before `step`.
    pub(super) fn end_backups(&mut self, step: u64) {
        for seat in &mut self.seats {
            seat.backups.retain(|_, last| *last >= step);
        }
    }
}
