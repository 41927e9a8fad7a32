//! Acknowledged jobs: each there exactly once (I2, I3), each with exactly one end (I5).
//!
//! The ledger is told every acknowledgement, every look at the cluster's list of jobs, and what
//! the jobs themselves left behind. It is not told why: it knows no faults.

use std::collections::{BTreeMap, BTreeSet};

/// A job as one look at the cluster showed it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenJob {
    /// Its id.
    pub id: u64,
    /// The key it was submitted under.
    pub key: String,
    /// How it ended: state, time and result; `None` while it is under way.
    pub end: Option<String>,
}

/// A promise that was broken.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub enum Violation {
    /// One key was acknowledged with two ids.
    #[error("key {key} was acknowledged as jobs {ids:?}: a retry became a second job (I3)")]
    AcknowledgedTwice {
        /// The key.
        key: String,
        /// The ids.
        ids: Vec<u64>,
    },
    /// An acknowledged job is not in the last list.
    #[error("job {id} of key {key} was acknowledged and is not there (I2)")]
    Lost {
        /// The key.
        key: String,
        /// The id.
        id: u64,
    },
    /// One key has several jobs in the last list.
    #[error("key {key} has jobs {ids:?}: one submission took effect more than once (I3)")]
    Doubled {
        /// The key.
        key: String,
        /// The ids.
        ids: Vec<u64>,
    },
    /// A job is there that nobody submitted.
    #[error("job {id} has key {key}, which nobody submitted")]
    Unasked {
        /// The key.
        key: String,
        /// The id.
        id: u64,
    },
    /// A job that had ended was seen differently later.
    #[error("job {id} ended as `{first}` and was later seen as `{later}` (I5)")]
    EndChanged {
        /// The id.
        id: u64,
        /// How it ended.
        first: String,
        /// What was seen later.
        later: String,
    },
    /// A job had not ended at the last look.
    #[error("job {id} of key {key} has not ended (I5)")]
    NotEnded {
        /// The key.
        key: String,
        /// The id.
        id: u64,
    },
    /// A job's program ran another number of times than it may.
    #[error("the job of key {key} really ran {runs} times, and may run {least} to {most} times")]
    Runs {
        /// The key.
        key: String,
        /// How often it ran.
        runs: u64,
        /// The least allowed.
        least: u64,
        /// The most allowed.
        most: u64,
    },
}

/// What a run showed of its jobs.
#[derive(Debug, Clone, Default)]
pub struct JobLedger {
    submitted: BTreeSet<String>,
    may_not_run: BTreeSet<String>,
    acknowledged: BTreeMap<String, BTreeSet<u64>>,
    ends: BTreeMap<u64, String>,
    runs: BTreeMap<String, u64>,
    last: Vec<SeenJob>,
    violations: BTreeSet<Violation>,
}

impl JobLedger {
    /// A client is about to submit under this key.
    pub fn submitted(&mut self, key: &str) {
        self.submitted.insert(key.to_owned());
    }

    /// A client was told that its submission is this job.
    pub fn acknowledged(&mut self, key: &str, id: u64) {
        self.submitted(key);
        self.acknowledged
            .entry(key.to_owned())
            .or_default()
            .insert(id);
    }

    /// A client is about to stop the job of this key: its program may not have run when it ends.
    pub fn may_not_run(&mut self, key: &str) {
        self.may_not_run.insert(key.to_owned());
    }

    /// Whether a client asked to stop the job of this key.
    #[must_use]
    pub fn was_stopped(&self, key: &str) -> bool {
        self.may_not_run.contains(key)
    }

    /// The jobs of the last look.
    #[must_use]
    pub fn last_seen(&self) -> &[SeenJob] {
        &self.last
    }

    /// The program of this key's job ran, by its own account.
    pub fn ran(&mut self, key: &str) {
        *self.runs.entry(key.to_owned()).or_default() += 1;
    }

    /// How many keys were acknowledged.
    #[must_use]
    pub fn acknowledged_count(&self) -> usize {
        self.acknowledged.len()
    }

    /// One look at all of the cluster's jobs.
    pub fn look(&mut self, jobs: Vec<SeenJob>) {
        for job in &jobs {
            let Some(first) = self.ends.get(&job.id) else {
                self.ends.extend(job.end.clone().map(|end| (job.id, end)));
                continue;
            };
            if job.end.as_ref() != Some(first) {
                self.violations.insert(Violation::EndChanged {
                    id: job.id,
                    first: first.clone(),
                    later: job.end.clone().unwrap_or_else(|| "under way".to_owned()),
                });
            }
        }
        self.last = jobs;
    }

    /// All promises that were broken, after the last look; each job's program may run once, and
    /// `restarts_max` times more.
    #[must_use]
    pub fn check(&self, restarts_max: u64) -> Vec<Violation> {
        let mut found = self.violations.clone();
        let mut there: BTreeMap<&str, Vec<&SeenJob>> = BTreeMap::new();
        for job in &self.last {
            there.entry(&job.key).or_default().push(job);
        }
        for (key, ids) in &self.acknowledged {
            if ids.len() > 1 {
                let (key, ids) = (key.clone(), ids.iter().copied().collect());
                found.insert(Violation::AcknowledgedTwice { key, ids });
            }
            for id in self.acknowledged[key].iter().copied() {
                let jobs = there.get(key.as_str());
                if !jobs.is_some_and(|jobs| jobs.iter().any(|job| job.id == id)) {
                    let key = key.clone();
                    found.insert(Violation::Lost { key, id });
                }
            }
        }
        for (key, jobs) in there {
            let owned = key.to_owned();
            if jobs.len() > 1 {
                let ids = jobs.iter().map(|job| job.id).collect();
                found.insert(Violation::Doubled {
                    key: owned.clone(),
                    ids,
                });
            }
            for job in &jobs {
                let (key, id) = (owned.clone(), job.id);
                if !self.submitted.contains(&key) {
                    found.insert(Violation::Unasked { key, id });
                } else if job.end.is_none() {
                    found.insert(Violation::NotEnded { key, id });
                }
            }
            let runs = self.runs.get(key).copied().unwrap_or(0);
            let least = u64::from(!self.may_not_run.contains(key));
            let most = 1 + restarts_max;
            if !(least..=most).contains(&runs) {
                found.insert(Violation::Runs {
                    key: owned,
                    runs,
                    least,
                    most,
                });
            }
        }
        found.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(id: u64, key: &str, end: Option<&str>) -> SeenJob {
        SeenJob {
            id,
            key: key.to_owned(),
            end: end.map(str::to_owned),
        }
    }

    /// Two jobs that ran and ended as they should.
    fn good() -> JobLedger {
        let mut ledger = JobLedger::default();
        for (id, key) in [(1, "a"), (2, "b")] {
            ledger.acknowledged(key, id);
            ledger.ran(key);
        }
        ledger.look(vec![seen(1, "a", Some("succeeded")), seen(2, "b", None)]);
        ledger.look(vec![
            seen(1, "a", Some("succeeded")),
            seen(2, "b", Some("succeeded")),
        ]);
        ledger
    }

    #[test]
    fn each_broken_promise_is_found() {
        assert_eq!(good().check(0), []);
        type Plant = fn(&mut JobLedger);
        let planted: [(Plant, &str); 8] = [
            (|l| l.acknowledged("a", 7), "acknowledged as jobs [1, 7]"),
            (
                |l| l.acknowledged("c", 3),
                "job 3 of key c was acknowledged and is not there",
            ),
            (
                |l| l.last.push(seen(9, "a", Some("succeeded"))),
                "key a has jobs [1, 9]",
            ),
            (
                |l| l.last.push(seen(9, "x", Some("failed"))),
                "key x, which nobody submitted",
            ),
            (
                |l| l.look(vec![seen(1, "a", Some("failed"))]),
                "ended as `succeeded` and was later",
            ),
            (
                |l| l.look(vec![seen(1, "a", None)]),
                "later seen as `under way`",
            ),
            (
                |l| {
                    l.submitted("c");
                    l.last.push(seen(3, "c", None));
                },
                "job 3 of key c has not ended",
            ),
            (
                |l| l.ran("b"),
                "key b really ran 2 times, and may run 1 to 1 times",
            ),
        ];
        for (plant, expected) in planted {
            let mut ledger = good();
            plant(&mut ledger);
            let found = ledger.check(0);
            let found: Vec<String> = found.iter().map(ToString::to_string).collect();
            assert!(
                found.iter().any(|text| text.contains(expected)),
                "{expected}: {found:?}"
            );
        }
    }

    #[test]
    fn a_job_that_was_stopped_need_not_have_run() {
        let mut ledger = good();
        ledger.acknowledged("c", 3);
        let ended = ["a", "b", "c"].iter().zip(1..);
        ledger.look(
            ended
                .map(|(key, id)| seen(id, key, Some("succeeded")))
                .collect(),
        );
        assert_eq!(ledger.check(0).len(), 1, "it never ran");
        ledger.may_not_run("c");
        assert_eq!(ledger.check(0), []);
        assert!(ledger.was_stopped("c") && !ledger.was_stopped("a"));
    }

    #[test]
    fn what_was_submitted_and_not_acknowledged_may_be_there_or_not() {
        let mut ledger = good();
        ledger.submitted("c");
        assert_eq!(ledger.check(0), []);
        ledger.ran("c");
        ledger.last.push(seen(3, "c", Some("succeeded")));
        assert_eq!(ledger.check(0), []);
    }
}
