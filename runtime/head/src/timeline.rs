//! When actors were ordered, ran and ended, as this leader saw it: the backbone of a job's timeline.
//!
//! Kept in memory only. A head that began to lead later knows less, which the timeline then shows as
//! it is: nothing is made up.
//!
//! Invariants:
//! 1. At most [`LIVES_MAX`] incarnations are remembered; the oldest go first.
//! 2. A repeated order or event changes nothing: the first one was when it happened.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use mobula_core::exit::ExitReason;
use mobula_core::id::{ActorId, Incarnation, JobId, NodeId};
use mobula_core::order::{Order, WorkerEvent};
use mobula_core::span::Span;
use mobula_scheduler::ActorView;
use parking_lot::Mutex;

/// Incarnations that are remembered: at some 100 bytes each, 2 MiB.
const LIVES_MAX: usize = 16_384;

/// One incarnation of an actor.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Life {
    job: JobId,
    actor: ActorId,
    node: NodeId,
    ordered_us: u64,
    started_us: Option<u64>,
    ended_us: Option<u64>,
    exit_code: Option<&'static str>,
}

/// What this leader saw of actors' lives.
#[derive(Debug, Default)]
pub(crate) struct Lives {
    /// Incarnations are numbers of log entries, so that their order is that of time; several actors
    /// may be assigned by one entry.
    lives: Mutex<BTreeMap<(Incarnation, ActorId), Life>>,
}

pub(crate) fn now_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
        })
}

impl Lives {
    /// A worker is being told to start something.
    pub(crate) fn ordered(&self, node: NodeId, order: &Order, now_us: u64) {
        let Order::Start(start) = order else { return };
        let mut lives = self.lives.lock();
        lives
            .entry((start.incarnation, start.actor))
            .or_insert(Life {
                job: start.job,
                actor: start.actor,
                node,
                ordered_us: now_us,
                started_us: None,
                ended_us: None,
                exit_code: None,
            });
        if lives.len() > LIVES_MAX {
            lives.pop_first();
        }
    }

    /// A worker said what became of it, and that is applied.
    pub(crate) fn heard(&self, event: &WorkerEvent, now_us: u64) {
        match event {
            WorkerEvent::ActorStarted {
                actor, incarnation, ..
            } => self.change(*actor, *incarnation, |life| {
                life.started_us.get_or_insert(now_us);
            }),
            WorkerEvent::ActorExited {
                actor,
                incarnation,
                reason,
            } => self.end(*actor, *incarnation, reason, now_us),
            _ => {}
        }
    }

    fn end(&self, actor: ActorId, incarnation: Incarnation, reason: &ExitReason, now_us: u64) {
        self.change(actor, incarnation, |life| {
            life.ended_us.get_or_insert(now_us);
            life.exit_code.get_or_insert(reason.code());
        });
    }

    fn change(&self, actor: ActorId, incarnation: Incarnation, change: impl FnOnce(&mut Life)) {
        if let Some(life) = self.lives.lock().get_mut(&(incarnation, actor)) {
            change(life);
        }
    }

    /// The spans of an actor: where it waited, started and ran, each inside the span of its
    /// incarnation.
    pub(crate) fn spans(&self, view: &ActorView) -> Vec<Span> {
        let lives = self.lives.lock();
        let own: Vec<(Incarnation, Life)> = lives
            .iter()
            .filter(|(_, life)| life.actor == view.actor)
            .map(|((incarnation, _), life)| (*incarnation, life.clone()))
            .collect();
        drop(lives);
        let mut spans = Vec::new();
        // The tables' clock has milliseconds: the order may seem to come before the request.
        let mut waits_since_us = Some(view.created_ms * 1000);
        for (number, (incarnation, life)) in own.iter().enumerate() {
            let begin_us = waits_since_us
                .take()
                .map_or(life.ordered_us, |since| since.min(life.ordered_us));
            let span = |name: &str, start_us: u64, end_us: Option<u64>| {
                let mut span = Span::new(
                    name,
                    "actor",
                    view.job,
                    start_us,
                    end_us.unwrap_or(start_us),
                );
                span.end_us = end_us.map(|end_us| end_us.max(start_us));
                span.by(view.actor, *incarnation)
                    .with("node", life.node.to_string())
            };
            let title = view.name.as_deref().unwrap_or(&view.type_name);
            let mut whole = span(title, begin_us, life.ended_us)
                .with("restart", number.to_string())
                .with("type", view.type_name.clone());
            if let Some(code) = life.exit_code {
                whole = whole.with("exit", code);
            }
            spans.push(whole);
            spans.push(span("wait for a place", begin_us, Some(life.ordered_us)));
            let started = life.started_us.or(life.ended_us);
            spans.push(span("start", life.ordered_us, started));
            if let Some(started_us) = life.started_us {
                spans.push(span("run", started_us, life.ended_us));
            }
            waits_since_us = life.ended_us;
        }
        let waits_still = view.state == "pending";
        if let Some(since_us) = waits_since_us.filter(|_| waits_still) {
            let mut span = Span::new("wait for a place", "actor", view.job, since_us, since_us);
            span.end_us = None;
            spans.push(span.by(view.actor, view.incarnation));
        }
        spans
    }
}
