//! The whole protocol in one thread and virtual time: members, leader and driver's copy, with messages
//! that are lost, late, doubled and out of order, and processes that are killed, started, stopped for a
//! while, given wrong bits, and led by two leaders. Whatever the schedule, the run must end in the state
//! of an undisturbed one, in every copy.
//!
//! The arithmetic is a toy that rounds: another order of additions, a shard that counts twice, or sums of
//! another step would show in the last bits.
//!
//! [`toy`] is the arithmetic, this file the world and what is done to it, [`driver`] what the driver does,
//! [`messages`] how members' messages travel, [`schedules`] the tests.

mod driver;
mod messages;
mod schedules;
mod toy;

use std::collections::{BTreeMap, BTreeSet};

use self::toy::{Rng, Toy};
use super::buckets::Buckets;
use super::exchange::{Ask, Content, Contribution, Refusal};
use super::gather::TreeShape;
use super::leader::Leader;
use super::member::{Member, MemberShape};
use super::plan::{DRIVER_SLOT, MemberId, Plan};
use crate::training::reduction::Partial;

const SHARDS: u32 = 8;
const SAMPLES: u64 = 2;
const VALUES: usize = 7;
const STEPS: u64 = 24;
const DRIVER: u32 = DRIVER_SLOT;
/// Events after which a schedule counts as stuck.
const EVENTS_MAX: u64 = 400_000;

/// A copy of the model in some process.
struct Copy {
    member: Member,
    toy: Toy,
    tokens: BTreeMap<u64, Ask>,
    /// What the next update does wrong.
    error: Option<f32>,
}

impl Copy {
    fn new(me: MemberId, shape: MemberShape, toy: Toy) -> Self {
        Copy {
            member: Member::new(me, shape, toy.step, toy.digest()),
            toy,
            tokens: BTreeMap::new(),
            error: None,
        }
    }
}

struct Trainer {
    incarnation: u64,
    entry: u64,
    is_up: bool,
    copy: Option<Copy>,
    paused_until: u64,
}

struct Driver {
    incarnation: u64,
    leader: Leader,
    copy: Copy,
    /// Who has said that it holds the state.
    present: BTreeSet<MemberId>,
}

#[derive(Clone)]
enum Reply {
    Contributed(Result<(), Refusal>),
    Asked(Result<Partial, Refusal>),
}

/// A call without its content, as its maker knows it.
#[derive(Clone, PartialEq)]
enum Made {
    Contribute(Content),
    Ask(u64, u32),
}

#[derive(Clone)]
enum Event {
    Contribute(MemberId, Contribution),
    Ask(MemberId, Ask),
    /// To the caller: from whom, which call, what came; nothing if it failed.
    Returned(MemberId, MemberId, Made, Option<Reply>),
    Computed(MemberId, u64, Partial),
    Applied(MemberId, std::sync::Arc<Partial>),
    Tick(MemberId),
    /// From a driver's start to a trainer.
    Adopt(u64, MemberId, Plan),
    Greet(u64, u32),
    /// From a driver's start: take this state over.
    Prepare(u64, MemberId, Toy, Plan),
    /// To a driver's start: the member holds the state.
    Present(u64, MemberId),
    Lost(u64, MemberId),
    Judge(u64, u64),
    Kill(u32),
    Start(u32),
    Pause(u32, u64),
    Leave(u32),
    FlipBit(u32),
    BackUp(u32),
    KillDriver,
    StartDriver,
}

struct World {
    rng: Rng,
    now: u64,
    next: u64,
    queue: BTreeMap<(u64, u64), Event>,
    trainers: Vec<Trainer>,
    driver: Option<Driver>,
    driver_starts: u64,
    saved: Toy,
    shape: MemberShape,
    members_min: u32,
    /// Whether updates go wrong. Then no driver is lost: it is the third voice where two differ.
    has_errors: bool,
    loss_percent: u64,
    delay_max: u64,
    counts: BTreeMap<&'static str, u64>,
    /// How often each step's shards were ordered to be computed.
    ordered: BTreeMap<(u64, u32), u64>,
    /// The step for which somebody was backed up last, and how many had seats then.
    backed_up: Option<(u64, usize)>,
    /// Faults that come just before the event with this number.
    blows: BTreeMap<u64, Event>,
    events: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let slots = 1 + rng.below(5) as usize;
        let shape = MemberShape {
            tree: TreeShape {
                shard_count: SHARDS,
                samples_per_shard: SAMPLES,
            },
            buckets: Buckets::new(VALUES, 1 + rng.below(VALUES as u64) as usize),
            steps: STEPS,
            history: 1 + rng.below(4) as usize,
        };
        let trainer = |_| Trainer {
            incarnation: 1,
            entry: 0,
            is_up: true,
            copy: None,
            paused_until: 0,
        };
        World {
            members_min: 1 + rng.below(slots as u64) as u32,
            has_errors: seed.is_multiple_of(3),
            loss_percent: rng.below(2) * rng.below(10),
            delay_max: 1 + rng.below(20),
            rng,
            now: 0,
            next: 0,
            queue: BTreeMap::new(),
            trainers: (0..slots).map(trainer).collect(),
            driver: None,
            driver_starts: 0,
            saved: Toy::initial(),
            shape,
            counts: BTreeMap::new(),
            ordered: BTreeMap::new(),
            backed_up: None,
            blows: BTreeMap::new(),
            events: 0,
        }
    }

    fn at(&mut self, delay: u64, event: Event) {
        self.next += 1;
        self.queue.insert((self.now + delay, self.next), event);
    }

    fn send(&mut self, event: Event) {
        let delay = self.rng.below(self.delay_max);
        self.at(delay, event);
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    fn id(&self, slot: u32) -> MemberId {
        let trainer = &self.trainers[slot as usize];
        MemberId {
            slot,
            incarnation: trainer.incarnation,
            entry: trainer.entry,
        }
    }

    /// Plans what goes wrong, all of it in the first part of the run.
    fn plan_faults(&mut self) {
        let slots = self.trainers.len() as u64;
        let mut time = 0;
        for _ in 0..self.rng.below(16) {
            time += self.rng.below(120);
            let slot = self.rng.below(slots) as u32;
            let event = match self.rng.below(12) {
                0..=3 => Event::Kill(slot),
                4 | 5 => Event::Pause(slot, 10 + self.rng.below(400)),
                6 => Event::Leave(slot),
                7 | 8 if self.has_errors => Event::FlipBit(slot),
                7 | 8 => Event::BackUp(slot),
                9 if self.rng.percent(30) => {
                    for slot in 1..slots as u32 {
                        self.at(time, Event::Kill(slot));
                    }
                    Event::Kill(0)
                }
                _ if self.has_errors => Event::BackUp(slot),
                _ => Event::KillDriver,
            };
            self.at(time, event);
        }
    }

    fn copy(&mut self, who: MemberId) -> Option<&mut Copy> {
        if who.slot == DRIVER {
            let driver = self.driver.as_mut()?;
            return (driver.incarnation == who.incarnation).then_some(&mut driver.copy);
        }
        let trainer = &mut self.trainers[who.slot as usize];
        if !trainer.is_up || (trainer.incarnation, trainer.entry) != (who.incarnation, who.entry) {
            return None;
        }
        trainer.copy.as_mut()
    }

    /// Who has to be running for the event to be handled.
    fn target(event: &Event) -> Option<MemberId> {
        match event {
            Event::Contribute(to, _)
            | Event::Ask(to, _)
            | Event::Returned(to, ..)
            | Event::Computed(to, ..)
            | Event::Applied(to, _)
            | Event::Tick(to)
            | Event::Adopt(_, to, _)
            | Event::Prepare(_, to, ..) => Some(*to),
            _ => None,
        }
    }

    fn run(&mut self) {
        self.start_driver();
        while let Some(((time, _), event)) = self.queue.pop_first() {
            self.now = time;
            self.events += 1;
            assert!(
                self.events < EVENTS_MAX,
                "it does not end: {}",
                self.describe()
            );
            if let Some(blow) = self.blows.remove(&self.events) {
                self.handle(blow);
            }
            let paused_until = Self::target(&event)
                .filter(|who| who.slot != DRIVER)
                .map_or(0, |who| self.trainers[who.slot as usize].paused_until);
            if paused_until > self.now {
                self.at(paused_until - time, event);
                continue;
            }
            self.handle(event);
            if self.is_over() {
                return;
            }
        }
        panic!("nothing happens any more: {}", self.describe());
    }

    fn is_over(&self) -> bool {
        let Some(driver) = &self.driver else {
            return false;
        };
        let seated = driver.leader.seated();
        driver.copy.member.step() == self.shape.steps
            && !seated.is_empty()
            && seated.iter().all(|member| {
                let trainer = &self.trainers[member.slot as usize];
                trainer.incarnation == member.incarnation
                    && trainer
                        .copy
                        .as_ref()
                        .is_some_and(|c| c.toy.step == self.shape.steps)
            })
    }

    fn describe(&self) -> String {
        let mut text = format!("at {} ms, counts {:?}", self.now, self.counts);
        for trainer in &self.trainers {
            let copy = trainer.copy.as_ref().map(|copy| copy.member.describe());
            text += &format!(
                "\nstart {} up {}: {copy:?}",
                trainer.incarnation, trainer.is_up
            );
        }
        if let Some(driver) = &self.driver {
            text += &format!(
                "\ndriver {}, seated {:?}: {}",
                driver.incarnation,
                driver.leader.seated(),
                driver.copy.member.describe()
            );
        }
        text
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Contribute(to, contribution) => self.contribution(to, contribution),
            Event::Ask(to, ask) => self.question(to, ask),
            Event::Returned(to, from, made, reply) => self.returned(to, from, made, reply),
            Event::Computed(who, step, sums) => {
                if let Some(copy) = self.copy(who) {
                    copy.member.computed(step, sums).unwrap();
                }
                self.act(who);
            }
            Event::Applied(who, root) => {
                if let Some(copy) = self.copy(who) {
                    copy.toy.apply(&root);
                    copy.toy.values[3] += copy.error.take().unwrap_or(0.0);
                    let digest = copy.toy.digest();
                    copy.member.applied(digest);
                }
                self.follow(who);
                self.act(who);
            }
            Event::Tick(who) => {
                if let Some(copy) = self.copy(who) {
                    copy.member.retry();
                    self.at(25, Event::Tick(who));
                }
                self.act(who);
            }
            Event::Adopt(driver, to, plan) => self.adopt(driver, to, plan),
            Event::Greet(driver, slot) => self.greet(driver, slot),
            Event::Prepare(driver, to, toy, plan) => self.prepare(driver, to, toy, plan),
            Event::Present(driver, member) => {
                if self.id(member.slot) != member {
                    // It has taken another state over meanwhile, which its news would tell.
                    self.at(20, Event::Greet(driver, member.slot));
                } else if self.is_driver(driver) {
                    let driver = self.driver.as_mut().unwrap();
                    driver.present.insert(member);
                    driver.leader.seat([member]);
                    self.publish();
                }
            }
            Event::Lost(driver, member) => {
                if self.is_driver(driver) {
                    self.drop_member(member);
                    self.at(20, Event::Greet(driver, member.slot));
                }
            }
            Event::Judge(driver, step) => self.judge(driver, step),
            Event::Kill(slot) => self.kill(slot),
            Event::Start(slot) => {
                let trainer = &mut self.trainers[slot as usize];
                trainer.is_up = true;
                trainer.incarnation += 1;
                trainer.entry = 0;
            }
            Event::Pause(slot, length) => {
                self.count("pauses");
                let until = self.now + length;
                self.trainers[slot as usize].paused_until = until;
                if length > 60 {
                    self.report_lost(slot, 60);
                }
            }
            Event::Leave(slot) => {
                self.count("leaves");
                let member = self.id(slot);
                if self.driver.is_some() {
                    self.drop_member(member);
                }
                self.kill(slot);
            }
            Event::FlipBit(slot) => {
                // No two are wrong in the same way.
                let error = 1.0 + self.rng.below(1_000_000) as f32;
                if let Some(copy) = self.trainers[slot as usize].copy.as_mut() {
                    copy.error = Some(error);
                }
            }
            Event::BackUp(slot) => {
                let member = self.id(slot);
                let copies = self.trainers.iter().filter_map(|t| t.copy.as_ref());
                let Some(step) = copies.map(|copy| copy.toy.step).max() else {
                    return;
                };
                if let Some(driver) = self.driver.as_mut()
                    && driver.leader.back_up(member, step) > 0
                {
                    self.backed_up = Some((step, driver.leader.seated().len()));
                    self.count("backups");
                    self.publish();
                }
            }
            Event::KillDriver => {
                if let Some(driver) = self.driver.take() {
                    self.count("drivers lost");
                    // Some of what it still has to say comes late: a leader of yesterday.
                    for member in driver.present {
                        let plan = driver.leader.plan().clone();
                        let late = self.rng.below(600);
                        self.at(late, Event::Adopt(driver.incarnation, member, plan));
                    }
                    let pause = self.rng.below(300);
                    self.at(pause, Event::StartDriver);
                }
            }
            Event::StartDriver => self.start_driver(),
        }
    }

    fn drop_member(&mut self, member: MemberId) {
        let driver = self.driver.as_mut().unwrap();
        driver.present.remove(&member);
        if driver.leader.unseat(member).is_some() {
            self.publish();
        }
    }

    fn kill(&mut self, slot: u32) {
        if !self.trainers[slot as usize].is_up {
            return;
        }
        self.count("kills");
        self.report_lost(slot, 8);
        let trainer = &mut self.trainers[slot as usize];
        (trainer.is_up, trainer.copy, trainer.paused_until) = (false, None, 0);
        let pause = self.rng.below(150);
        self.at(pause, Event::Start(slot));
    }

    fn report_lost(&mut self, slot: u32, within: u64) {
        let member = self.id(slot);
        if let Some(driver) = &self.driver {
            let incarnation = driver.incarnation;
            let delay = within + self.rng.below(within);
            self.at(delay, Event::Lost(incarnation, member));
        }
    }
}
