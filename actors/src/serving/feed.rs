//! From the router to the monitor: what was asked and answered, dropped rather than waited for.
//!
//! Invariants:
//! 1. Offering never waits. What does not fit is dropped, counted, and reported with the next rows.
//! 2. At most `WAITING_MAX` requests wait, each of at most one batch of rows.
//! 3. Each request says which version answered it: while another one is tried, the active version's monitor is told of both.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::oip::{InferRequest, Parameter};
use crate::drift::vitals::slices::SLICE_NAME_BYTES_MAX;

/// Requests that wait for the monitor: with full batches of 128 rows of 64 values, 8 MiB.
const WAITING_MAX: usize = 256;

/// Rows that are sent to the monitor in one call: 256 KiB, far below the limit of a call.
const ROWS_PER_CALL_MAX: usize = 1024;

/// The parameter of a request that names the slice of the traffic to which it belongs.
pub const SLICE: &str = "slice";

/// Bytes of a request's id, so that labels can name it.
pub const ROW_ID_BYTES_MAX: usize = 128;

/// What a request says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ObservedRequest {
    /// Its id, if it has one that is not too long.
    pub id: Option<String>,
    /// Its slice, if it names one.
    pub slice: Option<String>,
    /// How many of the rows are its.
    pub rows: u32,
}

impl ObservedRequest {
    /// What a request says before it is answered.
    #[must_use]
    pub fn of(request: &InferRequest) -> Self {
        let slice = match request.parameters.get(SLICE) {
            Some(Parameter::String(name)) => Some(name.clone()),
            Some(Parameter::Int(number)) => Some(number.to_string()),
            Some(Parameter::Bool(is)) => Some(is.to_string()),
            Some(Parameter::Float(_)) | None => None,
        };
        ObservedRequest {
            id: request
                .id
                .clone()
                .filter(|id| (1..=ROW_ID_BYTES_MAX).contains(&id.len())),
            slice: slice.filter(|name| (1..=SLICE_NAME_BYTES_MAX).contains(&name.len())),
            rows: 0,
        }
    }
}

/// What was answered to a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// The predicted class.
    pub class: u32,
    /// Its probability.
    pub confidence: f32,
    /// The energy of the logits, where they were seen.
    pub energy: Option<f32>,
}

/// The rows of answered requests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Observation {
    /// The inputs, row by row.
    pub rows: Vec<f32>,
    /// The predicted class of each row.
    pub classes: Vec<u32>,
    /// The probability of that class.
    pub confidences: Vec<f32>,
    /// The requests, in the order of their rows.
    pub requests: Vec<ObservedRequest>,
    /// The energy of each row's logits, where they were seen.
    pub energies: Vec<Option<f32>>,
    /// The version that answered each request.
    pub versions: Vec<u64>,
}

impl Observation {
    /// Of one request: its inputs, and what this version answered to each row.
    #[must_use]
    pub fn of(
        version: u64,
        request: ObservedRequest,
        rows: Vec<f32>,
        predictions: &[Prediction],
    ) -> Self {
        let answers = || predictions.iter();
        Observation {
            rows,
            classes: answers().map(|answer| answer.class).collect(),
            confidences: answers().map(|answer| answer.confidence).collect(),
            requests: vec![ObservedRequest {
                rows: predictions.len() as u32,
                ..request
            }],
            energies: answers().map(|answer| answer.energy).collect(),
            versions: vec![version],
        }
    }

    /// The part that this version answered, and the requests that others did. A request without all of its rows is not what a router
    /// sends: it ends the part.
    #[must_use]
    pub fn part_of(&self, version: u64) -> (Cow<'_, Observation>, Vec<&ObservedRequest>) {
        if self.versions.iter().all(|answered| *answered == version) {
            return (Cow::Borrowed(self), Vec::new());
        }
        let row_values = self.rows.len() / self.classes.len().max(1);
        let mut part = Observation {
            rows: Vec::new(),
            classes: Vec::new(),
            confidences: Vec::new(),
            requests: Vec::new(),
            energies: Vec::new(),
            versions: Vec::new(),
        };
        let (mut others, mut at) = (Vec::new(), 0);
        for (request, answered) in self.requests.iter().zip(&self.versions) {
            let first = at;
            at += request.rows as usize;
            if *answered != version {
                others.push(request);
                continue;
            }
            let (Some(rows), Some(classes), Some(confidences), Some(energies)) = (
                self.rows.get(first * row_values..at * row_values),
                self.classes.get(first..at),
                self.confidences.get(first..at),
                self.energies.get(first..at),
            ) else {
                break;
            };
            part.rows.extend_from_slice(rows);
            part.classes.extend_from_slice(classes);
            part.confidences.extend_from_slice(confidences);
            part.energies.extend_from_slice(energies);
            part.requests.push(request.clone());
            part.versions.push(version);
        }
        (Cow::Owned(part), others)
    }
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
            joined.confidences.extend(more.confidences);
            joined.requests.extend(more.requests);
            joined.energies.extend(more.energies);
            joined.versions.extend(more.versions);
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
        let request = ObservedRequest {
            id: Some(format!("request-{class}")),
            ..ObservedRequest::default()
        };
        let probabilities = [0.25, 0.75];
        let prediction = Prediction {
            class,
            confidence: probabilities[class as usize],
            energy: (class == 1).then_some(-4.5),
        };
        Observation::of(7, request, vec![class as f32], &[prediction])
    }

    #[tokio::test]
    async fn what_waits_is_joined_and_says_whose_it_is() {
        let (feed, mut reader) = feed();
        feed.offer(observation(1));
        feed.offer(observation(0));
        let joined = reader.next().await.unwrap();
        assert_eq!(joined.rows, [1.0, 0.0]);
        assert_eq!(joined.classes, [1, 0]);
        assert_eq!(joined.confidences, [0.75, 0.25]);
        assert_eq!(joined.energies, [Some(-4.5), None]);
        let ids: Vec<_> = joined
            .requests
            .iter()
            .map(|request| (request.id.as_deref().unwrap(), request.rows))
            .collect();
        assert_eq!(ids, [("request-1", 1), ("request-0", 1)]);
        assert_eq!(joined.versions, [7, 7]);
    }

    #[test]
    fn what_a_version_answered_is_told_from_what_others_did() {
        let request = |id: &str, rows| ObservedRequest {
            id: Some(id.to_owned()),
            slice: None,
            rows,
        };
        let both = Observation {
            rows: (0..8).map(|value| value as f32).collect(),
            classes: vec![0, 1, 2, 3],
            confidences: vec![0.5, 0.6, 0.7, 0.8],
            requests: vec![request("a", 1), request("b", 2), request("c", 1)],
            energies: vec![Some(-1.0), None, Some(-3.0), Some(-4.0)],
            versions: vec![1, 2, 1],
        };
        let (part, others) = both.part_of(1);
        assert_eq!(part.rows, [0.0, 1.0, 6.0, 7.0]);
        assert_eq!(
            (&part.classes[..], &part.versions[..]),
            (&[0, 3][..], &[1, 1][..])
        );
        assert_eq!(part.confidences, [0.5, 0.8]);
        assert_eq!(part.energies, [Some(-1.0), Some(-4.0)]);
        assert_eq!(part.requests, [request("a", 1), request("c", 1)]);
        assert_eq!(others, [&request("b", 2)]);
        // A part is all of itself.
        let (all, others) = part.part_of(1);
        assert_eq!((all.as_ref(), others.len()), (part.as_ref(), 0));
        assert!(matches!(all, Cow::Borrowed(_)));
        // Rows that are missing are nobody's.
        let cut = Observation {
            energies: vec![None; 3],
            ..both
        };
        assert_eq!(cut.part_of(1).0.requests, [request("a", 1)]);
    }

    #[test]
    fn a_request_names_itself_and_its_slice_in_few_bytes() {
        let request = |id: &str, slice: Parameter| InferRequest {
            id: Some(id.to_owned()),
            parameters: [(SLICE.to_owned(), slice)].into(),
            ..InferRequest::default()
        };
        let observed = ObservedRequest::of(&request("a", Parameter::String("north".into())));
        assert_eq!(observed.id.as_deref(), Some("a"));
        assert_eq!(observed.slice.as_deref(), Some("north"));
        let long = "x".repeat(ROW_ID_BYTES_MAX + 1);
        let observed = ObservedRequest::of(&request(&long, Parameter::String(long.clone())));
        assert_eq!(observed, ObservedRequest::default());
        let observed = ObservedRequest::of(&request("", Parameter::Int(7)));
        assert_eq!((observed.id, observed.slice.as_deref()), (None, Some("7")));
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
