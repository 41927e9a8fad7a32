//! How well a version does in service: how sure it is, how often it is right where labels come, in which slices, and
//! whether its replicas still answer known rows as they should.
//!
//! 1. All but the actor around it is a function of what it is given, the time included.
//! 2. Memory is bounded: by [`join`] for predictions and labels, by [`slices`] for windows, and at most
//!    [`SIGNALS_MAX`] signals wait to be reported; further ones are counted.
//! 3. A signal is raised when something begins, not for as long as it goes on.
//! 4. All but the windows of slices goes on while windows rest, and without a reference of their rows.

pub mod calibration;
pub mod confidence;
pub mod join;
pub(super) mod keeper;
pub mod sentinels;
pub mod slices;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use self::calibration::{OutcomeCounts, Reliability};
use self::confidence::{OutOfDistribution, ScoreMonitors};
use self::join::{JoinCounts, JoinTable, Outcome, Predicted};
use self::sentinels::{SentinelStatus, Sentinels};
use self::slices::{SliceDrift, SliceStatus, Slices};
use super::log::LogStatus;
use super::signals::{Signal, Stream};
use super::streams::{Bank, ErrorWatch};
use super::window::WindowMonitor;
use crate::registry::version_file::VersionFile;
use crate::serving::feed::{Observation, ObservedRequest};

/// Signals that wait for the head: when it is out of reach for long, the first ones tell most.
pub const SIGNALS_MAX: usize = 32;

/// Labels in a window of accuracy and calibration.
pub const OUTCOME_WINDOW: u64 = 200;

/// Labels in one call to a monitor.
pub const LABELS_PER_CALL_MAX: usize = 1000;

/// What a row really was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Truth {
    /// The number of its class.
    Class(u32),
    /// The name of its class.
    Name(String),
}

/// The truth about a row of an earlier request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Label {
    /// The request's id, as its client gave it.
    pub id: String,
    /// Which of its rows, from 0.
    pub row: u32,
    /// What it was.
    pub truth: Truth,
}

/// What became of some labels.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct LabelReply {
    /// Found their prediction.
    pub joined: u64,
    /// Wait a while for a prediction.
    pub waiting: u64,
    /// Came after their prediction had been given up.
    pub late: u64,
    /// Name no class of this version.
    pub refused: u64,
    /// Why the first of those was refused.
    pub refusal: Option<String>,
    /// Name what another version answered while it was tried: they say nothing about this one.
    #[serde(default)]
    pub of_other_versions: u64,
}

impl LabelReply {
    /// Adds what became of some more.
    pub fn add(&mut self, more: LabelReply) {
        self.joined += more.joined;
        self.waiting += more.waiting;
        self.late += more.late;
        self.refused += more.refused;
        self.refusal = self.refusal.take().or(more.refusal);
        self.of_other_versions += more.of_other_versions;
    }
}

/// What labels say about a version. All numbers are since its monitor started.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TruthStatus {
    /// What became of labels and predictions.
    pub counts: JoinCounts,
    /// Predictions that wait for a label.
    pub predictions_waiting: u64,
    /// Labels that wait for a prediction.
    pub labels_waiting: u64,
    /// Labels that name no class of this version.
    pub labels_refused: u64,
    /// Rows of requests without an id, or with one too long, which no label can name.
    pub rows_without_id: u64,
    /// The accuracy that was measured when the version was trained, if it was.
    pub trained_accuracy: Option<f64>,
    /// Windows of labels.
    pub windows: u64,
    /// The last full window.
    pub window: Option<Reliability>,
    /// All labels together.
    pub total: Option<Reliability>,
}

/// How well a version does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Vitals {
    /// Rows that the version answered.
    pub rows: u64,
    /// How sure the version was of them, on average.
    pub confidence_mean: Option<f64>,
    /// Whether that is unlike the reference, row by row.
    pub out_of_distribution: OutOfDistribution,
    /// What labels say.
    pub truth: TruthStatus,
    /// Parts of the traffic.
    pub slices: Vec<SliceStatus>,
    /// Known rows.
    pub sentinels: SentinelStatus,
    /// The prediction log, if there is one.
    pub log: Option<LogStatus>,
    /// Why windows of rows are compared with nothing, neither all rows nor slices, if they are not.
    pub no_reference: Option<String>,
    /// Whether the energies of rows are unlike the reference's.
    pub out_of_distribution_by_energy: OutOfDistribution,
    /// Rows that came without their energy, and are in no window of it.
    pub rows_without_energy: u64,
}

/// Keeps a version's [`Vitals`].
#[derive(Debug)]
pub struct VitalsMonitor {
    row_values: usize,
    class_names: Vec<String>,
    trained_accuracy: Option<f64>,
    rows: u64,
    confidence_sum: f64,
    confidence: Bank,
    scores: ScoreMonitors,
    rows_without_energy: u64,
    table: JoinTable,
    errors: ErrorWatch,
    labels_refused: u64,
    rows_without_id: u64,
    total: OutcomeCounts,
    open: OutcomeCounts,
    windows: u64,
    window: Option<Reliability>,
    slices: Slices,
    no_reference: Option<String>,
    sentinels: SentinelStatus,
    wrong_replicas: BTreeSet<u32>,
    signals: Vec<Signal>,
    signals_lost: u64,
    has_news: bool,
}

impl VitalsMonitor {
    /// Starts for a version, with slices like `window`, or the reason why there is none.
    #[must_use]
    pub fn new(
        file: &VersionFile,
        sentinels: &Sentinels,
        window: &Result<WindowMonitor, String>,
    ) -> Self {
        VitalsMonitor {
            row_values: file.samples.feature_count(),
            class_names: file.labels.clone(),
            trained_accuracy: file.provenance.metrics.get("accuracy").copied(),
            rows: 0,
            confidence_sum: 0.0,
            confidence: Bank::of_values(),
            scores: ScoreMonitors::of(file),
            rows_without_energy: 0,
            table: JoinTable::default(),
            errors: ErrorWatch::new(),
            labels_refused: 0,
            rows_without_id: 0,
            total: OutcomeCounts::default(),
            open: OutcomeCounts::default(),
            windows: 0,
            window: None,
            slices: Slices::new(window.as_ref().ok()),
            no_reference: window.as_ref().err().cloned(),
            sentinels: SentinelStatus {
                sentinels: sentinels.count() as u64,
                ..SentinelStatus::default()
            },
            wrong_replicas: BTreeSet::new(),
            signals: Vec::new(),
            signals_lost: 0,
            has_news: false,
        }
    }

    /// Takes requests that the version answered, while windows of rows rest without those of slices; how many of these it compared.
    pub fn observe(&mut self, observation: &Observation, now_ms: u64, windows_rest: bool) -> u64 {
        self.has_news = true;
        let windows_before = self.slices.windows();
        let mut rows = observation
            .rows
            .chunks(self.row_values)
            .zip(&observation.classes)
            .zip(&observation.confidences)
            .zip(&observation.energies);
        for request in &observation.requests {
            let slice = request.slice.as_deref().map(|name| self.slices.place(name));
            for (number, (((row, class), confidence), energy)) in
                (0..request.rows).zip(rows.by_ref().take(request.rows as usize))
            {
                let predicted = Predicted {
                    class: *class,
                    confidence: *confidence,
                    slice,
                };
                self.observe_scores(*confidence, *energy);
                self.observe_slice(row, predicted, windows_rest);
                let Some(id) = &request.id else {
                    self.rows_without_id += 1;
                    continue;
                };
                let joined = self.table.predict(join::key(id, number), predicted, now_ms);
                if let Some(outcome) = joined {
                    self.judge(&outcome);
                }
            }
        }
        self.slices.windows() - windows_before
    }

    /// Takes a request that another version answered: labels may name its rows, and nothing else is known of them.
    pub fn observe_elsewhere(&mut self, request: &ObservedRequest, now_ms: u64) {
        self.has_news = true;
        let Some(id) = &request.id else { return };
        for number in 0..request.rows {
            self.table.predict_elsewhere(join::key(id, number), now_ms);
        }
    }

    fn observe_scores(&mut self, confidence: f32, energy: Option<f32>) {
        let confidence = f64::from(confidence);
        self.rows += 1;
        self.confidence_sum += confidence;
        for (detector, change) in self.confidence.update(confidence) {
            self.raise(Signal::Stream {
                stream: Stream::Confidence,
                detector,
                change,
            });
        }
        if let Some(found) = self.scores.probability.take(confidence) {
            self.raise(Signal::OutOfDistribution(found));
        }
        let Some(energy) = energy else {
            self.rows_without_energy += 1;
            return;
        };
        if let Some(found) = self.scores.energy.take(f64::from(energy)) {
            self.raise(Signal::OutOfDistributionByEnergy(found));
        }
    }

    fn observe_slice(&mut self, row: &[f32], predicted: Predicted, windows_rest: bool) {
        let Some(place) = predicted.slice else {
            return;
        };
        if windows_rest {
            self.slices.leave_out(place);
        } else if let Some(SliceDrift {
            name,
            features_compared,
            features_drifted,
            prediction_drift,
        }) = self.slices.observe(place, row, predicted.class)
        {
            self.raise(Signal::Slice {
                slice: name,
                features_compared,
                features_drifted,
                prediction_drift,
            });
        }
    }

    /// Takes labels.
    pub fn label(&mut self, labels: &[Label], now_ms: u64) -> LabelReply {
        self.has_news = true;
        let mut reply = LabelReply::default();
        for label in labels {
            let truth = match self.class_of(label) {
                Ok(truth) => truth,
                Err(why) => {
                    self.labels_refused += 1;
                    reply.refused += 1;
                    reply.refusal.get_or_insert(why);
                    continue;
                }
            };
            let late_before = self.table.counts().late;
            let others_before = self.table.of_other_versions();
            match self
                .table
                .label(join::key(&label.id, label.row), truth, now_ms)
            {
                Some(outcome) => {
                    reply.joined += 1;
                    self.judge(&outcome);
                }
                None if self.table.counts().late > late_before => reply.late += 1,
                None if self.table.of_other_versions() > others_before => {
                    reply.of_other_versions += 1;
                }
                None => reply.waiting += 1,
            }
        }
        reply
    }

    fn class_of(&self, label: &Label) -> Result<u32, String> {
        let count = self.class_names.len();
        let found = match &label.truth {
            Truth::Class(class) => ((*class as usize) < count).then_some(*class),
            Truth::Name(name) => self
                .class_names
                .iter()
                .position(|known| known == name)
                .map(|class| class as u32),
        };
        found.ok_or_else(|| {
            let given = match &label.truth {
                Truth::Class(class) => format!("class {class}"),
                Truth::Name(name) => format!("label {:?}", cut(name)),
            };
            format!(
                "{given} of request {:?} is none of this version's {count} classes",
                cut(&label.id)
            )
        })
    }

    fn judge(&mut self, outcome: &Outcome) {
        let is_wrong = outcome.predicted.class != outcome.truth;
        if let Some((detector, change)) = self.errors.update(is_wrong) {
            self.raise(Signal::Stream {
                stream: Stream::Errors,
                detector,
                change,
            });
        }
        self.total.add(outcome);
        self.open.add(outcome);
        if self.open.samples() == OUTCOME_WINDOW {
            self.windows += 1;
            self.window = std::mem::take(&mut self.open).reliability();
        }
        if let Some(place) = outcome.predicted.slice {
            self.slices.label(place, outcome);
        }
    }

    /// Takes what a replica said about the sentinels; nothing if it did not answer.
    pub fn sentinel_answered(
        &mut self,
        sentinels: &Sentinels,
        replica: u32,
        classes: Option<&[u32]>,
    ) {
        let Some(classes) = classes else {
            self.sentinels.unanswered += 1;
            return;
        };
        let Some(mismatch) = sentinels.mismatch(replica, classes) else {
            self.sentinels.right += 1;
            self.has_news |= self.wrong_replicas.remove(&replica);
            return;
        };
        self.has_news = true;
        self.sentinels.wrong += 1;
        self.sentinels.last_wrong = Some(mismatch);
        if self.wrong_replicas.insert(replica) {
            self.raise(Signal::Sentinel(mismatch));
        }
    }

    /// Counts a round of sentinels to the replicas 1 to `replicas`.
    pub fn sentinel_round_ended(&mut self, replicas: u32) {
        self.sentinels.rounds += 1;
        // Later rounds are told with other news: a log entry for each would be one for nothing.
        self.has_news |= self.sentinels.rounds == 1;
        self.wrong_replicas.retain(|replica| *replica <= replicas);
    }

    fn raise(&mut self, signal: Signal) {
        if self.signals.len() < SIGNALS_MAX {
            self.signals.push(signal);
        } else {
            self.signals_lost += 1;
        }
    }

    /// Whether signals wait to be reported.
    #[must_use]
    pub fn has_signals(&self) -> bool {
        !self.signals.is_empty()
    }

    /// Notes that something has happened beside this.
    pub fn note_news(&mut self) {
        self.has_news = true;
    }

    /// Where all stands, but for the log, with the signals since the last time, and how many were lost; nothing if nothing has
    /// happened since.
    pub fn take_news(&mut self, now_ms: u64) -> Option<(Vitals, Vec<Signal>, u64)> {
        self.table.expire(now_ms);
        if !std::mem::take(&mut self.has_news) {
            return None;
        }
        let lost = std::mem::take(&mut self.signals_lost);
        Some((self.vitals(), std::mem::take(&mut self.signals), lost))
    }

    /// How well the version does.
    #[must_use]
    pub fn vitals(&self) -> Vitals {
        Vitals {
            rows: self.rows,
            confidence_mean: (self.rows > 0).then(|| self.confidence_sum / self.rows as f64),
            out_of_distribution: self.scores.probability.status(),
            truth: TruthStatus {
                counts: self.table.counts(),
                predictions_waiting: self.table.predictions_waiting() as u64,
                labels_waiting: self.table.labels_waiting() as u64,
                labels_refused: self.labels_refused,
                rows_without_id: self.rows_without_id,
                trained_accuracy: self.trained_accuracy,
                windows: self.windows,
                window: self.window.clone(),
                total: self.total.reliability(),
            },
            slices: self.slices.status(),
            sentinels: SentinelStatus {
                replicas_wrong: self.wrong_replicas.len() as u64,
                ..self.sentinels
            },
            log: None,
            no_reference: self.no_reference.clone(),
            out_of_distribution_by_energy: self.scores.energy.status(),
            rows_without_energy: self.rows_without_energy,
        }
    }
}

/// Words of others, short enough to say again.
fn cut(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
#[path = "vitals_tests.rs"]
mod tests;
