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
use super::requests::{Client, Load};
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

/// The demo under way.
pub(super) struct Demo<'a> {
    pub(super) cluster: Cluster,
    progress: &'a Progress,
    pub(super) report: &'a mut Report,
}

impl Demo<'_> {
    /// Says what happens now.
    pub(super) fn say(&self, text: &str) {
        self.progress.say(text);
    }

    /// Says what a stage does; when it began.
    pub(super) fn begin(&self, text: &str) -> Instant {
        self.say(text);
        Instant::now()
    }
}

/// The endpoint that is shown, of the model of the same name, and what is sent to it.
pub(super) struct Served {
    pub(super) name: String,
    client: Client,
    held_out: Dataset,
}

impl Served {
    /// Sends every held-out image after `change`.
    pub(super) async fn send_all(&self, change: fn(f32) -> f32) -> anyhow::Result<Load> {
        self.client.send_all(&self.held_out, change).await
    }
}

pub(super) async fn run(
    record: &ClusterRecord,
    seed: u64,
    progress: &Progress,
    report: &mut Report,
) -> anyhow::Result<()> {
    let started = Instant::now();
    let mut demo = Demo {
        cluster: Cluster::from_data_dir(&record.data_dir).await?,
        progress,
        report,
    };
    demo.report.note(
        "cluster",
        started,
        true,
        format!(
            "1 head, {} workers, as processes",
            record.processes.len() - 1
        ),
    );
    let spec = TrainSpec::from_toml(JOB, "digits-mlp.toml")?;
    let undisturbed = undisturbed(&mut demo, &spec).await?;
    disturbed(&mut demo, &spec, &undisturbed, seed).await?;
    let version = registered(&mut demo, &spec.name).await?;
    lifecycle::signed(&mut demo, &record.data_dir, &spec.name, version).await?;
    let served = Served {
        name: spec.name.clone(),
        // The one of the undisturbed run, so that the other one can follow it.
        client: deployed(&mut demo, &spec.name, version - 1).await?,
        held_out: Dataset::load(&spec.dataset, &Files::local())?
            .split(spec.seed, spec.held_out_fraction)
            .held_out,
    };
    answered(&mut demo, &served).await?;
    lifecycle::good_canary(&mut demo, &served, version).await?;
    lifecycle::broken_canary(&mut demo, &served).await?;
    lifecycle::set_policy(&demo.cluster, &record.data_dir, &spec).await?;
    drifted(&mut demo, &served).await?;
    lifecycle::retrained(&mut demo, &served).await
}

async fn undisturbed(demo: &mut Demo<'_>, spec: &TrainSpec) -> anyhow::Result<TrainingResult> {
    let started = demo.begin("training undisturbed, for the hash to compare with");
    let cluster = &demo.cluster;
    let job = submit(cluster, "undisturbed", JOB).await?;
    let (result, _) = follow(cluster, job, spec.steps, Vec::new(), demo.progress).await?;
    demo.report.note(
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
    demo: &mut Demo<'_>,
    spec: &TrainSpec,
    undisturbed: &TrainingResult,
    seed: u64,
) -> anyhow::Result<()> {
    let faults = drawn_faults(seed, GRACE);
    let started = demo.begin(&format!(
        "training again, with {} faults drawn from seed {seed} (--seed repeats them)",
        faults.len()
    ));
    let cluster = &demo.cluster;
    let disturbed = TrainSpec {
        log_every_steps: Some(STEPS_BETWEEN_LINES),
        ..spec.clone()
    };
    let job = submit(cluster, "disturbed", &toml::to_string(&disturbed)?).await?;
    let (result, done) = follow(cluster, job, spec.steps, faults, demo.progress).await?;
    demo.report.note(
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
    demo.say(&format!(
        "weights undisturbed {}",
        undisturbed.weights_blake3
    ));
    demo.say(&format!("weights disturbed   {}", result.weights_blake3));
    demo.report.note(
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

async fn registered(demo: &mut Demo<'_>, model: &str) -> anyhow::Result<u64> {
    let started = demo.begin("looking the version up in the registry");
    let version = registry::client::version(&demo.cluster, model, None).await?;
    let digest = &version.description.digest;
    let number = version.version;
    let detail = format!("{model}:{number}, digest {}", &digest[..16]);
    let is_shown = digest.len() == 64;
    demo.report.note("register", started, is_shown, detail);
    Ok(number)
}

async fn deployed(demo: &mut Demo<'_>, model: &str, version: u64) -> anyhow::Result<Client> {
    let started = demo.begin("deploying it with 2 replicas");
    let cluster = &demo.cluster;
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
    demo.report.note(
        "deploy",
        started,
        nodes.len() == REPLICAS as usize,
        format!(
            "{REPLICAS} replicas on {} nodes, http://{address}",
            nodes.len()
        ),
    );
    demo.report.curl = Some(format!(
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

async fn answered(demo: &mut Demo<'_>, served: &Served) -> anyhow::Result<()> {
    let started = demo.begin("sending the held-out images as requests");
    let load = served.send_all(|pixel| pixel).await?;
    demo.report.note(
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

async fn drifted(demo: &mut Demo<'_>, served: &Served) -> anyhow::Result<()> {
    let started = demo.begin("sending inverted images until drift is reported");
    let (cluster, endpoint) = (&demo.cluster, &*served.name);
    let before = drift::client::events(cluster, endpoint).await?.len();
    let mut sent = 0;
    for _ in 0..SHIFTED_ROUNDS_MAX {
        sent += served.send_all(shifted).await?.count;
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
        demo.report.note(
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
    demo.report.note(
        "drift",
        started,
        false,
        format!("{sent} inverted images raised nothing"),
    );
    Ok(())
}
