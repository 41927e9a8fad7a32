//! A training job's TOML file, made ready to be submitted: its secrets taken out, its data files found.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use mobula_actors::training::data::files::STORE_PREFIX;
use mobula_actors::training::spec::{TrainSpec, WorkerRange};

use crate::secrets;

/// A job that can be submitted.
pub(crate) struct TrainFile {
    pub(crate) spec: TrainSpec,
    /// The job's description for its driver.
    pub(crate) text: String,
    pub(crate) secrets: BTreeMap<String, String>,
    /// Data files of this machine, and where the job's processes find them.
    pub(crate) files: Vec<(PathBuf, String)>,
}

/// Reads a job file. Data files that are named by a relative path, seen from the job file, are shipped;
/// absolute paths and `store:` name what every worker has.
pub(crate) fn read(path: &Path, workers: Option<WorkerRange>) -> anyhow::Result<TrainFile> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("the job file {} cannot be read", path.display()))?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let (secrets, text) = secrets::take_from_toml(&text, folder)
        .with_context(|| format!("the job file {}", path.display()))?;
    let mut spec = TrainSpec::from_toml(&text, &path.display().to_string())?;
    if let Some(workers) = workers {
        spec.workers = workers;
        spec.validate()?;
    }
    let files = take_files(&mut spec, folder)?;
    let text = match files.is_empty() && workers.is_none() {
        true => text,
        false => toml::to_string(&spec).context("the job cannot be written again")?,
    };
    Ok(TrainFile {
        spec,
        text,
        secrets,
        files,
    })
}

/// Refuses a job that `mobula` itself, which trains it where no other program is given, was not built for.
pub(crate) fn check_program(spec: &TrainSpec, path: &Path) -> anyhow::Result<()> {
    spec.check_program()
        .with_context(|| format!("the job file {}", path.display()))
}

/// Finds the data files to ship, and puts their new names into the job.
fn take_files(spec: &mut TrainSpec, folder: &Path) -> anyhow::Result<Vec<(PathBuf, String)>> {
    let mut shipped = Vec::new();
    for name in spec.dataset.files_mut() {
        if name.starts_with(STORE_PREFIX) || Path::new(name).is_absolute() {
            continue;
        }
        let path = folder.join(&*name);
        if !path.is_file() {
            bail!(
                "the data file {} is not there: a relative path is looked for beside the job file; \
                 give an absolute path to what every worker has, or {STORE_PREFIX}<path> for a blob \
                 of the cluster's store",
                path.display()
            );
        }
        let base = path.file_name().unwrap_or_default().to_string_lossy();
        // Numbered, because files of different folders may have one name.
        *name = format!("data/{}-{base}", shipped.len());
        shipped.push((path, name.clone()));
    }
    Ok(shipped)
}

/// Reads `2..8` (both included), or `4` for just so many.
pub(crate) fn parse_workers(text: &str) -> Result<WorkerRange, String> {
    let number = |text: &str| {
        text.trim()
            .parse::<u32>()
            .map_err(|_| format!("`{text}` is not a number of workers: write 2..8, or 4"))
    };
    let (min, max) = match text.split_once("..") {
        Some((min, max)) => (number(min)?, number(max.trim_start_matches('='))?),
        None => (number(text)?, number(text)?),
    };
    if min == 0 || max < min {
        return Err(format!("{min} to {max} workers are none: write 2..8, or 4"));
    }
    Ok(WorkerRange { min, max })
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOB: &str = "name = \"a\"\nseed = 7\nsteps = 3\n[model.mlp]\nhidden = [8]\n";

    #[test]
    fn ranges_of_workers_are_read_and_wrong_ones_refused() {
        let range = |min, max| WorkerRange { min, max };
        assert_eq!(parse_workers("2..8"), Ok(range(2, 8)));
        assert_eq!(parse_workers("2..=8"), Ok(range(2, 8)));
        assert_eq!(parse_workers("4"), Ok(range(4, 4)));
        for wrong in ["", "two", "2..", "0..3", "5..2", "1...3"] {
            assert!(parse_workers(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn data_files_beside_the_job_are_shipped_under_names_of_their_own() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("b")).unwrap();
        for name in ["part.csv", "b/part.csv"] {
            std::fs::write(folder.path().join(name), "1,0\n").unwrap();
        }
        let job = folder.path().join("job.toml");
        let files = "files = [\"part.csv\", \"b/part.csv\", \"/data/x.csv\", \"store:y.csv\"]";
        std::fs::write(&job, format!("{JOB}[dataset.csv]\n{files}\n")).unwrap();
        let read_back = read(&job, Some(WorkerRange { min: 2, max: 5 })).unwrap();
        let names = [
            "data/0-part.csv",
            "data/1-part.csv",
            "/data/x.csv",
            "store:y.csv",
        ];
        let again = TrainSpec::from_toml(&read_back.text, "again.toml").unwrap();
        assert_eq!(again.dataset.files(), names);
        assert_eq!((again.workers.min, again.workers.max), (2, 5));
        let shipped: Vec<&str> = read_back
            .files
            .iter()
            .map(|(_, name)| name.as_str())
            .collect();
        assert_eq!(shipped, names[..2]);
        std::fs::remove_file(folder.path().join("part.csv")).unwrap();
        let error = read(&job, None).err().unwrap().to_string();
        assert!(error.contains("part.csv is not there"), "{error}");
    }

    #[test]
    fn a_job_for_gpus_is_refused_where_mobula_was_not_built_for_them() {
        let folder = tempfile::tempdir().unwrap();
        let job = folder.path().join("job.toml");
        std::fs::write(&job, JOB).unwrap();
        check_program(&read(&job, None).unwrap().spec, &job).unwrap();
        std::fs::write(&job, format!("device = \"cuda\"\n{JOB}")).unwrap();
        let read_back = read(&job, Some(WorkerRange { min: 2, max: 5 })).unwrap();
        let again = TrainSpec::from_toml(&read_back.text, "again.toml").unwrap();
        assert_eq!(again.device, read_back.spec.device);
        let checked = check_program(&read_back.spec, &job);
        if cfg!(feature = "cuda") {
            return checked.unwrap();
        }
        let error = format!("{:#}", checked.unwrap_err());
        assert!(error.contains("job.toml: device is cuda: "), "{error}");
        assert!(error.contains("build it with `--features cuda`"), "{error}");
    }

    #[test]
    fn a_job_without_files_keeps_its_text() {
        let folder = tempfile::tempdir().unwrap();
        let job = folder.path().join("job.toml");
        std::fs::write(&job, JOB).unwrap();
        let read_back = read(&job, None).unwrap();
        assert_eq!((read_back.text.as_str(), read_back.files.len()), (JOB, 0));
        let error = read(&job, Some(WorkerRange { min: 1, max: 99 }));
        assert!(
            error
                .err()
                .unwrap()
                .to_string()
                .contains("workers is 1 to 99")
        );
    }
}
