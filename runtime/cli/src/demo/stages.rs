//! The demo's stages, in order.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::Context;
use mobula::{Actor, Cluster};
use mobula_actors::serving::replica::Replica;
use mobula_actors::serving::replica_settings::ReplicaSettings;
use mobula_actors::training::data::{Dataset, Files};
use mobula_actors::training::spec::TrainSpec;
use mobula_actors::{drift, registry, serving};
use mobula_core::id::JobId;

use super::lifecycle;
use super::report::{Progress, Report};
use super::requests::Client;
use super::training::{TrainingResult, drawn_faults, follow, submit};
use crate::local::ClusterRecord;

/// What is trained; the same file that `mobula submit` takes.
const JOB: &str = include_str!("../../../../cluster-configs/jobs/digits-mlp.toml");

/// Steps between two lines of progress of the job that is hurt: what happens to it happens at such a line.
const STEPS_BETWEEN_LINES: u64 = 24;

/// The least accuracy on held-out images that counts as trained.
pub(super) const ACCURACY_MIN: f64 = 0.95;

/// How long the preempted machine still lives.
const GRACE: Duration = Duration::from_secs(10);

const REPLICAS: u32 = 2;

const READY_LIMIT: Duration = Duration::from_secs(30);

/// How often the shifted images are sent at most; each time is more than a window.
const SHIFTED_ROUNDS_MAX: usize = 10;

pub(super) async fn run(
    record: &ClusterRecord,
    seed: u64,
    progress: &Progress,
    report: &mut Report,
) -> anyhow::Result<()> {
    let started = Instant::now();
    let cluster = Cluster::from_data_dir(&record.data_dir).await?;
    report.note(
        "cluster",
        started,
        true,
        format!(
            "1 head, {} workers, as processes",
            record.processes.len() - 1
        ),
    );
    let spec = TrainSpec::from_toml(JOB, "digits-mlp.toml")?;
    let undisturbed = undisturbed(&cluster, &spec, progress, report).await?;
    disturbed(&cluster, &spec, &undisturbed, seed, progress, report).await?;
    let model = spec.name.clone();
    let version = registered(&cluster, &model, progress, report).await?;
    lifecycle::signed(
        &cluster,
        &record.data_dir,
        &model,
        version,
        progress,
        report,
    )
    .await?;
    // The one of the undisturbed run, so that the other one can follow it.
    let client = deployed(&cluster, &model, version - 1, progress, report).await?;
    let held_out = Dataset::load(&spec.dataset, &Files::local())?
        .split(spec.seed, spec.held_out_fraction)
        .held_out;
    answered(&client, &held_out, progress, report).await?;
    lifecycle::good_canary(
        &cluster, &model, version, &client, &held_out, progress, report,
    )
    .await?;
    lifecycle::broken_canary(&cluster, &model, &client, &held_out, progress, report).await?;
    lifecycle::set_policy(&cluster, &record.data_dir, &spec).await?;
    drifted(&cluster, &model, &client, &held_out, progress, report).await?;
    lifecycle::retrained(&cluster, &model, &client, &held_out, progress, report).await
}

async fn undisturbed(
    cluster: &Cluster,
    spec: &TrainSpec,
    progress: &Progress,
    report: &mut Report,
) -> anyhow::Result<TrainingResult> {
    progress.say("training undisturbed, for the hash to compare with");
    let started = Instant::now();
    let job = submit(cluster, "undisturbed", JOB).await?;
    let (result, _) = follow(cluster, job, spec.steps, Vec::new(), progress).await?;
    report.note(
        "train",
        started,
        result.accuracy >= ACCURACY_MIN,
        format!(
            "{} steps, {:.0} samples/s, held-out accuracy {:.2} %, weights {}",
            result.steps,
            result.samples_per_second,
            result.accuracy * 100.0,
            &result.weights_blake3
        ),
    );
    Ok(result)
}

async fn disturbed(
    cluster: &Cluster,
    spec: &TrainSpec,
    undisturbed: &TrainingResult,
    seed: u64,
    progress: &Progress,
    report: &mut Report,
) -> anyhow::Result<()> {
    let faults = drawn_faults(seed, GRACE);
    progress.say(&format!(
        "training again, with {} faults drawn from seed {seed} (--seed repeats them)",
        faults.len()
    ));
    let started = Instant::now();
    let disturbed = TrainSpec {
        log_every_steps: Some(STEPS_BETWEEN_LINES),
        ..spec.clone()
    };
    let job = submit(cluster, "disturbed", &toml::to_string(&disturbed)?).await?;
    let (result, done) = follow(cluster, job, spec.steps, faults, progress).await?;
    report.note(
        "survive",
        started,
        result.accuracy >= ACCURACY_MIN,
        format!(
            "{}; {} restarts, {} steps lost",
            done.join(", "),
            result.restarts,
            result.lost_steps
        ),
    );
    let is_equal = result.weights_blake3 == undisturbed.weights_blake3;
    progress.say(&format!(
        "weights undisturbed {}",
        undisturbed.weights_blake3
    ));
    progress.say(&format!("weights disturbed   {}", result.weights_blake3));
    report.note(
        "same bits",
        Instant::now(),
        is_equal,
        format!(
            "weights {} the undisturbed ones",
            if is_equal { "equal" } else { "DIFFER FROM" }
        ),
    );
    Ok(())
}

async fn registered(
    cluster: &Cluster,
    model: &str,
    progress: &Progress,
    report: &mut Report,
) -> anyhow::Result<u64> {
    progress.say("looking the version up in the registry");
    let started = Instant::now();
    let version = registry::client::version(cluster, model, None).await?;
    let digest = &version.description.digest;
    let number = version.version;
    let detail = format!("{model}:{number}, digest {}", &digest[..16]);
    report.note("register", started, digest.len() == 64, detail);
    Ok(number)
}

async fn deployed(
    cluster: &Cluster,
    model: &str,
    version: u64,
    progress: &Progress,
    report: &mut Report,
) -> anyhow::Result<Client> {
    progress.say("deploying it with 2 replicas");
    let started = Instant::now();
    let deployment = serving::client::deploy(
        cluster,
        model,
        model,
        Some(version),
        REPLICAS,
        ReplicaSettings::default(),
    )
    .await?;
    let endpoint = serving::client::wait_ready(cluster, &deployment, READY_LIMIT).await??;
    let token = &deployment.token;
    let address = endpoint
        .http_address
        .context("a ready endpoint has an address")?;
    let nodes = replica_nodes(cluster).await?;
    report.note(
        "deploy",
        started,
        nodes.len() == REPLICAS as usize,
        format!(
            "{REPLICAS} replicas on {} nodes, http://{address}",
            nodes.len()
        ),
    );
    report.curl = Some(format!(
        "curl -H 'Authorization: Bearer {token}' http://{address}/v2/models/{model}"
    ));
    Client::new(&address, model, token)
}

/// The nodes that replicas run on.
async fn replica_nodes(cluster: &Cluster) -> anyhow::Result<BTreeSet<u64>> {
    let actors = cluster.list_actors(Some(JobId::SYSTEM)).await?;
    let replicas = actors
        .iter()
        .filter(|actor| actor.type_name == Replica::TYPE_NAME);
    Ok(replicas.filter_map(|actor| actor.node).collect())
}

async fn answered(
    client: &Client,
    held_out: &Dataset,
    progress: &Progress,
    report: &mut Report,
) -> anyhow::Result<()> {
    progress.say("sending the held-out images as requests");
    let started = Instant::now();
    let load = client.send_all(held_out, |pixel| pixel).await?;
    report.note(
        "serve",
        started,
        load.accuracy() >= ACCURACY_MIN,
        format!(
            "{} requests, accuracy {:.2} %, p50 {:.1} ms, p95 {:.1} ms, {:.0} requests/s",
            load.count,
            load.accuracy() * 100.0,
            load.percentile_ms(0.5),
            load.percentile_ms(0.95),
            load.rate()
        ),
    );
    Ok(())
}

/// Ink where there was paper: no such image was ever trained on.
pub(super) fn shifted(pixel: f32) -> f32 {
    1.0 - pixel
}

async fn drifted(
    cluster: &Cluster,
    endpoint: &str,
    client: &Client,
    held_out: &Dataset,
    progress: &Progress,
    report: &mut Report,
) -> anyhow::Result<()> {
    progress.say("sending inverted images until drift is reported");
    let started = Instant::now();
    let before = drift::client::events(cluster, endpoint).await?.len();
    let mut sent = 0;
    for _ in 0..SHIFTED_ROUNDS_MAX {
        sent += client.send_all(held_out, shifted).await?.count;
        let events = drift::client::events(cluster, endpoint).await?;
        let Some(event) = events.get(before) else {
            continue;
        };
        let worst = event
            .report
            .drifted
            .iter()
            .find(|drifted| drifted.feature != "prediction")
            .context("a drift event names a feature")?;
        let monitors = drift::client::monitors(cluster, Some(endpoint)).await?;
        let suggestion = monitors
            .first()
            .and_then(|monitor| monitor.retrain_suggestion.as_ref());
        report.note(
            "drift",
            started,
            before == 0 && suggestion.is_some(),
            format!(
                "after {sent} requests: {} of {} features, {} {} {:.3} over {} ({} against {} \
                 rows); retrain suggested",
                event.report.features_drifted,
                event.report.features_compared,
                worst.feature,
                worst.statistic,
                worst.value,
                worst.threshold,
                worst.current_count,
                worst.reference_count
            ),
        );
        return Ok(());
    }
    report.note(
        "drift",
        started,
        false,
        format!("{sent} inverted images raised nothing"),
    );
    Ok(())
}
