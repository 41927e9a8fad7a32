//! `mobula rollout`.

mod evidence;

use anyhow::Context;
use mobula::Cluster;
use mobula_actors::serving::client;
use mobula_actors::serving::rollout::command::{Command, Proposed};
use mobula_actors::serving::rollout::plan::{Action, Decision, Phase, Progress};
use mobula_actors::serving::rollout::trial::SideEvidence;
use mobula_actors::serving::rollout::{Rollout, Strategy};
use mobula_actors::serving::sentinels::state::{Asked, Of};
use mobula_actors::serving::shadow;
use mobula_core::clock::Clock;
use serde::Serialize;

use crate::args::{RolloutCommand, RolloutStartArguments, RolloutTarget, Target};
use crate::clock::SystemClock;
use crate::connect::connect;
use crate::output::{age, print_json, print_table};
use crate::sentinels::{self, SentinelsJson};

/// A rollout as `--json` prints it.
#[derive(Serialize)]
struct RolloutJson<'a> {
    #[serde(flatten)]
    rollout: &'a Rollout,
    weight_percent: u32,
    /// How the candidate is shadowed at the first step, if it is.
    shadow: Option<shadow::Plan>,
}

/// An endpoint's rollouts as `--json` prints them.
#[derive(Serialize)]
struct StatusJson<'a> {
    endpoint: &'a str,
    model: &'a str,
    /// The active version.
    version: u64,
    /// Oldest first.
    rollouts: Vec<RolloutJson<'a>>,
    /// What was counted of the step under way.
    current: Option<Progress>,
    /// How far the candidate's sentinels are answered at it, if the router has said so.
    sentinels: Option<SentinelsJson>,
}

impl<'a> RolloutJson<'a> {
    fn of(rollout: &'a Rollout, shadows: &[(u64, shadow::Plan)]) -> Self {
        RolloutJson {
            rollout,
            weight_percent: rollout.weight_percent(),
            shadow: shadow_of(rollout, shadows).cloned(),
        }
    }
}

fn shadow_of<'s>(
    rollout: &Rollout,
    shadows: &'s [(u64, shadow::Plan)],
) -> Option<&'s shadow::Plan> {
    let mut shadows = shadows.iter();
    shadows
        .find(|(number, _)| *number == rollout.number)
        .map(|(_, plan)| plan)
}

pub(crate) async fn run(target: &Target, command: RolloutCommand) -> anyhow::Result<()> {
    let cluster = connect(target).await?;
    match command {
        RolloutCommand::Start(arguments) => start(&cluster, arguments).await,
        RolloutCommand::Status(of) => status(&cluster, of).await,
        RolloutCommand::Evidence(arguments) => evidence::write(&cluster, arguments).await,
        RolloutCommand::Pause(of) => {
            change(&cluster, of, |endpoint| Command::Pause { endpoint }).await
        }
        RolloutCommand::Resume(of) => {
            change(&cluster, of, |endpoint| Command::Resume { endpoint }).await
        }
        RolloutCommand::Promote(of) => {
            change(&cluster, of, |endpoint| Command::Promote { endpoint }).await
        }
        RolloutCommand::Abort(of) => {
            change(&cluster, of, |endpoint| Command::Abort { endpoint }).await
        }
        RolloutCommand::Rollback(of) => {
            change(&cluster, of, |endpoint| Command::RollBack { endpoint }).await
        }
    }
}

async fn start(cluster: &Cluster, arguments: RolloutStartArguments) -> anyhow::Result<()> {
    let (model, version) = model_and_version(&arguments.model)?;
    let plan = arguments.plan;
    let proposed = Proposed {
        endpoint: arguments.endpoint,
        model: model.to_owned(),
        version,
        guardrails: plan.guardrails(),
        strategy: plan.strategy.into(),
        steps: plan.steps,
        min_samples: plan.min_samples,
        shadow: arguments.shadow.plan(),
        replica_wait_max_ms: arguments.replica_wait,
    };
    let rollout = client::roll_out(cluster, Command::Begin(proposed)).await?;
    print_rollout(cluster, &rollout, arguments.format.json).await
}

async fn change(
    cluster: &Cluster,
    of: RolloutTarget,
    command: fn(String) -> Command,
) -> anyhow::Result<()> {
    let rollout = client::roll_out(cluster, command(of.endpoint)).await?;
    print_rollout(cluster, &rollout, of.format.json).await
}

async fn print_rollout(cluster: &Cluster, rollout: &Rollout, json: bool) -> anyhow::Result<()> {
    let shadows = client::shadows(cluster, &rollout.endpoint).await?;
    if json {
        return print_json(&RolloutJson::of(rollout, &shadows));
    }
    println!("{}", described(rollout, &shadows));
    Ok(())
}

/// `digits`, `digits:3` or `digits@3`.
pub(crate) fn model_and_version(text: &str) -> anyhow::Result<(&str, Option<u64>)> {
    let Some((model, version)) = text.split_once([':', '@']) else {
        return Ok((text, None));
    };
    let number = version
        .parse()
        .with_context(|| format!("`{version}` is not a version: write `{model}` or `{model}:1`"))?;
    Ok((model, Some(number)))
}

async fn status(cluster: &Cluster, of: RolloutTarget) -> anyhow::Result<()> {
    let endpoint = client::find(cluster, &of.endpoint).await?;
    let rollouts = client::rollouts(cluster, &of.endpoint).await?;
    let shadows = client::shadows(cluster, &of.endpoint).await?;
    let progress = client::progress(cluster, &of.endpoint).await?;
    let open = rollouts.last().filter(|last| last.phase.is_open());
    let asked = match open {
        Some(open) => asked(cluster, open).await?,
        None => None,
    };
    if of.format.json {
        return print_json(&StatusJson {
            current: progress,
            sentinels: asked.as_ref().map(SentinelsJson::of),
            endpoint: &endpoint.name,
            model: &endpoint.model,
            version: endpoint.version,
            rollouts: rollouts
                .iter()
                .map(|rollout| RolloutJson::of(rollout, &shadows))
                .collect(),
        });
    }
    println!(
        "{} serves {}:{}",
        endpoint.name, endpoint.model, endpoint.version
    );
    for rollout in &rollouts {
        println!("\n{}", described(rollout, &shadows));
    }
    let Some(last) = rollouts.last() else {
        println!("\nno rollout so far: begin one with `mobula rollout start`");
        return Ok(());
    };
    let now_ms = SystemClock.now_ms();
    if open.is_some() {
        println!("{}", sentinels::said("candidate", asked.as_ref(), now_ms));
    }
    println!();
    let mut rows: Vec<Vec<String>> = last
        .decisions
        .iter()
        .map(|decision| row(last, decision, now_ms))
        .collect();
    rows.extend(progress.map(|progress| current_row(last, &progress, now_ms)));
    let header = [
        "STEP",
        "WEIGHT",
        "DECISION",
        "AGE",
        "CANDIDATE",
        "BASELINE",
        "WHY",
    ];
    print_table(&header, &rows);
    Ok(())
}

/// How far the candidate's sentinels are answered at the step that a rollout is at.
async fn asked(cluster: &Cluster, rollout: &Rollout) -> anyhow::Result<Option<Asked>> {
    let of = Of::Step {
        rollout: rollout.number,
        step: rollout.step,
    };
    let asked = client::sentinels(cluster, &rollout.endpoint).await?;
    Ok(asked.filter(|asked| asked.of == of))
}

/// A rollout in a line.
fn described(rollout: &Rollout, shadows: &[(u64, shadow::Plan)]) -> String {
    let strategy = match rollout.strategy {
        Strategy::Canary => "canary",
        Strategy::BlueGreen => "blue-green",
        Strategy::Rolling => "rolling",
    };
    let shadow = shadow_of(rollout, shadows).filter(|_| rollout.step == 0);
    let at = || {
        let share = match shadow {
            Some(plan) => format!("copies of {} % of the requests", plan.percent),
            None => format!("{} % of the requests", rollout.weight_percent()),
        };
        let (step, steps) = (rollout.step + 1, rollout.steps.len());
        format!("at step {step} of {steps}, {share}")
    };
    let phase = match rollout.phase {
        Phase::Running => format!("running {}", at()),
        Phase::Paused => format!("paused {}", at()),
        Phase::Promoted => "promoted".to_owned(),
        Phase::Aborted => "aborted".to_owned(),
        Phase::RolledBack => "rolled back".to_owned(),
    };
    format!(
        "{} rollout {}: version {} to {}, {strategy}, {phase}",
        rollout.endpoint, rollout.number, rollout.stable.version, rollout.candidate.version
    )
}

fn row(rollout: &Rollout, decision: &Decision, now_ms: u64) -> Vec<String> {
    let action = match decision.action {
        Action::Start => "start",
        Action::Pass => "pass",
        Action::Pause => "pause",
        Action::Resume => "resume",
        Action::Promote => "promote",
        Action::Abort => "abort",
        Action::RollBack => "roll back",
    };
    let weight = rollout.steps.get(decision.step as usize);
    let (candidate, baseline, why) = match &decision.evidence {
        None => ("-".to_owned(), "-".to_owned(), "a client's".to_owned()),
        Some(evidence) => {
            let last_error = &evidence.candidate.last_error;
            let why = if last_error.is_empty() {
                evidence.reason.clone()
            } else {
                format!("{} (last error: {last_error})", evidence.reason)
            };
            (side(&evidence.candidate), side(&evidence.baseline), why)
        }
    };
    vec![
        (decision.step + 1).to_string(),
        weight.map_or_else(|| "-".to_owned(), |weight| format!("{weight} %")),
        action.to_owned(),
        age(decision.at_ms, now_ms),
        candidate,
        baseline,
        why,
    ]
}

/// The numbers of the step under way.
fn current_row(rollout: &Rollout, progress: &Progress, now_ms: u64) -> Vec<String> {
    let evidence = Some(progress.evidence.clone());
    let counted = Decision {
        at_ms: progress.at_ms,
        step: progress.step,
        action: Action::Start,
        evidence,
    };
    let mut row = row(rollout, &counted, now_ms);
    row[2] = "counting".to_owned();
    row
}

/// One side's numbers in a few words.
fn side(numbers: &SideEvidence) -> String {
    format!(
        "{} of {} failed, {:.1} ms, p95 {:.1} ms",
        numbers.errors,
        numbers.requests,
        numbers.latency_mean_us as f64 / 1e3,
        numbers.latency_p95_us as f64 / 1e3
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_named_with_either_sign_or_none() {
        assert_eq!(model_and_version("digits").unwrap(), ("digits", None));
        for text in ["digits:3", "digits@3"] {
            assert_eq!(model_and_version(text).unwrap(), ("digits", Some(3)));
        }
        let error = model_and_version("digits@latest").unwrap_err();
        assert!(
            error.to_string().contains("`latest` is not a version"),
            "{error}"
        );
    }

    #[test]
    fn numbers_are_said_with_their_units() {
        let numbers = SideEvidence {
            requests: 40,
            errors: 3,
            latency_mean_us: 2_150,
            latency_p95_us: 4_300,
            last_error: String::new(),
        };
        assert_eq!(side(&numbers), "3 of 40 failed, 2.1 ms, p95 4.3 ms");
    }
}
