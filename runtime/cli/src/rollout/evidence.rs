//! `mobula rollout evidence`: what a rollout's decisions rest on, in files that can be checked without a cluster.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_actors::registry::audit_file::proof_to_text;
use mobula_actors::registry::client as registry;
use mobula_actors::registry::merkle;
use mobula_actors::registry::search::Selector;
use mobula_actors::serving::client;
use mobula_actors::serving::rollout::Rollout;
use serde_json::{Value, json};

use super::RolloutJson;
use crate::args::RolloutEvidenceArguments;
use crate::models::VersionJson;
use crate::output::print_json;

/// Entries of the audit log in a bundle, the newest: what is decided about two versions is some dozen.
const ENTRIES_MAX: usize = 200;

/// The list of the other files with their hashes, as `sha256sum -c` reads it.
const MANIFEST: &str = "SHA256SUMS";

/// The fields of an entry of the audit log that name versions. The last four are those of how rollouts and experiments
/// ended, this rollout among them.
const VERSION_FIELDS: [&str; 8] = [
    "version",
    "replaces",
    "from",
    "to",
    "stable",
    "candidate",
    "control",
    "treatment",
];

/// The files of a bundle, by their names in its folder.
type Files = Vec<(String, String)>;

pub(super) async fn write(
    cluster: &Cluster,
    arguments: RolloutEvidenceArguments,
) -> anyhow::Result<()> {
    let endpoint = &arguments.endpoint;
    let rollouts = client::rollouts(cluster, endpoint).await?;
    let found = match arguments.rollout {
        None => rollouts.last(),
        Some(number) => rollouts.iter().find(|rollout| rollout.number == number),
    };
    let Some(rollout) = found else {
        bail!(
            "endpoint `{endpoint}` has no such rollout: see those that are kept with `mobula rollout status \
             {endpoint}`"
        );
    };
    let model = client::find(cluster, endpoint).await?.model;
    let shadows = client::shadows(cluster, endpoint).await?;
    let mut files = vec![
        file("rollout.json", &RolloutJson::of(rollout, &shadows))?,
        versions(cluster, &model, rollout).await?,
    ];
    files.extend(audit(cluster, &model, rollout).await?);
    let mut manifest = String::new();
    for (name, text) in &files {
        let hash = merkle::to_hex(&merkle::hash(text.as_bytes()));
        writeln!(manifest, "{hash}  {name}")?;
    }
    let manifest_hash = merkle::to_hex(&merkle::hash(manifest.as_bytes()));
    let count = files.len();
    files.push((MANIFEST.to_owned(), manifest));
    store(&arguments.out, &files)?;
    if arguments.format.json {
        return print_json(&json!({
            "endpoint": endpoint,
            "rollout": rollout.number,
            "folder": arguments.out,
            "files": count,
            "manifest_sha256": manifest_hash,
        }));
    }
    let folder = arguments.out.display();
    println!(
        "rollout {} of {endpoint}: {count} files in {folder}",
        rollout.number
    );
    println!("SHA-256 of {MANIFEST}: {manifest_hash}");
    println!("check them with `cd {folder} && sha256sum -c {MANIFEST}`");
    Ok(())
}

fn file<T: serde::Serialize>(name: &str, value: &T) -> anyhow::Result<(String, String)> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    Ok((name.to_owned(), text))
}

/// What the registry knows of both versions.
async fn versions(
    cluster: &Cluster,
    model: &str,
    rollout: &Rollout,
) -> anyhow::Result<(String, String)> {
    let mut known = Vec::new();
    for served in [&rollout.stable, &rollout.candidate] {
        let selector = Selector::Number(served.version);
        let view = registry::view(cluster, model, selector).await?;
        let mut version = serde_json::to_value(VersionJson::from(&view))?;
        let signed = registry::signed(cluster, model, served.version).await?;
        let signatures = signed.map(|signed| signed.promotion.signatures);
        let signers = signatures.unwrap_or_default().into_iter();
        version["signers"] = signers.map(|signature| signature.key).collect();
        known.push(version);
    }
    file("versions.json", &known)
}

/// The entries of the audit log about both versions, each with the proof that it is in the log.
async fn audit(cluster: &Cluster, model: &str, rollout: &Rollout) -> anyhow::Result<Files> {
    let versions = BTreeSet::from([rollout.stable.version, rollout.candidate.version]);
    let mut wanted = Vec::new();
    let mut from = 0;
    loop {
        let page = registry::events(cluster, from).await?;
        let Some(last) = page.events.last() else {
            break;
        };
        from = last.sequence + 1;
        let about = page.events.iter().filter(|event| {
            let entry: Option<Value> = serde_json::from_str(&event.text).ok();
            entry.is_some_and(|entry| is_about(&entry, model, &versions))
        });
        wanted.extend(about.map(|event| event.sequence));
    }
    let excess = wanted.len().saturating_sub(ENTRIES_MAX);
    let mut files = Vec::new();
    for sequence in wanted.into_iter().skip(excess) {
        let proof = registry::proof(cluster, sequence).await?;
        files.push((format!("audit-{sequence}.json"), proof_to_text(&proof)));
    }
    Ok(files)
}

/// Whether an entry of the audit log is about one of these versions.
fn is_about(entry: &Value, model: &str, versions: &BTreeSet<u64>) -> bool {
    let is_version = |value: &Value| {
        value
            .as_u64()
            .is_some_and(|value| versions.contains(&value))
    };
    let names_it = entry["model"] == model
        && VERSION_FIELDS
            .iter()
            .any(|field| is_version(&entry[*field]));
    // What a policy was asked about, and what somebody approved.
    let subjects = [&entry["gate"]["subject"], &entry["subject"]];
    let mut words = subjects
        .into_iter()
        .filter_map(Value::as_str)
        .flat_map(|subject| subject.split(' '));
    let is_asked = words.any(|word| {
        word.split_once(':').is_some_and(|(name, version)| {
            name == model
                && version
                    .parse()
                    .is_ok_and(|version| versions.contains(&version))
        })
    });
    names_it || is_asked
}

/// Writes the files into a folder that is not there yet, so that none of another bundle is among them.
fn store(folder: &Path, files: &Files) -> anyhow::Result<()> {
    std::fs::create_dir(folder).with_context(|| {
        format!(
            "{} cannot be made: name a folder that does not exist yet, in one that does",
            folder.display()
        )
    })?;
    for (name, text) in files {
        let path = folder.join(name);
        let written = std::fs::File::create_new(&path).and_then(|mut file| {
            file.write_all(text.as_bytes())
                .and_then(|()| file.sync_all())
        });
        written.with_context(|| format!("{} cannot be written", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_about_the_versions_are_found_and_no_others() {
        let versions = BTreeSet::from([1, 2]);
        for (entry, expected) in [
            (
                json!({"event": "registered", "model": "digits", "version": 2}),
                true,
            ),
            (
                json!({"event": "registered", "model": "digits", "version": 3}),
                false,
            ),
            (
                json!({"event": "registered", "model": "faces", "version": 2}),
                false,
            ),
            (
                json!({"event": "aliased", "model": "digits", "from": null, "to": 1}),
                true,
            ),
            (
                json!({"event": "gate_decided", "gate": {"subject": "deploy digits:2"}}),
                true,
            ),
            (
                json!({"event": "gate_decided", "gate": {"subject": "deploy digits:20"}}),
                false,
            ),
            (
                json!({"event": "gate_decided", "gate": {"subject": "train digits"}}),
                false,
            ),
            (
                json!({"event": "approved", "subject": "deploy digits:2"}),
                true,
            ),
            (
                json!({"event": "staged", "model": "digits", "version": 5, "replaces": 1}),
                true,
            ),
            (
                json!({"event": "rollout", "model": "digits", "stable": 1, "candidate": 4}),
                true,
            ),
            (
                json!({"event": "rollout", "model": "digits", "stable": 3, "candidate": 4}),
                false,
            ),
            (
                json!({"event": "experiment", "model": "digits", "control": 5, "treatment": 2}),
                true,
            ),
            (json!({"event": "key_added", "key": "k"}), false),
        ] {
            assert_eq!(is_about(&entry, "digits", &versions), expected, "{entry}");
        }
    }
}
