//! Labels of data, and which data a job and a version come from.
//!
//! Data is named by BLAKE3 in hex: of one of its files, as `b3sum` prints it, or of a whole data set as training
//! reports it (`dataset_blake3`), which also covers how the files are read. A label of a file holds for every
//! data set with that file, however it is read.
//!
//! Invariants:
//! 1. A label is taken away only with the signature of a key with the role `admin`, where there is one.
//! 2. A version has the labels of all data that went into it, also of that behind the checkpoint that its job
//!    began with.

use std::collections::BTreeSet;

use mobula_core::control::{ApplyContext, Reader, Txn};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::row;
use serde::{Deserialize, Serialize};

use crate::registry::envelope::Envelope;
use crate::registry::events::{self, Event};
use crate::registry::tables::{DATA, ENDS_KEY, TRAINED, TRAINED_ENDS, VERSION_DATA, version_key};
use crate::registry::versions::{ModelVersion, check_digest};
use crate::registry::{keys, statement};

/// Labelled data of a cluster: a list of all of it is one that people read.
const DATA_MAX: usize = 10_000;

/// Rows in one answer: each has 1.3 KiB at the most.
pub(in crate::registry) const DATA_PAGE: usize = 1_000;

/// Labels of one piece of data.
const LABELS_MAX: usize = 16;

/// The longest name of data, in bytes: a file's path.
const NAME_BYTES_MAX: usize = 256;

/// Data sets behind one job, by way of the checkpoints that jobs began with.
const ORIGINS_MAX: usize = 16;

/// Files of one data set whose digests are told: each is looked up at a gate. A data set with more is labelled
/// as a whole.
pub const FILES_MAX: usize = 1_024;

/// Jobs whose data is remembered, for jobs that begin with their checkpoints; the oldest go first. A version
/// remembers its own for good.
const JOBS_MAX: u64 = 10_000;

/// What data is labelled as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataRecord {
    /// Its BLAKE3, in hex.
    pub digest: String,
    /// What people call it.
    pub name: String,
    /// Its labels.
    pub labels: BTreeSet<String>,
    /// How often it was labelled.
    pub revision: u64,
    /// When last, in milliseconds since the Unix epoch.
    pub since_ms: u64,
}

/// A data set, as a training job reads it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DataSet {
    /// Its BLAKE3, in hex.
    pub digest: String,
    /// BLAKE3 of each of its files, in hex.
    pub files: Vec<String>,
}

/// The data that a job trained on, its own first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainedOn {
    /// Its own, and those behind the checkpoint that it began with.
    pub data: Vec<DataSet>,
}

/// Which jobs are remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct TrainedEnds {
    /// How many.
    pub count: u64,
    /// The last one that was forgotten.
    pub forgotten: u64,
}

/// What is known of data.
pub fn find(reader: &dyn Reader, digest: &str) -> Option<DataRecord> {
    row::get(reader, DATA, digest.as_bytes())
}

/// A page of labelled data behind `after`, by digest.
pub(in crate::registry) fn page(reader: &dyn Reader, after: Option<&str>) -> Vec<DataRecord> {
    let rows = reader.scan(DATA, &[], after.map(str::as_bytes), DATA_PAGE);
    rows.iter()
        .map(|(_, bytes)| row::from_bytes(DATA, bytes))
        .collect()
}

/// Says what data is.
pub(in crate::registry) fn label(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    change: &LabelChange,
) -> Result<DataRecord, Rejection> {
    let LabelChange {
        data,
        name,
        labels,
        expected_revision,
        envelope,
    } = change;
    check_digest("data", data)?;
    for label in labels {
        crate::name::check("a label", label)?;
    }
    if labels.len() > LABELS_MAX || name.len() > NAME_BYTES_MAX {
        return Err(Rejection::invalid(format!(
            "{} labels and a name of {} bytes, the limits are {LABELS_MAX} and {NAME_BYTES_MAX}: label it \
             with fewer, or shorten the name",
            labels.len(),
            name.len()
        )));
    }
    let before = find(txn, data);
    let revision = before.as_ref().map_or(0, |before| before.revision);
    if revision != *expected_revision {
        return Err(Rejection::fenced(format!(
            "{data} is at revision {revision}, and this was decided on revision {expected_revision}: \
             somebody labelled it since; look again with `mobula data show {data}`"
        )));
    }
    if before.is_none() && txn.scan(DATA, &[], None, DATA_MAX).len() == DATA_MAX {
        return Err(Rejection::new(
            ErrorCode::FailedPrecondition,
            format!(
                "{DATA_MAX} pieces of data are labelled, the limit: label the data sets instead of their files"
            ),
        ));
    }
    let is_weaker = before
        .as_ref()
        .is_some_and(|before| !before.labels.is_subset(labels));
    let envelope = envelope.as_ref();
    let signers = match is_weaker {
        false => Vec::new(),
        true => {
            let signed = statement::labels(data, name, labels, *expected_revision);
            keys::check_admin(txn, "taking away of labels", &signed, envelope)?
        }
    };
    let record = DataRecord {
        digest: data.clone(),
        name: name.clone(),
        labels: labels.clone(),
        revision: revision + 1,
        since_ms: context.now_ms,
    };
    row::put(txn, DATA, data.as_bytes(), &record);
    let event = Event::DataLabelled {
        data,
        name,
        labels,
        revision: record.revision,
        signers: &signers,
        envelopes: envelope
            .filter(|_| is_weaker)
            .map(Envelope::to_json)
            .into_iter()
            .collect(),
    };
    events::append(txn, context, &event);
    Ok(record)
}

/// What data should be labelled as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelChange {
    /// Its BLAKE3, in hex.
    pub data: String,
    /// What people call it.
    pub name: String,
    /// All of its labels from now on.
    pub labels: BTreeSet<String>,
    /// The data's revision that this was decided on; 0 for data that is not labelled.
    pub expected_revision: u64,
    /// [`statement::labels`], signed: needed to take a label away.
    pub envelope: Option<Envelope>,
}

/// The labels of these data sets and of their files.
pub(super) fn labels_of(reader: &dyn Reader, data: &[DataSet]) -> BTreeSet<String> {
    let digests = data
        .iter()
        .flat_map(|set| std::iter::once(&set.digest).chain(&set.files));
    digests
        .filter_map(|digest| find(reader, digest))
        .flat_map(|record| record.labels)
        .collect()
}

/// The data behind a job that reads `own` and begins with a checkpoint of `parent`.
pub(super) fn origins(
    reader: &dyn Reader,
    own: &DataSet,
    parent: Option<u64>,
) -> Result<Vec<DataSet>, Rejection> {
    check_digest("data", &own.digest)?;
    for file in &own.files {
        check_digest("a file of the data", file)?;
    }
    if own.files.len() > FILES_MAX {
        return Err(Rejection::invalid(format!(
            "the data has {} files, the limit is {FILES_MAX}: name the data set only",
            own.files.len()
        )));
    }
    let parent = parent.and_then(|job| of_job(reader, job));
    let inherited = parent.map(|parent| parent.data).unwrap_or_default();
    let mut data = vec![own.clone()];
    data.extend(inherited.into_iter().filter(|set| set != own));
    if data.len() > ORIGINS_MAX {
        return Err(Rejection::new(
            ErrorCode::FailedPrecondition,
            format!(
                "{} data sets are behind the checkpoint that the job begins with, the limit is \
                 {ORIGINS_MAX}: begin with a checkpoint that comes from fewer",
                data.len()
            ),
        ));
    }
    Ok(data)
}

/// The data that a job trained on, as far as that is remembered.
fn of_job(reader: &dyn Reader, job: u64) -> Option<TrainedOn> {
    row::get(reader, TRAINED, &job.to_be_bytes())
}

/// Remembers what a job trains on.
pub(super) fn remember(txn: &mut dyn Txn, job: u64, data: Vec<DataSet>) {
    let key = job.to_be_bytes();
    let is_new = of_job(txn, job).is_none();
    row::put(txn, TRAINED, &key, &TrainedOn { data });
    if !is_new {
        return;
    }
    let mut ends: TrainedEnds = row::get(txn, TRAINED_ENDS, ENDS_KEY).unwrap_or_default();
    ends.count += 1;
    if ends.count > JOBS_MAX {
        // From behind the last that went: a store walks over what was deleted.
        let after = ends.forgotten.to_be_bytes();
        for (key, _) in txn.scan(TRAINED, &[], Some(&after), 1) {
            txn.delete(TRAINED, &key);
            ends.forgotten = row::number_at(&key, 0);
            ends.count -= 1;
        }
    }
    row::put(txn, TRAINED_ENDS, ENDS_KEY, &ends);
}

/// Remembers for good what a new version comes from.
pub(in crate::registry) fn note_version(txn: &mut dyn Txn, version: &ModelVersion) {
    let description = &version.description;
    // A job may register what it did not train itself.
    let trained = of_job(txn, description.job).filter(|trained| {
        let mut sets = trained.data.iter();
        sets.any(|set| set.digest == description.dataset_blake3)
    });
    if let Some(trained) = trained {
        let key = version_key(&description.model, version.version);
        row::put(txn, VERSION_DATA, &key, &trained);
    }
}

/// The data that a version comes from.
pub fn of_version(reader: &dyn Reader, version: &ModelVersion) -> Vec<DataSet> {
    let description = &version.description;
    let key = version_key(&description.model, version.version);
    let known: Option<TrainedOn> = row::get(reader, VERSION_DATA, &key);
    known.map_or_else(
        || {
            let digest = description.dataset_blake3.clone();
            let files = Vec::new();
            vec![DataSet { digest, files }]
        },
        |trained| trained.data,
    )
}
