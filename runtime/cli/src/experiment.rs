//! `mobula experiment`.

mod json;

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_actors::serving::client;
use mobula_actors::serving::experiment::command::{Command, Proposed};
use mobula_actors::serving::experiment::findings::{
    Decision, GuardrailFinding, Measured, Ratio, Values,
};
use mobula_actors::serving::experiment::outcomes::{Reported, report};
use mobula_actors::serving::experiment::plan::Ending;
use mobula_actors::serving::experiment::{Experiment, Measure};
use mobula_actors::serving::sentinels::state::{Asked, Of};
use mobula_core::clock::Clock;

use self::json::ExperimentJson;
use crate::args::{
    ExperimentCommand, ExperimentRecordArguments, ExperimentStartArguments, MetricArgument, Target,
};
use crate::clock::SystemClock;
use crate::connect::connect;
use crate::output::{age, or_dash, print_json, print_table};
use crate::rollout::model_and_version;
use crate::sentinels;

/// The variable that holds an endpoint's token.
const TOKEN_VARIABLE: &str = "MOBULA_ENDPOINT_TOKEN";

/// `running`, or why it ended.
pub(crate) fn state(experiment: &Experiment) -> &'static str {
    match experiment.ending {
        None => "running",
        Some(Ending::Decided) => "decided",
        Some(Ending::Exhausted) => "exhausted",
        Some(Ending::Guardrail) => "guardrail",
        Some(Ending::Unfit) => "unfit",
        Some(Ending::Stopped) => "stopped",
        Some(Ending::Sentinel) => "sentinel",
    }
}

/// What follows from an experiment: nothing while it runs, or where somebody ended it.
pub(crate) fn decision(experiment: &Experiment) -> Decision {
    let found = experiment.findings.as_ref();
    found.map_or(Decision::Undecided, |findings| findings.decision)
}

pub(crate) async fn run(target: &Target, command: ExperimentCommand) -> anyhow::Result<()> {
    let cluster = connect(target).await?;
    match command {
        ExperimentCommand::Start(arguments) => start(&cluster, arguments).await,
        ExperimentCommand::Status {
            endpoint,
            number,
            out,
            format,
        } => status(&cluster, &endpoint, number, out.as_deref(), format.json).await,
        ExperimentCommand::Stop { endpoint, format } => {
            let experiment = client::experiment(&cluster, Command::Stop { endpoint }).await?;
            print_one(&experiment, format.json)
        }
        ExperimentCommand::List { endpoint, format } => list(&cluster, endpoint, format.json).await,
        ExperimentCommand::Record(arguments) => record(&cluster, arguments).await,
    }
}

async fn start(cluster: &Cluster, arguments: ExperimentStartArguments) -> anyhow::Result<()> {
    let (model, version) = model_and_version(&arguments.model)?;
    let MetricArgument(primary) = arguments.primary.clone();
    let [control_share_bp, treatment_share_bp] = arguments.split[..] else {
        bail!("--split takes two shares in basis points, as in --split 5000,5000");
    };
    let proposed = Proposed {
        model: model.to_owned(),
        version,
        control_share_bp,
        treatment_share_bp,
        primary,
        effect_min: arguments.min_effect,
        guardrails: arguments.guardrails(),
        alpha_bp: arguments.alpha,
        samples_max: arguments.max_samples,
        seed: arguments.seed,
        endpoint: arguments.endpoint,
    };
    let experiment = client::experiment(cluster, Command::Start(proposed)).await?;
    print_one(&experiment, arguments.format.json)
}

fn print_one(experiment: &Experiment, json: bool) -> anyhow::Result<()> {
    if json {
        // Nobody has asked a treatment that has just been named, and nobody asks one that is stopped.
        return print_json(&ExperimentJson::of(experiment, None));
    }
    println!("{}", described(experiment));
    Ok(())
}

/// An experiment in a line.
fn described(experiment: &Experiment) -> String {
    let plan = &experiment.plan;
    let state = match experiment.ending {
        None => "running",
        Some(Ending::Decided) => "decided",
        Some(Ending::Exhausted) => "ended undecided, with as many samples as its plan allows",
        Some(Ending::Guardrail) => "ended by a guardrail",
        Some(Ending::Unfit) => "ended: the treatment does not fit the endpoint",
        Some(Ending::Stopped) => "stopped by a client",
        Some(Ending::Sentinel) => "ended: the treatment answered a known row wrongly",
    };
    format!(
        "{} experiment {}: version {} (control, {} %) against {} (treatment, {} %) by {}, {state}",
        plan.endpoint,
        experiment.number,
        plan.control.version,
        f64::from(plan.control_share_bp) / 100.0,
        plan.treatment.version,
        f64::from(plan.treatment_share_bp) / 100.0,
        plan.primary
    )
}

async fn status(
    cluster: &Cluster,
    endpoint: &str,
    number: Option<u64>,
    out: Option<&Path>,
    json: bool,
) -> anyhow::Result<()> {
    let experiments = client::experiments(cluster, endpoint).await?;
    let found = match number {
        None => experiments.last(),
        Some(number) => experiments
            .iter()
            .find(|experiment| experiment.number == number),
    };
    let Some(experiment) = found else {
        match number {
            None => bail!(
                "endpoint `{endpoint}` has had no experiment: begin one with `mobula experiment start {endpoint}`"
            ),
            Some(number) => bail!(
                "no experiment {number} of endpoint `{endpoint}` is kept: see `mobula experiment list {endpoint}`"
            ),
        }
    };
    let asked = asked(cluster, experiment).await?;
    let shown = ExperimentJson::of(experiment, asked.as_ref());
    if let Some(file) = out {
        let text = serde_json::to_string_pretty(&shown)?;
        std::fs::write(file, text + "\n")
            .with_context(|| format!("{} cannot be written", file.display()))?;
    }
    if json {
        return print_json(&shown);
    }
    print_status(experiment, asked.as_ref());
    Ok(())
}

/// How far the sentinels of a treatment are answered, if its experiment is under way.
async fn asked(cluster: &Cluster, experiment: &Experiment) -> anyhow::Result<Option<Asked>> {
    if !experiment.is_open() {
        return Ok(None);
    }
    let of = Of::Experiment {
        experiment: experiment.number,
    };
    let asked = client::sentinels(cluster, &experiment.plan.endpoint).await?;
    Ok(asked.filter(|asked| asked.of == of))
}

fn print_status(experiment: &Experiment, asked: Option<&Asked>) {
    println!("{}", described(experiment));
    let plan = &experiment.plan;
    println!(
        "plan {}: better by {} at least, alpha {}, at most {} samples, seed {:?}",
        &plan.digest()[..12],
        plan.effect_min,
        f64::from(plan.alpha_bp) / 10_000.0,
        plan.samples_max,
        plan.seed
    );
    if experiment.is_open() {
        println!(
            "{}",
            sentinels::said("treatment", asked, SystemClock.now_ms())
        );
    }
    let Some(findings) = &experiment.findings else {
        println!(
            "\nnothing is counted so far: requests are counted once replicas of the treatment answer"
        );
        return;
    };
    if experiment.counts > 1 {
        println!(
            "counted anew, as what was counted before is lost; of alpha, {:.4} is left for this count",
            experiment.alpha()
        );
    }
    println!();
    let header = [
        "METRIC",
        "CONTROL",
        "TREATMENT",
        "DIFFERENCE",
        "AT LEAST",
        "AT MOST",
    ];
    let rows: Vec<Vec<String>> = findings.measured.iter().map(measured_row).collect();
    print_table(&header, &rows);
    println!();
    let rows: Vec<Vec<String>> = findings.ratios.iter().map(ratio_row).collect();
    print_table(&["GROUPS OF", "CONTROL", "TREATMENT", "P VALUE"], &rows);
    if !findings.guardrails.is_empty() {
        println!();
        let rows: Vec<Vec<String>> = findings.guardrails.iter().map(guardrail_row).collect();
        print_table(&["GUARDRAIL", "STATISTIC", "VALUE", "LIMIT", ""], &rows);
    }
    println!(
        "\ndecision: {} ({})",
        said(decision(experiment)),
        findings.reason
    );
    if let (Some(Ending::Decided), Decision::Treatment) = (experiment.ending, findings.decision) {
        println!(
            "go over to it with `mobula rollout start {} {}:{}`",
            plan.endpoint, plan.model, plan.treatment.version
        );
    }
}

/// A decision in a word.
pub(crate) fn said(decision: Decision) -> &'static str {
    match decision {
        Decision::Undecided => "undecided",
        Decision::Control => "control",
        Decision::Treatment => "treatment",
    }
}

fn measured_row(row: &Measured) -> Vec<String> {
    let values = |values: &Values| match (&row.measure, values.count) {
        (_, 0) => "-".to_owned(),
        (Measure::Latency, count) => format!("{:.2} ms of {count}", values.mean / 1e3),
        (_, count) => format!("{:.5} of {count}", values.mean),
    };
    let number = |value: f64| match row.measure {
        Measure::Latency => format!("{:+.2} %", value * 100.0),
        Measure::ErrorRate | Measure::Outcome(_) => format!("{value:+.5}"),
    };
    let effect = row.effect.as_ref();
    vec![
        row.measure.to_string(),
        values(&row.control),
        values(&row.treatment),
        or_dash(effect.map(|effect| number(effect.estimate))),
        or_dash(effect.map(|effect| number(effect.lower))),
        or_dash(effect.map(|effect| number(effect.upper))),
    ]
}

/// What was found of a measure, in a line.
pub(crate) fn measured_in_words(row: &Measured) -> String {
    let cells = measured_row(row);
    let [measure, control, treatment, difference, lower, upper] = &cells[..] else {
        return cells.join(", ");
    };
    format!(
        "{measure}: control {control}, treatment {treatment}, difference {difference} ({lower} to {upper})"
    )
}

fn ratio_row(row: &Ratio) -> Vec<String> {
    let verdict = if row.is_mismatch { " (mismatch)" } else { "" };
    vec![
        row.of.clone(),
        row.control.to_string(),
        row.treatment.to_string(),
        format!("{:.3e}{verdict}", row.p_value),
    ]
}

fn guardrail_row(row: &GuardrailFinding) -> Vec<String> {
    vec![
        row.measure.to_string(),
        row.statistic.clone(),
        format!("{:.4}", row.value),
        format!("{:.4}", row.limit),
        if row.is_violated { "violated" } else { "" }.to_owned(),
    ]
}

async fn list(cluster: &Cluster, endpoint: Option<String>, json: bool) -> anyhow::Result<()> {
    let endpoints = match endpoint {
        Some(endpoint) => vec![endpoint],
        None => {
            let endpoints = client::list(cluster).await?;
            endpoints
                .into_iter()
                .map(|endpoint| endpoint.name)
                .collect()
        }
    };
    let mut experiments = Vec::new();
    for endpoint in endpoints {
        experiments.extend(client::experiments(cluster, &endpoint).await?);
    }
    if json {
        let mut shown = Vec::new();
        for experiment in &experiments {
            let asked = asked(cluster, experiment).await?;
            shown.push(ExperimentJson::of(experiment, asked.as_ref()));
        }
        return print_json(&shown);
    }
    let now_ms = SystemClock.now_ms();
    let rows: Vec<Vec<String>> = experiments
        .iter()
        .map(|experiment| {
            let plan = &experiment.plan;
            vec![
                plan.endpoint.clone(),
                experiment.number.to_string(),
                plan.control.version.to_string(),
                plan.treatment.version.to_string(),
                plan.primary.to_string(),
                state(experiment).to_owned(),
                said(decision(experiment)).to_owned(),
                age(experiment.started_ms, now_ms),
            ]
        })
        .collect();
    let header = [
        "ENDPOINT",
        "NUMBER",
        "CONTROL",
        "TREATMENT",
        "PRIMARY",
        "STATE",
        "DECISION",
        "AGE",
    ];
    print_table(&header, &rows);
    Ok(())
}

async fn record(cluster: &Cluster, arguments: ExperimentRecordArguments) -> anyhow::Result<()> {
    let token = match &arguments.endpoint_token_file {
        Some(file) => std::fs::read_to_string(file)
            .with_context(|| format!("the token file {} cannot be read", file.display()))?,
        None => std::env::var(TOKEN_VARIABLE).with_context(|| {
            format!(
                "the endpoint's token is not given: name a file with --endpoint-token-file, or set {TOKEN_VARIABLE}"
            )
        })?,
    };
    let endpoint = client::find(cluster, &arguments.endpoint).await?;
    let address: Option<SocketAddr> = endpoint
        .http_address
        .as_ref()
        .and_then(|address| address.parse().ok());
    let Some(address) = address else {
        bail!(
            "the router of endpoint `{}` does not answer yet: see `mobula serve list`",
            endpoint.name
        );
    };
    let reported = Reported {
        key: arguments.key,
        value: arguments.value,
        metric: arguments.metric,
    };
    let counted = report(&endpoint.name, address, token.trim(), &reported).await?;
    if arguments.format.json {
        return print_json(&counted);
    }
    println!(
        "counted for the {}, version {}",
        counted.variant, counted.version
    );
    Ok(())
}
