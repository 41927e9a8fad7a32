//! Experiments as `--json` prints them.

use mobula_actors::serving::experiment::findings::{Decision, Findings, Interval, Ratio, Values};
use mobula_actors::serving::experiment::{Experiment, Plan};
use mobula_actors::serving::rollout::plan::{Cleanup, Served};
use mobula_actors::serving::sentinels::state::Asked;
use serde::Serialize;

use super::{decision, state};
use crate::sentinels::SentinelsJson;

/// A plan as `--json` prints it: metrics as they are written on the command line.
#[derive(Serialize)]
struct PlanJson<'a> {
    endpoint: &'a str,
    model: &'a str,
    control: &'a Served,
    treatment: &'a Served,
    control_share_bp: u32,
    treatment_share_bp: u32,
    seed: &'a str,
    primary: String,
    effect_min: f64,
    guardrails: Vec<GuardrailJson>,
    alpha: f64,
    samples_max: u64,
}

#[derive(Serialize)]
struct GuardrailJson {
    metric: String,
    worsening_max: f64,
}

#[derive(Serialize)]
struct MeasuredJson<'a> {
    metric: String,
    control: &'a Values,
    treatment: &'a Values,
    effect: &'a Option<Interval>,
}

#[derive(Serialize)]
struct GuardrailFindingJson<'a> {
    metric: String,
    statistic: &'a str,
    value: f64,
    limit: f64,
    is_violated: bool,
}

#[derive(Serialize)]
struct FindingsJson<'a> {
    reason: &'a str,
    ratios: &'a [Ratio],
    measured: Vec<MeasuredJson<'a>>,
    guardrails: Vec<GuardrailFindingJson<'a>>,
    uncounted: u64,
}

/// An experiment as `--json` prints it, and as `ab_summary.json` holds it.
#[derive(Serialize)]
pub(super) struct ExperimentJson<'a> {
    endpoint: &'a str,
    number: u64,
    plan: PlanJson<'a>,
    plan_blake3: String,
    started_ms: u64,
    ended_ms: Option<u64>,
    /// `running`, or why it ended.
    state: &'static str,
    decision: Decision,
    counts: u32,
    reported_ms: Option<u64>,
    findings: Option<FindingsJson<'a>>,
    cleanup: Cleanup,
    /// How far the treatment's sentinels are answered, while the experiment is under way and its router has said so.
    sentinels: Option<SentinelsJson>,
}

impl<'a> ExperimentJson<'a> {
    /// With what its router has `asked` the treatment, if that is known.
    pub(super) fn of(experiment: &'a Experiment, asked: Option<&Asked>) -> Self {
        let plan = &experiment.plan;
        ExperimentJson {
            endpoint: &plan.endpoint,
            number: experiment.number,
            plan: plan_json(plan),
            plan_blake3: plan.digest(),
            started_ms: experiment.started_ms,
            ended_ms: experiment.ended_ms,
            state: state(experiment),
            decision: decision(experiment),
            counts: experiment.counts,
            reported_ms: experiment.reported_ms,
            findings: experiment.findings.as_ref().map(findings_json),
            cleanup: experiment.cleanup,
            sentinels: asked.map(SentinelsJson::of),
        }
    }
}

fn plan_json(plan: &Plan) -> PlanJson<'_> {
    let guardrails = plan.guardrails.iter().map(|guardrail| GuardrailJson {
        metric: guardrail.metric.to_string(),
        worsening_max: guardrail.worsening_max,
    });
    PlanJson {
        endpoint: &plan.endpoint,
        model: &plan.model,
        control: &plan.control,
        treatment: &plan.treatment,
        control_share_bp: plan.control_share_bp,
        treatment_share_bp: plan.treatment_share_bp,
        seed: &plan.seed,
        primary: plan.primary.to_string(),
        effect_min: plan.effect_min,
        guardrails: guardrails.collect(),
        alpha: f64::from(plan.alpha_bp) / 10_000.0,
        samples_max: plan.samples_max,
    }
}

fn findings_json(findings: &Findings) -> FindingsJson<'_> {
    let measured = findings.measured.iter().map(|row| MeasuredJson {
        metric: row.measure.to_string(),
        control: &row.control,
        treatment: &row.treatment,
        effect: &row.effect,
    });
    let guardrails = findings.guardrails.iter().map(|row| GuardrailFindingJson {
        metric: row.measure.to_string(),
        statistic: &row.statistic,
        value: row.value,
        limit: row.limit,
        is_violated: row.is_violated,
    });
    FindingsJson {
        reason: &findings.reason,
        ratios: &findings.ratios,
        measured: measured.collect(),
        guardrails: guardrails.collect(),
        uncounted: findings.uncounted,
    }
}
