//! `mobula drift log`: what an endpoint answered, as Parquet files in the cluster's object store.

use std::path::Path;

use anyhow::{Context, bail};
use mobula_actors::drift::client;
use mobula_actors::drift::log::{LogPolicy, LogStatus, LoggedFeatures, Pages, files, folder};
use mobula_actors::storage::open_blobs;
use mobula_core::clock::Clock;
use serde::Serialize;

use crate::args::{
    DriftLogCommand, DriftLogExportArguments, DriftLogSetArguments, DriftTarget, Target,
};
use crate::clock::SystemClock;
use crate::connect::connect;
use crate::output::{print_json, size};

/// The largest file that is exported: some times what a file takes in memory before it is compressed.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// A log as `--json` prints it. The key of its hashes stays in the cluster.
#[derive(Serialize)]
struct LogJson<'a> {
    endpoint: &'a str,
    sample: f64,
    /// `null` for all.
    features: Option<&'a [String]>,
    hashed_features: &'a [String],
    plain_ids: bool,
    roll_rows: u32,
    roll_bytes: u64,
    roll_ms: u64,
    keep_ms: u64,
    /// Absent until the monitor has said something.
    status: Option<&'a LogStatus>,
}

/// What was exported, as `--json` prints it.
#[derive(Serialize)]
struct ExportJson<'a> {
    endpoint: &'a str,
    folder: &'a Path,
    files: u64,
    bytes: u64,
}

pub(super) async fn run(target: &Target, command: DriftLogCommand) -> anyhow::Result<()> {
    match command {
        DriftLogCommand::Set(arguments) => set(target, *arguments).await,
        DriftLogCommand::Show(of) => show(target, of).await,
        DriftLogCommand::Export(arguments) => export(target, arguments).await,
        DriftLogCommand::Remove { endpoint } => {
            client::set_log(&connect(target).await?, &endpoint, None).await?;
            println!(
                "nothing more is logged of {endpoint}; the files that there are stay in the object store under {}",
                folder(&endpoint)
            );
            Ok(())
        }
    }
}

async fn set(target: &Target, arguments: DriftLogSetArguments) -> anyhow::Result<()> {
    let cluster = connect(target).await?;
    let endpoint = &arguments.endpoint;
    // A log that is set again keeps its key, so that its hashes can be compared with those of before.
    let key = match client::log_policy(&cluster, endpoint).await? {
        Some(known) => known.key,
        None => new_key()?,
    };
    let policy = LogPolicy {
        sample_per_million: arguments.sample,
        features: if arguments.all_features {
            LoggedFeatures::All
        } else {
            LoggedFeatures::Named(arguments.features)
        },
        hashed_features: arguments.hash_features,
        plain_ids: arguments.plain_ids,
        key,
        roll_rows: arguments.roll_rows,
        roll_bytes: arguments.roll_bytes,
        roll_ms: arguments.roll_every,
        keep_ms: arguments.keep,
    };
    client::set_log(&cluster, endpoint, Some(policy.clone())).await?;
    print(endpoint, &policy, None, arguments.format.json)
}

fn new_key() -> anyhow::Result<[u8; 32]> {
    use rand::TryRngCore as _;
    let mut key = [0; 32];
    rand::rngs::OsRng
        .try_fill_bytes(&mut key)
        .context("the system gives no random bytes")?;
    Ok(key)
}

async fn show(target: &Target, of: DriftTarget) -> anyhow::Result<()> {
    let cluster = connect(target).await?;
    let endpoint = &of.endpoint;
    let policy = client::log_policy(&cluster, endpoint).await?.with_context(|| {
        format!(
            "nothing is logged of endpoint `{endpoint}`: begin with `mobula drift log set {endpoint} --sample 0.1`"
        )
    })?;
    let vitals = client::vitals(&cluster, endpoint).await?;
    let status = vitals.and_then(|known| known.vitals.log);
    print(endpoint, &policy, status.as_ref(), of.format.json)
}

fn print(
    endpoint: &str,
    policy: &LogPolicy,
    status: Option<&LogStatus>,
    json: bool,
) -> anyhow::Result<()> {
    let features = match &policy.features {
        LoggedFeatures::All => None,
        LoggedFeatures::Named(names) => Some(names.as_slice()),
    };
    let sample = f64::from(policy.sample_per_million) / 1e6;
    if json {
        return print_json(&LogJson {
            endpoint,
            sample,
            features,
            hashed_features: &policy.hashed_features,
            plain_ids: policy.plain_ids,
            roll_rows: policy.roll_rows,
            roll_bytes: policy.roll_bytes,
            roll_ms: policy.roll_ms,
            keep_ms: policy.keep_ms,
            status,
        });
    }
    let inputs = match features {
        None => "all features".to_owned(),
        Some([]) => "no feature of the inputs".to_owned(),
        Some(names) => format!("{} features: {}", names.len(), names.join(", ")),
    };
    println!(
        "of {} % of the requests of {endpoint}: class, confidence, slice, {}, and {inputs}",
        sample * 100.0,
        if policy.plain_ids {
            "id"
        } else {
            "a hash of the id"
        }
    );
    if !policy.hashed_features.is_empty() {
        println!("hashed: {}", policy.hashed_features.join(", "));
    }
    println!(
        "a file each {} rows, {} or {} s, kept for {} s under {}",
        policy.roll_rows,
        size(policy.roll_bytes),
        policy.roll_ms / 1000,
        policy.keep_ms / 1000,
        folder(endpoint)
    );
    if let Some(status) = status {
        print_status(status);
    }
    Ok(())
}

fn print_status(status: &LogStatus) {
    println!(
        "{} rows in {} files ({}), {} waiting, {} not in the sample, {} shed",
        status.rows,
        status.files,
        size(status.bytes),
        status.rows_waiting,
        status.rows_sampled_out,
        status.rows_shed
    );
    if status.unknown_features > 0 {
        println!(
            "{} of the named features are none of the version's: those of images are called pixel_0_1, all others \
             feature_0",
            status.unknown_features
        );
    }
    if let Some(why) = &status.last_error {
        println!("the last failure: {why}");
    }
}

async fn export(target: &Target, arguments: DriftLogExportArguments) -> anyhow::Result<()> {
    let DriftLogExportArguments {
        endpoint,
        to,
        since,
        store,
        format,
    } = arguments;
    let cluster = connect(target).await?;
    let location = crate::checkpoints::location(&cluster, &store).await?;
    let blobs = open_blobs(&location)?;
    let prefix = folder(&endpoint);
    let oldest_ms = since.map_or(0, |age| SystemClock.now_ms().saturating_sub(age));
    let (mut count, mut bytes) = (0, 0);
    let mut pages = Pages::of(&blobs, &endpoint);
    while let Some(page) = pages.next_page().await? {
        for file in page.iter().filter(|file| file.modified_ms >= oldest_ms) {
            // One whose time is over meanwhile is deleted by the monitor.
            let Some(content) = files::read(&blobs, file, FILE_BYTES_MAX).await? else {
                continue;
            };
            if count == 0 {
                std::fs::create_dir_all(&to)
                    .with_context(|| format!("the folder {} cannot be made", to.display()))?;
            }
            // `predictions/digits/v1/…` becomes `v1-…`.
            let name = file.path[prefix.len()..]
                .trim_matches('/')
                .replace('/', "-");
            let path = to.join(name);
            std::fs::write(&path, &content)
                .with_context(|| format!("{} cannot be written", path.display()))?;
            count += 1;
            bytes += content.len() as u64;
        }
    }
    if count == 0 {
        bail!(
            "there is no file of predictions of endpoint `{endpoint}`: `mobula drift log show {endpoint}` says what \
             is logged, and when files are written"
        );
    }
    if format.json {
        return print_json(&ExportJson {
            endpoint: &endpoint,
            folder: &to,
            files: count,
            bytes,
        });
    }
    println!("{count} files ({}) are in {}", size(bytes), to.display());
    Ok(())
}
