//! A notice by file: while it exists the machine is about to be taken away; removing it withdraws
//! the notice. This is how any cloud's own signal is passed on by a few lines of script.
//!
//! What the file may hold: nothing (the default grace), a number of seconds from now, or JSON with
//! one of `deadline_ms` (milliseconds since the Unix epoch), `grace_seconds`, or `time` (RFC 3339,
//! as in the spot `instance-action` document of AWS).

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::mpsc;

use super::{NoticeChange, NoticeSource, now_ms};
use crate::agent::Input;

/// No notice needs more; the rest of a larger file is not read.
const FILE_BYTES_MAX: u64 = 4096;

/// Why a notice file's text names no deadline.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoticeFileError {
    /// Neither empty, nor a number, nor JSON of the expected form.
    #[error(
        "`{text}` is not a notice: expected nothing, a number of seconds, or JSON with \
         `deadline_ms`, `grace_seconds` or `time` ({reason})"
    )]
    Malformed {
        /// Its beginning.
        text: String,
        /// What the parser met.
        reason: String,
    },
}

#[derive(Deserialize)]
struct NoticeJson {
    deadline_ms: Option<u64>,
    grace_seconds: Option<f64>,
    time: Option<String>,
}

/// The deadline that a notice file's `text` names, in milliseconds since the Unix epoch.
pub fn parse_notice_file(
    text: &str,
    now_ms: u64,
    default_grace_ms: u64,
) -> Result<u64, NoticeFileError> {
    let text = text.trim();
    let malformed = |reason: &dyn std::fmt::Display| NoticeFileError::Malformed {
        text: text.chars().take(80).collect(),
        reason: reason.to_string(),
    };
    let after_seconds = |seconds: f64| {
        let is_sane = seconds.is_finite() && (0.0..=31_536_000.0).contains(&seconds);
        is_sane
            .then(|| now_ms.saturating_add((seconds * 1000.0) as u64))
            .ok_or_else(|| malformed(&"seconds must be between 0 and one year"))
    };
    if text.is_empty() {
        return Ok(now_ms.saturating_add(default_grace_ms));
    }
    if let Ok(seconds) = text.parse::<f64>() {
        return after_seconds(seconds);
    }
    let json: NoticeJson = serde_json::from_str(text).map_err(|error| malformed(&error))?;
    match json {
        NoticeJson {
            deadline_ms: Some(deadline_ms),
            ..
        } => Ok(deadline_ms),
        NoticeJson {
            grace_seconds: Some(seconds),
            ..
        } => after_seconds(seconds),
        NoticeJson {
            time: Some(time), ..
        } => {
            let time = OffsetDateTime::parse(&time, &Rfc3339).map_err(|error| malformed(&error))?;
            u64::try_from(time.unix_timestamp_nanos() / 1_000_000)
                .map_err(|_| malformed(&"the time is before 1970"))
        }
        _ => Ok(now_ms.saturating_add(default_grace_ms)),
    }
}

/// Watches `path` until the agent ends.
pub(crate) async fn watch_file(
    path: PathBuf,
    poll: Duration,
    default_grace_ms: u64,
    inputs: mpsc::Sender<Input>,
) {
    let mut seen: Option<String> = None;
    let mut ticks = tokio::time::interval(poll);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let text = match read(&path) {
            Ok(text) => text,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot read the notice file");
                continue;
            }
        };
        if text == seen {
            continue;
        }
        let deadline_ms = text.as_deref().map(|text| {
            let now_ms = now_ms();
            parse_notice_file(text, now_ms, default_grace_ms).unwrap_or_else(|error| {
                // Somebody wants to warn us: better a guessed deadline than none.
                tracing::warn!(path = %path.display(), %error, default_grace_ms, "default grace");
                now_ms.saturating_add(default_grace_ms)
            })
        });
        seen = text;
        let change = NoticeChange {
            source: NoticeSource::File,
            deadline_ms,
        };
        if inputs.send(Input::Notice(change)).await.is_err() {
            return;
        }
    }
}

fn read(path: &Path) -> std::io::Result<Option<String>> {
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes)?;
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_names_its_deadline() {
        let cases = [
            ("", Some(31_000)),
            (" \n", Some(31_000)),
            ("10", Some(11_000)),
            ("0.5\n", Some(1_500)),
            ("0", Some(1_000)),
            (r#"{"deadline_ms": 77}"#, Some(77)),
            (r#"{"grace_seconds": 2}"#, Some(3_000)),
            (
                r#"{"action": "terminate", "time": "2017-09-18T08:22:00Z"}"#,
                Some(1_505_722_920_000),
            ),
            (r#"{"action": "terminate"}"#, Some(31_000)),
            (r#"{"time": "soon"}"#, None),
            ("-5", None),
            ("NaN", None),
            ("1e99", None),
            ("soon", None),
        ];
        for (text, deadline_ms) in cases {
            let parsed = parse_notice_file(text, 1_000, 30_000).ok();
            assert_eq!(parsed, deadline_ms, "{text:?}");
        }
    }

    #[tokio::test]
    async fn appearing_changing_and_vanishing_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notice");
        let (inputs, mut told) = mpsc::channel(4);
        let poll = Duration::from_millis(5);
        let watch = tokio::spawn(watch_file(path.clone(), poll, 30_000, inputs));
        let mut next = async || match told.recv().await {
            Some(Input::Notice(change)) => change.deadline_ms,
            other => panic!("expected a notice, got {other:?}"),
        };
        let write = |text: &str| {
            // Renamed into place, so that the watcher never sees half of it.
            let new = dir.path().join("new");
            std::fs::write(&new, text).unwrap();
            std::fs::rename(&new, &path).unwrap();
        };
        write(r#"{"deadline_ms": 5}"#);
        assert_eq!(next().await, Some(5));
        write(r#"{"deadline_ms": 6}"#);
        assert_eq!(next().await, Some(6));
        std::fs::remove_file(&path).unwrap();
        assert_eq!(next().await, None);
        watch.abort();
    }
}
