//! What the worker itself took time for: launches and transfers, recorded by the parts that do them,
//! for the timelines of jobs.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use mobula_core::id::JobId;
use mobula_core::span::{Span, SpanRing};
use parking_lot::Mutex;

/// The latest spans of this worker; clones record into the same ring.
#[derive(Debug, Clone, Default)]
pub(crate) struct Spans(Arc<Mutex<SpanRing>>);

impl Spans {
    pub(crate) fn push(&self, span: Span) {
        self.0.lock().push(span);
    }

    pub(crate) fn of_job(&self, job: JobId) -> Vec<Span> {
        self.0.lock().of_job(job, usize::MAX)
    }
}

pub(crate) fn now_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
        })
}
