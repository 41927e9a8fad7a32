//! When actors were ordered, ran and ended: the backbone of a job's timeline.
//!
//! The tables keep those times for the latest starts of each actor, to the millisecond of the leader's
//! clock, so that every head knows them, after any change of leaders. What a leader sees itself it
//! remembers more exactly, in memory only.
//!
//! Invariants:
//! 1. At most [`LIVES_MAX`] incarnations are remembered; the oldest go first.
//! 2. A repeated order or event changes nothing: the first one was when it happened.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use mobula_core::exit::ExitReason;
use mobula_core::id::{ActorId, Incarnation};
use mobula_core::order::{Order, WorkerEvent};
use mobula_core::span::Span;
use mobula_scheduler::{ActorView, Start};
use parking_lot::Mutex;

/// Incarnations that are remembered: at some 100 bytes each, 2 MiB.
const LIVES_MAX: usize = 16_384;

/// What this leader saw of one incarnation of an actor.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Life {
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
    pub(crate) fn ordered(&self, order: &Order, now_us: u64) {
        let Order::Start(start) = order else { return };
        let mut lives = self.lives.lock();
        lives
            .entry((start.incarnation, start.actor))
            .or_insert(Life {
                ordered_us: now_us,
                ..Life::default()
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
    /// incarnation. The tables know when that was, to the millisecond; where this leader saw it
    /// itself, it says so more exactly.
    pub(crate) fn spans(&self, view: &ActorView) -> Vec<Span> {
        let mut spans = Vec::new();
        let mut waits_since_us = Some(view.created_ms * 1000);
        for (number, start) in view.starts.iter().enumerate() {
            let life = self.life(view, start);
            let begin_us = waits_since_us
                .take()
                // Of an actor with many starts the first ones are forgotten.
                .filter(|_| number > 0 || view.starts.len() > view.restarts as usize)
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
                span.by(view.actor, start.incarnation)
                    .with("node", start.node.to_string())
            };
            let title = view.name.as_deref().unwrap_or(&view.type_name);
            let restart = (view.restarts as usize + number + 1).saturating_sub(view.starts.len());
            let mut whole = span(title, begin_us, life.ended_us)
                .with("restart", restart.to_string())
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

    /// What is known of one start.
    fn life(&self, view: &ActorView, start: &Start) -> Known {
        let seen = self.lives.lock();
        let seen = seen.get(&(start.incarnation, view.actor)).copied();
        let stored_us = |ms: u64| ms * 1000;
        // The orders that stand are sent anew in each session: what came after the start was not the
        // first order.
        let started_us = start.started_ms.map(stored_us);
        let ordered_us = seen
            .map(|life| life.ordered_us)
            .filter(|ordered| started_us.is_none_or(|started| *ordered <= started + 1000))
            .unwrap_or_else(|| stored_us(start.assigned_ms));
        let last_code = view
            .exit_code
            .as_deref()
            .filter(|_| start.incarnation == view.incarnation && start.ended_ms.is_some());
        Known {
            ordered_us,
            started_us: seen.and_then(|life| life.started_us).or(started_us),
            ended_us: seen
                .and_then(|life| life.ended_us)
                .or(start.ended_ms.map(stored_us)),
            exit_code: seen
                .and_then(|life| life.exit_code)
                .or(last_code)
                .map(str::to_owned),
        }
    }
}

/// One start of an actor, from the tables and from what this leader saw.
struct Known {
    ordered_us: u64,
    started_us: Option<u64>,
    ended_us: Option<u64>,
    exit_code: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_core::id::{JobId, NodeId};
    use mobula_core::order::StartActor;
    use mobula_core::resource::Resources;
    use mobula_core::spec::{ActorKind, ActorSpec, Program};

    fn start(incarnation: u64, times_ms: [u64; 3]) -> Start {
        let known = |ms: u64| (ms > 0).then_some(ms);
        Start {
            node: NodeId(1),
            incarnation: Incarnation(incarnation),
            assigned_ms: times_ms[0],
            started_ms: known(times_ms[1]),
            ended_ms: known(times_ms[2]),
        }
    }

    fn view(starts: Vec<Start>) -> ActorView {
        ActorView {
            actor: ActorId(5),
            job: JobId(1),
            name: Some("a".into()),
            type_name: "t".into(),
            state: "running".into(),
            group: None,
            node: Some(NodeId(1)),
            incarnation: starts.last().unwrap().incarnation,
            restarts: starts.len() as u32 - 1,
            starts,
            resources: Resources::default(),
            host: None,
            pid: None,
            call_address: None,
            created_ms: 10,
            since_ms: 0,
            not_before_ms: None,
            exit_code: Some("panicked".into()),
            exit_reason: None,
            namespace: None,
            detached: false,
        }
    }

    fn short(spans: &[Span]) -> Vec<String> {
        let of = |span: &Span| {
            let end = span.end_us.map_or("…".to_owned(), |end| end.to_string());
            format!("{} {}-{end}", span.name, span.start_us)
        };
        spans.iter().map(of).collect()
    }

    #[test]
    fn a_head_that_saw_nothing_tells_what_the_tables_know() {
        let lives = Lives::default();
        let view = view(vec![start(3, [12, 15, 20]), start(7, [21, 22, 0])]);
        let spans = lives.spans(&view);
        let expected = [
            "a 10000-20000",
            "wait for a place 10000-12000",
            "start 12000-15000",
            "run 15000-20000",
            "a 20000-…",
            "wait for a place 20000-21000",
            "start 21000-22000",
            "run 22000-…",
        ];
        assert_eq!(short(&spans), expected);
        assert_eq!(spans[4].detail["restart"], "1");

        // A new leader repeats the order to the worker; that is not when it was first given.
        let order = Order::Start(Box::new(StartActor {
            actor: ActorId(5),
            incarnation: Incarnation(7),
            job: JobId(1),
            program: Program::Builtin,
            spec: ActorSpec::new(ActorKind::Driver),
            args: Vec::new(),
            env: BTreeMap::new(),
            files: Vec::new(),
            secrets: BTreeMap::new(),
        }));
        lives.ordered(&order, 90_000);
        assert_eq!(short(&lives.spans(&view)), expected);
        // What a leader saw in time it says more exactly.
        let lives = Lives::default();
        lives.ordered(&order, 21_300);
        assert_eq!(
            short(&lives.spans(&view))[5],
            "wait for a place 20000-21300"
        );
    }
}
