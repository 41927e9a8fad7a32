//! The crew: the job's trainers as they come and go, and what is under way with each of them.
//!
//! Invariants:
//! 1. Every call to a trainer is a task of the crew's own, and ends with it.
//! 2. What was under way when a trainer was given up is ignored when it arrives.
//! 3. A trainer is either away and waited for, or being prepared, or following without a seat, or ready.
//!
//! `attempts` counts how often a trainer tried in vain, `questions` has what is asked beside the news, `sharing` has some
//! keep a state for those who join.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use mobula_storage::checkpoint::Piece;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::messages::{Admission, Epoch, Greeting, Handover, Held, KeepOrder, News, TrainerError};
use super::numerics::Probe;
use super::parts::SharedState;
use super::protocol::leader::StateDigest;
use super::protocol::plan::{MemberId, Plan};
use attempts::Attempts;

mod attempts;
mod questions;
mod sharing;

pub(super) use attempts::{LATE_PAUSE_MAX, REFUSALS_MAX};
pub use questions::Witness;

/// Pauses between attempts to reach a trainer.
pub(super) const GREET_PAUSE_FIRST: Duration = Duration::from_millis(50);
const GREET_PAUSE_MAX: Duration = Duration::from_secs(2);
/// A pause of so much and more ends early where the process does that it is for: what the next one does is another matter.
const WATCHED_FROM: Duration = Duration::from_millis(500);
/// How long a process that leaves may still be seen.
const LEAVE_PAUSE: Duration = Duration::from_millis(200);
/// The slot of what concerns no single trainer.
const NOBODY: usize = usize::MAX;

/// Why a trainer did not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// It answered that it cannot.
    #[error(transparent)]
    Trainer(#[from] TrainerError),
    /// It cannot be reached; whether it got the order is unknown and does not matter.
    #[error("{0}")]
    Lost(String),
}

/// What a trainer needs to take part.
#[derive(Debug, Clone)]
pub struct Preparation {
    /// The plan to follow.
    pub plan: Plan,
    /// The state to follow it from.
    pub state: Arc<Vec<u8>>,
    /// Who gives it too, if others keep it.
    pub shared: Option<SharedState>,
    /// What its machine must compute, where that is asked for.
    pub probe: Option<Probe>,
}

/// The way to one trainer, over all its restarts. Calls of one link arrive in their order.
pub trait TrainerLink: Clone + Send + Sync + 'static {
    /// Waits until it is there, within a bound, creating it if it has ended.
    fn greet(&self) -> impl Future<Output = Result<Greeting, LinkError>> + Send;
    /// Waits until the process that was greeted last has ended, for as long as that takes; not at all where none was, or
    /// its end is known.
    fn ended(&self) -> impl Future<Output = ()> + Send;
    /// Gives it a state, and the plan to follow from there.
    fn prepare(
        &self,
        order: Preparation,
    ) -> impl Future<Output = Result<Admission, LinkError>> + Send;
    /// Gives it another plan.
    fn adopt(&self, plan: Plan) -> impl Future<Output = Result<(), LinkError>> + Send;
    /// Listens to it; answers within a bound, also if there is nothing new.
    fn news(
        &self,
        epoch: Epoch,
        known: u64,
    ) -> impl Future<Output = Result<News, LinkError>> + Send;
    /// The state that it had before a step.
    fn digest_before(
        &self,
        step: u64,
    ) -> impl Future<Output = Result<Option<StateDigest>, LinkError>> + Send;
    /// Has it keep the state as it will be after `step`; whether it can.
    fn keep(
        &self,
        order: KeepOrder,
        step: u64,
    ) -> impl Future<Output = Result<bool, LinkError>> + Send;
    /// Has it store pieces of that state; answers within a bound.
    fn store(
        &self,
        step: u64,
        pieces: Vec<Piece>,
    ) -> impl Future<Output = Result<(), LinkError>> + Send;
    /// Has it keep no more what that order, or one before it, asked to keep.
    fn release(&self, order: KeepOrder) -> impl Future<Output = Result<(), LinkError>> + Send;
    /// Has it keep the state as it will be after `step` for those who join; whether it can.
    fn share(
        &self,
        order: KeepOrder,
        step: u64,
    ) -> impl Future<Output = Result<bool, LinkError>> + Send;
    /// Has it keep no more what that order, or one before it, asked to share.
    fn unshare(&self, order: KeepOrder) -> impl Future<Output = Result<(), LinkError>> + Send;
    /// Gives it what a driver that leaves knows, for the next one.
    fn entrust(
        &self,
        epoch: Epoch,
        handover: Handover,
    ) -> impl Future<Output = Result<(), LinkError>> + Send;
    /// Lets it leave its node.
    fn leave(&self) -> impl Future<Output = Result<(), LinkError>> + Send;
}

/// How far a trainer is from taking part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    /// Not there; it is being waited for.
    Away,
    /// There, and on its way to a state, or waiting for the one that others will give it.
    Preparing,
    /// Holds a state and takes the sums of every step, but computes none: it has to catch up first.
    Following,
    /// Takes part.
    Ready,
}

/// One trainer, as the coordinator sees it.
pub(super) struct Slot<L> {
    pub(super) link: L,
    pub(super) presence: Presence,
    /// Grows when it is given up; what was under way then is ignored.
    pub(super) ticket: u64,
    pub(super) incarnation: Option<u64>,
    /// The start that takes no part: it computes other bits, or was given up.
    pub(super) refused: Option<u64>,
    /// What that start does not do, if it has refused it too often: then it is given up, unless it is needed.
    pub(super) given_up: Option<String>,
    /// How its attempts to take part have gone, since its process was started.
    pub(super) attempts: Attempts,
    /// Whether it is left alone for longer than where it is needed: there it is asked at once.
    pub(super) naps: bool,
    /// Under which name it takes part.
    pub(super) member: Option<MemberId>,
    pub(super) node: String,
    /// The newest plan that it is known to follow, and its gate.
    adopted: Option<Plan>,
    is_adopting: bool,
    /// Until when it stays on a node that will be taken away.
    pub(super) stays_until: Option<Instant>,
    /// The last order to keep a state for a checkpoint, with the step after which that is, and whether it said that it does.
    pub(super) asked_to_keep: Option<(KeepOrder, u64)>,
    pub(super) keeps: bool,
    /// The last order by which it may still keep a state for those who join, though that has ended, and whether it is being
    /// told so.
    still_shares: Option<KeepOrder>,
    is_unsharing: bool,
    /// Since when it follows, and when it was heard of last.
    pub(super) following_since: Instant,
    pub(super) heard_at: Instant,
    /// The last of its news, and the step at which it stood then.
    pub(super) news_number: u64,
    pub(super) step: u64,
    /// How long its last step waited for samples, and how long it was computed, as it said last.
    pub(super) spent: (Duration, Duration),
    /// CPU time of its process, as it said last.
    pub(super) cpu: Duration,
    /// How busy its GPU is, as it said last.
    pub(super) gpu: Option<f64>,
}

/// Something that happened to a trainer.
pub(super) struct Event {
    pub(super) slot: usize,
    pub(super) ticket: u64,
    pub(super) what: Happened,
}

/// What happened.
pub(super) enum Happened {
    Greeted(Greeting),
    Prepared {
        sent: Held,
        /// How long that took.
        took: Duration,
        answer: Result<Admission, LinkError>,
    },
    Adopted(Result<(), LinkError>),
    News(Result<News, LinkError>),
    /// Whether it keeps the state that the order asked for, for a checkpoint.
    Keeps {
        order: KeepOrder,
        answer: Result<bool, LinkError>,
    },
    /// Whether it keeps the state that the order asked for, for those who join.
    Shares {
        order: KeepOrder,
        answer: Result<bool, LinkError>,
    },
    /// It was told to keep such a state no more, and has heard it of the one of this order.
    Unshared(Option<KeepOrder>),
    /// Who held which bits before the step, of those who answered.
    Judged {
        step: u64,
        said: BTreeMap<MemberId, StateDigest>,
    },
}

impl<L> Slot<L> {
    pub(super) fn is_ready(&self) -> bool {
        self.presence == Presence::Ready
    }

    /// Whether it takes the sums of every step, with a seat or without.
    pub(super) fn follows(&self) -> bool {
        matches!(self.presence, Presence::Following | Presence::Ready)
    }
}

/// What a trainer is told before it is waited for.
enum Farewell {
    Nothing,
    /// To leave its node.
    Leave,
    /// To follow this plan.
    Follow(Plan),
}

/// All trainers of a job.
pub(super) struct Crew<L> {
    slots: Vec<Slot<L>>,
    first_epoch: Epoch,
    /// The last order to keep a state.
    keep_order: KeepOrder,
    tasks: JoinSet<Event>,
}

impl<L: TrainerLink> Crew<L> {
    /// Begins to wait for the trainers of `links`.
    pub(super) fn new(links: Vec<L>, first_epoch: Epoch) -> Self {
        let now = Instant::now();
        let slots = links.into_iter().map(|link| Slot {
            link,
            presence: Presence::Away,
            ticket: 0,
            incarnation: None,
            refused: None,
            given_up: None,
            attempts: Attempts::default(),
            naps: false,
            member: None,
            node: "no node yet".to_owned(),
            adopted: None,
            is_adopting: false,
            asked_to_keep: None,
            stays_until: None,
            keeps: false,
            still_shares: None,
            is_unsharing: false,
            following_since: now,
            heard_at: now,
            news_number: 0,
            step: 0,
            spent: Default::default(),
            cpu: Duration::ZERO,
            gpu: None,
        });
        let mut crew = Crew {
            slots: slots.collect(),
            first_epoch,
            keep_order: KeepOrder::before_all_of(first_epoch.driver_incarnation()),
            tasks: JoinSet::new(),
        };
        for index in 0..crew.slots.len() {
            crew.summon(index, Farewell::Nothing, Duration::ZERO);
        }
        crew
    }

    pub(super) fn slots(&self) -> &[Slot<L>] {
        &self.slots
    }

    pub(super) fn slot(&mut self, index: usize) -> &mut Slot<L> {
        &mut self.slots[index]
    }

    /// The trainers of which `is_wanted` holds.
    pub(super) fn which(&self, is_wanted: impl Fn(&Slot<L>) -> bool) -> Vec<usize> {
        (0..self.slots.len())
            .filter(|index| is_wanted(&self.slots[*index]))
            .collect()
    }

    /// The next thing that happens; never, where nothing is under way.
    pub(super) async fn next_event(&mut self) -> Event {
        loop {
            let event = match self.tasks.join_next().await {
                Some(Ok(event)) => event,
                // Only we abort tasks, by dropping all of them.
                Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
                None => std::future::pending().await,
            };
            if event.slot == NOBODY || self.slots[event.slot].ticket == event.ticket {
                return event;
            }
        }
    }

    /// Gives a trainer up, and waits until it is there again, not before `pause` is over.
    pub(super) fn lose(&mut self, index: usize, pause: Duration) {
        self.give_up(index);
        self.summon(index, Farewell::Nothing, pause);
    }

    /// The same with one that may follow still: until then it asks nobody for sums, by a plan of `epoch` without seats.
    pub(super) fn dismiss(&mut self, index: usize, epoch: Epoch, pause: Duration) {
        self.give_up(index);
        let plan = Plan {
            epoch,
            hold: true,
            ..Plan::default()
        };
        self.summon(index, Farewell::Follow(plan), pause);
    }

    /// Lets a trainer leave its node, and waits until it is there again.
    pub(super) fn let_leave(&mut self, index: usize) {
        self.give_up(index);
        self.summon(index, Farewell::Leave, LEAVE_PAUSE);
    }

    /// Sends a state in the background.
    pub(super) fn prepare(&mut self, index: usize, sent: Held, order: Preparation) {
        // An answer to something older says nothing about the new state.
        self.give_up(index);
        let slot = &mut self.slots[index];
        slot.presence = Presence::Preparing;
        slot.adopted = Some(order.plan.clone());
        let link = slot.link.clone();
        self.spawn(index, async move {
            let begun = Instant::now();
            let answer = link.prepare(order).await;
            Happened::Prepared {
                sent,
                took: begun.elapsed(),
                answer,
            }
        });
    }

    /// The trainer holds the state before `step` and follows: listens to it from now on.
    pub(super) fn follow(&mut self, index: usize, member: MemberId, step: u64) {
        let slot = &mut self.slots[index];
        (slot.member, slot.step) = (Some(member), step);
        (slot.presence, slot.naps) = (Presence::Following, false);
        slot.news_number = 0;
        slot.heard_at = Instant::now();
        slot.following_since = slot.heard_at;
        self.listen(index);
    }

    /// The trainer that follows takes part from `step`.
    pub(super) fn ready(&mut self, index: usize, step: u64) {
        let slot = &mut self.slots[index];
        (slot.presence, slot.given_up) = (Presence::Ready, None);
        slot.attempts.succeeded(step, Instant::now());
    }

    /// Listens to a trainer in the background.
    pub(super) fn listen(&mut self, index: usize) {
        self.listen_after(index, Duration::ZERO);
    }

    /// The same after a pause, to one that has something to say at once each time.
    pub(super) fn listen_after(&mut self, index: usize, pause: Duration) {
        let slot = &self.slots[index];
        let (link, known) = (slot.link.clone(), slot.news_number);
        let epoch = slot
            .adopted
            .as_ref()
            .map_or(self.first_epoch, |plan| plan.epoch);
        self.spawn(index, async move {
            if !pause.is_zero() {
                tokio::time::sleep(pause).await;
            }
            Happened::News(link.news(epoch, known).await)
        });
    }

    /// Sends `plan` in the background to those who follow and do not have it yet.
    pub(super) fn publish(&mut self, plan: &Plan) {
        for index in self.which(Slot::follows) {
            let slot = &mut self.slots[index];
            if slot.is_adopting || slot.adopted.as_ref() == Some(plan) {
                continue;
            }
            slot.is_adopting = true;
            slot.adopted = Some(plan.clone());
            let (link, plan) = (slot.link.clone(), plan.clone());
            self.spawn(
                index,
                async move { Happened::Adopted(link.adopt(plan).await) },
            );
        }
    }

    /// A trainer has answered to a plan; it may lack the next one.
    pub(super) fn adopted(&mut self, index: usize) {
        self.slots[index].is_adopting = false;
    }

    pub(super) fn spawn(
        &mut self,
        index: usize,
        what: impl Future<Output = Happened> + Send + 'static,
    ) {
        let ticket = self.slots[index].ticket;
        self.tasks.spawn(async move {
            Event {
                slot: index,
                ticket,
                what: what.await,
            }
        });
    }

    fn give_up(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        slot.presence = Presence::Away;
        slot.ticket += 1;
        (slot.member, slot.adopted, slot.is_adopting) = (None, None, false);
        (slot.asked_to_keep, slot.keeps) = (None, false);
        slot.is_unsharing = false;
        (slot.stays_until, slot.naps) = (None, false);
    }

    /// Waits in the background until the trainer is there, after it was told its `farewell`.
    fn summon(&mut self, index: usize, farewell: Farewell, pause: Duration) {
        let link = self.slots[index].link.clone();
        self.spawn(index, async move {
            let told = match farewell {
                Farewell::Nothing => Ok(()),
                Farewell::Leave => link.leave().await,
                Farewell::Follow(plan) => link.adopt(plan).await,
            };
            if let Err(error) = told {
                // The notice is withdrawn, or the process is gone already: the greeting tells.
                tracing::debug!(%error, index, "a trainer did not do as it was told");
            }
            if pause < WATCHED_FROM {
                tokio::time::sleep(pause).await;
            } else if tokio::time::timeout(pause, link.ended()).await.is_ok() {
                // What is seen of it may be older than its end.
                tokio::time::sleep(GREET_PAUSE_FIRST).await;
            }
            let mut pause = Duration::ZERO;
            loop {
                tokio::time::sleep(pause).await;
                match link.greet().await {
                    Ok(greeting) => return Happened::Greeted(greeting),
                    // As long as the job lives it hopes for its trainers; each attempt waits.
                    Err(error) => tracing::debug!(%error, index, "a trainer is not there yet"),
                }
                pause = (pause * 2).clamp(GREET_PAUSE_FIRST, GREET_PAUSE_MAX);
            }
        });
    }
}
