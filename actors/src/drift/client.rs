//! What monitors and the command line ask of drift detection.

use mobula::Cluster;
use mobula_core::codec;
use mobula_core::control::ModuleId;

use super::state::{Command, DriftEvent, MonitorStatus, Query, Report};
use crate::ask;

/// Where all monitors stand, or that of one endpoint.
pub async fn monitors(
    cluster: &Cluster,
    endpoint: Option<&str>,
) -> mobula::Result<Vec<MonitorStatus>> {
    let query = Query::Monitors { endpoint: endpoint.map(str::to_owned) };
    ask::query(cluster, ModuleId::DRIFT, &query).await
}

/// The drift events of an endpoint, oldest first.
pub async fn events(cluster: &Cluster, endpoint: &str) -> mobula::Result<Vec<DriftEvent>> {
    let query = Query::Events { endpoint: endpoint.to_owned() };
    ask::query(cluster, ModuleId::DRIFT, &query).await
}

/// Reports a compared window; only the platform's monitors may.
pub async fn report(cluster: &Cluster, report: Report) -> mobula::Result<()> {
    let payload = codec::encode_plain(&Command::Report(report));
    cluster.apply(ModuleId::DRIFT, payload).await.map(drop)
}
