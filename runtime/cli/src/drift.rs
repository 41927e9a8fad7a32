//! `mobula drift`.

mod log;
mod policy;
mod retraining;
mod vitals;

use anyhow::bail;
use mobula_actors::drift::client;
use mobula_actors::drift::state::{
    DriftEvent, Drifted, EndpointVitals, MonitorStatus, SignalEvent,
};
use mobula_core::clock::Clock;
use serde::Serialize;

use crate::args::{DriftCommand, Format, Target};
use crate::clock::SystemClock;
use crate::connect::connect;
use crate::output::{age, or_dash, print_json, print_table};

/// What drifted, for a person; `--json` has all of it.
const FEATURES_SHOWN: usize = 5;

/// Events of an endpoint, for a person.
const EVENTS_SHOWN: usize = 5;

/// A monitor as `--json` prints it: its state, its events, how its version does, and its signals; the oldest first.
#[derive(Serialize)]
struct MonitorJson<'a> {
    #[serde(flatten)]
    status: &'a MonitorStatus,
    drift_events: &'a [DriftEvent],
    vitals: Option<&'a EndpointVitals>,
    signals: &'a [SignalEvent],
}

/// What is known of an endpoint.
struct Known {
    status: MonitorStatus,
    events: Vec<DriftEvent>,
    vitals: Option<EndpointVitals>,
    signals: Vec<SignalEvent>,
}

pub(crate) async fn run(target: &Target, command: DriftCommand) -> anyhow::Result<()> {
    match command {
        DriftCommand::Status { endpoint, format } => status(target, endpoint, format).await,
        DriftCommand::Label(arguments) => vitals::label(target, arguments).await,
        DriftCommand::Log(command) => log::run(target, command).await,
        DriftCommand::Policy(command) => policy::run(target, command).await,
        DriftCommand::Loop(of) => retraining::newest(target, of).await,
        DriftCommand::History(of) => retraining::history(target, of).await,
        DriftCommand::Retrain(of) => retraining::retrain(target, of).await,
        DriftCommand::Cancel { of, reason } => retraining::cancel(target, of, &reason).await,
    }
}

async fn status(target: &Target, endpoint: Option<String>, format: Format) -> anyhow::Result<()> {
    let cluster = connect(target).await?;
    let monitors = client::monitors(&cluster, endpoint.as_deref()).await?;
    if let (Some(endpoint), true) = (&endpoint, monitors.is_empty()) {
        bail!(
            "no monitor has reported on endpoint `{endpoint}` yet: it does once the endpoint has answered with classes of a \
             version that was trained here, and `mobula serve list` shows the endpoints that exist"
        );
    }
    let mut all = Vec::with_capacity(monitors.len());
    for status in monitors {
        let endpoint = &status.endpoint;
        all.push(Known {
            events: client::events(&cluster, endpoint).await?,
            vitals: client::vitals(&cluster, endpoint).await?,
            signals: client::signals(&cluster, endpoint).await?,
            status,
        });
    }
    if format.json {
        let json: Vec<MonitorJson<'_>> = all
            .iter()
            .map(|known| MonitorJson {
                status: &known.status,
                drift_events: &known.events,
                vitals: known.vitals.as_ref(),
                signals: &known.signals,
            })
            .collect();
        return print_json(&json);
    }
    let rows: Vec<Vec<String>> = all.iter().map(|known| row(&known.status)).collect();
    print_table(
        &[
            "ENDPOINT",
            "MODEL",
            "WINDOWS",
            "ROWS",
            "DROPPED",
            "EVENTS",
            "LAST WINDOW",
            "SUGGESTION",
        ],
        &rows,
    );
    for known in &all {
        if let Some(vitals) = &known.vitals {
            vitals::print(vitals, &known.signals);
        }
        for event in known.events.iter().rev().take(EVENTS_SHOWN) {
            print_event(&known.status, event);
        }
    }
    Ok(())
}

fn row(monitor: &MonitorStatus) -> Vec<String> {
    let suggestion = monitor.retrain_suggestion.as_ref().map(|suggestion| {
        format!(
            "retrain {}:{}: {}",
            suggestion.model, suggestion.version, suggestion.reason
        )
    });
    vec![
        monitor.endpoint.clone(),
        format!("{}:{}", monitor.last.model, monitor.last.version),
        monitor.windows.to_string(),
        monitor.samples.to_string(),
        monitor.dropped.to_string(),
        monitor.events.to_string(),
        age(monitor.last_ms, SystemClock.now_ms()),
        or_dash(suggestion),
    ]
}

fn print_event(monitor: &MonitorStatus, event: &DriftEvent) {
    let report = &event.report;
    println!(
        "\n{} event {} ({} ago): {} of {} features drifted in {} rows",
        monitor.endpoint,
        event.number,
        age(event.at_ms, SystemClock.now_ms()),
        report.features_drifted,
        report.features_compared,
        report.samples
    );
    let features = report.drifted.chunk_by(|a, b| a.feature == b.feature);
    for statistics in features.take(FEATURES_SHOWN) {
        println!("  {}", described(statistics));
    }
}

/// All statistics of a feature, or of the predictions, and how many rows they compare.
fn described(statistics: &[Drifted]) -> String {
    let values: Vec<String> = statistics.iter().map(value).collect();
    let rows = statistics.first().map_or_else(String::new, |first| {
        format!(
            ", {} rows against {}",
            first.current_count, first.reference_count
        )
    });
    let feature = statistics.first().map_or("", |first| &first.feature);
    format!("{feature} {}{rows}", values.join(", "))
}

fn value(drifted: &Drifted) -> String {
    let Drifted {
        statistic,
        value,
        threshold,
        ..
    } = drifted;
    match drifted.p_value {
        // What its threshold is for.
        Some(p) if statistic == "ks" || statistic == "chi_square" => {
            format!("{statistic} {value:.3} (p {p:.2e}, threshold {threshold})")
        }
        Some(p) => format!("{statistic} {value:.3} (threshold {threshold}; p {p:.2e})"),
        None if statistic.starts_with("share of ") => {
            format!("{statistic} {value:.3} (reference {threshold:.3})")
        }
        None => format!("{statistic} {value:.3} (threshold {threshold})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_drifted_is_said_with_its_numbers() {
        let psi = Drifted {
            feature: "pixel_1_2".into(),
            statistic: "psi".into(),
            value: 0.6812,
            p_value: None,
            threshold: 0.25,
            reference_count: 1438,
            current_count: 200,
        };
        let test = |statistic: &str, threshold| Drifted {
            statistic: statistic.into(),
            value: 0.3462,
            p_value: Some(1.25e-8),
            threshold,
            ..psi.clone()
        };
        assert_eq!(
            described(&[psi.clone(), test("wasserstein", 0.1)]),
            "pixel_1_2 psi 0.681 (threshold 0.25), wasserstein 0.346 (threshold 0.1; p 1.25e-8), 200 rows against 1438"
        );
        assert_eq!(
            described(&[psi.clone(), test("ks", 0.05)]),
            "pixel_1_2 psi 0.681 (threshold 0.25), ks 0.346 (p 1.25e-8, threshold 0.05), 200 rows against 1438"
        );
        let share = Drifted {
            statistic: "share of 2".into(),
            value: 0.45,
            threshold: 0.3,
            ..psi.clone()
        };
        assert_eq!(
            described(&[psi.clone(), test("chi_square", 0.05), share]),
            "pixel_1_2 psi 0.681 (threshold 0.25), chi_square 0.346 (p 1.25e-8, threshold 0.05), \
             share of 2 0.450 (reference 0.300), 200 rows against 1438"
        );
    }
}
