//! `mobula approvals`: who approved what.

use mobula::Cluster;
use mobula_actors::registry::policy::approvals::{ApprovalChange, Approvals, Subject};
use mobula_actors::registry::policy::client;
use mobula_actors::registry::search::Selector;
use mobula_actors::registry::statement;
use mobula_core::clock::Clock;
use serde::Serialize;

use super::resolve;
use crate::args::{ApprovalsCommand, Target};
use crate::clock::SystemClock;
use crate::connect::connect;
use crate::output::{age, or_dash, print_json, print_table};

/// The approvals of one thing as `--json` prints them.
#[derive(Serialize)]
struct ApprovalsJson<'a> {
    subject: String,
    action: &'static str,
    revision: u64,
    approvals: Vec<ApprovalJson<'a>>,
}

#[derive(Serialize)]
struct ApprovalJson<'a> {
    key: &'a str,
    principal: &'a str,
    reason: &'a str,
    approved_ms: u64,
}

impl<'a> From<&'a Approvals> for ApprovalsJson<'a> {
    fn from(of: &'a Approvals) -> Self {
        let approvals = of.approvals.iter().map(|approval| ApprovalJson {
            key: &approval.key,
            principal: &approval.principal,
            reason: &approval.reason,
            approved_ms: approval.approved_ms,
        });
        ApprovalsJson {
            subject: of.subject.to_string(),
            action: of.subject.action(),
            revision: of.revision,
            approvals: approvals.collect(),
        }
    }
}

pub(crate) async fn run(target: &Target, command: ApprovalsCommand) -> anyhow::Result<()> {
    let cluster = connect(target).await?;
    let (approvals, format) = match command {
        ApprovalsCommand::Add {
            subject,
            key,
            reason,
            format,
        } => {
            let subject = resolve(&cluster, &subject).await?;
            let expected_revision = client::approvals_of(&cluster, &subject).await?.revision;
            let file = file_of(&cluster, &subject).await?;
            let payload =
                statement::approval(&subject, file.as_deref(), &reason, expected_revision);
            let change = ApprovalChange {
                subject,
                expected_revision,
                reason,
                envelope: Some(key.envelope(&cluster, payload).await?),
            };
            (client::approve(&cluster, change).await?, format)
        }
        ApprovalsCommand::Withdraw {
            subject,
            reason,
            format,
        } => {
            let subject = resolve(&cluster, &subject).await?;
            let change = ApprovalChange {
                expected_revision: client::approvals_of(&cluster, &subject).await?.revision,
                subject,
                reason,
                envelope: None,
            };
            (client::approve(&cluster, change).await?, format)
        }
        ApprovalsCommand::List(format) => {
            let all = client::approvals(&cluster).await?;
            if format.json {
                return print_json(&all.iter().map(ApprovalsJson::from).collect::<Vec<_>>());
            }
            print(&all);
            return Ok(());
        }
    };
    if format.json {
        return print_json(&ApprovalsJson::from(&approvals));
    }
    print(std::slice::from_ref(&approvals));
    Ok(())
}

/// The digest of the file of the version that `subject` is about.
async fn file_of(cluster: &Cluster, subject: &Subject) -> anyhow::Result<Option<String>> {
    let (model, version) = match subject {
        Subject::Train { .. } => return Ok(None),
        Subject::Promote { model, version, .. } | Subject::Deploy { model, version } => {
            (model, *version)
        }
    };
    let selector = Selector::Number(version);
    let view = mobula_actors::registry::client::view(cluster, model, selector).await?;
    Ok(Some(view.version.description.digest))
}

fn print(all: &[Approvals]) {
    let now_ms = SystemClock.now_ms();
    let rows: Vec<Vec<String>> = all
        .iter()
        .flat_map(|of| of.approvals.iter().map(move |approval| (of, approval)))
        .map(|(of, approval)| {
            vec![
                of.subject.to_string(),
                approval.key.chars().take(16).collect(),
                approval.principal.clone(),
                or_dash(Some(&approval.reason).filter(|reason| !reason.is_empty())),
                age(approval.approved_ms, now_ms),
            ]
        })
        .collect();
    print_table(&["WHAT", "KEY", "SENT BY", "REASON", "AGE"], &rows);
}
