//! Where this process records what took how long, for the timeline of its job.
//!
//! `begin` where something starts and let the guard drop where it ends. A span costs a clock read at
//! each end and a short lock, so it is for tasks, transfers and phases, not for each call.
//!
//! Invariant: recording never waits for anyone but another recorder, and never fails.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mobula_core::id::{ActorId, Incarnation, JobId};
use mobula_core::span::{Span, SpanRing};
use parking_lot::Mutex;

use crate::context::HostRuntime;

/// Spans in one answer to the agent: some 200 bytes each, well within a control frame.
const SPANS_PER_ANSWER_MAX: usize = 2048;

static RING: Mutex<Option<SpanRing>> = Mutex::new(None);

/// Something that is under way; dropping it ends it.
#[derive(Debug)]
#[must_use = "the span ends when this is dropped"]
pub struct SpanGuard {
    span: Option<Span>,
}

impl SpanGuard {
    /// Says which actor does it.
    pub fn by(mut self, actor: ActorId, incarnation: Incarnation) -> Self {
        self.span = self.span.take().map(|span| span.by(actor, incarnation));
        self
    }

    /// Says one more thing about it.
    pub fn with(mut self, key: &str, value: impl Into<String>) -> Self {
        self.span = self.span.take().map(|span| span.with(key, value));
        self
    }
}

impl Drop for SpanGuard {
    fn drop(&mut self) {
        if let Some(mut span) = self.span.take() {
            span.end_us = Some(now_us().max(span.start_us));
            record(span);
        }
    }
}

/// Begins something called `name`, of a kind such as `task`, `transfer` or `user`. In a process that
/// no agent started nothing is recorded.
pub fn begin(name: &str, category: &str) -> SpanGuard {
    let span = HostRuntime::current().map(|runtime| {
        let now_us = now_us();
        Span::new(name, category, runtime.info().job, now_us, now_us)
    });
    SpanGuard { span }
}

/// The same for something that began so long `ago` and ends where the guard is dropped: for waits,
/// which are worth recording only once they were long.
pub fn begin_ago(name: &str, category: &str, ago: Duration) -> SpanGuard {
    let mut guard = begin(name, category);
    if let Some(span) = &mut guard.span {
        let ago_us = u64::try_from(ago.as_micros()).unwrap_or(u64::MAX);
        span.start_us = span.start_us.saturating_sub(ago_us);
    }
    guard
}

/// Keeps a span that was measured otherwise.
pub fn record(span: Span) {
    RING.lock().get_or_insert_default().push(span);
}

/// The latest spans of `job` in this process.
pub(crate) fn of_job(job: JobId) -> Vec<Span> {
    let ring = RING.lock();
    ring.as_ref()
        .map(|ring| ring.of_job(job, SPANS_PER_ANSWER_MAX))
        .unwrap_or_default()
}

/// How many were forgotten for want of room.
pub(crate) fn dropped() -> u64 {
    RING.lock().as_ref().map_or(0, SpanRing::dropped)
}

fn now_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_recorded_is_found_by_its_job() {
        let job = JobId(77);
        record(Span::new("load", "user", job, 5, 9).with("rows", "12"));
        record(Span::new("other", "user", JobId(78), 5, 9));
        let found = of_job(job);
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].name.as_str(), found[0].detail["rows"].as_str()),
            ("load", "12")
        );
        // No agent started this process.
        assert!(begin("x", "user").span.is_none());
    }
}
