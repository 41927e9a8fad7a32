//! The crew: the job's trainers as they come and go, and what is under way with each of them.
//!
//! Invariants:
//! 1. Every call to a trainer is a task of the crew's own, and ends with it.
//! 2. What was under way when a trainer was given up is ignored when it arrives.
//! 3. A trainer is either away and waited for, or being prepared, or ready.

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::messages::{Epoch, Greeting, Held, StepOrder, StepReply, TrainerError};

/// Pauses between attempts to reach a trainer.
const GREET_PAUSE_FIRST: Duration = Duration::from_millis(50);
const GREET_PAUSE_MAX: Duration = Duration::from_secs(2);
/// How long a process that leaves may still be seen.
const LEAVE_PAUSE: Duration = Duration::from_millis(200);

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

/// The way to one trainer, over all its restarts. Calls of one link arrive in their order.
pub trait TrainerLink: Clone + Send + Sync + 'static {
    /// Waits until it is there, within a bound, creating it if it has ended.
    fn greet(&self) -> impl Future<Output = Result<Greeting, LinkError>> + Send;
    /// Gives it a state.
    fn prepare(
        &self,
        epoch: Epoch,
        state: Vec<u8>,
    ) -> impl Future<Output = Result<Held, LinkError>> + Send;
    /// Orders a share of a step.
    fn step(&self, order: StepOrder) -> impl Future<Output = Result<StepReply, LinkError>> + Send;
    /// Lets it leave its node.
    fn leave(&self) -> impl Future<Output = Result<(), LinkError>> + Send;
}

/// How far a trainer is from taking part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    /// Not there; it is being waited for.
    Away,
    /// There, and on its way to the present state.
    Preparing,
    /// Takes part.
    Ready,
}

/// One trainer, as the coordinator sees it.
pub(super) struct Slot<L> {
    link: L,
    pub(super) presence: Presence,
    /// Grows when it is given up; what was under way then is ignored.
    pub(super) ticket: u64,
    pub(super) incarnation: Option<u64>,
    pub(super) node: String,
    /// The step at which its replica stands when it has done what it was ordered.
    pub(super) step: u64,
    /// Orders that it has not answered, and when they were sent.
    pub(super) orders: BTreeMap<u64, Instant>,
    pub(super) notice_ms: Option<u64>,
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
        answer: Result<Held, LinkError>,
    },
    Stepped {
        number: u64,
        answer: Box<Result<StepReply, LinkError>>,
    },
}

impl<L> Slot<L> {
    pub(super) fn is_ready(&self) -> bool {
        self.presence == Presence::Ready
    }

    /// Whether it takes part and owes no answer.
    pub(super) fn is_free(&self) -> bool {
        self.is_ready() && self.orders.is_empty()
    }
}

/// All trainers of a job.
pub(super) struct Crew<L> {
    slots: Vec<Slot<L>>,
    tasks: JoinSet<Event>,
}

impl<L: TrainerLink> Crew<L> {
    /// Begins to wait for the trainers of `links`.
    pub(super) fn new(links: Vec<L>) -> Self {
        let slots = links.into_iter().map(|link| Slot {
            link,
            presence: Presence::Away,
            ticket: 0,
            incarnation: None,
            node: "no node yet".to_owned(),
            step: 0,
            orders: BTreeMap::new(),
            notice_ms: None,
        });
        let mut crew = Crew {
            slots: slots.collect(),
            tasks: JoinSet::new(),
        };
        for index in 0..crew.slots.len() {
            crew.summon(index, false, Duration::ZERO);
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
            let slot = &mut self.slots[event.slot];
            if slot.ticket != event.ticket {
                continue;
            }
            if let Happened::Stepped { number, .. } = &event.what {
                slot.orders.remove(number);
            }
            return event;
        }
    }

    /// Gives a trainer up, and waits until it is there again.
    pub(super) fn lose(&mut self, index: usize) {
        self.give_up(index);
        self.summon(index, false, GREET_PAUSE_FIRST);
    }

    /// Lets a trainer leave its node, and waits until it is there again.
    pub(super) fn let_leave(&mut self, index: usize) {
        self.give_up(index);
        self.summon(index, true, LEAVE_PAUSE);
    }

    /// Sends a state in the background.
    pub(super) fn prepare(&mut self, index: usize, epoch: Epoch, sent: Held, state: Vec<u8>) {
        // An answer to an older order says nothing about the new state.
        self.give_up(index);
        let slot = &mut self.slots[index];
        slot.presence = Presence::Preparing;
        let (link, ticket) = (slot.link.clone(), slot.ticket);
        self.tasks.spawn(async move {
            let answer = link.prepare(epoch, state).await;
            Event {
                slot: index,
                ticket,
                what: Happened::Prepared { sent, answer },
            }
        });
    }

    /// Sends an order in the background.
    pub(super) fn order(&mut self, index: usize, number: u64, order: StepOrder) {
        let slot = &mut self.slots[index];
        slot.step = order.step;
        slot.orders.insert(number, Instant::now());
        let (link, ticket) = (slot.link.clone(), slot.ticket);
        self.tasks.spawn(async move {
            let answer = Box::new(link.step(order).await);
            Event {
                slot: index,
                ticket,
                what: Happened::Stepped { number, answer },
            }
        });
    }

    /// Sends each free trainer its order, and answers with the replies that come within `limit`.
    pub(super) async fn ask_free(
        &self,
        order_for: impl Fn(&Slot<L>) -> Option<StepOrder>,
        limit: Duration,
    ) -> Vec<StepReply> {
        let mut asked = JoinSet::new();
        for slot in self.slots.iter().filter(|slot| slot.is_free()) {
            if let Some(order) = order_for(slot) {
                let link = slot.link.clone();
                asked.spawn(async move { link.step(order).await });
            }
        }
        let mut replies = Vec::new();
        let collect = async {
            while let Some(answer) = asked.join_next().await {
                replies.extend(answer.ok().and_then(Result::ok));
            }
        };
        // Whoever is silent by then is not counted.
        let _ = tokio::time::timeout(limit, collect).await;
        replies
    }

    fn give_up(&mut self, index: usize) {
        let slot = &mut self.slots[index];
        slot.presence = Presence::Away;
        slot.ticket += 1;
        slot.orders.clear();
    }

    /// Waits in the background until the trainer is there; one that shall `leave` first is told.
    fn summon(&mut self, index: usize, leave: bool, pause: Duration) {
        let slot = &self.slots[index];
        let (link, ticket) = (slot.link.clone(), slot.ticket);
        self.tasks.spawn(async move {
            if leave && let Err(error) = link.leave().await {
                // The notice is withdrawn, or the process is gone already: the greeting tells.
                tracing::debug!(%error, index, "a trainer did not leave");
            }
            let mut pause = pause;
            loop {
                tokio::time::sleep(pause).await;
                match link.greet().await {
                    Ok(greeting) => {
                        return Event {
                            slot: index,
                            ticket,
                            what: Happened::Greeted(greeting),
                        };
                    }
                    // As long as the job lives it hopes for its trainers; each attempt waits.
                    Err(error) => tracing::debug!(%error, index, "a trainer is not there yet"),
                }
                pause = (pause * 2).clamp(GREET_PAUSE_FIRST, GREET_PAUSE_MAX);
            }
        });
    }
}
