//! From the router to the monitor: what was asked and answered, dropped rather than waited for.
//!
//! Invariants:
//! 1. Offering never waits. What does not fit is dropped, counted, and reported with the next rows.
//! 2. At most `WAITING_MAX` requests wait, each of at most one batch of rows.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::mpsc;

/// Requests that wait for the monitor: with full batches of 128 rows of 64 values, 8 MiB.
const WAITING_MAX: usize = 256;

/// Rows that are sent to the monitor in one call: 256 KiB, far below the limit of a call.
const ROWS_PER_CALL_MAX: usize = 1024;

/// The rows of one answered request.
#[derive(Debug, Clone, PartialEq)]
pub struct Observation {
    /// The inputs, row by row.
    pub rows: Vec<f32>,
    /// The predicted class of each row.
    pub classes: Vec<u32>,
}

/// Where answered requests are offered.
#[derive(Debug, Clone)]
pub struct Feed {
    queue: mpsc::Sender<Observation>,
    dropped: Arc<AtomicU64>,
}

/// Where they come out.
#[derive(Debug)]
pub struct FeedReader {
    queue: mpsc::Receiver<Observation>,
    dropped: Arc<AtomicU64>,
}

/// A feed and its other end.
#[must_use]
pub fn feed() -> (Feed, FeedReader) {
    let (sender, receiver) = mpsc::channel(WAITING_MAX);
    let dropped = Arc::new(AtomicU64::new(0));
    let reader = FeedReader {
        queue: receiver,
        dropped: Arc::clone(&dropped),
    };
    (
        Feed {
            queue: sender,
            dropped,
        },
        reader,
    )
}

impl Feed {
    /// Takes an observation if there is room.
    pub fn offer(&self, observation: Observation) {
        let rows = observation.classes.len() as u64;
        if self.queue.try_send(observation).is_err() {
            self.dropped.fetch_add(rows, Ordering::Relaxed);
        }
    }
}

impl FeedReader {
    /// What has been offered since, joined; `None` when the feed is gone.
    pub async fn next(&mut self) -> Option<Observation> {
        let mut joined = self.queue.recv().await?;
        while joined.classes.len() < ROWS_PER_CALL_MAX {
            let Ok(more) = self.queue.try_recv() else {
                break;
            };
            joined.rows.extend(more.rows);
            joined.classes.extend(more.classes);
        }
        Some(joined)
    }

    /// Counts rows that did not reach the monitor.
    pub fn count_dropped(&self, rows: u64) {
        self.dropped.fetch_add(rows, Ordering::Relaxed);
    }

    /// Rows that were dropped since the last time this was asked.
    pub fn take_dropped(&self) -> u64 {
        self.dropped.swap(0, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observation(class: u32) -> Observation {
        Observation {
            rows: vec![class as f32],
            classes: vec![class],
        }
    }

    #[tokio::test]
    async fn what_does_not_fit_is_dropped_and_counted() {
        let (feed, mut reader) = feed();
        for _ in 0..WAITING_MAX + 7 {
            feed.offer(observation(1));
        }
        assert_eq!(reader.take_dropped(), 7);
        assert_eq!(reader.take_dropped(), 0);
        assert_eq!(reader.next().await.unwrap().classes.len(), WAITING_MAX);
        drop(feed);
        assert_eq!(reader.next().await, None);
    }
}
