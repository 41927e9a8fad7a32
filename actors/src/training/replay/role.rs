//! The role of a program that makes a run of its own models once more: what its process does instead of the user's
//! `main`. Part of every program that this crate is linked into.
//!
//! Invariants:
//! 1. It needs no cluster and no object store: all that it reads is in the folder, or where the run's data says.
//! 2. When it says that it has begun, it needs the folder no more.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mobula::role::Role;

use super::channel::{PROTOCOL, RECORD_FILE, ROLE, START_FILE, TASK_FILE, Task, Told};
use super::{ReplayError, ReplayReport, replay};
use crate::training::data::Files;
use crate::training::record::{RecordError, RunRecord};
use crate::training::start_from::{StartError, take_over};
use crate::training::state::TrainState;
use crate::training::workload::{Workload, WorkloadError};

/// How often it is said how far the replay is: often enough for a program whose reader has gone to notice soon.
const TOLD_EVERY: Duration = Duration::from_millis(500);

inventory::submit! {
    Role { name: ROLE, play }
}

/// Why the run was not made.
#[derive(Debug, thiserror::Error)]
enum RoleError {
    #[error("the replay's file {}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error(
        "this program replays by protocol {PROTOCOL}, and was asked by protocol {0}: use the `mobula` of its release"
    )]
    Protocol(u32),
    #[error("whoever asked for the replay hears nothing any more: {0}")]
    Unheard(io::Error),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Replay(#[from] ReplayError),
}

fn play(folder: &Path) -> Result<(), String> {
    let said = |error: io::Error| format!("its answers reach nobody: {error}");
    // A descriptor of its own: that of the standard input is not ours to close.
    let channel = io::stdin().as_fd().try_clone_to_owned().map_err(said)?;
    answer(folder, &mut File::from(channel)).map_err(said)
}

/// Does what the folder says, and says on `channel` what comes of it.
fn answer(folder: &Path, channel: &mut impl Write) -> io::Result<()> {
    Told::Here { protocol: PROTOCOL }.tell(channel)?;
    let told = match made(folder, channel) {
        Ok(report) => Told::Done(report),
        Err(error) => Told::failed(&causes(&error)),
    };
    told.tell(channel)
}

fn made(folder: &Path, channel: &mut impl Write) -> Result<ReplayReport, RoleError> {
    let task = read_task(folder)?;
    let record = RunRecord::from_bytes(&read(&folder.join(RECORD_FILE))?)?;
    let blobs = task.blobs.into_iter();
    let copies: BTreeMap<String, PathBuf> = blobs
        .map(|(blob, file)| (blob, folder.join(file)))
        .collect();
    let workload = Workload::load(&record.spec, &Files::with_copies(copies))?;
    let start = match &record.spec.start_from {
        Some(_) => {
            let mut start = TrainState::initial(&workload);
            take_over(&read(&folder.join(START_FILE))?, &mut start)?;
            Some(start)
        }
        None => None,
    };
    Told::Began.tell(channel).map_err(RoleError::Unheard)?;
    let steps_max = task.steps_max.unwrap_or(u64::MAX);
    let mut said = Instant::now();
    let report = replay(&record, &workload, start, steps_max, |step| {
        if said.elapsed() < TOLD_EVERY {
            return;
        }
        if Told::Step(step).tell(channel).is_err() {
            // Whoever asked has gone, and nobody else wants to know.
            std::process::exit(1);
        }
        said = Instant::now();
    })?;
    Ok(report)
}

fn read_task(folder: &Path) -> Result<Task, RoleError> {
    let path = folder.join(TASK_FILE);
    let task: Task = serde_json::from_slice(&read(&path)?).map_err(|error| RoleError::File {
        path,
        source: error.into(),
    })?;
    match task.protocol {
        PROTOCOL => Ok(task),
        other => Err(RoleError::Protocol(other)),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, RoleError> {
    fs::read(path).map_err(|source| RoleError::File {
        path: path.to_owned(),
        source,
    })
}

/// An error and what caused it, as `mobula` shows them: a cause whose text is part of what was said is not said again.
fn causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use mobula_core::JobId;

    use super::*;
    use crate::training::data::DataSpec;
    use crate::training::data::csv::CsvSpec;
    use crate::training::local::LocalTrainer;
    use crate::training::spec::TrainSpec;
    use crate::training::start_from::StartFrom;
    use crate::training::trace::StepTrace;

    const STEPS: u64 = 4;

    /// The record of a run of `spec` that began with `start`, with the data in `files`.
    fn record(spec: &TrainSpec, files: &Files, start: Option<&TrainState>) -> RunRecord {
        let workload = Workload::load(spec, files).unwrap();
        let mut state = TrainState::initial(&workload);
        if let Some(start) = start {
            state.params = start.params.clone();
        }
        let mut trace = StepTrace::new(STEPS, &state, workload.layout());
        let mut trainer = LocalTrainer::resume(&workload, state).unwrap();
        while trainer.state().step < STEPS {
            trainer.step(1).unwrap();
            let state = trainer.state();
            trace.record(state, workload.layout(), &state.weights_blake3());
        }
        let state = trainer.state();
        RunRecord::new(
            JobId(3),
            spec,
            &state.fingerprint,
            workload.split().train.digest(),
            &trace,
            STEPS,
            &state.weights_blake3(),
        )
    }

    fn folder_with(record: &RunRecord, task: &Task) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(RECORD_FILE), record.to_bytes()).unwrap();
        let task = serde_json::to_vec(task).unwrap();
        fs::write(folder.path().join(TASK_FILE), task).unwrap();
        folder
    }

    fn task() -> Task {
        Task {
            protocol: PROTOCOL,
            steps_max: None,
            blobs: BTreeMap::new(),
        }
    }

    fn spec() -> TrainSpec {
        TrainSpec {
            steps: STEPS,
            ..TrainSpec::digits_mlp("a")
        }
    }

    /// What is said of a folder, but for the steps on the way.
    fn told(folder: &Path) -> Vec<Told> {
        let mut said = Vec::new();
        answer(folder, &mut said).unwrap();
        let lines = said.split(|byte| *byte == b'\n');
        lines
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_slice(line).unwrap())
            .filter(|told| !matches!(told, Told::Step(_)))
            .collect()
    }

    #[test]
    fn whatever_this_crate_is_linked_into_has_the_role() {
        let mut roles = inventory::iter::<Role>.into_iter();
        assert!(roles.any(|role| role.name == ROLE));
    }

    #[test]
    fn a_run_is_made_from_what_lies_in_the_folder() {
        let folder = folder_with(&record(&spec(), &Files::local(), None), &task());
        let said = told(folder.path());
        let [Told::Here { protocol: 1 }, Told::Began, Told::Done(report)] = said.as_slice() else {
            panic!("{said:?}")
        };
        assert!(report.equal && report.steps == STEPS, "{report:?}");
        let part = Task {
            steps_max: Some(2),
            ..task()
        };
        let folder = folder_with(&record(&spec(), &Files::local(), None), &part);
        let said = told(folder.path());
        let Some(Told::Done(report)) = said.last() else {
            panic!("{said:?}")
        };
        assert!(report.equal && report.steps == 2, "{report:?}");
    }

    #[test]
    fn data_of_the_object_store_and_the_weights_of_another_job_lie_there_too() {
        let rows: String = (0..200)
            .map(|n| format!("{n},{},{}\n", n % 7, n % 2))
            .collect();
        let mut spec = spec();
        spec.dataset = DataSpec::Csv(CsvSpec {
            files: vec!["store:data/rows.csv".into()],
            header: false,
            shape: None,
            classes: Some(2),
            targets: None,
            scale: Some(200.0),
        });
        let copies = tempfile::tempdir().unwrap();
        let copy = copies.path().join("rows");
        fs::write(&copy, &rows).unwrap();
        let files = Files::with_copies([("data/rows.csv".to_owned(), copy)].into());
        let mut start = TrainState::initial(&Workload::load(&spec, &files).unwrap());
        start.params[3] = 0.25;
        spec.start_from = Some(StartFrom {
            manifest: "manifest/job-12/000000000300-4.json".to_owned(),
            digest: "ab".repeat(32),
        });

        let task = Task {
            blobs: [("data/rows.csv".to_owned(), "blob-0".to_owned())].into(),
            ..task()
        };
        let folder = folder_with(&record(&spec, &files, Some(&start)), &task);
        fs::write(folder.path().join("blob-0"), rows).unwrap();
        fs::write(folder.path().join(START_FILE), start.to_bytes()).unwrap();
        let said = told(folder.path());
        let Some(Told::Done(report)) = said.last() else {
            panic!("{said:?}")
        };
        assert!(report.equal, "{report:?}");
    }

    #[test]
    fn why_a_run_is_not_made_is_said() {
        let mut other = record(&spec(), &Files::local(), None);
        other.data.blake3 = "other".into();
        let newer = Task {
            protocol: PROTOCOL + 1,
            ..task()
        };
        let good = record(&spec(), &Files::local(), None);
        for (record, task, reason) in [
            (&other, task(), "is not what the run was trained on"),
            (&good, newer, "was asked by protocol 2"),
        ] {
            let folder = folder_with(record, &task);
            let said = told(folder.path());
            let Some(Told::Failed(text)) = said.last() else {
                panic!("{said:?}")
            };
            assert!(text.contains(reason), "{text}");
        }
    }
}
