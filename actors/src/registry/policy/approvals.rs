//! Approvals: that somebody with the role `approve` agrees that data is trained on, or that a version is
//! promoted or deployed.
//!
//! An approval is a signed statement and stands until it is withdrawn. Whether it counts is decided at the gate,
//! where it is known who asks: not if the key that signed it signs the promotion too, and not if who sent it
//! and who asks are one principal.
//!
//! Invariants:
//! 1. An approval is signed for one revision of what is approved, so none can be used a second time, also not
//!    after it was withdrawn.
//! 2. A key that was revoked approves nothing, also not what it approved before.

use std::collections::BTreeSet;
use std::fmt;

use mobula_core::control::{ApplyContext, Reader, Txn};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::row;
use serde::{Deserialize, Serialize};

use super::data::DataSet;
use crate::registry::envelope::{Demand, Envelope, SIGNATURES_MAX};
use crate::registry::events::{self, Event};
use crate::registry::keys::{self, Role};
use crate::registry::stages::Stage;
use crate::registry::statement;
use crate::registry::tables::{APPROVALS, version_key};
use crate::registry::versions::{check_digest, find};

/// Things that have approvals: a list of them is one that people read.
const SUBJECTS_MAX: usize = 10_000;

/// Rows in one answer: each has 16 approvals of 1 KiB at the most.
pub(in crate::registry) const APPROVALS_PAGE: usize = 128;

/// The longest reason, in bytes.
const REASON_BYTES_MAX: usize = 512;

/// What is approved. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Subject {
    /// That jobs train on this data, by BLAKE3 in hex: of a data set, or of a file of one.
    Train {
        /// The data.
        data: String,
    },
    /// That a version becomes this.
    Promote {
        /// The model.
        model: String,
        /// Its version.
        version: u64,
        /// The stage.
        to: Stage,
    },
    /// That a version is served.
    Deploy {
        /// The model.
        model: String,
        /// Its version.
        version: u64,
    },
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Subject::Train { data } => write!(f, "train {data}"),
            Subject::Promote { model, version, to } => {
                write!(f, "promote {model}:{version} to {}", to.as_str())
            }
            Subject::Deploy { model, version } => write!(f, "deploy {model}:{version}"),
        }
    }
}

impl Subject {
    /// The action in the schema.
    #[must_use]
    pub fn action(&self) -> &'static str {
        match self {
            Subject::Train { .. } => "Train",
            Subject::Promote { .. } => "Promote",
            Subject::Deploy { .. } => "Deploy",
        }
    }

    fn key(&self) -> Vec<u8> {
        match self {
            Subject::Train { data } => [b"t", data.as_bytes()].concat(),
            Subject::Promote { model, version, to } => {
                let stage = to.as_str().as_bytes();
                [b"p", version_key(model, *version).as_slice(), stage].concat()
            }
            Subject::Deploy { model, version } => {
                [b"d", version_key(model, *version).as_slice()].concat()
            }
        }
    }

    /// Refuses what is not there; the digest of the version's file, if it is about one.
    fn check(&self, reader: &dyn Reader) -> Result<Option<String>, Rejection> {
        match self {
            Subject::Train { data } => check_digest("data", data).map(|()| None),
            Subject::Promote { to, .. } if !matches!(to, Stage::Staging | Stage::Production) => {
                Err(Rejection::invalid(format!(
                    "`{}` needs no approval: approve promotions to staging or to production",
                    to.as_str()
                )))
            }
            Subject::Promote { model, version, .. } | Subject::Deploy { model, version } => Ok(
                Some(find(reader, model, Some(*version))?.description.digest),
            ),
        }
    }
}

/// That somebody agrees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Approval {
    /// The key that signed it.
    pub key: String,
    /// In whose name it was sent.
    pub principal: String,
    /// Why, for people.
    pub reason: String,
    /// Since when, in milliseconds since the Unix epoch.
    pub approved_ms: u64,
}

/// All that was approved of one thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Approvals {
    /// Of what.
    pub subject: Subject,
    /// How often that changed.
    pub revision: u64,
    /// The approvals that stand.
    pub approvals: Vec<Approval>,
}

/// Who asks, whose approval is none.
#[derive(Debug, Clone, Copy)]
pub(super) struct Requester<'a> {
    /// In whose name.
    pub(super) principal: &'a str,
    /// The keys that sign the change itself.
    pub(super) signers: &'a [String],
}

/// The approvals that count.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Counted {
    /// The keys.
    pub(super) keys: BTreeSet<String>,
    /// Why others do not count.
    pub(super) left_out: Vec<String>,
}

/// The approvals of something.
pub fn of(reader: &dyn Reader, subject: &Subject) -> Approvals {
    row::get(reader, APPROVALS, &subject.key()).unwrap_or_else(|| Approvals {
        subject: subject.clone(),
        revision: 0,
        approvals: Vec::new(),
    })
}

/// A page of approvals behind those of `after`.
pub(in crate::registry) fn page(reader: &dyn Reader, after: Option<&Subject>) -> Vec<Approvals> {
    let after = after.map(Subject::key);
    let rows = reader.scan(APPROVALS, &[], after.as_deref(), APPROVALS_PAGE);
    rows.iter()
        .map(|(_, bytes)| row::from_bytes(APPROVALS, bytes))
        .collect()
}

/// Those of `approvals` that count for `requester`.
pub(super) fn counted(
    reader: &dyn Reader,
    approvals: &Approvals,
    requester: Requester<'_>,
) -> Counted {
    let mut counted = Counted::default();
    for approval in &approvals.approvals {
        let key = &approval.key;
        let record = keys::find(reader, key);
        let is_good = record.is_some_and(|key| key.revoked.is_none() && key.may(Role::Approve));
        let short: String = key.chars().take(16).collect();
        let left_out = if !is_good {
            format!("key {short} was revoked")
        } else if requester.signers.contains(key) {
            format!("key {short} also signs what is asked for")
        } else if approval.principal == requester.principal {
            format!(
                "key {short} approved in the name of {}, who asks for it",
                approval.principal
            )
        } else {
            counted.keys.insert(key.clone());
            continue;
        };
        counted.left_out.push(left_out);
    }
    counted
}

/// The keys that approved to train on `data`: on the data set, or on each of its files.
pub(super) fn counted_of_data(
    reader: &dyn Reader,
    data: &DataSet,
    requester: Requester<'_>,
) -> Counted {
    let of = |digest: &String| {
        let data = digest.clone();
        counted(reader, &of(reader, &Subject::Train { data }), requester)
    };
    let mut all = of(&data.digest);
    let mut files = data.files.iter().map(of);
    if let Some(first) = files.next() {
        let of_each = files.fold(first, |mut all, file| {
            all.keys.retain(|key| file.keys.contains(key));
            all.left_out.extend(file.left_out);
            all
        });
        all.keys.extend(of_each.keys);
        all.left_out.extend(of_each.left_out);
        all.left_out.sort();
        all.left_out.dedup();
    }
    all
}

/// A new approval, or the end of all of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApprovalChange {
    /// Of what.
    pub subject: Subject,
    /// Its revision that this was decided on.
    pub expected_revision: u64,
    /// Why, for people.
    pub reason: String,
    /// [`statement::approval`], signed; absent: all approvals are withdrawn, which needs no signature because
    /// it opens no gate.
    pub envelope: Option<Envelope>,
}

/// Approves something, or withdraws what was approved. `principal` is in whose name that is asked.
pub(in crate::registry) fn change(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    principal: &str,
    change: &ApprovalChange,
) -> Result<Approvals, Rejection> {
    let ApprovalChange {
        subject,
        expected_revision,
        reason,
        envelope,
    } = change;
    if reason.len() > REASON_BYTES_MAX {
        return Err(Rejection::invalid(format!(
            "the reason has {} bytes, the limit is {REASON_BYTES_MAX}: shorten it",
            reason.len()
        )));
    }
    let file = subject.check(txn)?;
    let mut approvals = of(txn, subject);
    if approvals.revision != *expected_revision {
        return Err(Rejection::fenced(format!(
            "the approvals to {subject} are at revision {}, and this was decided on revision \
             {expected_revision}: look again with `mobula approvals list`",
            approvals.revision
        )));
    }
    let is_new = approvals.revision == 0;
    if is_new && txn.scan(APPROVALS, &[], None, SUBJECTS_MAX).len() == SUBJECTS_MAX {
        return Err(Rejection::new(
            ErrorCode::FailedPrecondition,
            format!(
                "{SUBJECTS_MAX} things have approvals, the limit: approve data sets instead of files"
            ),
        ));
    }
    approvals.revision += 1;
    let mut signers = Vec::new();
    match envelope {
        None => approvals.approvals.clear(),
        Some(envelope) => {
            let signed = statement::approval(subject, file.as_deref(), reason, *expected_revision);
            let demand = Demand {
                what: "approval",
                statement: &signed,
                role: Role::Approve,
                signatures: 1,
            };
            signers = envelope.check(demand, |id| keys::find(txn, id))?;
            approvals
                .approvals
                .retain(|old| !signers.contains(&old.key));
            approvals
                .approvals
                .extend(signers.iter().map(|key| Approval {
                    key: key.clone(),
                    principal: principal.to_owned(),
                    reason: reason.clone(),
                    approved_ms: context.now_ms,
                }));
            if approvals.approvals.len() > SIGNATURES_MAX {
                return Err(Rejection::new(
                    ErrorCode::FailedPrecondition,
                    format!(
                        "{SIGNATURES_MAX} keys have approved to {subject}, the limit: `mobula approvals \
                         withdraw` begins anew"
                    ),
                ));
            }
        }
    }
    row::put(txn, APPROVALS, &subject.key(), &approvals);
    let subject = subject.to_string();
    let event = Event::Approved {
        subject: &subject,
        withdrawn: envelope.is_none(),
        principal,
        reason,
        revision: approvals.revision,
        signers: &signers,
        envelopes: envelope
            .as_ref()
            .map(Envelope::to_json)
            .into_iter()
            .collect(),
    };
    events::append(txn, context, &event);
    Ok(approvals)
}
