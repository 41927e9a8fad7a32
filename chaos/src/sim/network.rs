//! Ways between processes: what is lost, doubled, delayed, cut or clogged.
//!
//! Invariant: a cut or clog has an end, known when it begins; healing ends all of them at once.

use std::collections::BTreeMap;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use super::options::{MILLISECOND, Micros, Swarm};

/// A process in the simulated cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    /// The head with this Raft id.
    Head(u64),
    /// A worker.
    Worker(usize),
    /// A client.
    Client(usize),
}

/// The ways, and what is wrong with them.
#[derive(Debug)]
pub(crate) struct Network {
    loss: u32,
    duplication: u32,
    delay_max: Micros,
    /// Until when nothing gets from one to the other.
    cuts: BTreeMap<(Place, Place), Micros>,
    /// Until when nothing arrives that is on its way from one to the other.
    clogs: BTreeMap<(Place, Place), Micros>,
}

impl Network {
    /// One that does nothing wrong yet.
    pub(crate) fn new() -> Self {
        Network {
            loss: 0,
            duplication: 0,
            delay_max: MILLISECOND,
            cuts: BTreeMap::new(),
            clogs: BTreeMap::new(),
        }
    }

    /// From now on it is as rough as `swarm` says.
    pub(crate) fn roughen(&mut self, swarm: &Swarm) {
        self.loss = swarm.loss;
        self.duplication = swarm.duplication;
        self.delay_max = swarm.delay_ms_max * MILLISECOND;
    }

    /// From now on everything arrives, soon.
    pub(crate) fn heal(&mut self) {
        *self = Network::new();
    }

    pub(crate) fn cut(&mut self, from: Place, to: Place, until: Micros) {
        self.cuts.insert((from, to), until);
    }

    pub(crate) fn clog(&mut self, from: Place, to: Place, until: Micros) {
        self.clogs.insert((from, to), until);
    }

    /// When a message that is sent now arrives: never, once, or twice.
    pub(crate) fn arrivals(
        &self,
        from: Place,
        to: Place,
        now: Micros,
        rng: &mut ChaCha8Rng,
    ) -> [Option<Micros>; 2] {
        if self.cuts.get(&(from, to)).is_some_and(|until| now < *until)
            || (self.loss > 0 && rng.random_range(0..1000) < self.loss)
        {
            return [None, None];
        }
        let first = self.arrival(from, to, now, rng);
        let is_doubled = self.duplication > 0 && rng.random_range(0..1000) < self.duplication;
        let second = is_doubled.then(|| self.arrival(from, to, now, rng) + 10 * self.delay_max);
        [Some(first), second]
    }

    fn arrival(&self, from: Place, to: Place, now: Micros, rng: &mut ChaCha8Rng) -> Micros {
        let arrival = now + rng.random_range(100..=self.delay_max.max(200));
        let clogged = self.clogs.get(&(from, to)).copied().unwrap_or(0);
        arrival.max(clogged)
    }
}
