//! A worker's session with the leader: begun, kept up and begun again; orders in, events out.

use mobula_core::resource::Resources;
use rand::Rng;

use super::{Session, WORKER_CPU_MILLI, obey};
use crate::sim::network::Place;
use crate::sim::options::{MILLISECOND, Micros, SECOND};
use crate::sim::packet::{HeadSays, Packet, WorkerSays};
use crate::sim::world::World;

const RENEW: Micros = 300 * MILLISECOND;
const RESEND: Micros = SECOND;

/// A leader that owes an answer for so long may have been replaced.
const SILENCE_MAX: Micros = 900 * MILLISECOND;

impl World {
    pub(super) fn keep_session(&mut self, index: usize) {
        let now = self.now;
        let is_silent = |session: &Session| {
            session
                .waits_since
                .is_some_and(|since| now - since > SILENCE_MAX)
        };
        let worker = &mut self.workers[index];
        if worker.session.as_ref().is_some_and(is_silent) {
            worker.session = None;
            worker.next_head = None;
        }
        if worker.session.is_none() && worker.retry_at <= now {
            self.open_session(index);
        }
    }

    /// Renews, and reports what is not acknowledged.
    pub(super) fn say_what_waits(&mut self, index: usize) {
        let now = self.now;
        let worker = &mut self.workers[index];
        let Some(session) = worker.session.as_mut() else {
            return;
        };
        if !session.is_welcome {
            return;
        }
        let (number, head) = (session.number, session.head);
        let mut says = Vec::new();
        if session.renew_at <= now {
            session.renew_at = now + RENEW;
            session.waits_since.get_or_insert(now);
            says.push(WorkerSays::Renew);
        }
        if session.resend_at <= now {
            session.resend_at = now + RESEND;
            session.sent = 0;
        }
        for (sequence, event) in worker.events.range(session.sent + 1..).take(64) {
            says.push(WorkerSays::Event {
                sequence: *sequence,
                event: event.clone(),
            });
            session.sent = *sequence;
        }
        for said in says {
            self.worker_says(index, number, head, said);
        }
    }

    fn worker_says(&mut self, index: usize, session: u64, head: u64, said: WorkerSays) {
        if !matches!(said, WorkerSays::Renew) {
            self.say(|| format!("worker {index} says in session {session}: {said:?}"));
        }
        let packet = Packet::FromWorker {
            worker: index,
            session,
            said,
        };
        self.send_at(self.now, Place::Worker(index), Place::Head(head), packet);
    }

    fn open_session(&mut self, index: usize) {
        let now = self.now;
        let pause = self.rng.random_range(100..400) * MILLISECOND;
        let known = self.workers[index].next_head.take();
        let Some(head) = known.or_else(|| self.any_head()) else {
            return;
        };
        self.sessions += 1;
        let number = self.sessions;
        let worker = &mut self.workers[index];
        worker.retry_at = now + pause;
        worker.session = Some(Session {
            number,
            head,
            is_welcome: false,
            waits_since: Some(now),
            renew_at: now + RENEW,
            resend_at: now + RESEND,
            sent: 0,
        });
        let hello = WorkerSays::Hello {
            name: format!("worker-{index}"),
            boot: format!("boot-{}", worker.boot),
            capacity: Resources {
                cpu_milli: WORKER_CPU_MILLI,
                ..Resources::default()
            },
        };
        self.worker_says(index, number, head, hello);
    }

    pub(crate) fn worker_loses_session(&mut self, index: usize, session: u64) {
        let worker = &mut self.workers[index];
        if worker.session.as_ref().is_some_and(|s| s.number == session) {
            worker.session = None;
        }
    }

    /// Takes what has arrived, unless the worker is stopped.
    pub(crate) fn worker_reads(&mut self, index: usize) {
        if self.now < self.workers[index].stopped_until {
            return;
        }
        for (session, said) in std::mem::take(&mut self.workers[index].inbox) {
            self.worker_hears(index, session, said);
        }
    }

    fn worker_hears(&mut self, index: usize, number: u64, said: HeadSays) {
        let now = self.now;
        let starts_in = self.rng.random_range(5..150) * MILLISECOND;
        if !matches!(said, HeadSays::Renewed { .. }) {
            self.say(|| format!("worker {index} hears in session {number}: {said}"));
        }
        let worker = &mut self.workers[index];
        let Some(session) = worker.session.as_mut().filter(|s| s.number == number) else {
            return;
        };
        let term = match &said {
            HeadSays::Welcome { term, .. }
            | HeadSays::Renewed { term }
            | HeadSays::Order { term, .. }
            | HeadSays::OrdersComplete { term, .. } => Some(*term),
            HeadSays::Refused { .. } | HeadSays::Acknowledged { .. } => None,
        };
        if term.is_some_and(|term| term < worker.highest_term) {
            worker.session = None;
            return;
        }
        worker.highest_term = worker.highest_term.max(term.unwrap_or(0));
        session.waits_since = None;
        match said {
            HeadSays::Welcome {
                node, incarnation, ..
            } => {
                session.is_welcome = true;
                if worker.registered != Some((node, incarnation)) {
                    worker.registered = Some((node, incarnation));
                    worker.actors.clear();
                    worker.events.clear();
                }
            }
            HeadSays::Refused { leader } => {
                worker.session = None;
                worker.next_head = leader;
                worker.retry_at = now + 100 * MILLISECOND;
            }
            HeadSays::Renewed { .. } => {}
            HeadSays::Order { order, .. } => obey(worker, order, now, starts_in),
            HeadSays::OrdersComplete { standing, .. } => {
                worker
                    .actors
                    .retain(|actor, runs| standing.contains(&(*actor, runs.incarnation)));
            }
            HeadSays::Acknowledged { sequence } => {
                worker.events.remove(&sequence);
            }
        }
    }
}
