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
use mobula_core::control::{
    Applied, ApplyContext, Caller, ModuleId, Origin, Reader, StateModule, Txn,
};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::row;
use serde::{Deserialize, Serialize};

use super::envelope::Envelope;
use super::keys::Role;
use super::policy::approvals::ApprovalChange;
use super::policy::data::{DataSet, LabelChange};
use super::policy::{approvals, data, file, gate};
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
    /// Adds a public key with the signature of one with the role `admin`. Answer: [`keys::KeyRecord`].
    EnrolKey {
        /// Its `SubjectPublicKeyInfo` in DER.
        spki: Vec<u8>,
        /// What it may sign.
        roles: BTreeSet<Role>,
        /// Whose it is, for people.
        owner: String,
        /// [`super::statement::key`], signed.
        envelope: Envelope,
    },
    /// Makes a key worthless with the signature of one with the role `admin`. Answer: [`keys::KeyRecord`].
    RevokeKeySigned {
        /// Its name.
        key: String,
        /// Why, for people.
        reason: String,
        /// [`super::statement::key`], signed.
        envelope: Envelope,
    },
    /// Sets the policies. Answer: [`file::PolicyFile`].
    SetPolicyFile {
        /// Their text; empty: only the shipped ones count.
        text: String,
        /// The revision that this was decided on.
        expected_revision: u64,
        /// [`super::statement::policy_file`], signed: needed once a key has the role `admin`.
        envelope: Option<Envelope>,
    },
    /// Says what data is. Answer: [`data::DataRecord`].
    LabelData(LabelChange),
    /// Approves something, or withdraws approvals. Answer: [`approvals::Approvals`].
    Approve(ApprovalChange),
    /// Asks whether a job may train, before it does. Answer: [`gate::Decision`].
    Train {
        /// The job.
        job: u64,
        /// What it trains on.
        data: DataSet,
        /// The job of whose checkpoint the weights are that it begins with.
        parent: Option<u64>,
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
    /// The policies. Answer: [`file::PolicyFile`].
    PolicyFile,
    /// What the policies would say. Answer: [`gate::Decision`].
    Explain {
        /// In whose name it would be asked.
        principal: String,
        /// What.
        request: gate::Request,
    },
    /// Labelled data, by digest, a page of it. Answer: `Vec<DataRecord>`, empty after the last.
    Data {
        /// Only data with a larger digest.
        after: Option<String>,
    },
    /// What data is labelled as. Answer: `Option<DataRecord>`.
    DataRecord {
        /// Its BLAKE3, in hex.
        digest: String,
    },
    /// Approvals, a page of them. Answer: `Vec<Approvals>`, empty after the last.
    Approvals {
        /// Only behind those of this.
        after: Option<approvals::Subject>,
    },
    /// The approvals of one thing. Answer: [`approvals::Approvals`].
    ApprovalsOf {
        /// Of what.
        subject: approvals::Subject,
    },
}

/// The registry's replicated part.
#[derive(Debug, Clone, Copy, Default)]
pub struct Registry;

/// Applies a command; the encoded answer.
fn apply(
    context: &ApplyContext,
    origin: Option<&Origin>,
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
            let principal = gate::principal(txn, origin);
            let version = stages::change(context, txn, &principal, &change)?;
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
            codec::encode_plain(&keys::add(context, txn, spki, roles, owner, None)?)
        }
        Command::RevokeKey { key, reason } => {
            codec::encode_plain(&keys::revoke(context, txn, &key, reason, None)?)
        }
        Command::EnrolKey {
            spki,
            roles,
            owner,
            envelope,
        } => {
            let envelope = Some(&envelope);
            codec::encode_plain(&keys::add(context, txn, spki, roles, owner, envelope)?)
        }
        Command::RevokeKeySigned {
            key,
            reason,
            envelope,
        } => codec::encode_plain(&keys::revoke(context, txn, &key, reason, Some(&envelope))?),
        Command::SetPolicyFile {
            text,
            expected_revision,
            envelope,
        } => {
            let envelope = envelope.as_ref();
            codec::encode_plain(&file::set(context, txn, text, expected_revision, envelope)?)
        }
        Command::LabelData(change) => codec::encode_plain(&data::label(context, txn, &change)?),
        Command::Approve(change) => {
            let principal = gate::principal(txn, origin);
            codec::encode_plain(&approvals::change(context, txn, &principal, &change)?)
        }
        Command::Train { job, data, parent } => {
            codec::encode_plain(&gate::pass_train(context, txn, job, &data, parent)?)
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
        Query::PolicyFile => codec::encode_plain(&file::current(reader)),
        Query::Explain { principal, request } => {
            codec::encode_plain(&gate::decide(reader, &principal, &request)?)
        }
        Query::Data { after } => codec::encode_plain(&data::page(reader, after.as_deref())),
        Query::DataRecord { digest } => codec::encode_plain(&data::find(reader, &digest)),
        Query::Approvals { after } => codec::encode_plain(&approvals::page(reader, after.as_ref())),
        Query::ApprovalsOf { subject } => codec::encode_plain(&approvals::of(reader, &subject)),
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
        self.apply_from(context, None, txn, payload)
    }

    fn apply_from(
        &self,
        context: &ApplyContext,
        origin: Option<&Origin>,
        txn: &mut dyn Txn,
        payload: &[u8],
    ) -> Result<Applied, Rejection> {
        let command = crate::payload::decode(payload, PAYLOAD_BYTES_MAX)?;
        let response = apply(context, origin, txn, command)?;
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
            Ok(Command::AddKey { owner, .. } | Command::EnrolKey { owner, .. }) => {
                format!("a key of {owner}")
            }
            Ok(Command::RevokeKey { key, .. } | Command::RevokeKeySigned { key, .. }) => {
                format!("key {key}")
            }
            Ok(Command::SetPolicyFile { .. }) => "the policies".to_owned(),
            Ok(Command::LabelData(change)) => format!("labels of {}", change.data),
            Ok(Command::Approve(change)) => format!("approval to {}", change.subject),
            Ok(Command::Train { job, data, .. }) => {
                format!("job-{job} to train on {}", data.digest)
            }
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
            Command::Train { job, .. } => Some(*job),
            _ => None,
        };
        match (caller, of_job) {
            // A job asks for itself, and nobody else can make its data known.
            (Caller::Client, _) if matches!(command, Command::Train { .. }) => Err(Rejection::new(
                ErrorCode::PermissionDenied,
                "a job asks for itself whether it may train: see `mobula policy explain`",
            )),
            (Caller::Client | Caller::Head, _) => Ok(()),
            // What counts are the signatures, whoever sends them.
            (Caller::Host { .. }, _) if matches!(command, Command::Stage(_)) => Ok(()),
            (Caller::Host { job, .. }, Some(of_job)) if job.0 == of_job => Ok(()),
            (Caller::Host { .. } | Caller::Node(_), Some(_)) => Err(Rejection::new(
                ErrorCode::PermissionDenied,
                "models are registered by clients, and by jobs that name themselves as their origin; jobs \
                 ask about their own training only",
            )),
            (Caller::Host { .. } | Caller::Node(_), None) => Err(Rejection::new(
                ErrorCode::PermissionDenied,
                "aliases, tags, policies, labels, approvals and keys are changed with a client token",
            )),
        }
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
pub(super) mod tests;
