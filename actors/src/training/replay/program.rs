//! Making a run of a user's own model once more: in the program that ran, fetched from the cluster's object store and
//! started on this machine.
//!
//! Invariants:
//! 1. Only the program that the run's record names is started, and only after its hash was found to be that one.
//! 2. The user's `main` does not run, also not that of a program which cannot replay (`mobula::role`).
//! 3. The program and what it works with lie in a folder that only this user may enter. It is removed as soon as the
//!    program has read what is there, and when this ends in any other way.
//! 4. The program needs no cluster, and gets no token of one and no key of the object store. It does have the rights of
//!    whoever runs this.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::TryStreamExt;
use mobula_storage::artifact::{ArtifactError, ArtifactId, ArtifactStore};
use mobula_storage::digest::{Digest, ParseDigestError};
use tempfile::TempDir;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::Child;

use super::ReplayReport;
use super::channel::{
    LINE_BYTES_MAX, PROTOCOL, RECORD_FILE, ROLE, START_FILE, TASK_FILE, Task, Told,
};
use crate::checkpoint::client::Archive;
use crate::training::data::DataError;
use crate::training::data::files::STORE_PREFIX;
use crate::training::job_log::JobLog;
use crate::training::record::{RecordError, RunRecord};
use crate::training::start_from::StartError;
use crate::training::validation::InvalidField;

/// The largest program, as heads take them.
const PROGRAM_BYTES_MAX: u64 = 4 << 30;

/// How long a program may take to say its first word: it is only started for that.
const FIRST_WORD_MAX: Duration = Duration::from_secs(60);

/// How long a program may take to end when it says no more.
const END_MAX: Duration = Duration::from_secs(5);

/// How far a replay is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplayStage {
    /// The run's data is there.
    Began,
    /// So many steps were taken; said about twice a second.
    Step(u64),
}

/// Why a run was not made once more by the program that ran.
#[derive(Debug, thiserror::Error)]
pub enum ProgramReplayError {
    /// Its record cannot be read.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The record does not say which program it was.
    #[error(
        "the run's record does not say which program ran, because its file could not be read there: replay the run in a \
         program that the model is linked into (docs/reproducing.md)"
    )]
    Unnamed,
    /// The object store does not have the program.
    #[error(
        "the program that ran (BLAKE3 {0}) is not in the cluster's object store any more: replay the run in a program \
         that the model is linked into (docs/reproducing.md)"
    )]
    Gone(Digest),
    /// The program cannot be fetched, or is not what was stored.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    /// The run's data cannot be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The record's description of the start is wrong.
    #[error(transparent)]
    Invalid(#[from] InvalidField),
    /// The weights that it began with cannot be read.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The folder for it cannot be made or written.
    #[error("{}: {source}; a replay needs room for the program and the run's data in the folder that TMPDIR names", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The system does not run the program.
    #[error(
        "the program that ran does not start on this machine: {source}. It ran on {ran_on}, and this is {here}: replay \
         the run on such a machine, or, if programs may not be run from the folder that TMPDIR names, name another one"
    )]
    Exec {
        /// What the system said.
        source: io::Error,
        /// The architecture and operating system of the run's driver.
        ran_on: String,
        /// Those of this machine.
        here: String,
    },
    /// It does not know how to replay.
    #[error(
        "the program that ran (with mobula {version}) does not say that it can replay: {end}. Its release of Mobula may be \
         from before programs could; then replay the run in a program that the model is linked into (docs/reproducing.md)"
    )]
    NoRole {
        /// The version of Mobula that it was built with.
        version: String,
        /// How it ended.
        end: String,
    },
    /// It replays in another way.
    #[error(
        "the program that ran replays by protocol {found}, and this `mobula` by protocol {PROTOCOL}: use the `mobula` of \
         its release ({version})"
    )]
    OtherProtocol {
        /// The program's.
        found: u32,
        /// The version of Mobula that it was built with.
        version: String,
    },
    /// It ended too early.
    #[error(
        "the program that ran gave up the replay without a word: {0}; what it printed stands above"
    )]
    Died(String),
    /// It says what nobody understands.
    #[error(
        "the program that ran says what is no answer: {0}; did it write to its standard input?"
    )]
    Malformed(String),
    /// It says why it does not.
    #[error("{0}")]
    Failed(String),
}

fn file_error(path: &Path) -> impl Fn(io::Error) -> ProgramReplayError {
    let path = path.to_owned();
    move |source| ProgramReplayError::File {
        path: path.clone(),
        source,
    }
}

/// Makes the run whose record `digest` (in hex) names once more, at most `steps_max` steps of it, in the program that ran:
/// that is fetched from `archive` and runs on this machine, in this process's working directory and with the rights of its
/// user. What it prints goes to standard error. `heard` hears how far it is.
///
/// When this is dropped before its end, the program is killed and nothing of it stays.
pub async fn replay_in_program(
    archive: &Archive,
    digest: &str,
    steps_max: Option<u64>,
    heard: impl FnMut(ReplayStage),
) -> Result<ReplayReport, ProgramReplayError> {
    let bytes = archive.record_bytes(digest).await?;
    let record = RunRecord::from_bytes(&bytes)?;
    let folder = private_folder()?;
    // First what fails soonest.
    let program = fetch_program(archive, &record, folder.path()).await?;
    write(&folder.path().join(RECORD_FILE), &bytes).await?;
    prepare(archive, &record, steps_max, folder.path()).await?;
    let (program, channel) = start(&program, folder.path(), &record)?;
    listen(program, channel, folder, &record, heard).await
}

fn private_folder() -> Result<TempDir, ProgramReplayError> {
    tempfile::Builder::new()
        .prefix("mobula-replay-")
        .permissions(Permissions::from_mode(0o700))
        .tempdir()
        .map_err(file_error(&std::env::temp_dir()))
}

async fn write(path: &Path, bytes: &[u8]) -> Result<(), ProgramReplayError> {
    tokio::fs::write(path, bytes)
        .await
        .map_err(file_error(path))
}

/// Puts the program that ran into the folder, if it still is what it was.
async fn fetch_program(
    archive: &Archive,
    record: &RunRecord,
    folder: &Path,
) -> Result<PathBuf, ProgramReplayError> {
    let Some(named) = &record.program.blake3 else {
        return Err(ProgramReplayError::Unnamed);
    };
    let blake3: Digest = named
        .parse()
        .map_err(|error: ParseDigestError| RecordError::Malformed(error.to_string()))?;
    let mut id = ArtifactId {
        blake3,
        size_bytes: 0,
    };
    let blobs = archive.blobs();
    let found = blobs.head(&id.path()).await.map_err(ArtifactError::from)?;
    // The record has no size; the hash says whether these are the right bytes.
    id.size_bytes = found.ok_or(ProgramReplayError::Gone(blake3))?.size_bytes;
    let path = folder.join("program");
    let artifacts = ArtifactStore::new(blobs.clone(), PROGRAM_BYTES_MAX);
    match artifacts.fetch(&id, &path).await {
        Err(error) if error.is_not_found() => return Err(ProgramReplayError::Gone(blake3)),
        fetched => fetched?,
    }
    tokio::fs::set_permissions(&path, Permissions::from_mode(0o700))
        .await
        .map_err(file_error(&path))?;
    Ok(path)
}

/// Puts what the program needs into the folder: blobs of the run's data, the weights that it began with, and the task.
async fn prepare(
    archive: &Archive,
    record: &RunRecord,
    steps_max: Option<u64>,
    folder: &Path,
) -> Result<(), ProgramReplayError> {
    let names = record.spec.dataset.files();
    let mut blobs = BTreeMap::new();
    for blob in names
        .into_iter()
        .filter_map(|name| name.strip_prefix(STORE_PREFIX))
    {
        let file = format!("blob-{}", blobs.len());
        blobs.entry(blob.to_owned()).or_insert(file);
    }
    for (blob, file) in &blobs {
        fetch_blob(archive, blob, &folder.join(file)).await?;
    }
    if let Some(from) = &record.spec.start_from {
        from.validate()?;
        let open = || Ok(archive.blobs().clone());
        let checkpoint = from.fetch(open, JobLog::Silent).await?;
        write(&folder.join(START_FILE), &checkpoint).await?;
    }
    let task = Task {
        protocol: PROTOCOL,
        steps_max,
        blobs,
    };
    let path = folder.join(TASK_FILE);
    let task = serde_json::to_vec(&task).map_err(|error| file_error(&path)(error.into()))?;
    write(&path, &task).await
}

/// Copies a blob of the run's data, which may be larger than memory, to a file.
async fn fetch_blob(archive: &Archive, blob: &str, path: &Path) -> Result<(), ProgramReplayError> {
    let failed = |source| DataError::Store {
        file: blob.to_owned(),
        source,
    };
    let (_, mut bytes) = archive.blobs().get_stream(blob).await.map_err(failed)?;
    let mut file = tokio::fs::File::create(path)
        .await
        .map_err(file_error(path))?;
    while let Some(part) = bytes.try_next().await.map_err(failed)? {
        file.write_all(&part).await.map_err(file_error(path))?;
    }
    file.flush().await.map_err(file_error(path))
}

/// Starts the program. What it says can be read from the socket.
fn start(
    program: &Path,
    folder: &Path,
    record: &RunRecord,
) -> Result<(Child, UnixStream), ProgramReplayError> {
    let failed = |source| ProgramReplayError::Exec {
        source,
        ran_on: ran_on(record),
        here: format!("{} {}", std::env::consts::ARCH, std::env::consts::OS),
    };
    let (ours, theirs) = StdUnixStream::pair().map_err(failed)?;
    ours.set_nonblocking(true).map_err(failed)?;
    let ours = UnixStream::from_std(ours).map_err(failed)?;
    let mut command = tokio::process::Command::from(mobula::role::command(program, ROLE, folder));
    command
        .stdin(OwnedFd::from(theirs))
        // Standard output is the answer of whoever asked for the replay.
        .stdout(io::stderr())
        .kill_on_drop(true);
    let child = command.spawn().map_err(failed)?;
    // The command goes here, and with it our own copy of the program's end of the socket.
    Ok((child, ours))
}

fn ran_on(record: &RunRecord) -> String {
    let environment = &record.environment;
    let architecture = environment.isa.first().map_or("unknown", String::as_str);
    format!("{architecture} {}", environment.os)
}

/// Hears what the program says until it has an answer.
async fn listen(
    mut program: Child,
    channel: UnixStream,
    folder: TempDir,
    record: &RunRecord,
    mut heard: impl FnMut(ReplayStage),
) -> Result<ReplayReport, ProgramReplayError> {
    let mut lines = BufReader::new(channel);
    let version = || record.program.version.clone();
    match tokio::time::timeout(FIRST_WORD_MAX, next(&mut lines)).await {
        Ok(Ok(Some(Told::Here { protocol: PROTOCOL }))) => {}
        Ok(Ok(Some(Told::Here { protocol: found }))) => {
            let version = version();
            return Err(ProgramReplayError::OtherProtocol { found, version });
        }
        Ok(Err(error)) => return Err(error),
        Ok(Ok(_)) | Err(_) => {
            let (version, end) = (version(), end_of(&mut program).await);
            return Err(ProgramReplayError::NoRole { version, end });
        }
    }
    let mut folder = Some(folder);
    loop {
        match next(&mut lines).await? {
            Some(Told::Began) => {
                // Before anything is said: who hears it may write to a pipe that is closed, and end this process.
                drop(folder.take());
                heard(ReplayStage::Began);
            }
            Some(Told::Step(step)) => heard(ReplayStage::Step(step)),
            Some(Told::Done(report)) if report.recorded_weights_blake3 != record.weights_blake3 => {
                let reason = "it is about another run".to_owned();
                return Err(ProgramReplayError::Malformed(reason));
            }
            Some(Told::Done(report)) => {
                // Nothing is lost if it is killed on its way out, but it may have something to print.
                let _ = tokio::time::timeout(END_MAX, program.wait()).await;
                return Ok(report);
            }
            Some(Told::Failed(reason)) => return Err(ProgramReplayError::Failed(reason)),
            Some(Told::Here { .. }) => {
                let reason = "it begins twice".to_owned();
                return Err(ProgramReplayError::Malformed(reason));
            }
            None => return Err(ProgramReplayError::Died(end_of(&mut program).await)),
        }
    }
}

/// How a program ended that says no more.
async fn end_of(program: &mut Child) -> String {
    match tokio::time::timeout(END_MAX, program.wait()).await {
        Ok(Ok(status)) => format!("it ended with {status}"),
        Ok(Err(error)) => format!("how it ended is not known: {error}"),
        Err(_) => "it had not ended, and was killed".to_owned(),
    }
}

/// What the program says next; nothing if it has said all.
async fn next(lines: &mut (impl AsyncBufRead + Unpin)) -> Result<Option<Told>, ProgramReplayError> {
    let malformed = ProgramReplayError::Malformed;
    let mut line = Vec::new();
    let read = AsyncReadExt::take(&mut *lines, LINE_BYTES_MAX)
        .read_until(b'\n', &mut line)
        .await
        .map_err(|error| malformed(error.to_string()))?;
    if line.last() == Some(&b'\n') {
        return serde_json::from_slice(&line)
            .map(Some)
            .map_err(|error| malformed(error.to_string()));
    }
    if read as u64 == LINE_BYTES_MAX {
        return Err(malformed(format!(
            "a line of more than {LINE_BYTES_MAX} bytes"
        )));
    }
    // It ended, perhaps in the middle of a line.
    Ok(None)
}

#[cfg(test)]
#[path = "program_tests.rs"]
mod tests;
