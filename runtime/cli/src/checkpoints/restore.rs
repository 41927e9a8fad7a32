//! `mobula checkpoints restore`.

use std::collections::BTreeMap;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use mobula_actors::checkpoint::client::Archive;
use mobula_actors::checkpoint::safetensors;
use mobula_actors::checkpoint::state::Committed;
use mobula_core::id::JobId;
use serde::Serialize;

use crate::output::{or_dash, print_json, size};

#[derive(Serialize)]
struct RestoredJson<'a> {
    job: u64,
    step: u64,
    output: &'a Path,
    size_bytes: u64,
    weights_blake3: Option<&'a str>,
    manifest: &'a str,
    manifest_digest: &'a str,
    rejected: Vec<PassedOver>,
}

#[derive(Serialize)]
struct PassedOver {
    step: u64,
    reason: String,
}

pub(super) async fn restore(
    job: JobId,
    candidates: &[&Committed],
    archive: &Archive,
    output: Option<PathBuf>,
    force: bool,
    json: bool,
) -> anyhow::Result<()> {
    let mut rejected = Vec::new();
    let mut found = None;
    for one in candidates {
        match archive.load(&one.checkpoint).await {
            Ok(checkpoint) => {
                found = Some((one, checkpoint));
                break;
            }
            Err(error) if error.condemns_the_checkpoint() => {
                let step = one.checkpoint.step;
                eprintln!("the checkpoint of step {step} is passed over: {error}");
                rejected.push(PassedOver {
                    step,
                    reason: error.to_string(),
                });
            }
            Err(error) => return Err(error.into()),
        }
    }
    let Some((one, checkpoint)) = found else {
        bail!(
            "none of {} checkpoints of {job} can be restored",
            candidates.len()
        );
    };
    let reference = &one.checkpoint;
    let output =
        output.unwrap_or_else(|| PathBuf::from(format!("{job}-{}.safetensors", reference.step)));
    let notes = BTreeMap::from([
        ("job".to_owned(), job.to_string()),
        ("step".to_owned(), reference.step.to_string()),
        ("manifest".to_owned(), reference.manifest_path.clone()),
        (
            "manifest_digest".to_owned(),
            reference.manifest_digest.clone(),
        ),
    ]);
    write_whole_file(&output, force, |file| {
        safetensors::write(&checkpoint, &notes, file)
    })?;
    if json {
        return print_json(&RestoredJson {
            job: job.0,
            step: reference.step,
            output: &output,
            size_bytes: std::fs::metadata(&output)?.len(),
            weights_blake3: reference.weights_blake3.as_deref(),
            manifest: &reference.manifest_path,
            manifest_digest: &reference.manifest_digest,
            rejected,
        });
    }
    println!(
        "step {} of {job}, verified, is in {} ({})",
        reference.step,
        output.display(),
        size(std::fs::metadata(&output)?.len())
    );
    println!("weights {}", or_dash(reference.weights_blake3.as_deref()));
    println!(
        "\nto begin another job with these weights, put this into its TOML file, and pin the \
         checkpoint\n(`mobula checkpoints pin {job} {}`) for as long as that job may begin:\n\n\
         [start_from]\nmanifest = \"{}\"\ndigest = \"{}\"",
        reference.step, reference.manifest_path, reference.manifest_digest
    );
    Ok(())
}

/// Writes a file so that a reader sees all of it or nothing, and replaces none unasked.
fn write_whole_file(
    path: &Path,
    force: bool,
    write: impl FnOnce(&mut BufWriter<&std::fs::File>) -> std::io::Result<()>,
) -> anyhow::Result<()> {
    if path.exists() && !force {
        bail!(
            "{} is there already: name another file with --output, or replace it with --force",
            path.display()
        );
    }
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let cannot = || format!("{} cannot be written", path.display());
    let file = tempfile::NamedTempFile::new_in(folder).with_context(cannot)?;
    let mut writer = BufWriter::new(file.as_file());
    write(&mut writer).with_context(cannot)?;
    drop(writer);
    file.as_file().sync_all().with_context(cannot)?;
    file.persist(path).with_context(cannot)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_only_when_asked_and_only_as_a_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        write_whole_file(&path, false, |file| std::io::Write::write_all(file, b"one")).unwrap();
        let error = write_whole_file(&path, false, |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("--force"), "{error}");
        let failed = |_: &mut BufWriter<&std::fs::File>| Err(std::io::Error::other("no"));
        assert!(write_whole_file(&path, true, failed).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"one");
        write_whole_file(&path, true, |file| std::io::Write::write_all(file, b"two")).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        let nowhere = dir.path().join("no/folder/out");
        let error = write_whole_file(&nowhere, false, |_| Ok(())).unwrap_err();
        assert!(error.to_string().contains("cannot be written"), "{error}");
    }
}
