//! The gates: what the policies say about something that is about to happen, and what the log says of it.
//!
//! Invariants:
//! 1. A gate reads the tables as they are within the command that it guards.
//! 2. Each permit is an entry of the registry's log. A refused training is one too; other refusals change
//!    nothing, and stand in the heads' own log with the first of the policies that decided.

use std::collections::{BTreeMap, BTreeSet};

use mobula_core::control::{ApplyContext, Origin, Reader, Txn};
use mobula_core::error::{ErrorCode, Rejection};
use serde::{Deserialize, Serialize};

use super::approvals::{self, Counted, Requester, Subject};
use super::data::{self, DataRecord, DataSet};
use super::engine::{self, Deciding, Question, Thing, Value};
use super::file;
use crate::registry::events::{self, Event};
use crate::registry::keys;
use crate::registry::provenance::missing;
use crate::registry::stages::{self, Stage};
use crate::registry::versions::{ModelVersion, find};

/// What somebody wants to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Train on data.
    Train {
        /// The data.
        data: DataSet,
        /// The job of whose checkpoint the weights are that it begins with.
        parent: Option<u64>,
    },
    /// Bring a version to staging or to production.
    Promote {
        /// The model.
        model: String,
        /// Its version.
        version: u64,
        /// The stage.
        to: Stage,
        /// The keys that sign it.
        signers: Vec<String>,
    },
    /// Serve a version.
    Deploy {
        /// The model.
        model: String,
        /// Its version.
        version: u64,
        /// The endpoint.
        endpoint: String,
        /// Whether it is a rollout at an endpoint that is there.
        rollout: bool,
    },
}

/// What the policies say, and about what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// Whether it may happen.
    pub permitted: bool,
    /// In whose name it was asked.
    pub principal: String,
    /// What was asked, as [`Subject`] spells it.
    pub subject: String,
    /// The revision of the policies.
    pub revision: u64,
    /// The policies that decided, by id.
    pub policies: Vec<Deciding>,
    /// Policies that failed meanwhile, which denies.
    pub errors: Vec<String>,
    /// The labels of the data.
    pub labels: BTreeSet<String>,
    /// The keys whose approvals count.
    pub approvers: BTreeSet<String>,
    /// Why other approvals do not count.
    pub left_out: Vec<String>,
}

impl Decision {
    /// Which rule, which value, which limit, what next; `None` if it is permitted.
    #[must_use]
    pub fn refusal(&self) -> Option<String> {
        if self.permitted {
            return None;
        }
        let ids: Vec<&str> = self
            .policies
            .iter()
            .map(|policy| policy.id.as_str())
            .collect();
        // The beginning is what the heads' log keeps.
        let mut parts = vec![match (ids.as_slice(), self.errors.as_slice()) {
            ([], []) => format!("no policy permits to {}", self.subject),
            ([], _) => format!("policies failed, so nobody may {}", self.subject),
            (ids, _) => format!("policy {} forbids to {}", ids.join(", "), self.subject),
        }];
        parts.extend(
            self.policies
                .iter()
                .filter_map(|policy| policy.reason.clone()),
        );
        parts.push(format!(
            "asked in the name of {}, labels {}, approvals that count {}",
            self.principal,
            match self.labels.len() {
                0 => "none".to_owned(),
                _ => self.labels.iter().cloned().collect::<Vec<_>>().join(", "),
            },
            self.approvers.len()
        ));
        parts.extend(
            self.left_out
                .iter()
                .map(|why| format!("not counted: {why}")),
        );
        parts.extend(self.errors.iter().cloned());
        let next = self
            .policies
            .iter()
            .filter_map(|policy| policy.next.clone());
        let mut next: Vec<String> = next.collect();
        if next.is_empty() {
            next.push("see `mobula policy show`".to_owned());
        }
        parts.append(&mut next);
        Some(parts.join("; "))
    }

    fn check(self) -> Result<Self, Rejection> {
        match self.refusal() {
            None => Ok(self),
            Some(why) => Err(Rejection::new(ErrorCode::PermissionDenied, why)),
        }
    }
}

/// In whose name a command comes.
#[must_use]
pub fn principal(reader: &dyn Reader, origin: Option<&Origin>) -> String {
    match origin {
        Some(origin) => mobula_scheduler::principal_of(reader, &origin.principal),
        None => "head".to_owned(),
    }
}

/// What the policies say now.
pub fn decide(
    reader: &dyn Reader,
    principal: &str,
    request: &Request,
) -> Result<Decision, Rejection> {
    match request {
        Request::Train { data, parent } => {
            let origins = data::origins(reader, data, *parent)?;
            Ok(train(reader, principal, &origins))
        }
        Request::Promote {
            model,
            version,
            to,
            signers,
        } => {
            let found = find(reader, model, Some(*version))?;
            Ok(promote(reader, principal, &found, *to, signers))
        }
        Request::Deploy {
            model,
            version,
            endpoint,
            rollout,
        } => {
            let found = find(reader, model, Some(*version))?;
            Ok(deploy(reader, principal, &found, endpoint, *rollout))
        }
    }
}

/// Asks for a job to train on `data`, writes down what was decided, and remembers what the job trains on.
pub(in crate::registry) fn pass_train(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    job: u64,
    own: &DataSet,
    parent: Option<u64>,
) -> Result<Decision, Rejection> {
    let origins = data::origins(txn, own, parent)?;
    let submitter = mobula_scheduler::job_submitter(txn, mobula_core::JobId(job));
    let principal = submitter.unwrap_or_else(|| format!("job-{job}"));
    let decision = train(txn, &principal, &origins);
    append(context, txn, &decision, Some(job));
    if decision.permitted {
        data::remember(txn, job, origins);
    }
    Ok(decision)
}

/// Refuses what the policies forbid about a change of a version's stage. The entry of the log is that of the
/// change itself.
pub(in crate::registry) fn pass_promote(
    txn: &dyn Reader,
    principal: &str,
    version: &ModelVersion,
    to: Stage,
    signers: &[String],
) -> Result<Option<Decision>, Rejection> {
    // Who wants something out of use is not kept waiting.
    if !matches!(to, Stage::Staging | Stage::Production) {
        return Ok(None);
    }
    promote(txn, principal, version, to, signers)
        .check()
        .map(Some)
}

/// Refuses a deployment that the policies forbid; writes down one that they permit.
pub(crate) fn pass_deploy(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    origin: Option<&Origin>,
    version: &ModelVersion,
    endpoint: &str,
    rollout: bool,
) -> Result<(), Rejection> {
    let decision = ask_deploy(txn, origin, version, endpoint, rollout)?;
    write_down(context, txn, &decision);
    Ok(())
}

/// The same for a command that goes on if the deployment is refused: nothing is written before
/// [`write_down`].
pub(crate) fn ask_deploy(
    reader: &dyn Reader,
    origin: Option<&Origin>,
    version: &ModelVersion,
    endpoint: &str,
    rollout: bool,
) -> Result<Decision, Rejection> {
    let principal = principal(reader, origin);
    deploy(reader, &principal, version, endpoint, rollout).check()
}

/// Writes down what was decided.
pub(crate) fn write_down(context: &ApplyContext, txn: &mut dyn Txn, decision: &Decision) {
    append(context, txn, decision, None);
}

fn append(context: &ApplyContext, txn: &mut dyn Txn, decision: &Decision, job: Option<u64>) {
    let event = Event::GateDecided {
        job,
        gate: decision,
    };
    events::append(txn, context, &event);
}

fn train(reader: &dyn Reader, principal: &str, origins: &[DataSet]) -> Decision {
    let own = origins.first().expect("a job's own data is the first");
    let whole = data::find(reader, &own.digest);
    let files: Option<Vec<DataRecord>> = own
        .files
        .iter()
        .map(|file| data::find(reader, file))
        .collect();
    let mut records = whole.into_iter().chain(files.unwrap_or_default());
    let record = records.next();
    let labels = data::labels_of(reader, origins);
    let requester = Requester {
        principal,
        signers: &[],
    };
    let counted = approvals::counted_of_data(reader, own, requester);
    let resource = Thing {
        kind: "Dataset",
        id: own.digest.clone(),
        attributes: vec![
            ("registered", Value::Flag(record.is_some())),
            (
                "name",
                Value::Text(record.map(|record| record.name).unwrap_or_default()),
            ),
            ("labels", Value::Texts(labels.clone())),
        ],
        metrics: BTreeMap::new(),
    };
    let subject = Subject::Train {
        data: own.digest.clone(),
    };
    let asked = Asked {
        principal,
        subject: &subject,
        resource,
        context: Vec::new(),
        signers: &[],
        labels,
        approvals: counted,
    };
    ask(reader, asked)
}

fn promote(
    reader: &dyn Reader,
    principal: &str,
    version: &ModelVersion,
    to: Stage,
    signers: &[String],
) -> Decision {
    let subject = Subject::Promote {
        model: version.description.model.clone(),
        version: version.version,
        to,
    };
    let context = vec![
        ("to", Value::Text(to.as_str().to_owned())),
        ("signers", Value::Keys(signers.iter().cloned().collect())),
    ];
    of_version(reader, principal, version, &subject, context, signers)
}

fn deploy(
    reader: &dyn Reader,
    principal: &str,
    version: &ModelVersion,
    endpoint: &str,
    rollout: bool,
) -> Decision {
    let subject = Subject::Deploy {
        model: version.description.model.clone(),
        version: version.version,
    };
    let context = vec![
        ("endpoint", Value::Text(endpoint.to_owned())),
        ("rollout", Value::Flag(rollout)),
    ];
    of_version(reader, principal, version, &subject, context, &[])
}

fn of_version(
    reader: &dyn Reader,
    principal: &str,
    version: &ModelVersion,
    subject: &Subject,
    context: Vec<(&'static str, Value)>,
    signers: &[String],
) -> Decision {
    let model = &version.description.model;
    let standing = stages::standing(reader, version);
    let policy = stages::model_state(reader, model).policy;
    let provenance = stages::provenance(reader, model, version.version);
    let missing = missing(version, provenance.as_ref());
    let tags = standing
        .tags
        .iter()
        .map(|(tag, value)| format!("{tag}={value}"));
    let labels = data::labels_of(reader, &data::of_version(reader, version));
    let text = |text: &str| Value::Text(text.to_owned());
    let resource = Thing {
        kind: "ModelVersion",
        id: format!("{model}:{}", version.version),
        attributes: vec![
            ("model", text(model)),
            ("version", Value::Number(version.version)),
            ("stage", text(standing.stage.as_str())),
            ("risk", text(policy.risk.as_str())),
            ("labels", Value::Texts(labels.clone())),
            ("tags", Value::Texts(tags.collect())),
            (
                "missing",
                Value::Texts(missing.iter().map(|&field| field.to_owned()).collect()),
            ),
        ],
        metrics: version.description.metrics.clone(),
    };
    let requester = Requester { principal, signers };
    let counted = approvals::counted(reader, &approvals::of(reader, subject), requester);
    let asked = Asked {
        principal,
        subject,
        resource,
        context,
        signers,
        labels,
        approvals: counted,
    };
    ask(reader, asked)
}

/// A question on its way to the policies.
struct Asked<'a> {
    principal: &'a str,
    subject: &'a Subject,
    resource: Thing,
    context: Vec<(&'static str, Value)>,
    /// The keys that sign it.
    signers: &'a [String],
    labels: BTreeSet<String>,
    approvals: Counted,
}

fn ask(reader: &dyn Reader, asked: Asked<'_>) -> Decision {
    let Asked {
        principal,
        subject,
        resource,
        mut context,
        signers,
        labels,
        approvals,
    } = asked;
    let approvers = approvals.keys;
    context.push(("approvers", Value::Keys(approvers.clone())));
    context.push(("approvals", Value::Number(approvers.len() as u64)));
    let named: BTreeSet<&String> = signers.iter().chain(&approvers).collect();
    let question = Question {
        principal: principal.to_owned(),
        action: subject.action(),
        resource,
        context,
        keys: named.into_iter().map(|id| of_key(reader, id)).collect(),
    };
    let file = file::current(reader);
    let verdict = engine::decide(&file.text, &question);
    Decision {
        permitted: verdict.permitted,
        principal: principal.to_owned(),
        subject: subject.to_string(),
        revision: file.revision,
        policies: verdict.policies,
        errors: verdict.errors,
        labels,
        approvers,
        left_out: approvals.left_out,
    }
}

fn of_key(reader: &dyn Reader, id: &str) -> Thing {
    let record = keys::find(reader, id);
    let roles = record.iter().flat_map(|key| &key.roles);
    let roles = roles.map(|role| role.as_str().to_owned()).collect();
    let owner = record.as_ref().map(|key| key.owner.clone());
    Thing {
        kind: "Key",
        id: id.to_owned(),
        attributes: vec![
            ("roles", Value::Texts(roles)),
            ("owner", Value::Text(owner.unwrap_or_default())),
        ],
        metrics: BTreeMap::new(),
    }
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;
