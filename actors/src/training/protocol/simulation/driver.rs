//! What a driver does: meets the trainers, publishes plans, and judges who is wrong.

use std::collections::{BTreeMap, BTreeSet};

use super::toy::Toy;
use super::{Copy, DRIVER, Driver, Event, SHARDS, World};
use crate::training::messages::Epoch;
use crate::training::protocol::leader::{Leader, LeaderShape, StateDigest, judge};
use crate::training::protocol::plan::{MemberId, Plan};

impl World {
    pub(super) fn is_driver(&self, incarnation: u64) -> bool {
        self.driver
            .as_ref()
            .is_some_and(|driver| driver.incarnation == incarnation)
    }

    /// A driver begins at the furthest state that a trainer holds, or at the last one saved.
    pub(super) fn start_driver(&mut self) {
        self.driver_starts += 1;
        let incarnation = self.driver_starts;
        let copies = self.trainers.iter().filter_map(|t| t.copy.as_ref());
        let mut votes: BTreeMap<(u64, StateDigest), (usize, Toy)> = BTreeMap::new();
        for copy in copies {
            let vote = votes.entry((copy.toy.step, copy.toy.digest()));
            vote.or_insert((0, copy.toy.clone())).0 += 1;
        }
        let best = votes
            .into_values()
            .max_by_key(|(count, toy)| (toy.step, *count));
        let toy = best.map_or(self.saved.clone(), |(_, toy)| toy);
        let shape = LeaderShape {
            shard_count: SHARDS,
            bucket_count: self.shape.buckets.count(),
            members_min: self.members_min,
            lead_max: self.shape.history as u64,
            steps: self.shape.steps,
        };
        let me = MemberId {
            slot: DRIVER,
            incarnation,
            entry: 0,
        };
        self.driver = Some(Driver {
            incarnation,
            leader: Leader::new(shape, Epoch::first_of(incarnation), toy.step),
            copy: Copy::new(me, self.shape, toy),
            present: BTreeSet::new(),
        });
        self.at(1, Event::Tick(me));
        for slot in 0..self.trainers.len() as u32 {
            self.at(1, Event::Greet(incarnation, slot));
        }
    }

    /// The driver asks a trainer who it is; whoever has no state, or an older one, is given one.
    pub(super) fn greet(&mut self, incarnation: u64, slot: u32) {
        if !self.is_driver(incarnation) {
            return;
        }
        let driver = self.driver.as_ref().unwrap();
        let (plan, own) = (driver.leader.plan().clone(), driver.copy.toy.clone());
        let donors: Vec<Toy> = driver
            .leader
            .seated()
            .iter()
            .filter(|member| member.slot != slot)
            .filter_map(|member| self.trainers[member.slot as usize].copy.as_ref())
            .map(|copy| copy.toy.clone())
            .filter(|toy| toy.step >= own.step && !self.has_errors)
            .collect();
        let trainer = &self.trainers[slot as usize];
        let (is_up, paused) = (trainer.is_up, trainer.paused_until > self.now);
        let held = trainer.copy.as_ref().map(|copy| copy.toy.step);
        if !is_up || paused {
            self.at(30, Event::Greet(incarnation, slot));
            return;
        }
        let member = self.id(slot);
        // What a driver that was started anew cannot check is not believed.
        if held.is_some_and(|step| step >= own.step) && !self.rng.percent(20) {
            self.driver.as_mut().unwrap().present.insert(member);
            self.send(Event::Adopt(incarnation, member, plan));
            self.send(Event::Present(incarnation, member));
            return;
        }
        let toy = match donors.len() as u64 {
            0 => own,
            count => donors[self.rng.below(count) as usize].clone(),
        };
        self.count("prepared");
        let delay = self.rng.below(40);
        self.at(delay, Event::Prepare(incarnation, member, toy, plan));
    }

    pub(super) fn prepare(&mut self, driver: u64, to: MemberId, toy: Toy, plan: Plan) {
        let shape = self.shape;
        let trainer = &mut self.trainers[to.slot as usize];
        // Another state may have come meanwhile, of another driver.
        if !trainer.is_up || (trainer.incarnation, trainer.entry) != (to.incarnation, to.entry) {
            // The driver hears that its call failed, and asks again who is there.
            self.at(20, Event::Greet(driver, to.slot));
            return;
        }
        let newer = |copy: &Copy| copy.member.epoch() > plan.epoch;
        if trainer.copy.as_ref().is_some_and(newer) {
            return;
        }
        trainer.entry += 1;
        let to = MemberId {
            entry: trainer.entry,
            ..to
        };
        let mut copy = Copy::new(to, shape, toy);
        copy.member.adopt(plan).unwrap();
        trainer.copy = Some(copy);
        self.at(1, Event::Tick(to));
        self.send(Event::Present(driver, to));
        self.act(to);
    }

    pub(super) fn adopt(&mut self, driver: u64, to: MemberId, plan: Plan) {
        if self.rng.percent(self.loss_percent) && self.is_driver(driver) {
            self.at(30, Event::Adopt(driver, to, plan));
            return;
        }
        if let Some(copy) = self.copy(to) {
            let before = copy.member.epoch();
            let outcome = copy.member.adopt(plan.clone());
            assert_eq!(outcome.is_err(), plan.epoch < before);
            if outcome.is_err() {
                self.count("plans refused");
            }
        }
        self.act(to);
    }

    pub(super) fn publish(&mut self) {
        let driver = self.driver.as_mut().unwrap();
        let (incarnation, plan) = (driver.incarnation, driver.leader.plan().clone());
        driver.copy.member.adopt(plan.clone()).unwrap();
        let me = MemberId {
            slot: DRIVER,
            incarnation,
            entry: 0,
        };
        for member in driver.present.clone() {
            self.send(Event::Adopt(incarnation, member, plan.clone()));
        }
        self.act(me);
    }

    pub(super) fn follow(&mut self, who: MemberId) {
        if who.slot != DRIVER || !self.is_driver(who.incarnation) {
            return;
        }
        let driver = self.driver.as_mut().unwrap();
        if driver.leader.follow(driver.copy.toy.step) {
            self.publish();
        }
        let toy = &self.driver.as_ref().unwrap().copy.toy;
        if toy.step.is_multiple_of(5) {
            self.saved = toy.clone();
        }
    }

    pub(super) fn judge(&mut self, incarnation: u64, step: u64) {
        if !self.is_driver(incarnation) {
            return;
        }
        let driver = self.driver.as_ref().unwrap();
        let Some(own) = driver.copy.member.digest_before(step) else {
            return;
        };
        let said = driver
            .present
            .iter()
            .filter_map(|member| {
                let trainer = &self.trainers[member.slot as usize];
                let copy = trainer.copy.as_ref()?;
                ((trainer.incarnation, trainer.entry) == (member.incarnation, member.entry))
                    .then(|| Some((*member, copy.member.digest_before(step)?)))?
            })
            .collect();
        let Some(wrong) = judge(&said, own) else {
            panic!("the driver's copy is outvoted at step {step}: {said:?}");
        };
        for member in wrong {
            self.count("quarantined");
            self.drop_member(member);
            self.trainers[member.slot as usize].copy = None;
            self.at(5, Event::Greet(incarnation, member.slot));
        }
    }
}
