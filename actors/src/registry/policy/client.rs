//! What jobs and the command line ask about policies, labels and approvals.

use mobula::Cluster;
use mobula_core::JobId;
use mobula_core::control::ModuleId;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::approvals::{ApprovalChange, Approvals, Subject};
use super::data::{DataRecord, DataSet, LabelChange};
use super::file::PolicyFile;
use super::gate::{Decision, Request};
use crate::ask;
use crate::registry::envelope::Envelope;
use crate::registry::state::{Command, Query};

async fn change<A: DeserializeOwned>(
    cluster: &Cluster,
    operation: &str,
    command: &Command,
) -> mobula::Result<A> {
    let answer = ask::apply(cluster, ModuleId::REGISTRY, operation, command).await?;
    ask::answer(&answer)
}

async fn query<A: DeserializeOwned>(
    cluster: &Cluster,
    operation: &str,
    question: &(impl Serialize + Sync),
) -> mobula::Result<A> {
    ask::query(cluster, ModuleId::REGISTRY, operation, question).await
}

/// The policies that are in force beside the shipped ones.
pub async fn policy_file(cluster: &Cluster) -> mobula::Result<PolicyFile> {
    query(cluster, "read the policies", &Query::PolicyFile).await
}

/// Puts `text` in the place of the policies.
pub async fn set_policy_file(
    cluster: &Cluster,
    text: &str,
    expected_revision: u64,
    envelope: Option<Envelope>,
) -> mobula::Result<PolicyFile> {
    let command = Command::SetPolicyFile {
        text: text.to_owned(),
        expected_revision,
        envelope,
    };
    change(cluster, "set the policies", &command).await
}

/// What the policies would say.
pub async fn explain(
    cluster: &Cluster,
    principal: &str,
    request: Request,
) -> mobula::Result<Decision> {
    let principal = principal.to_owned();
    let question = Query::Explain { principal, request };
    query(cluster, "ask the policies", &question).await
}

/// Whether this job may train on `data`, beginning with a checkpoint of `parent` if there is one.
pub async fn may_train(
    cluster: &Cluster,
    job: JobId,
    data: DataSet,
    parent: Option<JobId>,
) -> mobula::Result<Decision> {
    let command = Command::Train {
        job: job.0,
        data,
        parent: parent.map(|parent| parent.0),
    };
    change(cluster, "ask whether to train", &command).await
}

/// Says what data is.
pub async fn label(cluster: &Cluster, label: LabelChange) -> mobula::Result<DataRecord> {
    change(cluster, "label data", &Command::LabelData(label)).await
}

/// What data is labelled as.
pub async fn data_record(cluster: &Cluster, digest: &str) -> mobula::Result<Option<DataRecord>> {
    let digest = digest.to_owned();
    query(cluster, "look up data", &Query::DataRecord { digest }).await
}

/// All labelled data, by digest.
pub async fn data(cluster: &Cluster) -> mobula::Result<Vec<DataRecord>> {
    let mut rows: Vec<DataRecord> = Vec::new();
    loop {
        let after = rows.last().map(|last| last.digest.clone());
        let page: Vec<DataRecord> = query(cluster, "list data", &Query::Data { after }).await?;
        if page.is_empty() {
            return Ok(rows);
        }
        rows.extend(page);
    }
}

/// Approves something, or withdraws what was approved.
pub async fn approve(cluster: &Cluster, approval: ApprovalChange) -> mobula::Result<Approvals> {
    change(cluster, "approve", &Command::Approve(approval)).await
}

/// The approvals of one thing.
pub async fn approvals_of(cluster: &Cluster, subject: &Subject) -> mobula::Result<Approvals> {
    let subject = subject.clone();
    query(
        cluster,
        "look up approvals",
        &Query::ApprovalsOf { subject },
    )
    .await
}

/// All approvals.
pub async fn approvals(cluster: &Cluster) -> mobula::Result<Vec<Approvals>> {
    let mut rows: Vec<Approvals> = Vec::new();
    loop {
        let after = rows.last().map(|last| last.subject.clone());
        let question = Query::Approvals { after };
        let page: Vec<Approvals> = query(cluster, "list approvals", &question).await?;
        if page.is_empty() {
            return Ok(rows);
        }
        rows.extend(page);
    }
}
