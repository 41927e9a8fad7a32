//! A worker's agent and what it runs, after `runtime/worker/src/{session,agent}.rs`: one session
//! with the leader, orders in, events out until they are acknowledged.
//!
//! What it checks by itself: an incarnation is started once, by whatever orders it hears (I4).

mod session;

use std::collections::{BTreeMap, BTreeSet};

use mobula_core::control::ModuleId;
use mobula_core::exit::ExitReason;
use mobula_core::id::{ActorId, HostId, Incarnation, JobId, NodeId, SessionId};
use mobula_core::order::{Order, WorkerEvent};
use mobula_core::spec::ActorKind;
use mobula_scheduler::Command;
use rand::Rng;

use super::domain::Role;
use super::network::Place;
use super::options::{MILLISECOND, Micros};
use super::packet::{Ask, HeadSays, Packet, Request};
use super::world::{Event, World};

const TICK: Micros = 40 * MILLISECOND;

/// CPU that a worker has, in thousandths.
pub(crate) const WORKER_CPU_MILLI: u64 = 4_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Until it is constructed.
    Starts,
    /// Until it ends by itself.
    Runs,
    /// Until it has ended, as asked.
    Stops,
}

#[derive(Debug)]
struct Runs {
    incarnation: Incarnation,
    job: JobId,
    is_driver: bool,
    role: Option<Role>,
    stage: Stage,
    until: Micros,
}

#[derive(Debug)]
struct Session {
    number: u64,
    head: u64,
    is_welcome: bool,
    /// Since when the head owes an answer.
    waits_since: Option<Micros>,
    renew_at: Micros,
    resend_at: Micros,
    sent: u64,
}

/// A worker.
#[derive(Debug)]
pub(crate) struct Worker {
    boot: u64,
    pub(crate) is_up: bool,
    /// Until when its processes are stopped, to go on as if nothing had been.
    pub(crate) stopped_until: Micros,
    /// What has arrived and is not read yet, in its order: a stopped process reads all of it when it goes
    /// on, before anything that comes then.
    pub(crate) inbox: Vec<(u64, HeadSays)>,
    session: Option<Session>,
    retry_at: Micros,
    next_head: Option<u64>,
    highest_term: u64,
    registered: Option<(NodeId, Incarnation)>,
    actors: BTreeMap<ActorId, Runs>,
    /// What was ended here, so that a late order starts nothing twice.
    ended: BTreeSet<(ActorId, Incarnation)>,
    events: BTreeMap<u64, WorkerEvent>,
    last_event: u64,
}

impl std::fmt::Display for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let running: Vec<String> = self
            .actors
            .iter()
            .map(|(actor, runs)| format!("{actor} as {}", runs.incarnation))
            .collect();
        write!(
            f,
            "a worker of boot {} that {} registered as {:?}, in session {:?}, runs {running:?} and has {} \
             events to report",
            self.boot,
            if self.is_up { "is up," } else { "is down," },
            self.registered,
            self.session
                .as_ref()
                .map(|session| (session.number, session.head)),
            self.events.len(),
        )
    }
}

impl Worker {
    pub(crate) fn new(_: usize) -> Self {
        Worker {
            boot: 1,
            is_up: true,
            stopped_until: 0,
            inbox: Vec::new(),
            session: None,
            retry_at: 0,
            next_head: None,
            highest_term: 0,
            registered: None,
            actors: BTreeMap::new(),
            ended: BTreeSet::new(),
            events: BTreeMap::new(),
            last_event: 0,
        }
    }

    /// Its machine loses power, with everything that runs on it.
    pub(crate) fn crash(&mut self) {
        *self = Worker {
            boot: self.boot + 1,
            is_up: false,
            ..Worker::new(0)
        };
    }

    /// The agent gives its session up, and runs on.
    pub(crate) fn drop_session(&mut self) {
        self.session = None;
    }

    fn report(&mut self, event: WorkerEvent) {
        self.last_event += 1;
        self.events.insert(self.last_event, event);
    }

    fn end(&mut self, actor: ActorId, incarnation: Incarnation, reason: ExitReason) {
        self.actors.remove(&actor);
        self.ended.insert((actor, incarnation));
        self.report(WorkerEvent::ActorExited {
            actor,
            incarnation,
            reason,
        });
    }
}

impl World {
    pub(crate) fn worker_ticks(&mut self, index: usize) {
        self.after(TICK, Event::WorkerTick(index));
        if !self.workers[index].is_up || self.now < self.workers[index].stopped_until {
            return;
        }
        self.worker_reads(index);
        self.run_actors(index);
        self.actors_go_on(index);
        self.say_what_waits(index);
        self.keep_session(index);
    }

    fn run_actors(&mut self, index: usize) {
        let now = self.now;
        let due: Vec<ActorId> = self.workers[index]
            .actors
            .iter()
            .filter(|(_, runs)| runs.until <= now)
            .map(|(actor, _)| *actor)
            .collect();
        for actor in due {
            let lasts = self.rng.random_range(50..1_500) * MILLISECOND;
            let ending = self.rng.random_range(0..10);
            let worker = &mut self.workers[index];
            let Some(runs) = worker.actors.get_mut(&actor) else {
                continue;
            };
            let incarnation = runs.incarnation;
            match runs.stage {
                Stage::Starts if ending == 0 => {
                    let reason = ExitReason::StartFailed("no such file".to_owned());
                    worker.end(actor, incarnation, reason);
                }
                Stage::Starts => {
                    runs.stage = Stage::Runs;
                    runs.until = now + lasts;
                    let (job, is_driver) = (runs.job, runs.is_driver);
                    worker.report(WorkerEvent::ActorStarted {
                        actor,
                        incarnation,
                        host: HostId(actor.0),
                        call_address: "127.0.0.1:1".to_owned(),
                        pid: 1,
                    });
                    if is_driver {
                        self.driver_began(index, job, incarnation);
                    }
                }
                Stage::Runs => {
                    let (job, is_driver) = (runs.job, runs.is_driver);
                    let reason = match ending {
                        0 => ExitReason::Panicked("simulated".to_owned()),
                        1 => ExitReason::HostSignaled(9),
                        _ => ExitReason::Completed,
                    };
                    if is_driver {
                        self.set_result(index, job, actor, incarnation);
                    }
                    self.workers[index].end(actor, incarnation, reason);
                }
                // Not everybody that is told to end does so in good order.
                Stage::Stops => {
                    let reason = match ending {
                        0 | 1 => ExitReason::HostSignaled(9),
                        2 => ExitReason::Panicked("simulated".to_owned()),
                        _ => ExitReason::Stopped,
                    };
                    worker.end(actor, incarnation, reason);
                }
            }
        }
    }

    /// What running actors do beside running.
    fn actors_go_on(&mut self, index: usize) {
        let running = self.workers[index].actors.iter();
        let running: Vec<(ActorId, JobId, Incarnation, bool, Option<Role>)> = running
            .filter(|(_, runs)| runs.stage == Stage::Runs)
            .filter(|(_, runs)| runs.is_driver || runs.role.is_some())
            .map(|(actor, runs)| {
                (
                    *actor,
                    runs.job,
                    runs.incarnation,
                    runs.is_driver,
                    runs.role.clone(),
                )
            })
            .collect();
        for (actor, job, incarnation, is_driver, role) in running {
            if is_driver {
                self.driver_goes_on(index, job, (actor, incarnation));
            }
            if let Some(role) = role {
                self.role_goes_on(index, role, incarnation);
            }
        }
    }

    /// A driver stores its result, whatever became of its incarnation meanwhile.
    fn set_result(&mut self, index: usize, job: JobId, actor: ActorId, incarnation: Incarnation) {
        let Some(head) = self.any_head() else { return };
        let command = Command::SetJobResult {
            job,
            actor,
            incarnation,
            result_json: format!("{}", incarnation.0),
        };
        let request = Request {
            client: None,
            operation: 0,
            attempt: 0,
            ask: Ask::Change {
                session: SessionId::INTERNAL,
                seq: 0,
                module: ModuleId::SCHEDULER,
                payload: command.encode(),
            },
        };
        let packet = Packet::Request(request);
        self.send_at(self.now, Place::Worker(index), Place::Head(head), packet);
    }

    /// A head that is a member, as somebody who knows the list would try one.
    pub(crate) fn any_head(&mut self) -> Option<u64> {
        let members = &self.checker.reference().members().voters;
        let choice = self.rng.random_range(0..members.len().max(1));
        members.get(choice).copied()
    }

    /// Whether no worker has anything to run or to report.
    pub(crate) fn workers_are_idle(&self) -> bool {
        self.workers
            .iter()
            .all(|worker| worker.actors.is_empty() && worker.events.is_empty())
    }
}

fn obey(worker: &mut Worker, order: Order, now: Micros, starts_in: Micros) {
    match order {
        Order::Start(start) => {
            let (actor, incarnation) = (start.actor, start.incarnation);
            let newest = worker.actors.get(&actor).map(|runs| runs.incarnation);
            if newest >= Some(incarnation) || worker.ended.contains(&(actor, incarnation)) {
                return;
            }
            let runs = Runs {
                incarnation,
                job: start.job,
                is_driver: start.spec.kind == ActorKind::Driver,
                role: start.spec.name.as_deref().and_then(Role::of),
                stage: Stage::Starts,
                until: now + starts_in,
            };
            worker.actors.insert(actor, runs);
        }
        Order::Stop {
            actor, incarnation, ..
        } => match worker.actors.get_mut(&actor) {
            Some(runs) if runs.incarnation == incarnation => {
                if runs.stage != Stage::Stops {
                    runs.stage = Stage::Stops;
                    runs.until = now + starts_in;
                }
            }
            _ => {
                // It does not run (any more): whoever asks must be told.
                let is_reported = worker.events.values().any(|event| {
                    matches!(event, WorkerEvent::ActorExited { actor: a, incarnation: i, .. }
                        if (*a, *i) == (actor, incarnation))
                });
                if !is_reported {
                    worker.end_unstarted(actor, incarnation);
                }
            }
        },
        Order::Notice { .. } | Order::NoticeWithdrawn | Order::JobEnded { .. } => {}
    }
}

impl Worker {
    fn end_unstarted(&mut self, actor: ActorId, incarnation: Incarnation) {
        self.ended.insert((actor, incarnation));
        self.report(WorkerEvent::ActorExited {
            actor,
            incarnation,
            reason: ExitReason::Stopped,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::EVENTS_MAX;
    use super::*;
    use crate::sim::options::SECOND;

    /// What had arrived at a stopped worker was put off to the end of its stop. When it went on earlier, it
    /// heard an old list of what should run after the orders that came behind that list, and ended what it
    /// had just begun.
    #[test]
    fn a_worker_that_was_stopped_reads_in_the_order_of_arrival() {
        let mut world = World::new(1, EVENTS_MAX, false);
        let head = Place::Head(1);
        let say = |said| Packet::FromHead { session: 7, said };
        let (actor, incarnation) = (ActorId(1), Incarnation(5));
        let worker = &mut world.workers[0];
        worker.session = Some(Session {
            number: 7,
            head: 1,
            is_welcome: true,
            waits_since: None,
            renew_at: SECOND,
            resend_at: SECOND,
            sent: 0,
        });
        let runs = Runs {
            incarnation,
            job: JobId(1),
            is_driver: true,
            role: None,
            stage: Stage::Runs,
            until: SECOND,
        };
        worker.actors.insert(actor, runs);
        worker.stopped_until = 10 * SECOND;
        let (term, standing) = (1, Vec::new());
        let list = HeadSays::OrdersComplete { term, standing };
        world.arrive(head, Place::Worker(0), say(list));
        assert_eq!(world.workers[0].actors.len(), 1, "it is stopped");
        world.workers[0].stopped_until = 0;
        let order = Order::Stop {
            actor,
            incarnation,
            grace_ms: 0,
        };
        world.arrive(head, Place::Worker(0), say(HeadSays::Order { term, order }));
        let worker = &world.workers[0];
        assert!(worker.actors.is_empty(), "the list does not have it");
        // The order found it gone, and did not begin to end it.
        assert!(worker.ended.contains(&(actor, incarnation)));
    }
}
