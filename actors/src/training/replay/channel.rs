//! What passes between a program that replays a run and whoever started it for that: files in a folder one way, lines of
//! JSON the other way.
//!
//! The lines go over a socket that is the program's standard input. Its outputs are the model's own: what it prints there
//! is nobody's answer.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde::{Deserialize, Serialize};

use super::ReplayReport;

/// The name of the role.
pub(super) const ROLE: &str = "replay";

/// What both must speak. Another number is a change that an older program or `mobula` would misread; a field that may be
/// absent is none.
pub(super) const PROTOCOL: u32 = 1;

/// The files of the folder: the task, the record as it was stored, and the checkpoint that the run began with, if it began
/// with one.
pub(super) const TASK_FILE: &str = "task.json";
pub(super) const RECORD_FILE: &str = "record.json";
pub(super) const START_FILE: &str = "start";

/// A line's length: a report names a few thousand steps at the most.
pub(super) const LINE_BYTES_MAX: u64 = 1 << 20;

/// The length of a reason, so that it fits into a line.
const REASON_CHARS_MAX: usize = 16 << 10;

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Task {
    pub(super) protocol: u32,
    /// Only so many steps.
    pub(super) steps_max: Option<u64>,
    /// The blobs that the run's data consists of, and the file of each in the folder.
    pub(super) blobs: BTreeMap<String, String>,
}

/// What a program says, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Told {
    /// It has the role.
    Here { protocol: u32 },
    /// It has read whatever is in the folder.
    Began,
    /// So many steps were taken.
    Step(u64),
    /// What came of it.
    Done(ReplayReport),
    /// Why nothing came of it.
    Failed(String),
}

impl Told {
    /// Why nothing came of it, as far as it fits.
    pub(super) fn failed(reason: &str) -> Self {
        Told::Failed(reason.chars().take(REASON_CHARS_MAX).collect())
    }

    /// Says it.
    pub(super) fn tell(&self, channel: &mut impl Write) -> io::Result<()> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        channel.write_all(&line)
    }
}
