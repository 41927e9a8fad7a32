//! Model files signed as OpenSSF's model-signing does (github.com/sigstore/model-transparency, PyPI
//! `model-signing` 1.1): one signature over all files of a folder, which `model_signing verify key` accepts,
//! and which is accepted here when `model_signing sign key` made it.
//!
//! The signature is a Sigstore bundle v0.3 with a DSSE envelope around an in-toto statement. The statement's
//! predicate lists the SHA-256 of each file in the order of their paths, its subject is the SHA-256 over those
//! digests' bytes in that order.
//!
//! Invariants:
//! 1. Nothing of a bundle is believed before its signature is verified with the key that was given.
//! 2. A folder fits if it has exactly the files that were signed, but for those that the statement or git
//!    leaves out: one more is as wrong as one less.
//! 3. No link is followed.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use ring::digest::{Context, SHA256};
use serde::Deserialize;
use serde_json::{Value, json};

use super::envelope::{Envelope, EnvelopeError, PAYLOAD_TYPE, Signature, pae};
use super::hex;
use super::keys::{Algorithm, PublicKey};
use super::merkle::{self, Hash};
use super::signer::{SignError, Signer};
use super::statement::STATEMENT_TYPE;

/// The bundle's file, within the folder that it is for.
pub const BUNDLE_FILE: &str = "model.sig";

/// What kind of bundle it is.
const MEDIA_TYPE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";

/// What its statement says.
const PREDICATE_TYPE: &str = "https://model_signing/signature/v1.0";

/// What is never signed: git's own files.
const IGNORED: [&str; 4] = [".git", ".gitattributes", ".github", ".gitignore"];

/// Files of a model: a large one in shards has some hundreds.
const FILES_MAX: usize = 100_000;

/// Folders within folders.
const DEPTH_MAX: usize = 64;

/// The largest bundle: 100,000 files at some 200 bytes, twice encoded.
pub const BUNDLE_BYTES_MAX: u64 = 64 << 20;

/// Bytes of a file that are hashed at once.
const CHUNK_BYTES: usize = 1 << 20;

/// Why a folder was not signed, or does not verify.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// A file cannot be read.
    #[error("{}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// Neither file nor folder, or a name that is no text.
    #[error("{} is {what}: a model is made of plain files", path.display())]
    NotPlain {
        /// Which.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Too many files, or folders too deep.
    #[error("{} has more than {FILES_MAX} files, or folders deeper than {DEPTH_MAX}: sign a part of it", path.display())]
    TooLarge {
        /// The folder.
        path: PathBuf,
    },
    /// The key is of a kind that model-signing does not know.
    #[error(
        "model-signing knows no {0} keys: sign with one of `mobula keys create --algorithm ecdsa-p256`"
    )]
    Algorithm(&'static str),
    /// The key did not sign.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// Not a bundle that this code reads.
    #[error("not a bundle of model-signing with a key: {0}")]
    Format(String),
    /// Another key signed, as the bundle itself says.
    #[error(
        "the bundle was signed with another key: its hint is {found}, this key's is {expected}"
    )]
    OtherKey {
        /// In the bundle.
        found: String,
        /// Of the key.
        expected: String,
    },
    /// The signature is not genuine.
    #[error(
        "the bundle's signature is not genuine: it was made with another key, or the bundle was changed"
    )]
    Forged,
    /// The listed digests do not come to the root.
    #[error(
        "the bundle contradicts itself: its files come to the root {found}, and it says {stated}"
    )]
    Root {
        /// Of the files that it lists.
        found: String,
        /// As it says.
        stated: String,
    },
    /// The folder has other files.
    #[error("the folder is not what was signed: {}", differences.join(", "))]
    Differs {
        /// What is missing, what is more, what is changed; the first ones.
        differences: Vec<String>,
    },
}

impl From<EnvelopeError> for BundleError {
    fn from(error: EnvelopeError) -> Self {
        BundleError::Format(error.0)
    }
}

/// Differences that an error lists.
const DIFFERENCES_MAX: usize = 10;

/// Paths in the order that model-signing gives them: folder by folder, not letter by letter, so that `a/b`
/// comes before `a.b`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Name(String);

impl Ord for Name {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.split('/').cmp(other.0.split('/'))
    }
}

impl PartialOrd for Name {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// What was verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// The name of the folder that was signed.
    pub name: String,
    /// How many files.
    pub files: usize,
    /// The SHA-256 over their digests, in hex.
    pub root: String,
}

fn root(digests: impl Iterator<Item = Hash>) -> String {
    let bytes: Vec<u8> = digests.flatten().collect();
    hex::encode(&merkle::hash(&bytes))
}

/// The digest of each file below `folder`, but for `ignored` paths.
fn hash_folder(folder: &Path, ignored: &[String]) -> Result<BTreeMap<Name, Hash>, BundleError> {
    let mut files = BTreeMap::new();
    let mut folders = vec![(folder.to_owned(), String::new(), 0)];
    while let Some((path, prefix, depth)) = folders.pop() {
        let failed = |error| BundleError::File {
            path: path.clone(),
            error,
        };
        for entry in std::fs::read_dir(&path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let path = entry.path();
            let Ok(name) = entry.file_name().into_string() else {
                let what = "named by something that is no text";
                return Err(BundleError::NotPlain { path, what });
            };
            let name = format!("{prefix}{name}");
            if IGNORED.contains(&name.as_str()) || ignored.contains(&name) {
                continue;
            }
            let kind = entry.file_type().map_err(failed)?;
            if kind.is_dir() {
                folders.push((path, format!("{name}/"), depth + 1));
            } else if kind.is_file() {
                files.insert(Name(name), hash_file(&path)?);
            } else {
                let what = if kind.is_symlink() {
                    "a link"
                } else {
                    "no file"
                };
                return Err(BundleError::NotPlain { path, what });
            }
            if files.len() > FILES_MAX || depth > DEPTH_MAX {
                let path = folder.to_owned();
                return Err(BundleError::TooLarge { path });
            }
        }
    }
    Ok(files)
}

fn hash_file(path: &Path) -> Result<Hash, BundleError> {
    let failed = |error| BundleError::File {
        path: path.to_owned(),
        error,
    };
    let mut file = std::fs::File::open(path).map_err(failed)?;
    let mut context = Context::new(&SHA256);
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match file.read(&mut chunk).map_err(failed)? {
            0 => break,
            count => context.update(&chunk[..count]),
        }
    }
    let digest = context.finish();
    Ok(digest.as_ref().try_into().expect("a SHA-256 has 32 bytes"))
}

/// SHA-256 of a key's PEM: how a bundle says which key it needs.
fn hint(key: &PublicKey) -> String {
    hex::encode(&merkle::hash(key.to_pem().as_bytes()))
}

/// Signs all files of `folder`; the bundle's text, to be written into [`BUNDLE_FILE`] there.
pub fn sign(folder: &Path, name: &str, signer: &dyn Signer) -> Result<String, BundleError> {
    let key = signer.public_key();
    if key.algorithm() != Algorithm::EcdsaP256 {
        return Err(BundleError::Algorithm(key.algorithm().as_str()));
    }
    let ignored: Vec<&str> = IGNORED.into_iter().chain([BUNDLE_FILE]).collect();
    let files = hash_folder(folder, &[BUNDLE_FILE.to_owned()])?;
    let resources: Vec<Value> = files
        .iter()
        .map(|(Name(name), digest)| {
            json!({ "name": name, "algorithm": "sha256", "digest": hex::encode(digest) })
        })
        .collect();
    let statement = json!({
        "_type": STATEMENT_TYPE,
        "subject": [{ "name": name, "digest": { "sha256": root(files.into_values()) } }],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": false,
                "ignore_paths": ignored,
            },
            "resources": resources,
        },
    });
    let payload = serde_json::to_vec(&statement).expect("texts always encode");
    let signature = Signature {
        // As model-signing has it: the key is named by the hint.
        key: String::new(),
        bytes: signer.sign(&pae(PAYLOAD_TYPE, &payload))?,
    };
    let envelope = Envelope {
        payload,
        signatures: vec![signature],
    };
    let bundle = json!({
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {
            "publicKey": { "hint": hint(key) },
            "tlogEntries": [],
        },
        "dsseEnvelope": envelope.to_json(),
    });
    Ok(bundle.to_string())
}

#[derive(Deserialize)]
struct Statement {
    #[serde(rename = "_type")]
    statement_type: String,
    subject: Vec<Subject>,
    #[serde(rename = "predicateType")]
    predicate_type: String,
    predicate: Predicate,
}

#[derive(Deserialize)]
struct Subject {
    name: String,
    digest: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Predicate {
    serialization: Serialization,
    resources: Vec<Resource>,
}

#[derive(Deserialize)]
struct Serialization {
    method: String,
    hash_type: String,
    #[serde(default)]
    ignore_paths: Vec<String>,
}

#[derive(Deserialize)]
struct Resource {
    name: String,
    algorithm: String,
    digest: String,
}

/// The statement of a bundle that `key` signed.
fn open(text: &str, key: &PublicKey) -> Result<Statement, BundleError> {
    let wrong = |what: &str| BundleError::Format(what.to_owned());
    let bundle: Value =
        serde_json::from_str(text).map_err(|error| BundleError::Format(error.to_string()))?;
    if bundle["mediaType"] != MEDIA_TYPE {
        return Err(wrong("it is of another media type, or an older version"));
    }
    let expected = hint(key);
    match bundle["verificationMaterial"]["publicKey"]["hint"].as_str() {
        Some(found) if !found.is_empty() && found != expected => {
            let found = found.chars().take(80).collect();
            return Err(BundleError::OtherKey { found, expected });
        }
        _ => {}
    }
    let envelope = Envelope::from_json(&bundle["dsseEnvelope"])?;
    let [signature] = envelope.signatures.as_slice() else {
        return Err(wrong("it has no signature, or more than one"));
    };
    if !key.verifies(&pae(PAYLOAD_TYPE, &envelope.payload), &signature.bytes) {
        return Err(BundleError::Forged);
    }
    let statement: Statement = serde_json::from_slice(&envelope.payload)
        .map_err(|error| BundleError::Format(error.to_string()))?;
    if statement.statement_type != STATEMENT_TYPE || statement.predicate_type != PREDICATE_TYPE {
        return Err(wrong("its statement is about something else"));
    }
    let serialization = &statement.predicate.serialization;
    if serialization.method != "files" || serialization.hash_type != "sha256" {
        return Err(wrong(
            "its files are hashed in shards or not with SHA-256: sign with `--serialization files`",
        ));
    }
    Ok(statement)
}

/// Checks that `folder` has the files that the bundle with this text lists, and that `key` signed it.
pub fn verify(
    folder: &Path,
    bundle_file: &Path,
    text: &str,
    key: &PublicKey,
) -> Result<Verified, BundleError> {
    let statement = open(text, key)?;
    let [subject] = statement.subject.as_slice() else {
        return Err(BundleError::Format("it has not one subject".to_owned()));
    };
    let mut listed = BTreeMap::new();
    let mut digests = Vec::new();
    for resource in &statement.predicate.resources {
        let digest = hex::decode_hash(&resource.digest);
        let Some(digest) = digest.filter(|_| resource.algorithm == "sha256") else {
            let name: String = resource.name.chars().take(80).collect();
            return Err(BundleError::Format(format!("`{name}` has no SHA-256")));
        };
        digests.push(digest);
        listed.insert(Name(resource.name.clone()), digest);
    }
    let found = root(digests.into_iter());
    let stated = subject.digest.get("sha256").cloned().unwrap_or_default();
    if found != stated {
        return Err(BundleError::Root { found, stated });
    }
    let mut ignored = statement.predicate.serialization.ignore_paths;
    if let Ok(path) = bundle_file.strip_prefix(folder) {
        ignored.push(path.to_string_lossy().into_owned());
    }
    let there = hash_folder(folder, &ignored)?;
    let differences = differences(&listed, &there);
    if !differences.is_empty() {
        return Err(BundleError::Differs { differences });
    }
    Ok(Verified {
        name: subject.name.clone(),
        files: there.len(),
        root: found,
    })
}

fn differences(listed: &BTreeMap<Name, Hash>, there: &BTreeMap<Name, Hash>) -> Vec<String> {
    let missing = listed
        .iter()
        .filter_map(|(name, digest)| match there.get(name) {
            None => Some(format!("`{}` is missing", name.0)),
            Some(found) if found != digest => Some(format!("`{}` was changed", name.0)),
            Some(_) => None,
        });
    let more = there
        .keys()
        .filter(|name| !listed.contains_key(name))
        .map(|name| format!("`{}` was not signed", name.0));
    missing.chain(more).take(DIFFERENCES_MAX).collect()
}

#[cfg(test)]
#[path = "bundle_tests.rs"]
mod tests;
