//! What is signed about models: in-toto statements (github.com/in-toto/attestation, spec/v1), written the
//! same by whoever signs and by the apply that checks.
//!
//! Invariants:
//! 1. A statement's bytes are a function of what it says.
//! 2. It says everything that the change does: model, version, files, both stages, which version leaves
//!    production, why, and the revision that it is for, so that it cannot be used a second time.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::hex;
use super::keys::Role;
use super::merkle;
use super::policy::approvals::Subject;
use super::provenance::{CheckpointOrigin, Parent, Provenance};
use super::stages::{Policy, Stage};
use super::versions::ModelVersion;

/// The type of an in-toto statement.
pub const STATEMENT_TYPE: &str = "https://in-toto.io/Statement/v1";

/// What a stage edge's statement says.
pub const PROMOTION_TYPE: &str =
    "https://github.com/mobula-runtime/mobula/attestations/promotion/v1";

/// What the statement of a policy says.
pub const POLICY_TYPE: &str = "https://github.com/mobula-runtime/mobula/attestations/policy/v1";

/// What the statement of a file of policies says.
pub const POLICY_FILE_TYPE: &str =
    "https://github.com/mobula-runtime/mobula/attestations/policy-file/v1";

/// What the statement of labels of data says.
pub const LABELS_TYPE: &str = "https://github.com/mobula-runtime/mobula/attestations/labels/v1";

/// What the statement of an approval says.
pub const APPROVAL_TYPE: &str = "https://github.com/mobula-runtime/mobula/attestations/approval/v1";

/// What the statement about a key says.
pub const KEY_TYPE: &str = "https://github.com/mobula-runtime/mobula/attestations/key/v1";

/// SLSA's provenance (slsa.dev/spec/v1.0/provenance).
pub const PROVENANCE_TYPE: &str = "https://slsa.dev/provenance/v1";

/// All types of statements that are signed here, and so by [`super::key_holder`].
pub const SIGNED_TYPES: [&str; 7] = [
    PROMOTION_TYPE,
    POLICY_TYPE,
    PROVENANCE_TYPE,
    POLICY_FILE_TYPE,
    LABELS_TYPE,
    APPROVAL_TYPE,
    KEY_TYPE,
];

/// How our versions are built: SLSA asks for a name of it.
const BUILD_TYPE: &str = "https://github.com/mobula-runtime/mobula/attestations/training/v1";

/// Who builds them.
const BUILDER: &str = "https://github.com/mobula-runtime/mobula";

/// The file of a version, as statements and exports call it.
pub const VERSION_FILE: &str = "version.mobula";

/// A stage edge.
#[derive(Debug, Clone, Copy)]
pub struct Promotion<'a> {
    /// The version.
    pub version: &'a ModelVersion,
    /// Where it came from.
    pub provenance: Option<&'a Provenance>,
    /// Its stage.
    pub from: Stage,
    /// What it becomes.
    pub to: Stage,
    /// The version that leaves production by this.
    pub replaces: Option<u64>,
    /// The model's revision that this was decided on.
    pub revision: u64,
    /// Why, for people.
    pub reason: &'a str,
}

fn to_bytes(subject: Value, predicate_type: &str, predicate: Value) -> Vec<u8> {
    let statement = json!({
        "_type": STATEMENT_TYPE,
        "subject": [subject],
        "predicateType": predicate_type,
        "predicate": predicate,
    });
    serde_json::to_vec(&statement).expect("texts and numbers always encode")
}

/// The version's file.
fn subject(version: &ModelVersion, provenance: Option<&Provenance>) -> Value {
    let mut digests = Map::new();
    if let Some(sha256) = provenance.and_then(|provenance| provenance.sha256.as_ref()) {
        digests.insert("sha256".to_owned(), sha256.as_str().into());
    }
    let blake3 = version.description.digest.as_str();
    digests.insert("blake3".to_owned(), blake3.into());
    json!({ "name": VERSION_FILE, "digest": digests })
}

/// The statement of a stage edge.
#[must_use]
pub fn promotion(edge: &Promotion<'_>) -> Vec<u8> {
    let predicate = json!({
        "model": edge.version.description.model,
        "version": edge.version.version,
        "from": edge.from.as_str(),
        "to": edge.to.as_str(),
        "replaces": edge.replaces,
        "revision": edge.revision,
        "reason": edge.reason,
    });
    to_bytes(
        subject(edge.version, edge.provenance),
        PROMOTION_TYPE,
        predicate,
    )
}

/// The statement of a policy. It is about no file: its subject is the model, by the SHA-256 of its name.
#[must_use]
pub fn policy(model: &str, policy: &Policy, revision: u64) -> Vec<u8> {
    let name = hex::encode(&merkle::hash(model.as_bytes()));
    let predicate = json!({
        "model": model,
        "risk": policy.risk.as_str(),
        "signatures": policy.signatures,
        "revision": revision,
    });
    to_bytes(
        json!({ "name": model, "digest": { "sha256": name } }),
        POLICY_TYPE,
        predicate,
    )
}

/// The statement of a file of policies, which is its subject.
#[must_use]
pub fn policy_file(text: &str, revision: u64) -> Vec<u8> {
    let digest = hex::encode(&merkle::hash(text.as_bytes()));
    to_bytes(
        json!({ "name": "policies.cedar", "digest": { "sha256": digest } }),
        POLICY_FILE_TYPE,
        json!({ "revision": revision }),
    )
}

/// The statement of what data is labelled as.
#[must_use]
pub fn labels(data: &str, name: &str, labels: &BTreeSet<String>, revision: u64) -> Vec<u8> {
    to_bytes(
        json!({ "name": "data", "digest": { "blake3": data } }),
        LABELS_TYPE,
        json!({ "name": name, "labels": labels, "revision": revision }),
    )
}

/// The statement of an approval. Its subject is what is approved, by the SHA-256 of its name; a version is
/// meant by the digest of its file.
#[must_use]
pub fn approval(about: &Subject, file: Option<&str>, reason: &str, revision: u64) -> Vec<u8> {
    let name = about.to_string();
    let digest = hex::encode(&merkle::hash(name.as_bytes()));
    to_bytes(
        json!({ "name": name, "digest": { "sha256": digest } }),
        APPROVAL_TYPE,
        json!({
            "action": about.action(),
            "file_blake3": file,
            "reason": reason,
            "revision": revision,
        }),
    )
}

/// The statement that a key counts from now on (`roles`), or no more. Its subject is the key, by the SHA-256
/// of its DER.
#[must_use]
pub fn key(id: &str, change: &KeyChange<'_>) -> Vec<u8> {
    let predicate = match change {
        KeyChange::Enrol { roles, owner } => {
            let roles: Vec<&str> = roles.iter().map(|role| role.as_str()).collect();
            json!({ "change": "enrol", "roles": roles, "owner": owner })
        }
        KeyChange::Revoke { reason } => json!({ "change": "revoke", "reason": reason }),
    };
    to_bytes(
        json!({ "name": "key", "digest": { "sha256": id } }),
        KEY_TYPE,
        predicate,
    )
}

/// What becomes of a key.
#[derive(Debug, Clone, Copy)]
pub enum KeyChange<'a> {
    /// It counts. A key is enrolled once, so the statement cannot be used again.
    Enrol {
        /// What it may sign.
        roles: &'a BTreeSet<Role>,
        /// Whose it is.
        owner: &'a str,
    },
    /// It counts no more, for good.
    Revoke {
        /// Why.
        reason: &'a str,
    },
}

/// SLSA provenance of a version.
#[must_use]
pub fn provenance(version: &ModelVersion, provenance: &Provenance) -> Vec<u8> {
    let description = &version.description;
    let training: Value = serde_json::from_str(&description.training_json).unwrap_or(Value::Null);
    let blake3 = |name: &str, digest: &str| json!({ "name": name, "digest": { "blake3": digest } });
    let checkpoint = |name: &str, of: &CheckpointOrigin| json!({ "name": name, "uri": of.manifest, "digest": { "blake3": of.digest } });
    let mut dependencies = Vec::new();
    if !description.dataset_blake3.is_empty() {
        dependencies.push(blake3("dataset", &description.dataset_blake3));
    }
    if let Some(code) = &provenance.code {
        dependencies.push(blake3(&code.reference, &code.blake3));
    }
    if let Some(Parent::Checkpoint(parent)) = &provenance.parent {
        dependencies.push(checkpoint("parent checkpoint", parent));
    }
    let mut byproducts = vec![blake3("weights", &description.weights_blake3)];
    if let Some(of) = &provenance.checkpoint {
        byproducts.push(checkpoint("checkpoint", of));
    }
    if let Some(record) = &provenance.run_record {
        byproducts.push(blake3("run record", record));
    }
    byproducts.push(json!({ "name": "metrics", "annotations": description.metrics }));
    let invocation = match version.is_imported() {
        false => format!("job-{}", description.job),
        true => "imported".to_owned(),
    };
    let predicate = json!({
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": { "training": training },
            "internalParameters": {
                "seed": provenance.seed,
                "environment": provenance.environment,
            },
            "resolvedDependencies": dependencies,
        },
        "runDetails": {
            "builder": { "id": BUILDER },
            "metadata": { "invocationId": invocation },
            "byproducts": byproducts,
        },
    });
    to_bytes(
        subject(version, Some(provenance)),
        PROVENANCE_TYPE,
        predicate,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::envelope::PAYLOAD_BYTES_MAX;
    use crate::registry::provenance::tests::complete;
    use crate::registry::versions::tests::new_version;

    fn version() -> ModelVersion {
        ModelVersion {
            version: 3,
            registered_ms: 9,
            description: new_version('1'),
        }
    }

    #[test]
    fn a_promotion_says_all_that_it_does() {
        let (version, provenance) = (version(), complete());
        let edge = Promotion {
            version: &version,
            provenance: Some(&provenance),
            from: Stage::Staging,
            to: Stage::Production,
            replaces: Some(2),
            revision: 8,
            reason: "better",
        };
        let expected = format!(
            concat!(
                r#"{{"_type":"https://in-toto.io/Statement/v1","subject":[{{"name":"version.mobula","#,
                r#""digest":{{"sha256":"{}","blake3":"{}"}}}}],"predicateType":"{}","#,
                r#""predicate":{{"model":"digits","version":3,"from":"staging","to":"production","#,
                r#""replaces":2,"revision":8,"reason":"better"}}}}"#
            ),
            "5".repeat(64),
            "1".repeat(64),
            PROMOTION_TYPE
        );
        assert_eq!(String::from_utf8(promotion(&edge)).unwrap(), expected);
    }

    #[test]
    fn provenance_has_the_fields_that_slsa_asks_for_and_a_bound() {
        let mut version = version();
        version.description.training_json = format!(r#"{{"name":"{}"}}"#, "x".repeat(8_000));
        let bytes = super::provenance(&version, &complete());
        assert!(bytes.len() < PAYLOAD_BYTES_MAX, "{}", bytes.len());
        let statement: Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(statement["predicateType"], PROVENANCE_TYPE);
        let predicate = &statement["predicate"];
        let build = &predicate["buildDefinition"];
        assert_eq!(build["buildType"], BUILD_TYPE);
        assert_eq!(build["internalParameters"]["seed"], 7);
        assert_eq!(build["resolvedDependencies"][0]["name"], "dataset");
        assert_eq!(predicate["runDetails"]["builder"]["id"], BUILDER);
        assert_eq!(predicate["runDetails"]["metadata"]["invocationId"], "job-3");
    }
}
