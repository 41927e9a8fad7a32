//! Clients: each has a session, several commands of it under way, retries what it does not know with
//! the same stamp at another head, and reads.

mod choices;

use std::collections::BTreeMap;

use mobula_core::control::ModuleId;
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::{ActorId, JobId, SessionId};
use mobula_scheduler::{Command, Response};
use rand::Rng;

use super::network::Place;
use super::options::{MILLISECOND, Micros};
use super::packet::{Answer, Ask, Packet, Reply, Request};
use super::watches::Watcher;
use super::world::{Event, Phase, World};

const TICK: Micros = 30 * MILLISECOND;

/// Operations that a client has under way at one time, its standing watch among them.
const IN_FLIGHT_MAX: usize = 5;

/// After which silence another head is asked.
const PATIENCE: Micros = 400 * MILLISECOND;

/// Names of leaders that are followed without a pause, as the SDK does: heads may name each other in
/// turn during an election.
const NAMES_MAX: u32 = 2;

/// What a client begins at the least, after the healing if it could not before: a run in which a cluster
/// of one head was away nearly all the time shows nothing otherwise.
const BEGUN_MIN: u64 = 8;

#[derive(Debug)]
struct Operation {
    ask: Ask,
    asked_at: Micros,
    /// Tells its attempts from each other: an answer to an earlier one leads to nothing new.
    attempts: u32,
    /// Names of leaders that were followed since the last pause.
    followed: u32,
}

/// A client.
#[derive(Debug)]
pub(crate) struct Client {
    index: usize,
    session: Option<SessionId>,
    opening: Option<u64>,
    last_seq: u64,
    last_operation: u64,
    /// How often it began something in a session.
    begun: u64,
    operations: BTreeMap<u64, Operation>,
    leader: Option<u64>,
    jobs: Vec<JobId>,
    actors: Vec<ActorId>,
    keys: u64,
    closing: Option<u64>,
    /// Between two answers of one client in sequence tables never go back.
    seen: u64,
    pub(crate) watcher: Watcher,
}

impl Client {
    pub(crate) fn new(index: usize) -> Self {
        Client {
            index,
            session: None,
            opening: None,
            last_seq: 0,
            last_operation: 0,
            begun: 0,
            operations: BTreeMap::new(),
            leader: None,
            jobs: Vec::new(),
            actors: Vec::new(),
            keys: 0,
            closing: None,
            seen: 0,
            watcher: Watcher::new(index),
        }
    }

    /// Whether nothing is under way but the standing watch.
    pub(crate) fn is_idle(&self) -> bool {
        self.operations
            .keys()
            .all(|number| self.watcher.is(*number))
    }

    /// Whether it has done its part of the run, and waits for nothing.
    pub(crate) fn is_done(&self) -> bool {
        self.begun >= BEGUN_MIN && self.is_idle()
    }

    /// The number that the next operation will have.
    pub(crate) fn next_operation(&self) -> u64 {
        self.last_operation + 1
    }

    pub(crate) fn waiting(&self) -> String {
        let asks: Vec<String> = self
            .operations
            .values()
            .map(|operation| match &operation.ask {
                Ask::Change { payload, .. } => format!("{:?}", Command::decode(payload)),
                Ask::Look(question) => format!("{question:?}"),
                Ask::Watch { module, .. } => format!("a change of module {}", module.0),
            })
            .collect();
        asks.join(", ")
    }
}

impl World {
    pub(crate) fn client_ticks(&mut self, index: usize) {
        self.after(TICK, Event::ClientTick(index));
        let now = self.now;
        let late: Vec<u64> = self.clients[index]
            .operations
            .iter()
            .filter(|(_, operation)| now - operation.asked_at >= PATIENCE)
            .map(|(number, _)| *number)
            .collect();
        for number in late {
            self.clients[index].leader = None;
            if let Some(operation) = self.clients[index].operations.get_mut(&number) {
                operation.followed = 0;
            }
            self.ask_somebody(index, number);
        }
        self.keep_watching(index);
        if self.phase == Phase::Liveness && self.clients[index].begun >= BEGUN_MIN {
            // Only when no draining is under way any more.
            if !self.is_undrained && self.clients.iter().all(Client::is_done) {
                self.is_undrained = true;
                self.undrain();
                self.take_down();
            }
            return;
        }
        let client = &self.clients[index];
        if client.session.is_none() {
            if client.opening.is_none() && client.is_idle() {
                let command = Command::OpenSession {
                    client: format!("client-{index}"),
                };
                let ask = self.change(index, false, &command);
                let number = self.begin(index, ask);
                self.clients[index].opening = Some(number);
            }
            return;
        }
        if client.closing.is_none()
            && client.operations.len() < IN_FLIGHT_MAX
            && self.rng.random_bool(0.5)
        {
            self.clients[index].begun += 1;
            self.begin_something(index);
        }
    }

    fn change(&mut self, index: usize, in_session: bool, command: &Command) -> Ask {
        self.change_in(index, in_session, ModuleId::SCHEDULER, command.encode())
    }

    fn change_in(
        &mut self,
        index: usize,
        in_session: bool,
        module: ModuleId,
        payload: Vec<u8>,
    ) -> Ask {
        let client = &mut self.clients[index];
        let (session, seq) = match client.session.filter(|_| in_session) {
            Some(session) => {
                client.last_seq += 1;
                (session, client.last_seq)
            }
            None => (SessionId::INTERNAL, 0),
        };
        Ask::Change {
            session,
            seq,
            module,
            payload,
        }
    }

    pub(crate) fn begin(&mut self, index: usize, ask: Ask) -> u64 {
        let now = self.now;
        let client = &mut self.clients[index];
        let number = client.next_operation();
        client.last_operation = number;
        let operation = Operation {
            ask,
            asked_at: now,
            attempts: 0,
            followed: 0,
        };
        client.operations.insert(number, operation);
        self.ask_somebody(index, number);
        number
    }

    fn ask_somebody(&mut self, index: usize, number: u64) {
        // Any head tells of changes, and the next one goes on where the last one was.
        let is_watch = self.clients[index].watcher.is(number);
        let known = self.clients[index].leader.filter(|_| !is_watch);
        let Some(head) = known.or_else(|| self.any_head()) else {
            return;
        };
        let now = self.now;
        let Some(operation) = self.clients[index].operations.get_mut(&number) else {
            return;
        };
        operation.asked_at = now;
        operation.attempts += 1;
        let request = Request {
            client: Some(index),
            operation: number,
            attempt: operation.attempts,
            ask: operation.ask.clone(),
        };
        let packet = Packet::Request(request);
        self.send_at(now, Place::Client(index), Place::Head(head), packet);
    }

    pub(crate) fn client_hears(&mut self, index: usize, reply: Reply) {
        let Reply {
            operation,
            attempt,
            answer,
        } = reply;
        let now = self.now;
        let Some(waiting) = self.clients[index].operations.get_mut(&operation) else {
            return;
        };
        match answer {
            // A refusal ends the attempt that it is for. One that arrives twice ends it once:
            // otherwise doubled requests and refusals would multiply.
            Answer::No(_) if attempt != waiting.attempts => {}
            Answer::No(leader) => {
                // Again at the next tick, or a little later when it has just been asked.
                waiting.asked_at = waiting.asked_at.min(now.saturating_sub(PATIENCE - TICK));
                let follows = leader.is_some() && waiting.followed < NAMES_MAX;
                waiting.followed += u32::from(follows);
                self.clients[index].leader = leader;
                if follows && self.rng.random_bool(0.9) {
                    self.ask_somebody(index, operation);
                }
            }
            // It is asked again when it has taken long enough.
            Answer::Unknown => {}
            Answer::Seen { applied, found } => {
                self.counts.answers += 1;
                self.counts.reads += 1;
                self.clients[index].operations.remove(&operation);
                self.clients[index].seen = self.clients[index].seen.max(applied);
                self.trace.note_all(&[applied, found.len() as u64]);
            }
            Answer::Watched { revision } => {
                self.clients[index].operations.remove(&operation);
                self.watcher_hears(index, revision);
            }
            Answer::Applied {
                index: entry,
                result,
            } => {
                self.counts.answers += 1;
                let ask = waiting.ask.clone();
                self.clients[index].operations.remove(&operation);
                self.acknowledged = self.acknowledged.max(entry);
                self.trace.note_all(&[entry, u64::from(result.is_ok())]);
                self.check_applied(&ask, entry, &result);
                self.learn(index, operation, &result);
            }
        }
    }

    fn learn(&mut self, index: usize, operation: u64, result: &Result<Vec<u8>, Rejection>) {
        let client = &mut self.clients[index];
        if client.opening == Some(operation) {
            client.opening = None;
        }
        if client.closing == Some(operation) {
            client.closing = None;
            client.session = None;
        }
        match result {
            Ok(bytes) => match Response::decode(bytes) {
                Ok(Response::SessionOpened { session }) => {
                    client.session = Some(session);
                    client.last_seq = 0;
                }
                Ok(Response::JobSubmitted { job, driver, .. }) if !client.jobs.contains(&job) => {
                    client.jobs.push(job);
                    client.actors.push(driver);
                }
                Ok(Response::ActorsCreated { actors }) => client.actors.extend(actors),
                _ => {}
            },
            Err(rejection) if rejection.code == ErrorCode::SessionExpired => {
                client.session = None;
            }
            Err(_) => {}
        }
        debug_assert_eq!(client.index, index);
    }
}

#[cfg(test)]
mod tests {
    use mobula_scheduler::Query;

    use super::super::EVENTS_MAX;
    use super::super::packet::Question;
    use super::*;

    /// Two heads that name each other as the leader, and a network that doubles messages: each refusal led
    /// to a request, so that requests multiplied without end.
    #[test]
    fn a_refusal_that_arrives_twice_leads_to_one_request() {
        let mut world = World::new(1, EVENTS_MAX, false);
        world.clients[0].leader = Some(1);
        let query = Query::ListJobs {
            after: None,
            limit: 0,
        };
        let operation = world.begin(0, Ask::Look(Question::Scheduler(query)));
        let attempts = |world: &World| world.clients[0].operations[&operation].attempts;
        assert_eq!(attempts(&world), 1);
        for attempt in 1..=8 {
            for _time in 0..2 {
                let before = attempts(&world);
                let refusal = Reply {
                    operation,
                    attempt,
                    answer: Answer::No(Some(2)),
                };
                world.client_hears(0, refusal);
                assert!(attempts(&world) <= before + 1);
                assert!(attempts(&world) <= attempt + 1, "it was taken twice");
            }
        }
        assert!(
            attempts(&world) <= 1 + NAMES_MAX,
            "names are followed without a pause {NAMES_MAX} times at the most"
        );
    }
}
