//! `mobula drift label`, and what `mobula drift status` says about how a version does.

use anyhow::{Context, bail};
use mobula_actors::drift::labels;
use mobula_actors::drift::state::{EndpointVitals, SignalEvent};
use mobula_actors::drift::vitals::calibration::{Reliability, ReliabilityBin};
use mobula_actors::drift::vitals::confidence::OutOfDistribution;
use mobula_actors::drift::vitals::sentinels::SentinelStatus;
use mobula_actors::drift::vitals::slices::SliceStatus;
use mobula_actors::drift::vitals::{TruthStatus, Vitals};
use mobula_actors::serving;
use mobula_core::clock::Clock;

use crate::args::{DriftLabelArguments, Target};
use crate::clock::SystemClock;
use crate::connect::connect;
use crate::output::{age, or_dash, print_json, print_table};

/// Where an endpoint's token may stand, so that it is in no list of processes.
const TOKEN_VARIABLE: &str = "MOBULA_ENDPOINT_TOKEN";

/// Signals of an endpoint, for a person.
const SIGNALS_SHOWN: usize = 5;

pub(super) async fn label(target: &Target, arguments: DriftLabelArguments) -> anyhow::Result<()> {
    let DriftLabelArguments {
        endpoint,
        file,
        endpoint_token_file,
        format,
    } = arguments;
    let text = std::fs::read(&file)
        .with_context(|| format!("the labels in {} cannot be read", file.display()))?;
    let token = match &endpoint_token_file {
        Some(path) => std::fs::read_to_string(path)
            .with_context(|| format!("the token file {} cannot be read", path.display()))?,
        None => std::env::var(TOKEN_VARIABLE).with_context(|| {
            format!(
                "labels are reported with the endpoint's token, as `mobula serve deploy` printed it: give \
                 --endpoint-token-file FILE, or set {TOKEN_VARIABLE}"
            )
        })?,
    };
    let known = serving::client::find(&connect(target).await?, &endpoint).await?;
    let address = known.http_address.with_context(|| {
        format!("endpoint `{endpoint}` does not answer yet: see `mobula serve list`")
    })?;
    let reply = labels::send(&address, &endpoint, token.trim(), &text)
        .await
        .with_context(|| format!("the labels in {} were not taken", file.display()))?;
    if format.json {
        print_json(&reply)?;
    } else {
        println!(
            "{} joined, {} wait for their prediction, {} came too late, {} of other versions, {} refused",
            reply.joined, reply.waiting, reply.late, reply.of_other_versions, reply.refused
        );
    }
    if let Some(why) = reply.refusal {
        bail!("{} labels were refused; the first: {why}", reply.refused);
    }
    Ok(())
}

/// Says how the version of an endpoint does.
pub(super) fn print(known: &EndpointVitals, signals: &[SignalEvent]) {
    let now_ms = SystemClock.now_ms();
    println!(
        "\n{} serves {}:{} (as of {} ago)",
        known.endpoint,
        known.model,
        known.version,
        age(known.reported_ms, now_ms)
    );
    let vitals = &known.vitals;
    println!(
        "  confidence  mean {} over {} rows; {}",
        or_dash(vitals.confidence_mean.map(|mean| format!("{mean:.3}"))),
        vitals.rows,
        out_of_distribution(&vitals.out_of_distribution)
    );
    println!("  energy      {}", by_energy(vitals));
    if let Some(why) = &vitals.no_reference {
        println!("  windows     no reference: {why}");
    }
    println!("  labels      {}", truth(&vitals.truth));
    if let Some(total) = &vitals.truth.total {
        print_reliability(total);
    }
    println!("  sentinels   {}", sentinels(&vitals.sentinels));
    if !vitals.slices.is_empty() {
        println!();
        print_slices(&vitals.slices);
    }
    for event in signals.iter().rev().take(SIGNALS_SHOWN) {
        println!(
            "\n{} signal {} ({} ago): {}",
            known.endpoint,
            event.number,
            age(event.at_ms, now_ms),
            event.signal.sentence()
        );
    }
    if known.signals_lost > 0 {
        println!(
            "\n{} more signals came at once and were not kept",
            known.signals_lost
        );
    }
}

fn out_of_distribution(found: &OutOfDistribution) -> String {
    if let Some(why) = &found.no_reference {
        return format!("no reference: {why}");
    }
    let Some(last) = &found.last else {
        return "no window is full yet".to_owned();
    };
    let judgement = if last.is_out { "OUT of" } else { "within" };
    format!(
        "{judgement} the reference's distribution: mean {:.3} against {:.3}, {:.0} % in its tail (from {:.0} % on), \
         p {:.1e}",
        last.window_mean,
        last.reference_mean,
        last.tail_share * 100.0,
        last.tail_share_threshold * 100.0,
        last.p_value
    )
}

fn by_energy(vitals: &Vitals) -> String {
    let unseen = vitals.rows_without_energy;
    if unseen > 0 && unseen == vitals.rows {
        return "not seen: the replicas answer without saying the energy of their logits"
            .to_owned();
    }
    let found = out_of_distribution(&vitals.out_of_distribution_by_energy);
    if unseen == 0 {
        return found;
    }
    format!("{found}; not seen of {unseen} rows")
}

fn truth(truth: &TruthStatus) -> String {
    let counts = &truth.counts;
    let Some(total) = &truth.total else {
        return format!(
            "none joined, so accuracy and calibration are not known ({} predictions wait, {} rows had no id)",
            truth.predictions_waiting, truth.rows_without_id
        );
    };
    let of_window = truth.window.as_ref().map_or(String::new(), |window| {
        format!(
            "; the last {}: accuracy {:.3}, calibration error {:.3}",
            window.samples, window.accuracy, window.calibration_error
        )
    });
    let trained = truth.trained_accuracy.map_or(String::new(), |accuracy| {
        format!(" (trained: {accuracy:.3})")
    });
    format!(
        "{} joined, {} late, {} unmatched, {} refused: accuracy {:.3}{trained}, calibration error {:.3}{of_window}",
        counts.joined,
        counts.late,
        counts.unmatched,
        truth.labels_refused,
        total.accuracy,
        total.calibration_error
    )
}

/// Bins with anything in them.
fn print_reliability(known: &Reliability) {
    let width = known.bins.len() as f64;
    for (index, bin) in known.bins.iter().enumerate() {
        let ReliabilityBin {
            count,
            confidence,
            accuracy,
        } = bin;
        if *count > 0 {
            println!(
                "    {:.2} to {:.2}: {count} answers, {confidence:.3} sure, {accuracy:.3} right",
                index as f64 / width,
                (index + 1) as f64 / width
            );
        }
    }
}

fn sentinels(found: &SentinelStatus) -> String {
    if found.sentinels == 0 {
        return "none: the version's file has no reference rows".to_owned();
    }
    format!(
        "{} rows, {} rounds: {} right, {} wrong, {} unanswered",
        found.sentinels, found.rounds, found.right, found.wrong, found.unanswered
    )
}

fn print_slices(slices: &[SliceStatus]) {
    let rows: Vec<Vec<String>> = slices
        .iter()
        .map(|slice| {
            vec![
                slice.name.clone(),
                slice.rows.to_string(),
                slice.dropped.to_string(),
                slice.windows.to_string(),
                format!("{} of {}", slice.features_drifted, slice.features_compared),
                if slice.drifts { "yes" } else { "no" }.to_owned(),
                slice.labelled.to_string(),
                or_dash(slice.accuracy.map(|accuracy| format!("{accuracy:.3}"))),
                or_dash(slice.calibration_error.map(|error| format!("{error:.3}"))),
            ]
        })
        .collect();
    print_table(
        &[
            "SLICE",
            "ROWS",
            "DROPPED",
            "WINDOWS",
            "FEATURES DRIFTED",
            "DRIFTS",
            "LABELS",
            "ACCURACY",
            "CALIBRATION ERROR",
        ],
        &rows,
    );
}
