//! The registry's replicated module: its commands and questions, and who may send them. What a command does
//! is in the file of its subject.
//!
//! Invariants:
//! 1. A version never changes and is never given out again ([`super::versions`]).
//! 2. At most one version of a model is in production, and each change of a stage is signed
//!    ([`super::stages`]).
//! 3. Each change has its entry in the log ([`super::events`]).
//! 4. What was decided on another revision of a model than its present one is refused.

use std::collections::BTreeSet;

use mobula_core::codec;
use mobula_core::control::{Applied, ApplyContext, Caller, ModuleId, Reader, StateModule, Txn};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::row;
use serde::{Deserialize, Serialize};

use super::envelope::Envelope;
use super::keys::Role;
use super::provenance::Provenance;
use super::search::{self, Filter, Selector};
use super::stages::{self, Policy, StageChange};
use super::tables::{NEWEST, VERSIONS, model_prefix, version_key};
pub use super::versions::{ModelVersion, NewVersion, find};
use super::{aliases, events, keys, versions};

/// The largest command or question: signed statements of up to 64 KiB, two at the most.
const PAYLOAD_BYTES_MAX: usize = 256 * 1024;

/// Versions in one answer: 4 MiB at the most, which the control API carries.
const PAGE_ROWS: usize = 256;

/// A change to the registry. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// Adds a version. Answer: [`ModelVersion`].
    Register(NewVersion),
    /// Adds a version with where it came from. Answer: [`ModelVersion`].
    RegisterRun {
        /// What it says about itself.
        version: NewVersion,
        /// Where it came from.
        provenance: Box<Provenance>,
    },
    /// Changes a version's stage. Answer: [`search::VersionView`].
    Stage(StageChange),
    /// Makes an alias name a version, or nothing. Answer: [`stages::ModelState`].
    Alias {
        /// The model.
        model: String,
        /// The alias.
        alias: String,
        /// What it names from now on; absent: it is removed.
        version: Option<u64>,
        /// The model's revision that this was decided on.
        expected_revision: u64,
    },
    /// Gives a version a tag, or takes it away. Answer: [`search::VersionView`].
    Tag {
        /// The model.
        model: String,
        /// Its version.
        version: u64,
        /// The tag's name.
        tag: String,
        /// Its value; absent: the tag is removed.
        value: Option<String>,
    },
    /// Sets who decides about a model. Answer: [`stages::ModelState`].
    SetPolicy {
        /// The model.
        model: String,
        /// Its policy from now on.
        policy: Policy,
        /// The model's revision that this was decided on.
        expected_revision: u64,
        /// [`super::statement::policy`], signed: needed for a weaker policy.
        envelope: Option<Envelope>,
    },
    /// Adds a public key. Answer: [`keys::KeyRecord`].
    AddKey {
        /// Its `SubjectPublicKeyInfo` in DER.
        spki: Vec<u8>,
        /// What it may sign.
        roles: BTreeSet<Role>,
        /// Whose it is, for people.
        owner: String,
    },
    /// Makes a key worthless for what is signed from now on. Answer: [`keys::KeyRecord`].
    RevokeKey {
        /// Its name.
        key: String,
        /// Why, for people.
        reason: String,
    },
}

/// A question. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Query {
    /// The newest version of each model, by name, a page of them. Answer: `Vec<ModelVersion>`,
    /// empty after the last.
    List {
        /// Only models with a larger name.
        after: Option<String>,
    },
    /// The versions of a model, oldest first, a page of them. Answer: `Vec<ModelVersion>`, empty
    /// after the last.
    Versions {
        /// The model.
        model: String,
        /// Only larger ones; 0 for all.
        after: u64,
    },
    /// One version. Answer: [`ModelVersion`].
    Version {
        /// The model.
        model: String,
        /// Which; the newest if absent.
        version: Option<u64>,
    },
    /// The versions that a filter lets through, by model and number, a page of them. Answer:
    /// [`search::Page`].
    Search {
        /// Which.
        filter: Filter,
        /// Only those behind this one.
        after: Option<(String, u64)>,
    },
    /// One version with all that is known of it. Answer: [`search::VersionView`].
    View {
        /// The model.
        model: String,
        /// Which.
        selector: Selector,
    },
    /// A model, without its versions. Answer: [`search::ModelView`].
    Model {
        /// Its name.
        model: String,
    },
    /// The latest signed change of a version's stage. Answer: `Option<SignedEdge>`.
    Signed {
        /// The model.
        model: String,
        /// Its version.
        version: u64,
    },
    /// Keys, by name, a page of them. Answer: `Vec<KeyRecord>`, empty after the last.
    Keys {
        /// Only keys with a larger name.
        after: Option<String>,
    },
    /// Entries of the log, a page of them. Answer: [`events::EventPage`].
    Events {
        /// Only from this number on.
        from: u64,
    },
    /// One entry of the log, and the proof that it is there. Answer: [`events::EventProof`].
    Proof {
        /// Its number.
        sequence: u64,
    },
}

/// The registry's replicated part.
#[derive(Debug, Clone, Copy, Default)]
pub struct Registry;

/// Applies a command; the encoded answer.
fn apply(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    command: Command,
) -> Result<Vec<u8>, Rejection> {
    Ok(match command {
        Command::Register(new) => {
            codec::encode_plain(&versions::register(context, txn, new, None)?)
        }
        Command::RegisterRun {
            version,
            provenance,
        } => {
            let registered = versions::register(context, txn, version, Some(&provenance))?;
            codec::encode_plain(&registered)
        }
        Command::Stage(change) => {
            let version = stages::change(context, txn, &change)?;
            codec::encode_plain(&search::view(txn, version))
        }
        Command::Alias {
            model,
            alias,
            version,
            expected_revision,
        } => {
            let state = aliases::set(context, txn, &model, &alias, version, expected_revision)?;
            codec::encode_plain(&state)
        }
        Command::Tag {
            model,
            version,
            tag,
            value,
        } => {
            let tagged = aliases::tag(context, txn, (&model, version), &tag, value)?;
            codec::encode_plain(&search::view(txn, tagged))
        }
        Command::SetPolicy {
            model,
            policy,
            expected_revision,
            envelope,
        } => {
            let envelope = envelope.as_ref();
            let revision = expected_revision;
            let state = stages::set_policy(context, txn, &model, policy, revision, envelope)?;
            codec::encode_plain(&state)
        }
        Command::AddKey { spki, roles, owner } => {
            codec::encode_plain(&keys::add(context, txn, spki, roles, owner)?)
        }
        Command::RevokeKey { key, reason } => {
            codec::encode_plain(&keys::revoke(context, txn, &key, reason)?)
        }
    })
}

fn query(reader: &dyn Reader, query: Query) -> Result<Vec<u8>, Rejection> {
    Ok(match query {
        Query::List { after } => {
            let after = after.as_deref().map(str::as_bytes);
            let newest = reader.scan(NEWEST, &[], after, PAGE_ROWS);
            let versions = newest.into_iter().map(|(model, _)| {
                let model = String::from_utf8(model).expect("a model's name is ASCII");
                find(reader, &model, None).expect("the newest version of a model exists")
            });
            codec::encode_plain(&versions.collect::<Vec<ModelVersion>>())
        }
        Query::Versions { model, after } => {
            find(reader, &model, None)?;
            let after = version_key(&model, after);
            let rows = reader.scan(VERSIONS, &model_prefix(&model), Some(&after), PAGE_ROWS);
            let versions = rows
                .iter()
                .map(|(_, bytes)| row::from_bytes(VERSIONS, bytes));
            codec::encode_plain(&versions.collect::<Vec<ModelVersion>>())
        }
        Query::Version { model, version } => codec::encode_plain(&find(reader, &model, version)?),
        Query::Search { filter, after } => {
            codec::encode_plain(&search::page(reader, &filter, after)?)
        }
        Query::View { model, selector } => {
            let version = search::select(reader, &model, &selector)?;
            codec::encode_plain(&search::view(reader, version))
        }
        Query::Model { model } => codec::encode_plain(&search::model(reader, &model)?),
        Query::Signed { model, version } => {
            find(reader, &model, Some(version))?;
            codec::encode_plain(&stages::signed(reader, &model, version))
        }
        Query::Keys { after } => codec::encode_plain(&keys::page(reader, after.as_deref())),
        Query::Events { from } => codec::encode_plain(&events::page(reader, from)),
        Query::Proof { sequence } => codec::encode_plain(&events::proof(reader, sequence)?),
    })
}

impl StateModule for Registry {
    fn id(&self) -> ModuleId {
        ModuleId::REGISTRY
    }

    fn name(&self) -> &'static str {
        "registry"
    }

    fn apply(
        &self,
        context: &ApplyContext,
        txn: &mut dyn Txn,
        payload: &[u8],
    ) -> Result<Applied, Rejection> {
        let command = crate::payload::decode(payload, PAYLOAD_BYTES_MAX)?;
        let response = apply(context, txn, command)?;
        Ok(Applied::changed(self.id(), response))
    }

    fn subject(&self, payload: &[u8], _response: Option<&[u8]>) -> String {
        match crate::payload::decode(payload, PAYLOAD_BYTES_MAX) {
            Ok(Command::Register(version) | Command::RegisterRun { version, .. }) => {
                format!("a version of {}", version.model)
            }
            Ok(Command::Stage(change)) => {
                let StageChange {
                    model, version, to, ..
                } = change;
                format!("{model}:{version} to {}", to.as_str())
            }
            Ok(Command::Alias { model, alias, .. }) => format!("alias {alias} of {model}"),
            Ok(Command::Tag {
                model,
                version,
                tag,
                ..
            }) => format!("tag {tag} of {model}:{version}"),
            Ok(Command::SetPolicy { model, .. }) => format!("policy of {model}"),
            Ok(Command::AddKey { owner, .. }) => format!("a key of {owner}"),
            Ok(Command::RevokeKey { key, .. }) => format!("key {key}"),
            Err(_) => self.name().to_owned(),
        }
    }

    fn query(
        &self,
        reader: &dyn Reader,
        _now_ms: u64,
        payload: &[u8],
    ) -> Result<Vec<u8>, Rejection> {
        query(reader, crate::payload::decode(payload, PAYLOAD_BYTES_MAX)?)
    }

    fn authorize(&self, caller: &Caller, payload: &[u8]) -> Result<(), Rejection> {
        let command: Command = crate::payload::decode(payload, PAYLOAD_BYTES_MAX)?;
        let of_job = match &command {
            Command::Register(version) | Command::RegisterRun { version, .. } => Some(version.job),
            _ => None,
        };
        match (caller, of_job) {
            (Caller::Client | Caller::Head, _) => Ok(()),
            // What counts are the signatures, whoever sends them.
            (Caller::Host { .. }, _) if matches!(command, Command::Stage(_)) => Ok(()),
            (Caller::Host { job, .. }, Some(of_job)) if job.0 == of_job => Ok(()),
            (Caller::Host { .. } | Caller::Node(_), Some(_)) => Err(Rejection::new(
                ErrorCode::PermissionDenied,
                "models are registered by clients, and by jobs that name themselves as their origin",
            )),
            (Caller::Host { .. } | Caller::Node(_), None) => Err(Rejection::new(
                ErrorCode::PermissionDenied,
                "aliases, tags, policies and keys are changed with a client token",
            )),
        }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
pub(super) mod tests;
