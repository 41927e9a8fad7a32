//! What a job tells people: lines on its standard output, which the worker keeps as the job's log.

use std::fmt;

/// Where a job's lines go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobLog {
    /// To standard output.
    Stdout,
    /// Nowhere, in tests.
    Silent,
}

impl JobLog {
    /// Writes one line.
    pub fn line(self, text: fmt::Arguments<'_>) {
        if self == JobLog::Stdout {
            println!("{text}");
        }
    }
}
