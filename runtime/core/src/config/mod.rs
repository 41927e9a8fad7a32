//! The configuration file: one TOML schema for heads and workers.
//!
//! Invariants:
//! 1. Every key is known: an unknown or mistyped one is refused with file, line and column.
//! 2. Every number is checked against its range before anything starts.
//!
//! Reading the file is the caller's; this module only understands its text.

mod schema;

pub use schema::{
    Config, HeadConfig, LimitsConfig, PreemptionConfig, RaftConfig, ResourcesConfig, S3Config,
    StorageConfig, SweepConfig, TokensConfig, WorkerConfig,
};

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not TOML, an unknown key, or a value of the wrong type.
    #[error("{file}:{line}:{column}: {message}")]
    Syntax {
        /// The file's name, as given.
        file: String,
        /// Line, counted from 1.
        line: usize,
        /// Column, counted from 1.
        column: usize,
        /// What is wrong.
        message: String,
    },
    /// A value outside its range.
    #[error("{file}: `{key}` is {value}: {rule}")]
    Range {
        /// The file's name, as given.
        file: String,
        /// The dotted key.
        key: &'static str,
        /// The value found.
        value: String,
        /// What is allowed, and why.
        rule: &'static str,
    },
}

/// Line and column, counted from 1, of a byte offset in a text.
#[must_use]
pub fn line_and_column(text: &str, offset: usize) -> (usize, usize) {
    let before = &text.as_bytes()[..offset.min(text.len())];
    let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
    let column = before
        .iter()
        .rev()
        .take_while(|byte| **byte != b'\n')
        .count()
        + 1;
    (line, column)
}

impl Config {
    /// Reads `text`; `file` is its name in errors.
    pub fn from_toml(text: &str, file: &str) -> Result<Config, ConfigError> {
        let config: Config = toml::from_str(text).map_err(|error| {
            let offset = error.span().map_or(0, |span| span.start);
            let (line, column) = line_and_column(text, offset);
            ConfigError::Syntax {
                file: file.to_owned(),
                line,
                column,
                message: error.message().to_owned(),
            }
        })?;
        config.check(file)?;
        Ok(config)
    }

    fn check(&self, file: &str) -> Result<(), ConfigError> {
        let range = |key, value: String, rule| {
            Err(ConfigError::Range {
                file: file.to_owned(),
                key,
                value,
                rule,
            })
        };
        let raft = &self.raft;
        if !(5..=1_000).contains(&raft.tick_ms) {
            return range(
                "raft.tick_ms",
                raft.tick_ms.to_string(),
                "allowed are 5 to 1000 ms",
            );
        }
        if raft.heartbeat_ticks == 0 {
            return range("raft.heartbeat_ticks", "0".into(), "must be at least 1");
        }
        if raft.election_ticks < 3 * raft.heartbeat_ticks {
            return range(
                "raft.election_ticks",
                raft.election_ticks.to_string(),
                "must be at least 3 times raft.heartbeat_ticks, or a healthy leader is voted out",
            );
        }
        let limits = &self.limits;
        if limits.renew_ms == 0 || limits.renew_ms * 3 > limits.lease_ms {
            return range(
                "limits.renew_ms",
                limits.renew_ms.to_string(),
                "must be between 1 ms and a third of limits.lease_ms, so that two losses are survived",
            );
        }
        if limits.suspect_ms > limits.lease_ms {
            return range(
                "limits.suspect_ms",
                limits.suspect_ms.to_string(),
                "must not exceed limits.lease_ms",
            );
        }
        let stopped_ms = self.worker.stopped_process_limit_ms;
        if (1..STOPPED_PROCESS_LIMIT_MS_MIN).contains(&stopped_ms) {
            return range(
                "worker.stopped_process_limit_ms",
                stopped_ms.to_string(),
                "must be 0 (no limit) or at least 1000: processes are looked at once a second",
            );
        }
        if !self.storage.url.contains("://") {
            return range(
                "storage.url",
                format!("`{}`", self.storage.url),
                "must be a URL: file:///path or s3://bucket/prefix",
            );
        }
        if self.storage.sweep.age_minutes < SWEEP_AGE_MINUTES_MIN {
            return range(
                "storage.sweep.age_minutes",
                self.storage.sweep.age_minutes.to_string(),
                "must be at least 60, twice the longest time that saving a checkpoint may take",
            );
        }
        if self.tokens.worker_ttl_hours == 0 || self.tokens.client_ttl_hours == 0 {
            return range(
                "tokens",
                "0 hours".into(),
                "a token must live for at least an hour",
            );
        }
        // Outages of half of it are survived; a year is as good as no renewal at all.
        if !(1..=365 * 24).contains(&self.tokens.host_certificate_ttl_hours) {
            return range(
                "tokens.host_certificate_ttl_hours",
                self.tokens.host_certificate_ttl_hours.to_string(),
                "allowed are 1 hour to 365 days",
            );
        }
        Ok(())
    }
}

/// How often a worker looks whether processes are stopped: less than that it does not see.
const STOPPED_PROCESS_LIMIT_MS_MIN: u64 = 1_000;

/// Twice the longest time that saving a checkpoint may take: what is younger may be on its way.
const SWEEP_AGE_MINUTES_MIN: u64 = 60;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(Config::from_toml("", "x.toml").unwrap(), Config::default());
    }

    #[test]
    fn unknown_and_mistyped_keys_are_refused_with_their_place() {
        let error =
            Config::from_toml("[raft]\ntick_ms = 25\nelektion = 3\n", "a.toml").unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("a.toml:3:1: unknown field `elektion`"),
            "{text}"
        );
        let error = Config::from_toml("[raft]\ntick_ms = \"x\"\n", "a.toml").unwrap_err();
        assert!(error.to_string().starts_with("a.toml:2:"), "{error}");
    }

    #[test]
    fn ranges_are_checked() {
        let cases = [
            ("[raft]\ntick_ms = 0", "raft.tick_ms"),
            ("[raft]\nelection_ticks = 2", "raft.election_ticks"),
            ("[limits]\nrenew_ms = 9000", "limits.renew_ms"),
            ("[limits]\nsuspect_ms = 90000", "limits.suspect_ms"),
            (
                "[worker]\nstopped_process_limit_ms = 999",
                "worker.stopped_process_limit_ms",
            ),
            ("[storage]\nurl = \"/tmp\"", "storage.url"),
            (
                "[storage.sweep]\nage_minutes = 59",
                "storage.sweep.age_minutes",
            ),
            ("[tokens]\nworker_ttl_hours = 0", "tokens"),
            (
                "[tokens]\nhost_certificate_ttl_hours = 0",
                "tokens.host_certificate_ttl_hours",
            ),
        ];
        for (text, key) in cases {
            let error = Config::from_toml(text, "a.toml").unwrap_err();
            assert!(error.to_string().contains(&format!("`{key}`")), "{error}");
        }
        // That one is switched off.
        let off = Config::from_toml("[worker]\nstopped_process_limit_ms = 0", "a.toml").unwrap();
        assert_eq!(off.worker.stopped_process_limit_ms, 0);
    }
}
