//! What monitors and the command line ask of drift detection.

use mobula::Cluster;
use mobula_core::control::ModuleId;

use super::log::LogPolicy;
use super::retraining::{self, History, RetrainPolicy, Retraining};
use super::state::{
    Command, DriftEvent, EndpointVitals, MonitorStatus, Query, Report, SignalEvent, VitalsReport,
};
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

/// How well the version of an endpoint does, if its monitor has said so.
pub async fn vitals(cluster: &Cluster, endpoint: &str) -> mobula::Result<Option<EndpointVitals>> {
    let query = Query::Vitals {
        endpoint: endpoint.to_owned(),
    };
    let operation = "look up how an endpoint does";
    ask::query(cluster, ModuleId::DRIFT, operation, &query).await
}

/// The signals of an endpoint, oldest first.
pub async fn signals(cluster: &Cluster, endpoint: &str) -> mobula::Result<Vec<SignalEvent>> {
    let query = Query::Signals {
        endpoint: endpoint.to_owned(),
    };
    ask::query(cluster, ModuleId::DRIFT, "list signals", &query).await
}

/// Reports how well a version does; only the platform's monitors may.
pub async fn report_vitals(cluster: &Cluster, report: VitalsReport) -> mobula::Result<()> {
    let command = Command::Vitals(Box::new(report));
    let operation = "report how an endpoint does";
    ask::apply(cluster, ModuleId::DRIFT, operation, &command)
        .await
        .map(drop)
}

/// Reports a compared window; only the platform's monitors may.
pub async fn report(cluster: &Cluster, report: Report) -> mobula::Result<()> {
    let command = Command::Report(report);
    ask::apply(cluster, ModuleId::DRIFT, "report a window", &command)
        .await
        .map(drop)
}

/// The retrain policy of an endpoint, if it has one.
pub async fn policy(cluster: &Cluster, endpoint: &str) -> mobula::Result<Option<RetrainPolicy>> {
    let query = Query::Policy {
        endpoint: endpoint.to_owned(),
    };
    ask::query(cluster, ModuleId::DRIFT, "look up a retrain policy", &query).await
}

/// The retrainings of an endpoint, and what its policy still allows.
pub async fn retrainings(cluster: &Cluster, endpoint: &str) -> mobula::Result<History> {
    let query = Query::Retrainings {
        endpoint: endpoint.to_owned(),
    };
    ask::query(cluster, ModuleId::DRIFT, "look up retrainings", &query).await
}

/// Sets the retrain policy of an endpoint.
pub async fn set_policy(
    cluster: &Cluster,
    endpoint: &str,
    policy: RetrainPolicy,
) -> mobula::Result<()> {
    let command = retraining::Command::SetPolicy {
        endpoint: endpoint.to_owned(),
        policy: Box::new(policy),
    };
    change(cluster, "set a retrain policy", command)
        .await
        .map(drop)
}

/// Removes the retrain policy of an endpoint.
pub async fn remove_policy(cluster: &Cluster, endpoint: &str) -> mobula::Result<()> {
    let command = retraining::Command::RemovePolicy {
        endpoint: endpoint.to_owned(),
    };
    change(cluster, "remove a retrain policy", command)
        .await
        .map(drop)
}

/// Begins a retraining that is suggested.
pub async fn retrain(cluster: &Cluster, endpoint: &str) -> mobula::Result<Retraining> {
    let command = retraining::Command::Retrain {
        endpoint: endpoint.to_owned(),
    };
    ask::answer(&change(cluster, "retrain", command).await?)
}

/// Ends a retraining that is under way.
pub async fn cancel(cluster: &Cluster, endpoint: &str, reason: &str) -> mobula::Result<Retraining> {
    let command = retraining::Command::Cancel {
        endpoint: endpoint.to_owned(),
        reason: reason.to_owned(),
    };
    ask::answer(&change(cluster, "cancel a retraining", command).await?)
}

async fn change(
    cluster: &Cluster,
    operation: &str,
    command: retraining::Command,
) -> mobula::Result<Vec<u8>> {
    let command = Command::Retraining(Box::new(command));
    ask::apply(cluster, ModuleId::DRIFT, operation, &command).await
}

/// What is logged of an endpoint's predictions, if anything is.
pub async fn log_policy(cluster: &Cluster, endpoint: &str) -> mobula::Result<Option<LogPolicy>> {
    let query = Query::Log {
        endpoint: endpoint.to_owned(),
    };
    ask::query(cluster, ModuleId::DRIFT, "look up a prediction log", &query).await
}

/// Logs the predictions of an endpoint, or no more.
pub async fn set_log(
    cluster: &Cluster,
    endpoint: &str,
    policy: Option<LogPolicy>,
) -> mobula::Result<()> {
    let command = Command::SetLog {
        endpoint: endpoint.to_owned(),
        policy: policy.map(Box::new),
    };
    ask::apply(cluster, ModuleId::DRIFT, "set a prediction log", &command)
        .await
        .map(drop)
}
