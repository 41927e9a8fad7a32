//! The simulated cluster: one heap of events, one clock, one thread.
//!
//! Invariants:
//! 1. Everything that happens comes out of the heap, in order of time and then of being put there;
//!    all chance comes from one generator. So a seed is a run.
//! 2. Whatever a head answers or sends is checked before anybody gets it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mobula_core::control::StateModule;
use mobula_scheduler::{KeptObjects, Scheduler};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::client::Client;
use super::coverage::Counts;
use super::head::{HeadInput, HeadProcess};
use super::network::{Network, Place};
use super::operator::Operator;
use super::options::{MILLISECOND, Micros, SECOND, Swarm};
use super::packet::Packet;
use super::raft_check::RaftChecker;
use super::trace::Trace;
use super::violation::Violation;
use super::worker::Worker;

/// How long the group may take to form when nothing is wrong.
const FORMATION_MAX: Micros = 30 * SECOND;

/// How long the healed cluster may take to answer, finish and agree (I18): some elections, the
/// longest lease, restarts with back-off, a replaced head.
const HEALING_MAX: Micros = 60 * SECOND;

/// Something that will happen.
#[derive(Debug)]
pub(crate) enum Event {
    Arrive(Place, Place, Packet),
    /// A head works off its inbox.
    HeadWake(u64, u64),
    HeadTick(u64, u64),
    HeadStart(u64),
    WorkerTick(usize),
    ClientTick(usize),
    OperatorTick,
    Fault,
    SessionBroken {
        worker: usize,
        session: u64,
        head: u64,
    },
}

impl Event {
    fn kind(&self) -> &'static str {
        match self {
            Event::Arrive(_, _, packet) => packet.kind(),
            Event::HeadWake(..) => "wakes of heads",
            Event::HeadTick(..) => "ticks of heads",
            Event::HeadStart(_) => "starts of heads",
            Event::WorkerTick(_) => "ticks of workers",
            Event::ClientTick(_) => "ticks of clients",
            Event::OperatorTick => "ticks of the operator",
            Event::Fault => "faults",
            Event::SessionBroken { .. } => "broken sessions",
        }
    }
}

struct Due {
    at: Micros,
    number: u64,
    event: Event,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// In which part of a run we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Heads join until there are as many as there should be; nothing goes wrong.
    Forming,
    /// Anything may go wrong.
    Safety,
    /// Everything is well again, and must become so.
    Liveness,
}

pub(crate) struct World {
    pub(crate) seed: u64,
    pub(crate) swarm: Swarm,
    pub(crate) rng: ChaCha8Rng,
    pub(crate) now: Micros,
    base: Instant,
    pub(crate) phase: Phase,
    heap: BinaryHeap<Reverse<Due>>,
    numbers: u64,
    pub(crate) network: Network,
    pub(crate) heads: BTreeMap<u64, HeadProcess>,
    pub(crate) workers: Vec<Worker>,
    pub(crate) clients: Vec<Client>,
    pub(crate) operator: Operator,
    pub(crate) checker: RaftChecker,
    pub(crate) modules: Vec<Arc<dyn StateModule>>,
    pub(crate) trace: Trace,
    pub(crate) counts: Counts,
    pub(crate) lives: u64,
    pub(crate) sessions: u64,
    /// When the newest message of a session arrives, so that the next one comes after it. Behind one that
    /// never arrives none does.
    session_clocks: BTreeMap<(u64, bool), Option<Micros>>,
    /// The newest index that any client was told of.
    pub(crate) acknowledged: u64,
    pub(crate) complaint: Option<Violation>,
    /// Heads that stay down in the second phase: the others must do without them.
    pub(crate) asleep: BTreeSet<u64>,
    /// Whether all nodes were told to take actors again.
    pub(crate) is_undrained: bool,
    /// Past it the run counts as a loop.
    events_max: u64,
    pub(crate) is_verbose: bool,
}

impl World {
    pub(crate) fn new(seed: u64, events_max: u64, is_verbose: bool) -> World {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let swarm = Swarm::draw(&mut rng);
        let mut modules: Vec<Arc<dyn StateModule>> =
            vec![Arc::new(Scheduler), Arc::new(KeptObjects)];
        modules.extend(mobula_actors::modules());
        let checker = RaftChecker::new(1, &modules);
        World {
            seed,
            rng,
            now: 0,
            base: Instant::now(),
            phase: Phase::Forming,
            heap: BinaryHeap::new(),
            numbers: 0,
            network: Network::new(),
            heads: BTreeMap::new(),
            workers: (0..swarm.workers).map(Worker::new).collect(),
            clients: (0..swarm.clients).map(Client::new).collect(),
            operator: Operator::new(swarm.heads),
            swarm,
            checker,
            modules,
            trace: Trace::new(seed),
            counts: Counts::default(),
            lives: 0,
            sessions: 0,
            session_clocks: BTreeMap::new(),
            acknowledged: 0,
            complaint: None,
            asleep: BTreeSet::new(),
            is_undrained: false,
            events_max,
            is_verbose,
        }
    }

    /// Virtual time as the head's loop wants it.
    pub(crate) fn instant(&self) -> Instant {
        self.base + Duration::from_micros(self.now)
    }

    pub(crate) fn say(&self, what: impl FnOnce() -> String) {
        if self.is_verbose {
            println!("{:>10.3} ms  {}", self.now as f64 / 1_000.0, what());
        }
    }

    pub(crate) fn after(&mut self, delay: Micros, event: Event) {
        self.at(self.now + delay, event);
    }

    pub(crate) fn at(&mut self, at: Micros, event: Event) {
        self.numbers += 1;
        let number = self.numbers;
        self.heap.push(Reverse(Due { at, number, event }));
    }

    /// Sends a packet that leaves at `leaves`.
    pub(crate) fn send_at(&mut self, leaves: Micros, from: Place, to: Place, packet: Packet) {
        if let Packet::FromWorker { session, .. } | Packet::FromHead { session, .. } = &packet {
            return self.send_in_session(leaves, from, to, *session, packet);
        }
        let arrivals = self.network.arrivals(from, to, leaves, &mut self.rng);
        if let Packet::Snapshot { message, life, .. } = &packet
            && arrivals[0].is_none()
        {
            let end = Packet::SnapshotEnd {
                to: message.to,
                arrived: false,
                life: *life,
            };
            let at = leaves + 100 * MILLISECOND;
            return self.at(at, Event::Arrive(to, from, end));
        }
        let is_once = matches!(packet, Packet::Snapshot { .. });
        if let (Some(second), false) = (arrivals[1], is_once) {
            self.at(second, Event::Arrive(from, to, packet.clone()));
        }
        if let Some(first) = arrivals[0] {
            self.at(first, Event::Arrive(from, to, packet));
        }
    }

    /// A session is a stream: in order, sent again when lost, broken when that does not help.
    fn send_in_session(
        &mut self,
        leaves: Micros,
        from: Place,
        to: Place,
        session: u64,
        packet: Packet,
    ) {
        let mut leaves = leaves;
        let way = (session, matches!(to, Place::Head(_)));
        let Some(newest) = *self.session_clocks.entry(way).or_insert(Some(0)) else {
            return;
        };
        for _ in 0..4 {
            if let [Some(arrival), _] = self.network.arrivals(from, to, leaves, &mut self.rng) {
                let at = arrival.max(newest + 1);
                self.session_clocks.insert(way, Some(at));
                return self.at(at, Event::Arrive(from, to, packet));
            }
            leaves += 100 * MILLISECOND;
        }
        self.session_clocks.insert(way, None);
        let (Place::Head(head), Place::Worker(worker)) = (from.max_head(to), from.max_worker(to))
        else {
            return;
        };
        let broken = Event::SessionBroken {
            worker,
            session,
            head,
        };
        self.at(leaves + 300 * MILLISECOND, broken);
    }

    /// Runs all of it.
    pub(crate) fn run(&mut self) -> Result<(), Violation> {
        self.set_out();
        self.run_until(FORMATION_MAX, |world| world.operator.is_content())?;
        if !self.operator.is_content() {
            return Err(Violation::new(
                "the group forms (I18)",
                format!("{} heads do not vote after 30 s", self.swarm.heads),
            ));
        }
        self.phase = Phase::Safety;
        self.say(|| "the group is formed; faults begin".to_owned());
        let swarm = self.swarm.clone();
        self.network.roughen(&swarm);
        self.after(MILLISECOND, Event::Fault);
        let end = self.now + self.swarm.safety_ms * MILLISECOND;
        self.run_until(end, |_| false)?;
        self.heal();
        let bound = self.now + HEALING_MAX;
        self.run_until(bound, World::is_quiet)?;
        if !self.is_quiet() {
            return Err(Violation::new(
                "after healing, progress within a bound (I18)",
                self.what_is_missing(),
            ));
        }
        self.check_end()?;
        self.count_up();
        self.counts.check_run()?;
        self.trace.note(self.checker.rows_sum());
        Ok(())
    }

    /// Takes over what the checkers have counted.
    pub(crate) fn count_up(&mut self) {
        let (checker, counts) = (&self.checker, &mut self.counts);
        counts.entries = checker.last();
        counts.leaders = checker.leader_count();
        (counts.promoted, counts.removed) = checker.group_changes();
        counts.jobs = checker.model.job_count() as u64;
        counts.repeats = checker.model.repeats;
        counts.nodes_lost = checker.model.nodes_lost;
        counts.fenced = checker.model.fenced + checker.model.domain.fenced;
        counts.detached = checker.model.detached;
        counts.checkpoints = checker.model.domain.committed;
        counts.kept = checker.model.kept_count;
        counts.kept_dropped = checker.model.dropped_count;
        counts.take_experiments(&checker.model.domain.experiments);
    }

    fn set_out(&mut self) {
        self.add_head(1, true);
        self.after(0, Event::HeadStart(1));
        self.after(50 * MILLISECOND, Event::OperatorTick);
        for worker in 0..self.workers.len() {
            self.after(300 * MILLISECOND + worker as u64, Event::WorkerTick(worker));
        }
        for client in 0..self.clients.len() {
            self.after(400 * MILLISECOND + client as u64, Event::ClientTick(client));
        }
    }

    fn run_until(
        &mut self,
        until: Micros,
        is_enough: impl Fn(&World) -> bool,
    ) -> Result<(), Violation> {
        while let Some(Reverse(next)) = self.heap.peek() {
            if next.at > until || is_enough(self) {
                break;
            }
            let Some(Reverse(due)) = self.heap.pop() else {
                break;
            };
            self.now = self.now.max(due.at);
            self.counts.events += 1;
            if self.counts.events > self.events_max {
                let detail = format!(
                    "{} events in {} ms, and most of what is on its way are {}",
                    self.events_max,
                    self.now / MILLISECOND,
                    self.busiest()
                );
                return Err(Violation::new("a run ends", detail));
            }
            self.happen(due.event)?;
        }
        Ok(())
    }

    /// How much of each kind is to happen.
    pub(crate) fn due(&self) -> BTreeMap<&'static str, u64> {
        let mut kinds = BTreeMap::new();
        for Reverse(due) in &self.heap {
            *kinds.entry(due.event.kind()).or_default() += 1;
        }
        kinds
    }

    /// What the heap is full of.
    fn busiest(&self) -> String {
        let most = self.due().into_iter().max_by_key(|(_, count)| *count);
        most.map_or_else(String::new, |(kind, count)| format!("{kind}: {count}"))
    }

    fn happen(&mut self, event: Event) -> Result<(), Violation> {
        self.trace.note(self.now);
        let domain = &self.checker.model.domain;
        let decided = domain.rollouts.decided();
        let turned = domain.experiments.turns().len();
        match event {
            Event::Arrive(from, to, packet) => self.arrive(from, to, packet),
            Event::HeadWake(id, life) => self.head_wakes(id, life)?,
            Event::HeadTick(id, life) => self.head_ticks(id, life),
            Event::HeadStart(id) => self.head_starts(id)?,
            Event::WorkerTick(index) => self.worker_ticks(index),
            Event::ClientTick(index) => self.client_ticks(index),
            Event::OperatorTick => self.operator_ticks()?,
            Event::Fault => self.fault(),
            Event::SessionBroken {
                worker,
                session,
                head,
            } => {
                self.worker_loses_session(worker, session);
                self.head_loses_session(head, session);
            }
        }
        self.endanger_decisions(decided);
        self.endanger_experiments(turned);
        self.take_complaints()
    }

    pub(crate) fn arrive(&mut self, from: Place, to: Place, packet: Packet) {
        match (to, packet) {
            (Place::Head(id), packet) => {
                if let Packet::Snapshot { life, .. } = packet
                    && !self.is_up(id)
                {
                    let end = Packet::SnapshotEnd {
                        to: id,
                        arrived: false,
                        life,
                    };
                    return self.arrive(to, from, end);
                }
                let from = match from {
                    Place::Head(id) => id,
                    _ => 0,
                };
                self.give_head(id, HeadInput::Packet(from, packet));
            }
            (Place::Worker(index), Packet::FromHead { session, said }) => {
                self.workers[index].inbox.push((session, said));
                self.worker_reads(index);
            }
            (Place::Client(index), Packet::Reply(reply)) => self.client_hears(index, reply),
            (to, packet) => unreachable!("{packet:?} is nothing for {to:?}"),
        }
    }
}

impl Place {
    fn max_head(self, other: Place) -> Place {
        if matches!(self, Place::Head(_)) {
            self
        } else {
            other
        }
    }

    fn max_worker(self, other: Place) -> Place {
        if matches!(self, Place::Worker(_)) {
            self
        } else {
            other
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::EVENTS_MAX;
    use super::super::packet::HeadSays;
    use super::*;

    /// The welcome was lost, and the orders behind it arrived: the worker ran actors in a session that it
    /// did not know yet, forgot them with the next welcome, and never started them again.
    #[test]
    fn nothing_arrives_in_a_session_behind_what_was_lost() {
        let mut world = World::new(1, EVENTS_MAX, false);
        let (head, worker) = (Place::Head(1), Place::Worker(0));
        let due = |world: &World| world.due().get("messages to workers").copied();
        let tell = |world: &mut World, session| {
            let said = HeadSays::Renewed { term: 1 };
            world.send_at(world.now, head, worker, Packet::FromHead { session, said });
        };
        tell(&mut world, 7);
        assert_eq!(due(&world), Some(1));
        world.network.cut(head, worker, SECOND);
        tell(&mut world, 7);
        assert_eq!(world.due().get("broken sessions"), Some(&1));
        world.network.heal();
        tell(&mut world, 7);
        assert_eq!(
            due(&world),
            Some(1),
            "the session is broken, if nobody knows yet"
        );
        tell(&mut world, 8);
        assert_eq!(due(&world), Some(2), "another session is another stream");
    }
}
