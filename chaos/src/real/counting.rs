//! The workload's counter: a job whose calls must count once each.

use std::path::{Path, PathBuf};
use std::time::Duration;

use mobula::Cluster;
use mobula::core::id::JobId;
use serde_json::Value;

use super::cluster::{ClusterError, RealCluster};
use super::job;
use super::outcome::Check;
use super::scenario::Scenario;
use super::traffic::Traffic;

/// That job, where the workload has one.
pub(super) struct Counting {
    pub(super) job: Option<JobId>,
    stop_file: PathBuf,
}

impl Counting {
    pub(super) async fn start(
        scenario: &Scenario,
        cluster: &RealCluster,
        dir: &Path,
    ) -> Result<Counting, ClusterError> {
        let stop_file = dir.join("stop-counting");
        let rate = scenario.workload.increments_per_second;
        if rate <= 0.0 {
            let job = None;
            return Ok(Counting { job, stop_file });
        }
        let client: Cluster = cluster.client().await?;
        let submitted = client
            .new_job("counting")
            .builtin()
            .args(job::count_arguments(&stop_file, rate))
            .cpus(0.1)
            .submit()
            .await
            .map_err(|reason| ClusterError::Api {
                what: "the counting job",
                reason,
            })?;
        Ok(Counting {
            job: Some(submitted.id()),
            stop_file,
        })
    }

    pub(super) fn stop(&self) {
        // Without it the check below finds that the job has not ended.
        let _ = std::fs::write(&self.stop_file, "");
    }

    /// Whether each acknowledged call counted once.
    pub(super) async fn check(
        &self,
        cluster: &RealCluster,
        limit: Duration,
        traffic: &Traffic,
    ) -> Option<Check> {
        let handle = cluster.admin().job_handle(self.job?);
        let ended = tokio::time::timeout(limit, handle.result::<Value>()).await;
        let told = match ended {
            Ok(Ok(Some(told))) => Ok(told),
            Ok(Ok(None)) => Err("the counting job has no result".to_owned()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err(format!("it has not ended after {} s", limit.as_secs())),
        };
        let (looked_at, broken) = match told {
            Err(reason) => (String::new(), vec![reason]),
            Ok(told) => {
                let number = |key: &str| told[key].as_u64().unwrap_or(0);
                let (n, acknowledged, unknown) =
                    (number("n"), number("acknowledged"), number("unknown"));
                {
                    let mut counts = traffic.counts.lock();
                    counts.increments = acknowledged;
                    counts.increments_gap_ms = number("longest_gap_ms");
                }
                let is_right = (acknowledged..=acknowledged + unknown).contains(&n);
                let line = format!("counted to {n} with {acknowledged} answers, {unknown} unknown");
                let broken = if is_right { vec![] } else { vec![line.clone()] };
                (line, broken)
            }
        };
        Some(Check::of(
            "each counted call counts once (I3)",
            looked_at,
            &broken,
        ))
    }
}
