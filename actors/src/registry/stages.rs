//! Which stage each version is in, and who decides that it changes.
//!
//! ```text
//! candidate ──► staging ──► production
//!     │          │   ▲          │
//!     └──────────┴───┼── archived ◄── (also by the promotion of another version)
//!                    └──────┴────────► production, for one that was there before: a rollback
//! ```
//!
//! Invariants:
//! 1. At most one version of a model is in production, at every index of the log: who takes its place
//!    archives it in the same entry.
//! 2. Each edge is signed, for this revision of the model and no other, by as many different keys as the
//!    model's policy asks for.
//! 3. A version with a field of its provenance missing is never in production.
//! 4. A policy becomes weaker only with the signatures that the stronger one asks for.
//! 5. Nothing becomes staging or production that the policies forbid ([`super::policy`]).

use std::collections::BTreeMap;

use mobula_core::control::{ApplyContext, Reader, Txn};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::row;
use serde::{Deserialize, Serialize};

use super::envelope::{Demand, Envelope};
use super::events::{self, Event};
use super::keys::{self, KeyRecord, Role};
use super::policy::gate;
use super::provenance::{Provenance, missing};
use super::statement::{self, Promotion};
use super::tables::{KEYS, MODELS, PROVENANCE, SIGNED, STANDINGS, version_key};
use super::versions::{ModelVersion, find};

/// The longest reason of a change, in bytes.
const REASON_BYTES_MAX: usize = 512;

/// The most signatures that a policy may ask for.
pub const SIGNATURES_NEEDED_MAX: u32 = 8;

/// The fewest signatures for a model of high risk: nobody decides alone.
const SIGNATURES_HIGH_RISK_MIN: u32 = 2;

/// Where a version stands. Append-only: positions are tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Stage {
    /// Registered, and nothing more.
    Candidate,
    /// Being tried.
    Staging,
    /// The one that counts.
    Production,
    /// Out of use.
    Archived,
}

impl Stage {
    /// All of them.
    pub const ALL: [Stage; 4] = [
        Stage::Candidate,
        Stage::Staging,
        Stage::Production,
        Stage::Archived,
    ];

    /// A short stable word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Stage::Candidate => "candidate",
            Stage::Staging => "staging",
            Stage::Production => "production",
            Stage::Archived => "archived",
        }
    }

    /// The stages that may follow. `was_production`: whether the version has been in production.
    #[must_use]
    pub fn next(self, was_production: bool) -> &'static [Stage] {
        match (self, was_production) {
            (Stage::Candidate, _) => &[Stage::Staging, Stage::Archived],
            (Stage::Staging, _) => &[Stage::Production, Stage::Archived],
            (Stage::Production, _) => &[Stage::Archived],
            (Stage::Archived, false) => &[Stage::Staging],
            (Stage::Archived, true) => &[Stage::Staging, Stage::Production],
        }
    }

    /// The role that signs this edge.
    #[must_use]
    pub fn role_to(self, to: Stage) -> Role {
        if self == Stage::Production || to == Stage::Production {
            Role::Release
        } else {
            Role::Stage
        }
    }
}

/// How much harm a model can do. Append-only: positions are tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub enum Risk {
    /// One key decides, unless more are asked for.
    #[default]
    Normal,
    /// Nobody decides alone.
    High,
}

impl Risk {
    /// A short stable word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Risk::Normal => "normal",
            Risk::High => "high",
        }
    }
}

/// Who decides about a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// Its risk.
    pub risk: Risk,
    /// How many different keys sign each change of a stage.
    pub signatures: u32,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            risk: Risk::Normal,
            signatures: 1,
        }
    }
}

/// Where a version stands, with what people say about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    /// Its stage.
    pub stage: Stage,
    /// Since when, in milliseconds since the Unix epoch.
    pub since_ms: u64,
    /// Whether it is or was in production.
    pub was_production: bool,
    /// Tags, by name.
    pub tags: BTreeMap<String, String>,
}

/// What was decided about a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ModelState {
    /// How often something was decided: stages, aliases, policy.
    pub revision: u64,
    /// The version in production.
    pub production: Option<u64>,
    /// Who decides.
    pub policy: Policy,
}

/// A change of a stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageChange {
    /// The model.
    pub model: String,
    /// Its version.
    pub version: u64,
    /// What it becomes.
    pub to: Stage,
    /// The model's revision that this was decided on.
    pub expected_revision: u64,
    /// Why, for people.
    pub reason: String,
    /// [`statement::promotion`], signed.
    pub promotion: Envelope,
    /// [`statement::provenance`], signed: for production only.
    pub provenance: Option<Envelope>,
}

/// The latest change of a version's stage, as it was signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedEdge {
    /// The edge.
    pub promotion: Envelope,
    /// The version's provenance: since it was in production.
    pub provenance: Option<SignedProvenance>,
    /// How many different keys the edge needed.
    pub signatures: u32,
    /// When it was taken, in milliseconds since the Unix epoch: a key that is revoked later had the right to sign.
    pub signed_ms: u64,
}

/// A version's provenance, as it was signed when the version became production.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedProvenance {
    /// The statement.
    pub envelope: Envelope,
    /// How many different keys were needed.
    pub signatures: u32,
    /// When, in milliseconds since the Unix epoch.
    pub signed_ms: u64,
}

/// Where a version stands.
pub fn standing(reader: &dyn Reader, version: &ModelVersion) -> Standing {
    let key = version_key(&version.description.model, version.version);
    row::get(reader, STANDINGS, &key).unwrap_or_else(|| Standing {
        stage: Stage::Candidate,
        since_ms: version.registered_ms,
        was_production: false,
        tags: BTreeMap::new(),
    })
}

/// What was decided about a model.
pub fn model_state(reader: &dyn Reader, model: &str) -> ModelState {
    row::get(reader, MODELS, model.as_bytes()).unwrap_or_default()
}

/// Where a version came from, if that is known.
pub fn provenance(reader: &dyn Reader, model: &str, version: u64) -> Option<Provenance> {
    row::get(reader, PROVENANCE, &version_key(model, version))
}

/// The latest change of a version's stage.
pub(super) fn signed(reader: &dyn Reader, model: &str, version: u64) -> Option<SignedEdge> {
    row::get(reader, SIGNED, &version_key(model, version))
}

/// Refuses a command that was made for another revision; counts the new one.
pub(super) fn next_revision(
    txn: &mut dyn Txn,
    model: &str,
    expected: u64,
) -> Result<ModelState, Rejection> {
    let state = model_state(txn, model);
    if state.revision != expected {
        return Err(Rejection::fenced(format!(
            "model `{model}` is at revision {}, and this was decided on revision {expected}: somebody \
             decided something since; look again with `mobula models show {model}`",
            state.revision
        )));
    }
    Ok(ModelState {
        revision: state.revision + 1,
        ..state
    })
}

pub(super) fn put_model_state(txn: &mut dyn Txn, model: &str, state: &ModelState) {
    row::put(txn, MODELS, model.as_bytes(), state);
}

pub(super) fn put_standing(txn: &mut dyn Txn, model: &str, version: u64, standing: &Standing) {
    row::put(txn, STANDINGS, &version_key(model, version), standing);
}

fn check_edge(
    version: &ModelVersion,
    standing: &Standing,
    to: Stage,
    provenance: Option<&Provenance>,
) -> Result<(), Rejection> {
    let name = format!("{}:{}", version.description.model, version.version);
    let possible = standing.stage.next(standing.was_production);
    if !possible.contains(&to) {
        let words: Vec<&str> = possible.iter().map(|stage| stage.as_str()).collect();
        return Err(Rejection::new(
            ErrorCode::FailedPrecondition,
            format!(
                "{name} is in stage {} and cannot become {}: from there it can become {}",
                standing.stage.as_str(),
                to.as_str(),
                words.join(" or ")
            ),
        ));
    }
    let missing = missing(version, provenance);
    if to == Stage::Production && !missing.is_empty() {
        return Err(Rejection::new(
            ErrorCode::FailedPrecondition,
            format!(
                "{name} cannot become production: its provenance lacks {}; train it with a job that \
                 has `register`, which records all of them",
                missing.join(", ")
            ),
        ));
    }
    Ok(())
}

/// Changes the stage of a version; `principal` is in whose name that is asked.
pub(super) fn change(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    principal: &str,
    change: &StageChange,
) -> Result<ModelVersion, Rejection> {
    let StageChange {
        model, version, to, ..
    } = change;
    if change.reason.len() > REASON_BYTES_MAX {
        return Err(Rejection::invalid(format!(
            "the reason has {} bytes, the limit is {REASON_BYTES_MAX}: shorten it",
            change.reason.len()
        )));
    }
    let found = find(txn, model, Some(*version))?;
    let origin = provenance(txn, model, *version);
    let standing = standing(txn, &found);
    let mut state = next_revision(txn, model, change.expected_revision)?;
    check_edge(&found, &standing, *to, origin.as_ref())?;
    let from = standing.stage;
    let replaces = state.production.filter(|_| *to == Stage::Production);
    let edge = Promotion {
        version: &found,
        provenance: origin.as_ref(),
        from,
        to: *to,
        replaces,
        revision: change.expected_revision,
        reason: &change.reason,
    };
    let role = from.role_to(*to);
    let signatures = state.policy.signatures;
    let find_key = |id: &str| keys::find(txn, id);
    let demand = Demand {
        what: "promotion",
        statement: &statement::promotion(&edge),
        role,
        signatures,
    };
    let signers = change.promotion.check(demand, find_key)?;
    let signed_provenance = match (to, &origin) {
        (Stage::Production, Some(origin)) => {
            let Some(envelope) = &change.provenance else {
                return Err(Rejection::invalid(
                    "a version becomes production with its provenance signed: send that envelope too",
                ));
            };
            let demand = Demand {
                what: "provenance",
                statement: &statement::provenance(&found, origin),
                ..demand
            };
            envelope.check(demand, find_key)?;
            Some(SignedProvenance {
                envelope: envelope.clone(),
                signatures,
                signed_ms: context.now_ms,
            })
        }
        // What was signed once stays with the version.
        _ => signed(txn, model, *version).and_then(|before| before.provenance),
    };
    let gate = gate::pass_promote(txn, principal, &found, *to, &signers)?;

    let event = Event::Staged {
        model,
        version: *version,
        from: from.as_str(),
        to: to.as_str(),
        replaces,
        revision: state.revision,
        signers: &signers,
        envelopes: std::iter::once(&change.promotion)
            .chain(
                change
                    .provenance
                    .as_ref()
                    .filter(|_| *to == Stage::Production),
            )
            .map(Envelope::to_json)
            .collect(),
        gate: gate.as_ref(),
    };
    events::append(txn, context, &event);
    if let Some(replaced) = replaces {
        let found = find(txn, model, Some(replaced))?;
        let before = self::standing(txn, &found);
        let archived = Standing {
            stage: Stage::Archived,
            since_ms: context.now_ms,
            ..before
        };
        put_standing(txn, model, replaced, &archived);
    }
    let next = Standing {
        stage: *to,
        since_ms: context.now_ms,
        was_production: standing.was_production || *to == Stage::Production,
        tags: standing.tags,
    };
    put_standing(txn, model, *version, &next);
    let edge = SignedEdge {
        promotion: change.promotion.clone(),
        provenance: signed_provenance,
        signatures,
        signed_ms: context.now_ms,
    };
    row::put(txn, SIGNED, &version_key(model, *version), &edge);
    state.production = match (from, to) {
        (_, Stage::Production) => Some(*version),
        (Stage::Production, _) => None,
        _ => state.production,
    };
    put_model_state(txn, model, &state);
    Ok(found)
}

/// Sets who decides about a model.
pub(super) fn set_policy(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    model: &str,
    policy: Policy,
    expected_revision: u64,
    envelope: Option<&Envelope>,
) -> Result<ModelState, Rejection> {
    find(txn, model, None)?;
    let mut state = next_revision(txn, model, expected_revision)?;
    let fewest = match policy.risk {
        Risk::Normal => 1,
        Risk::High => SIGNATURES_HIGH_RISK_MIN,
    };
    if !(fewest..=SIGNATURES_NEEDED_MAX).contains(&policy.signatures) {
        return Err(Rejection::invalid(format!(
            "{} signatures are not possible for a model of {} risk: ask for {fewest} to \
             {SIGNATURES_NEEDED_MAX}",
            policy.signatures,
            policy.risk.as_str()
        )));
    }
    let able = row::all::<KeyRecord>(txn, KEYS, &[])
        .iter()
        .filter(|(_, key)| key.revoked.is_none() && key.may(Role::Release))
        .count();
    if policy.signatures > 1 && able < policy.signatures as usize {
        return Err(Rejection::new(
            ErrorCode::FailedPrecondition,
            format!(
                "{} signatures cannot be given: {able} keys have the role `release`; add keys first",
                policy.signatures
            ),
        ));
    }
    let before = state.policy;
    let is_weaker = policy.signatures < before.signatures || policy.risk < before.risk;
    let signers = match envelope {
        None if is_weaker => {
            return Err(Rejection::new(
                ErrorCode::FailedPrecondition,
                format!(
                    "model `{model}` asks for {} signatures ({} risk), and less is signed by as many: \
                     give --key",
                    before.signatures,
                    before.risk.as_str()
                ),
            ));
        }
        None => Vec::new(),
        Some(envelope) => {
            let demand = Demand {
                what: "policy",
                statement: &statement::policy(model, &policy, expected_revision),
                role: Role::Release,
                signatures: before.signatures,
            };
            envelope.check(demand, |id| keys::find(txn, id))?
        }
    };
    state.policy = policy;
    put_model_state(txn, model, &state);
    let event = Event::PolicySet {
        model,
        risk: policy.risk.as_str(),
        signatures: policy.signatures,
        revision: state.revision,
        signers: &signers,
        envelopes: envelope.map(Envelope::to_json).into_iter().collect(),
    };
    events::append(txn, context, &event);
    Ok(state)
}

#[cfg(test)]
#[path = "stages_tests.rs"]
mod tests;
