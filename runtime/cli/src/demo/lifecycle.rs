//! The stages of a version's life after its training: signed into production, tried on requests, rolled back
//! if it is broken, and followed by another one when the data drifts.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_actors::drift::retraining::plan::{Budget, CanaryPlan, Mode, Retraining, Terms};
use mobula_actors::drift::retraining::{Phase as RetrainingPhase, RetrainPolicy};
use mobula_actors::registry::decide::Decision;
use mobula_actors::registry::keys::{Algorithm, Role};
use mobula_actors::registry::search::Selector;
use mobula_actors::registry::signer::{PrivateKey, Signer};
use mobula_actors::registry::stages::Stage;
use mobula_actors::registry::{NewVersion, VersionFile};
use mobula_actors::serving::rollout::command::Command;
use mobula_actors::serving::rollout::plan::{Cleanup, Phase};
use mobula_actors::serving::rollout::{Guardrails, Rollout, Strategy};
use mobula_actors::storage::open_blobs;
use mobula_actors::training::data::csv::CsvSpec;
use mobula_actors::training::data::{DataSpec, Dataset, Files};
use mobula_actors::training::spec::TrainSpec;
use mobula_actors::{drift, registry, serving};

use super::stages::{ACCURACY_MIN, Demo, Served, shifted};
use crate::args::StoreArguments;
use crate::checkpoints::location;

/// How long a rollout or a retraining may take: both go on with the requests that the demo sends.
const ROLLOUT_LIMIT: Duration = Duration::from_secs(120);

/// The candidate's share of the requests at each step, in percent.
const STEPS: [u32; 2] = [50, 100];

/// Requests that both sides need at a step.
const MIN_SAMPLES: u64 = 100;

/// What a candidate may not do. The processes share the machine with whatever else runs on it, so how long
/// an answer takes says nothing of a version here.
const GUARDRAILS: Guardrails = Guardrails {
    latency_increase_max_percent: 100_000,
    ..Guardrails::STANDARD
};

/// Steps of the retraining: the digits are small.
const RETRAIN_STEPS: u64 = 1_200;

/// The name of the data file among those of the retraining's job.
const DATA_FILE: &str = "data/inverted.csv";

/// Signs a version into production, which is refused without a signature.
pub(super) async fn signed(
    demo: &mut Demo<'_>,
    data_dir: &Path,
    model: &str,
    version: u64,
) -> anyhow::Result<()> {
    let started = demo.begin("signing the version into production");
    let cluster = &demo.cluster;
    let file = data_dir.join("demo-signing-key.pem");
    let key = match file.exists() {
        true => PrivateKey::open(&file)?,
        false => PrivateKey::create(&file, Algorithm::Ed25519)?,
    };
    let roles = [Role::Stage, Role::Release];
    registry::client::add_key(cluster, key.public_key(), roles, "demo", None).await?;
    let unsigned = decision(cluster, model, version, Stage::Staging).await?;
    let refused = registry::client::stage(cluster, unsigned.into_change()).await;
    let mut stage = Stage::Candidate;
    for to in [Stage::Staging, Stage::Production] {
        let mut decision = decision(cluster, model, version, to).await?;
        decision.sign(&key)?;
        let shown = registry::client::stage(cluster, decision.into_change()).await?;
        stage = shown.standing.stage;
    }
    demo.report.note(
        "signed",
        started,
        refused.is_err() && stage == Stage::Production,
        format!(
            "{model}:{version} in {}, signed with key {}; without a signature refused",
            stage.as_str(),
            &key.public_key().id()[..12]
        ),
    );
    Ok(())
}

async fn decision(
    cluster: &Cluster,
    model: &str,
    version: u64,
    to: Stage,
) -> anyhow::Result<Decision> {
    let view = registry::client::model(cluster, model).await?;
    let selector = Selector::Number(version);
    let version = registry::client::view(cluster, model, selector).await?;
    Ok(Decision::new(&view, &version, to, "the demo"))
}

/// Tries a version that is as good as the active one: it gets all requests in the end.
pub(super) async fn good_canary(
    demo: &mut Demo<'_>,
    served: &Served,
    version: u64,
) -> anyhow::Result<()> {
    let started = demo.begin("rolling out a good version as a canary");
    let (cluster, model) = (&demo.cluster, &*served.name);
    let (rollout, answered) = roll_out(cluster, served, version).await?;
    demo.report.note(
        "canary",
        started,
        rollout.phase == Phase::Promoted && active(cluster, model).await? == version,
        format!(
            "{model}:{version} {} after {answered} requests, none failed: {}",
            word(rollout.phase),
            why(&rollout)
        ),
    );
    Ok(())
}

/// Tries a version that answers no numbers: nobody sees them, and the version of before stays.
pub(super) async fn broken_canary(demo: &mut Demo<'_>, served: &Served) -> anyhow::Result<()> {
    let started = demo.begin("rolling out a broken version");
    let (cluster, model) = (&demo.cluster, &*served.name);
    let stable = active(cluster, model).await?;
    let broken = register_broken(cluster, model, stable).await?;
    let (rollout, answered) = roll_out(cluster, served, broken).await?;
    demo.report.note(
        "rollback",
        started,
        rollout.phase == Phase::RolledBack && active(cluster, model).await? == stable,
        format!(
            "{model}:{broken} {} after {answered} requests, none failed: {}",
            word(rollout.phase),
            why(&rollout)
        ),
    );
    Ok(())
}

fn word(phase: Phase) -> &'static str {
    match phase {
        Phase::Running | Phase::Paused => "undecided",
        Phase::Promoted => "promoted",
        Phase::Aborted => "aborted",
        Phase::RolledBack => "rolled back",
    }
}

fn why(rollout: &Rollout) -> String {
    let evidence = rollout
        .decisions
        .last()
        .and_then(|last| last.evidence.as_ref());
    evidence.map_or_else(
        || "nobody said why".to_owned(),
        |found| found.reason.clone(),
    )
}

async fn active(cluster: &Cluster, endpoint: &str) -> anyhow::Result<u64> {
    Ok(serving::client::find(cluster, endpoint).await?.version)
}

/// Registers a version whose weights are no numbers.
async fn register_broken(cluster: &Cluster, model: &str, of: u64) -> anyhow::Result<u64> {
    let good = registry::client::version(cluster, model, Some(of))
        .await?
        .description;
    let blobs = open_blobs(&location(cluster, &StoreArguments { config: None }).await?)?;
    let mut file = VersionFile::load(&blobs, &good.digest, good.size_bytes).await?;
    file.parameters.fill(f32::NAN);
    // What it answers to known rows then: its sentinels would find a file that says otherwise before any request came.
    file.reference.predictions.fill(0);
    let stored = file.store(&blobs).await?;
    let new = NewVersion {
        digest: stored.digest,
        size_bytes: stored.size_bytes,
        ..good
    };
    Ok(registry::client::register(cluster, new).await?.version)
}

/// Rolls a version out; the rollout at its end, and how many requests were answered meanwhile.
async fn roll_out(
    cluster: &Cluster,
    served: &Served,
    version: u64,
) -> anyhow::Result<(Rollout, usize)> {
    let start = Command::Start {
        endpoint: served.name.clone(),
        model: served.name.clone(),
        version: Some(version),
        strategy: Strategy::Canary,
        steps: STEPS.to_vec(),
        guardrails: GUARDRAILS,
        min_samples: MIN_SAMPLES,
    };
    serving::client::roll_out(cluster, start).await?;
    clean(cluster, served, |pixel| pixel).await
}

/// Sends changed images until the newest rollout is decided, and the router has left the version that lost;
/// the rollout, and how many were answered.
async fn clean(
    cluster: &Cluster,
    served: &Served,
    change: fn(f32) -> f32,
) -> anyhow::Result<(Rollout, usize)> {
    let deadline = Instant::now() + ROLLOUT_LIMIT;
    let mut answered = 0;
    loop {
        answered += served.send_all(change).await?.count;
        let routing = serving::client::routing(cluster, &served.name).await?;
        let rollout = routing.rollout.context("a rollout was begun")?;
        if rollout.cleanup == Cleanup::Done {
            return Ok((rollout, answered));
        }
        if Instant::now() >= deadline {
            bail!(
                "rollout {} is not over after {answered} requests and {} s",
                rollout.number,
                ROLLOUT_LIMIT.as_secs()
            );
        }
    }
}

/// Says what is to be done when the endpoint drifts: a job that trains on inverted images, and no person.
pub(super) async fn set_policy(
    cluster: &Cluster,
    data_dir: &Path,
    spec: &TrainSpec,
) -> anyhow::Result<()> {
    let images = Dataset::load(&spec.dataset, &Files::local())?.all()?;
    let width = images.features().len() / images.labels().len();
    let mut text = String::new();
    for (image, label) in images.features().chunks(width).zip(images.labels()) {
        for pixel in image {
            write!(text, "{},", shifted(*pixel))?;
        }
        writeln!(text, "{label}")?;
    }
    let path = data_dir.join("inverted.csv");
    std::fs::write(&path, text).with_context(|| format!("{} cannot be written", path.display()))?;
    let retrain = TrainSpec {
        name: format!("retrain-{}", spec.name),
        steps: RETRAIN_STEPS,
        dataset: DataSpec::Csv(CsvSpec {
            files: vec![DATA_FILE.to_owned()],
            header: false,
            shape: Some(vec![8, 8]),
            classes: Some(10),
            targets: None,
            scale: None,
        }),
        ..spec.clone()
    };
    let job = cluster
        .new_job(&retrain.name)
        .builtin()
        .args(["train".to_owned(), toml::to_string(&retrain)?])
        .cpus(0.1)
        .max_restarts(3)
        .file(path, DATA_FILE)
        .into_spec()
        .await?;
    let policy = RetrainPolicy {
        model: spec.name.clone(),
        job,
        mode: Mode::Auto,
        budget: Budget {
            jobs: 1,
            period_ms: 24 * 3_600_000,
        },
        terms: Terms {
            cooldown_ms: 3_600_000,
            metric: Some("accuracy".to_owned()),
            min_gain: 0.0,
            gate: Stage::Candidate,
            canary: CanaryPlan {
                strategy: Strategy::Canary,
                steps: STEPS.to_vec(),
                guardrails: GUARDRAILS,
                min_samples: MIN_SAMPLES,
            },
        },
    };
    drift::client::set_policy(cluster, &spec.name, policy).await?;
    Ok(())
}

/// Goes on sending inverted images until what the drift began has ended.
pub(super) async fn retrained(demo: &mut Demo<'_>, served: &Served) -> anyhow::Result<()> {
    let started = demo.begin("the drift retrains the model; sending inverted images all the while");
    let row = follow_retraining(demo, served).await?;
    let (cluster, endpoint) = (&demo.cluster, &*served.name);
    clean(cluster, served, shifted).await?;
    let load = served.send_all(shifted).await?;
    let version = active(cluster, endpoint).await?;
    let compared = row
        .comparison
        .as_ref()
        .map_or_else(String::new, |compared| {
            format!(
                ", {} {:.2} % against {:.2} %",
                compared.metric,
                compared.candidate * 100.0,
                compared.baseline * 100.0
            )
        });
    let reason = row.steps.last().map_or("", |step| &step.reason);
    let is_shown = row.phase == RetrainingPhase::Promoted
        && row.candidate == Some(version)
        && load.accuracy() >= ACCURACY_MIN;
    demo.report.note(
        "retrain",
        started,
        is_shown,
        format!(
            "event {} -> job-{} -> {endpoint}:{}{compared} -> {}: {reason}; inverted images now {:.2} %",
            row.event,
            row.job.unwrap_or_default(),
            row.candidate.unwrap_or_default(),
            row.phase.as_str(),
            load.accuracy() * 100.0
        ),
    );
    Ok(())
}

async fn follow_retraining(demo: &Demo<'_>, served: &Served) -> anyhow::Result<Retraining> {
    let deadline = Instant::now() + ROLLOUT_LIMIT;
    let mut told = 0;
    loop {
        served.send_all(shifted).await?;
        let history = drift::client::retrainings(&demo.cluster, &served.name).await?;
        if let Some(row) = history.retrainings.last().map(|shown| &shown.retraining) {
            for step in &row.steps[told..] {
                demo.say(&format!(
                    "retraining: {}: {}",
                    step.phase.as_str(),
                    step.reason
                ));
            }
            told = row.steps.len();
            if !row.phase.is_open() {
                return Ok(row.clone());
            }
        }
        if Instant::now() >= deadline {
            bail!(
                "the retraining is not over after {} s",
                ROLLOUT_LIMIT.as_secs()
            );
        }
    }
}
