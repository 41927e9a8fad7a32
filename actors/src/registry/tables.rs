//! The registry's tables and their keys. Tags are persisted and never reused.

use mobula_core::control::{ModuleId, Table};

const fn table(tag: u8) -> Table {
    Table {
        module: ModuleId::REGISTRY,
        tag,
    }
}

/// Model name, 0, version → [`super::versions::ModelVersion`].
pub(super) const VERSIONS: Table = table(1);
/// Model name → its newest version.
pub(super) const NEWEST: Table = table(2);
/// Model name, 0, digest → its version.
pub(super) const BY_DIGEST: Table = table(3);
/// Model name, 0, version → [`super::provenance::Provenance`].
pub(super) const PROVENANCE: Table = table(4);
/// Model name, 0, version → [`super::stages::Standing`]; a version without one is a candidate.
pub(super) const STANDINGS: Table = table(5);
/// Model name → [`super::stages::ModelState`]; a model without one was never decided about.
pub(super) const MODELS: Table = table(6);
/// Model name, 0, version → [`super::stages::SignedEdge`], the latest.
pub(super) const SIGNED: Table = table(7);
/// Model name, 0, alias → [`super::aliases::Alias`].
pub(super) const ALIASES: Table = table(8);
/// Key name → [`super::keys::KeyRecord`].
pub(super) const KEYS: Table = table(9);
/// Sequence number → [`super::events::StoredEvent`].
pub(super) const EVENTS: Table = table(10);
/// Level, index → hash of that subtree of the events.
pub(super) const TREE: Table = table(11);
/// [`ENDS_KEY`] → [`super::events::Ends`].
pub(super) const ENDS: Table = table(12);
/// [`POLICY_FILE_KEY`] → [`super::policy::file::PolicyFile`].
pub(super) const POLICY_FILE: Table = table(13);
/// BLAKE3 of data or of one of its files → [`super::policy::data::DataRecord`].
pub(super) const DATA: Table = table(14);
/// Job → [`super::policy::data::TrainedOn`], of the newest jobs.
pub(super) const TRAINED: Table = table(15);
/// [`ENDS_KEY`] → [`super::policy::data::TrainedEnds`].
pub(super) const TRAINED_ENDS: Table = table(16);
/// Model name, 0, version → [`super::policy::data::TrainedOn`], where the job said so.
pub(super) const VERSION_DATA: Table = table(17);
/// What is approved → [`super::policy::approvals::Approvals`].
pub(super) const APPROVALS: Table = table(18);

/// The one key of [`POLICY_FILE`].
pub(super) const POLICY_FILE_KEY: &[u8] = b"policies";

/// The one key of [`ENDS`] and of [`TRAINED_ENDS`].
pub(super) const ENDS_KEY: &[u8] = b"ends";

/// The key of a version.
pub(super) fn version_key(model: &str, version: u64) -> Vec<u8> {
    [model.as_bytes(), &[0], &version.to_be_bytes()].concat()
}

/// The model and the version of such a key.
pub(super) fn version_of_key(key: &[u8]) -> (String, u64) {
    let (model, version) = key
        .split_last_chunk::<8>()
        .expect("a version's key ends with its number");
    let model = model.strip_suffix(&[0]).expect("a zero ends the name");
    let model = String::from_utf8(model.to_vec()).expect("a model's name is ASCII");
    (model, u64::from_be_bytes(*version))
}

/// The key of something of a model that has a name: a digest, or an alias.
pub(super) fn named_key(model: &str, name: &str) -> Vec<u8> {
    [model.as_bytes(), &[0], name.as_bytes()].concat()
}

/// How the keys of everything of a model begin.
pub(super) fn model_prefix(model: &str) -> Vec<u8> {
    [model.as_bytes(), &[0]].concat()
}

/// The key of a subtree.
pub(super) fn subtree_key(level: u8, index: u64) -> Vec<u8> {
    [&[level], index.to_be_bytes().as_slice()].concat()
}
