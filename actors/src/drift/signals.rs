//! What monitors say beside the comparison of windows: how well a version does, and signals. Rows, and what a report
//! makes of them.
//!
//! Invariants:
//! 1. Signals are numbered and bounded for each endpoint; the oldest goes first.
//! 2. A report counts once however often it is sent, and one of an older start of a monitor not at all.
//! 3. That a version is wrong more often than before is a drift event as drifting windows are, and suggests to train
//!    again. The other signals need a person.
//! 4. Errors may grow on, and be found to have grown again: that is one event, which is open until they are found to have become
//!    fewer, or another version is watched. While it is open, labels say when it was last seen to go on (`growth`).

use mobula_core::control::{ApplyContext, ModuleId, Reader, Table, Txn};
use mobula_core::error::Rejection;
use mobula_core::row;
use serde::{Deserialize, Serialize};

use super::findings::{self, About};
use super::growth::{GrownErrors, Judged};
use super::streams::{Change, Detector};
use super::vitals::confidence::ScoreComparison;
use super::vitals::sentinels::Mismatch;
use super::vitals::slices::{SLICE_NAME_BYTES_MAX, SLICES_MAX};
use super::vitals::{SIGNALS_MAX, Vitals};

/// Endpoint → [`EndpointVitals`].
pub(super) const VITALS: Table = Table {
    module: ModuleId::DRIFT,
    tag: 6,
};
/// Endpoint, 0, signal number → [`SignalEvent`].
pub(super) const SIGNALS: Table = Table {
    module: ModuleId::DRIFT,
    tag: 7,
};

/// Signals kept for each endpoint.
const SIGNALS_KEPT: u64 = 100;

/// The longest text in a report.
const TEXT_BYTES_MAX: usize = 1024;

/// A stream that detectors watch. Append-only: positions are tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stream {
    /// The probability of the predicted class, row by row.
    Confidence,
    /// One for each label that was not what had been predicted, zero for each that was.
    Errors,
}

/// Something that began. Append-only: positions are tags.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Signal {
    /// A detector found a change in a stream.
    Stream {
        /// Which stream.
        stream: Stream,
        /// Which detector.
        detector: Detector,
        /// What it found.
        change: Change,
    },
    /// The version is less sure of a window's rows than of its reference.
    OutOfDistribution(ScoreComparison),
    /// A slice drifts.
    Slice {
        /// Its name.
        slice: String,
        /// Features that were compared.
        features_compared: u64,
        /// How many of them drifted.
        features_drifted: u64,
        /// Whether the predictions drifted.
        prediction_drift: bool,
    },
    /// A replica answers a known row wrongly.
    Sentinel(Mismatch),
    /// The version's logits for a window's rows have higher energies than for its reference.
    OutOfDistributionByEnergy(ScoreComparison),
}

impl Signal {
    /// By how much the version is wrong more often than it was, if it says that.
    fn growth(&self) -> Option<&Change> {
        match self {
            Signal::Stream {
                stream: Stream::Errors,
                change,
                ..
            } if change.after > change.before => Some(change),
            _ => None,
        }
    }

    /// Whether it says that the version is wrong more often than it was.
    #[must_use]
    pub fn is_concept_drift(&self) -> bool {
        self.growth().is_some()
    }

    /// Whether it says that the version is wrong less often than it was.
    #[must_use]
    pub fn ends_concept_drift(&self) -> bool {
        matches!(
            self,
            Signal::Stream {
                stream: Stream::Errors,
                change,
                ..
            } if change.after < change.before
        )
    }

    /// In a sentence.
    #[must_use]
    pub fn sentence(&self) -> String {
        match self {
            Signal::Stream {
                stream,
                detector,
                change,
            } => {
                let what = match stream {
                    Stream::Confidence => "the mean confidence went",
                    Stream::Errors => "the share of wrong answers went",
                };
                format!(
                    "{what} from {:.3} to {:.3} ({} {:.3} over {:.3}, after {} rows)",
                    change.before,
                    change.after,
                    detector.as_str(),
                    change.statistic,
                    change.threshold,
                    change.observations
                )
            }
            Signal::OutOfDistribution(found) => format!(
                "{:.0} % of {} rows are less sure than 95 % of the reference is (mean confidence {:.3} \
                 against {:.3}, p {:.1e})",
                found.tail_share * 100.0,
                found.window_rows,
                found.window_mean,
                found.reference_mean,
                found.p_value
            ),
            Signal::Slice {
                slice,
                features_compared,
                features_drifted,
                prediction_drift,
            } => {
                let predictions = if *prediction_drift {
                    ", and its predictions did"
                } else {
                    ""
                };
                format!(
                    "in slice {slice:?} {features_drifted} of {features_compared} features \
                     drifted{predictions}"
                )
            }
            Signal::Sentinel(wrong) => wrong.to_string(),
            Signal::OutOfDistributionByEnergy(found) => format!(
                "{:.0} % of {} rows have a higher energy than 95 % of the reference has (mean energy {:.3} against \
                 {:.3}, p {:.1e})",
                found.tail_share * 100.0,
                found.window_rows,
                found.window_mean,
                found.reference_mean,
                found.p_value
            ),
        }
    }

    fn is_bounded(&self) -> bool {
        match self {
            Signal::Slice { slice, .. } => slice.len() <= SLICE_NAME_BYTES_MAX,
            _ => true,
        }
    }
}

/// What a monitor says about its version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VitalsReport {
    /// The endpoint.
    pub endpoint: String,
    /// The model that it serves.
    pub model: String,
    /// Which version of it.
    pub version: u64,
    /// Tells this monitor's reports from those of its earlier starts.
    pub incarnation: u64,
    /// Counted from 1 within an incarnation.
    pub sequence: u64,
    /// How well the version does.
    pub vitals: Vitals,
    /// What began since the report before this one.
    pub signals: Vec<Signal>,
    /// Signals that had no room in this list.
    pub signals_lost: u64,
}

/// How well the version of an endpoint does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EndpointVitals {
    /// The endpoint.
    pub endpoint: String,
    /// The model that it serves.
    pub model: String,
    /// Which version of it.
    pub version: u64,
    /// The monitor's start that said so.
    pub incarnation: u64,
    /// And its report.
    pub sequence: u64,
    /// When, in milliseconds since the Unix epoch.
    pub reported_ms: u64,
    /// Signals so far.
    pub signals: u64,
    /// Signals beside those, that were not kept because too many came at once.
    pub signals_lost: u64,
    /// What it said.
    pub vitals: Vitals,
    /// The drift event of this version's wrong answers, from its beginning until they became fewer.
    pub errors_event: Option<u64>,
    /// What is known of these answers while that event goes on.
    pub grown_errors: Option<GrownErrors>,
}

/// A signal that is kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SignalEvent {
    /// Counted from 1 for each endpoint.
    pub number: u64,
    /// When, in milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// The model.
    pub model: String,
    /// The version that was watched.
    pub version: u64,
    /// What began.
    pub signal: Signal,
    /// The number among the endpoint's drift events of the one that it begins, or that goes on with it.
    pub drift_event: Option<u64>,
}

/// How well the version of an endpoint does, if its monitor has said so.
pub(super) fn vitals(reader: &dyn Reader, endpoint: &str) -> Option<EndpointVitals> {
    row::get(reader, VITALS, endpoint.as_bytes())
}

/// When labels last said that a version's wrong answers, which are a drift event, are as many, in milliseconds since the Unix epoch;
/// nothing if they are none.
pub(super) fn errors_go_on_ms(reader: &dyn Reader, about: About<'_>) -> Option<u64> {
    vitals(reader, about.endpoint)
        .filter(|known| about.is_about(&known.model, known.version))
        .and_then(|known| known.grown_errors)
        .map(|grown| grown.confirmed_ms)
}

/// What vitals say of all endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Troubled {
    /// Endpoints whose version is unsure of its last window of rows.
    pub(super) unsure: u64,
    /// Endpoints whose last window of rows has high energies.
    pub(super) high_energy: u64,
    /// Replicas that answer sentinels wrongly.
    pub(super) replicas_wrong: u64,
    /// Endpoints whose version is wrong more often than it was.
    pub(super) wrong_more_often: u64,
    /// Slices whose last window drifts, of all endpoints.
    pub(super) slices_drifting: u64,
}

/// Counts them.
pub(super) fn troubled(reader: &dyn Reader) -> Troubled {
    let mut troubled = Troubled::default();
    for (_, known) in row::all::<EndpointVitals>(reader, VITALS, &[]) {
        let vitals = &known.vitals;
        troubled.unsure += u64::from(vitals.out_of_distribution.is_out());
        troubled.high_energy += u64::from(vitals.out_of_distribution_by_energy.is_out());
        let wrong = vitals.sentinels.replicas_wrong;
        troubled.replicas_wrong = troubled.replicas_wrong.saturating_add(wrong);
        troubled.wrong_more_often += u64::from(known.errors_event.is_some());
        let drifting = vitals.slices.iter().filter(|slice| slice.drifts);
        troubled.slices_drifting += drifting.count() as u64;
    }
    troubled
}

/// The signals of an endpoint that are kept, oldest first.
pub(super) fn signals(reader: &dyn Reader, endpoint: &str) -> Vec<SignalEvent> {
    let prefix = [endpoint.as_bytes(), &[0]].concat();
    row::all(reader, SIGNALS, &prefix)
        .into_iter()
        .map(|(_, event)| event)
        .collect()
}

fn check(report: &VitalsReport) -> Result<(), Rejection> {
    let (signals, slices) = (report.signals.len(), report.vitals.slices.len());
    if signals > SIGNALS_MAX || slices > SLICES_MAX + 1 {
        return Err(Rejection::invalid(format!(
            "a report of {signals} signals and {slices} slices: send at most {SIGNALS_MAX} and {}",
            SLICES_MAX + 1
        )));
    }
    let truth = &report.vitals.truth;
    let bins = [&truth.window, &truth.total]
        .into_iter()
        .flatten()
        .map(|known| known.bins.len())
        .max()
        .unwrap_or(0);
    let scores_are_bounded = [
        &report.vitals.out_of_distribution,
        &report.vitals.out_of_distribution_by_energy,
    ]
    .into_iter()
    .all(|known| {
        let reason = known.no_reference.as_ref().map_or(0, String::len);
        known.score.len() + reason <= TEXT_BYTES_MAX
    });
    let log = report.vitals.log.as_ref();
    let failure = log.and_then(|log| log.last_error.as_ref());
    let no_reference = report.vitals.no_reference.as_ref();
    let is_bounded = failure.is_none_or(|text| text.len() <= TEXT_BYTES_MAX)
        && no_reference.is_none_or(|text| text.len() <= TEXT_BYTES_MAX)
        && bins <= super::vitals::calibration::BINS
        && scores_are_bounded
        && report.endpoint.len() + report.model.len() <= TEXT_BYTES_MAX
        && report.signals.iter().all(Signal::is_bounded)
        && report
            .vitals
            .slices
            .iter()
            .all(|slice| slice.name.len() <= SLICE_NAME_BYTES_MAX);
    if is_bounded {
        return Ok(());
    }
    Err(Rejection::invalid(format!(
        "a report with names longer than {SLICE_NAME_BYTES_MAX} bytes, texts longer than {TEXT_BYTES_MAX}, or too \
         many bins"
    )))
}

pub(super) fn report(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    report: VitalsReport,
) -> Result<(), Rejection> {
    check(&report)?;
    let before = vitals(txn, &report.endpoint);
    if let Some(before) = &before {
        let known = (before.incarnation, before.sequence);
        if (report.incarnation, report.sequence) == known {
            return Ok(());
        }
        if (report.incarnation, report.sequence) < known {
            return Err(Rejection::fenced(format!(
                "report {} of monitor {} is older than what is known of endpoint `{}`",
                report.sequence, report.incarnation, report.endpoint
            )));
        }
    }
    let about = About {
        endpoint: &report.endpoint,
        model: &report.model,
        version: report.version,
    };
    let of_version = before
        .as_ref()
        .filter(|before| about.is_about(&before.model, before.version));
    let mut errors_event = of_version.and_then(|before| before.errors_event);
    let mut grown_errors = of_version.and_then(|before| before.grown_errors);
    let judged = Judged::new(report.incarnation, &report.vitals.truth, context.now_ms);
    let (mut number, lost) = before.map_or((0, 0), |before| (before.signals, before.signals_lost));
    for signal in report.signals {
        number += 1;
        if signal.ends_concept_drift() {
            (errors_event, grown_errors) = (None, None);
        }
        let drift_event = signal.growth().map(|change| {
            grown_errors = Some(GrownErrors::found(grown_errors, judged, change));
            errors_event
                .unwrap_or_else(|| findings::begin_event(context, txn, about, signal.sentence()))
        });
        errors_event = drift_event.or(errors_event);
        let event = SignalEvent {
            number,
            at_ms: context.now_ms,
            model: report.model.clone(),
            version: report.version,
            signal,
            drift_event,
        };
        row::put(
            txn,
            SIGNALS,
            &findings::event_key(about.endpoint, number),
            &event,
        );
        if number > SIGNALS_KEPT {
            let oldest = findings::event_key(about.endpoint, number - SIGNALS_KEPT);
            txn.delete(SIGNALS, &oldest);
        }
    }
    // The row that bounds how many there are of this one.
    let status = findings::ensure(context, txn, about);
    if errors_event.is_none() {
        findings::errors_are_over(txn, status, about);
    }
    let row = EndpointVitals {
        endpoint: report.endpoint.clone(),
        model: report.model.clone(),
        version: report.version,
        incarnation: report.incarnation,
        sequence: report.sequence,
        reported_ms: context.now_ms,
        signals: number,
        signals_lost: report.signals_lost.saturating_add(lost),
        vitals: report.vitals,
        errors_event,
        grown_errors: grown_errors.map(|grown| grown.looked_at(judged)),
    };
    row::put(txn, VITALS, row.endpoint.as_bytes(), &row);
    Ok(())
}

/// Forgets an endpoint.
pub(super) fn forget(txn: &mut dyn Txn, endpoint: &str) {
    let Some(known) = vitals(txn, endpoint) else {
        return;
    };
    txn.delete(VITALS, endpoint.as_bytes());
    for number in known.signals.saturating_sub(SIGNALS_KEPT) + 1..=known.signals {
        txn.delete(SIGNALS, &findings::event_key(endpoint, number));
    }
}

#[cfg(test)]
#[path = "signals_tests.rs"]
pub(super) mod tests;
