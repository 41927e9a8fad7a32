//! What monitors and the command line ask of drift detection.

use mobula::Cluster;
use mobula_core::control::ModuleId;

use super::state::{Command, DriftEvent, MonitorStatus, Query, Report};
use crate::ask;

/// Where all monitors stand, or that of one endpoint.
pub async fn monitors(
    cluster: &Cluster,
    endpoint: Option<&str>,
) -> mobula::Result<Vec<MonitorStatus>> {
    let mut monitors: Vec<MonitorStatus> = Vec::new();
    loop {
        let query = Query::Monitors {
            endpoint: endpoint.map(str::to_owned),
            after: monitors.last().map(|last| last.endpoint.clone()),
        };
        let page: Vec<MonitorStatus> =
            ask::query(cluster, ModuleId::DRIFT, "list monitors", &query).await?;
        let is_last = page.is_empty() || endpoint.is_some();
        monitors.extend(page);
        if is_last {
            return Ok(monitors);
        }
    }
}

/// The drift events of an endpoint, oldest first.
pub async fn events(cluster: &Cluster, endpoint: &str) -> mobula::Result<Vec<DriftEvent>> {
    let operation = "list drift events";
    let query = Query::Events {
        endpoint: endpoint.to_owned(),
    };
    ask::query(cluster, ModuleId::DRIFT, operation, &query).await
}

/// Reports a compared window; only the platform's monitors may.
pub async fn report(cluster: &Cluster, report: Report) -> mobula::Result<()> {
    let command = Command::Report(report);
    ask::apply(cluster, ModuleId::DRIFT, "report a window", &command)
        .await
        .map(drop)
}
