//! `mobula drift policy`.

use anyhow::{Context, bail};
use mobula_actors::drift::client;
use mobula_actors::drift::retraining::RetrainPolicy;
use mobula_actors::drift::retraining::plan::{Budget, CanaryPlan, Mode, Terms};
use serde::Serialize;

use crate::args::{DriftTarget, RetrainPolicyCommand, RetrainPolicySetArguments, Target};
use crate::connect::connect;
use crate::output::print_json;
use crate::train_file;

/// CPU cores for the job's driver, and how often it is started again: as `mobula submit` has it.
const DRIVER_CPUS: f64 = 0.1;
const DRIVER_RESTARTS: u32 = 3;

/// A policy as `--json` prints it.
#[derive(Serialize)]
struct PolicyJson<'a> {
    endpoint: &'a str,
    model: &'a str,
    mode: Mode,
    budget: Budget,
    cooldown_ms: u64,
    metric: Option<&'a str>,
    min_gain: f64,
    gate: &'static str,
    canary: &'a CanaryPlan,
    /// The job's name.
    job: &'a str,
    /// Its description, as it will be submitted.
    job_toml: Option<&'a str>,
    /// The names of the files that come with it.
    files: Vec<&'a str>,
}

impl<'a> PolicyJson<'a> {
    fn of(endpoint: &'a str, policy: &'a RetrainPolicy) -> Self {
        let Terms {
            cooldown_ms,
            metric,
            min_gain,
            gate,
            canary,
        } = &policy.terms;
        PolicyJson {
            endpoint,
            model: &policy.model,
            mode: policy.mode,
            budget: policy.budget,
            cooldown_ms: *cooldown_ms,
            metric: metric.as_deref(),
            min_gain: *min_gain,
            gate: gate.as_str(),
            canary,
            job: &policy.job.name,
            job_toml: policy.job.args.get(1).map(String::as_str),
            files: policy
                .job
                .files
                .iter()
                .map(|file| file.name.as_str())
                .collect(),
        }
    }
}

pub(super) async fn run(target: &Target, command: RetrainPolicyCommand) -> anyhow::Result<()> {
    match command {
        RetrainPolicyCommand::Set(arguments) => set(target, *arguments).await,
        RetrainPolicyCommand::Show(of) => show(target, of).await,
        RetrainPolicyCommand::Remove { endpoint } => {
            client::remove_policy(&connect(target).await?, &endpoint).await?;
            println!("nothing is done any more when {endpoint} drifts");
            Ok(())
        }
    }
}

async fn set(target: &Target, arguments: RetrainPolicySetArguments) -> anyhow::Result<()> {
    let file = train_file::read(&arguments.job, None)?;
    train_file::check_program(&file.spec, &arguments.job)?;
    let path = arguments.job.display();
    if !file.secrets.is_empty() {
        bail!(
            "the job file {path} has secrets, and a policy is kept where it is shown: let the job read its \
             data without them"
        );
    }
    let model = file.spec.register.clone().with_context(|| {
        format!("the job file {path} registers no model: write `register = \"<the endpoint's model>\"` into it")
    })?;
    let cluster = connect(target).await?;
    let mut job = cluster
        .new_job(&file.spec.name)
        .builtin()
        .args(["train".to_owned(), file.text])
        .cpus(DRIVER_CPUS)
        .max_restarts(DRIVER_RESTARTS)
        .on_upload(crate::upload::shown());
    for (path, name) in file.files {
        job = job.file(path, name);
    }
    let plan = arguments.canary;
    let policy = RetrainPolicy {
        model,
        job: job.into_spec().await?,
        mode: if arguments.auto {
            Mode::Auto
        } else {
            Mode::Suggest
        },
        budget: arguments.budget,
        terms: Terms {
            cooldown_ms: arguments.cooldown,
            metric: arguments.metric,
            min_gain: arguments.min_gain,
            gate: arguments.gate.into(),
            canary: CanaryPlan {
                guardrails: plan.guardrails(),
                strategy: plan.strategy.into(),
                steps: plan.steps,
                min_samples: plan.min_samples,
            },
        },
    };
    client::set_policy(&cluster, &arguments.endpoint, policy.clone()).await?;
    print(&arguments.endpoint, &policy, arguments.format.json)
}

async fn show(target: &Target, of: DriftTarget) -> anyhow::Result<()> {
    let cluster = connect(target).await?;
    let endpoint = &of.endpoint;
    let policy = client::policy(&cluster, endpoint).await?.with_context(|| {
        format!(
            "endpoint `{endpoint}` has no retrain policy: set one with `mobula drift policy set {endpoint} \
             --job FILE`"
        )
    })?;
    print(endpoint, &policy, of.format.json)
}

fn print(endpoint: &str, policy: &RetrainPolicy, json: bool) -> anyhow::Result<()> {
    if json {
        return print_json(&PolicyJson::of(endpoint, policy));
    }
    println!("{}", described(endpoint, policy));
    Ok(())
}

fn described(endpoint: &str, policy: &RetrainPolicy) -> String {
    let terms = &policy.terms;
    let begins = match policy.mode {
        Mode::Auto => "is retrained",
        Mode::Suggest => "is suggested to be retrained",
    };
    let metric = terms.metric.as_deref().unwrap_or("accuracy, else loss");
    format!(
        "when {endpoint} drifts, {} {begins} by job `{}`: {} jobs in {} s at the most, {} s after the last one\n\
         a new version is tried if it gains {} ({metric}) and is {}",
        policy.model,
        policy.job.name,
        policy.budget.jobs,
        policy.budget.period_ms / 1000,
        terms.cooldown_ms / 1000,
        terms.min_gain,
        terms.gate.as_str(),
    )
}
