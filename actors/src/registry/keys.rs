//! Public keys that may sign decisions about models, as replicated state.
//!
//! Invariants:
//! 1. A key is named by the SHA-256 of its DER: another key has another name.
//! 2. A key's roles never change, and a revoked key never counts again.
//! 3. No private key comes near the tables: see [`super::signer`].

use std::collections::BTreeSet;
use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use mobula_core::control::{ApplyContext, Reader, Txn};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::row;
use ring::signature::{ECDSA_P256_SHA256_ASN1, ED25519, UnparsedPublicKey, VerificationAlgorithm};
use rustls_pki_types::pem::{PemObject, SectionKind};
use serde::{Deserialize, Serialize};

use super::envelope::{Demand, Envelope};
use super::events::{self, Event};
use super::hex;
use super::merkle;
use super::statement::{self, KeyChange};
use super::tables::KEYS;

/// Keys of a cluster, revoked ones among them: people and services that decide, and what they had before.
const KEYS_MAX: usize = 1_000;

/// Keys in one answer.
pub(super) const KEYS_PAGE: usize = 256;

/// The longest name of an owner, and the longest reason of a revocation, in bytes.
const TEXT_BYTES_MAX: usize = 256;

/// Bytes of PEM in a line (RFC 7468, section 2).
const PEM_LINE: usize = 64;

/// How a key signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Algorithm {
    /// ECDSA on P-256 with SHA-256, signatures in ASN.1 DER.
    EcdsaP256,
    /// Ed25519 (RFC 8032).
    Ed25519,
}

impl Algorithm {
    /// A short stable word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Algorithm::EcdsaP256 => "ecdsa-p256",
            Algorithm::Ed25519 => "ed25519",
        }
    }

    /// How the DER of such a key begins; the key's own bytes follow (RFC 5480, RFC 8410).
    pub(super) fn spki_prefix(self) -> &'static [u8] {
        match self {
            Algorithm::EcdsaP256 => &[
                0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06,
                0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00,
            ],
            Algorithm::Ed25519 => &[
                0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
            ],
        }
    }

    /// The length of a key's own bytes: an uncompressed point, or 32 bytes.
    fn key_bytes(self) -> usize {
        match self {
            Algorithm::EcdsaP256 => 65,
            Algorithm::Ed25519 => 32,
        }
    }
}

/// What is wrong with a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Not a PEM file with a public key.
    #[error("not a public key in PEM (`-----BEGIN PUBLIC KEY-----`): {0}")]
    Pem(String),
    /// A key of another kind.
    #[error("not a public key of ECDSA on P-256 or of Ed25519: make one with `mobula keys create`")]
    Algorithm,
}

/// A public key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    algorithm: Algorithm,
    spki: Vec<u8>,
}

impl PublicKey {
    /// The key that a `SubjectPublicKeyInfo` in DER holds.
    pub fn from_spki(spki: &[u8]) -> Result<Self, KeyError> {
        [Algorithm::EcdsaP256, Algorithm::Ed25519]
            .into_iter()
            .find(|algorithm| {
                spki.strip_prefix(algorithm.spki_prefix())
                    .is_some_and(|key| {
                        // A compressed or hybrid point has another first byte.
                        key.len() == algorithm.key_bytes()
                            && (*algorithm != Algorithm::EcdsaP256 || key[0] == 4)
                    })
            })
            .map(|algorithm| PublicKey {
                algorithm,
                spki: spki.to_vec(),
            })
            .ok_or(KeyError::Algorithm)
    }

    /// The key with these own bytes: an uncompressed point, or 32 bytes.
    pub(super) fn from_raw(algorithm: Algorithm, key: &[u8]) -> Result<Self, KeyError> {
        PublicKey::from_spki(&[algorithm.spki_prefix(), key].concat())
    }

    /// The key that a PEM file holds.
    pub fn from_pem(text: &str) -> Result<Self, KeyError> {
        match <(SectionKind, Vec<u8>)>::from_pem_slice(text.as_bytes()) {
            Ok((SectionKind::PublicKey, der)) => PublicKey::from_spki(&der),
            Ok((kind, _)) => Err(KeyError::Pem(format!("it holds a {kind:?}"))),
            Err(error) => Err(KeyError::Pem(error.to_string())),
        }
    }

    /// The key as PEM, as OpenSSL writes it.
    #[must_use]
    pub fn to_pem(&self) -> String {
        pem("PUBLIC KEY", &self.spki)
    }

    /// Its `SubjectPublicKeyInfo` in DER.
    #[must_use]
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }

    /// How it signs.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// SHA-256 of its DER, in hex: its name.
    #[must_use]
    pub fn id(&self) -> String {
        hex::encode(&merkle::hash(&self.spki))
    }

    /// Whether `signature` is this key's over `message`.
    #[must_use]
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        let algorithm: &'static dyn VerificationAlgorithm = match self.algorithm {
            Algorithm::EcdsaP256 => &ECDSA_P256_SHA256_ASN1,
            Algorithm::Ed25519 => &ED25519,
        };
        let key = &self.spki[self.algorithm.spki_prefix().len()..];
        UnparsedPublicKey::new(algorithm, key)
            .verify(message, signature)
            .is_ok()
    }
}

/// `der` as PEM under `label`.
pub(super) fn pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let lines: Vec<&str> = text
        .as_bytes()
        .chunks(PEM_LINE)
        .map(|line| std::str::from_utf8(line).expect("base64 is ASCII"))
        .collect();
    let body = lines.join("\n");
    format!("-----BEGIN {label}-----\n{body}\n-----END {label}-----\n")
}

/// What a key may sign. Append-only: positions are tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Role {
    /// Edges between candidate, staging and archived.
    Stage,
    /// Those too, and edges to and from production, and weaker policies.
    Release,
    /// Approvals of what others ask for.
    Approve,
    /// Which keys count, which policies there are, and what data is labelled no more.
    Admin,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 4] = [Role::Stage, Role::Release, Role::Approve, Role::Admin];

    /// A short stable word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Stage => "stage",
            Role::Release => "release",
            Role::Approve => "approve",
            Role::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A key as the registry knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRecord {
    /// Its name: SHA-256 of its DER, in hex.
    pub id: String,
    /// Its `SubjectPublicKeyInfo` in DER.
    pub spki: Vec<u8>,
    /// What it may sign.
    pub roles: BTreeSet<Role>,
    /// Whose it is, for people.
    pub owner: String,
    /// Since when, in milliseconds since the Unix epoch.
    pub added_ms: u64,
    /// Set once it does not count any more.
    pub revoked: Option<Revocation>,
}

/// Why a key does not count any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revocation {
    /// Since when, in milliseconds since the Unix epoch.
    pub revoked_ms: u64,
    /// Why, for people.
    pub reason: String,
}

impl KeyRecord {
    /// The key itself.
    #[must_use]
    pub fn public_key(&self) -> PublicKey {
        PublicKey::from_spki(&self.spki).expect("a key is checked before it is added")
    }

    /// Whether it may sign what needs `role`.
    #[must_use]
    pub fn may(&self, role: Role) -> bool {
        let implied = role == Role::Stage && self.roles.contains(&Role::Release);
        self.roles.contains(&role) || implied
    }
}

/// The key of this name.
pub fn find(reader: &dyn Reader, id: &str) -> Option<KeyRecord> {
    row::get(reader, KEYS, id.as_bytes())
}

/// A page of keys behind `after`, by name.
pub(super) fn page(reader: &dyn Reader, after: Option<&str>) -> Vec<KeyRecord> {
    let rows = reader.scan(KEYS, &[], after.map(str::as_bytes), KEYS_PAGE);
    rows.iter()
        .map(|(_, bytes)| row::from_bytes(KEYS, bytes))
        .collect()
}

fn check_text(what: &str, text: &str) -> Result<(), Rejection> {
    if text.len() <= TEXT_BYTES_MAX {
        return Ok(());
    }
    Err(Rejection::invalid(format!(
        "{what} has {} bytes, the limit is {TEXT_BYTES_MAX}: shorten it",
        text.len()
    )))
}

/// Refuses what no key with the role `admin` has signed, once such a key was added; the keys that signed it.
pub(super) fn check_admin(
    reader: &dyn Reader,
    what: &'static str,
    statement: &[u8],
    envelope: Option<&Envelope>,
) -> Result<Vec<String>, Rejection> {
    let keys = row::all::<KeyRecord>(reader, KEYS, &[]);
    let is_needed = keys.iter().any(|(_, key)| key.may(Role::Admin));
    let Some(envelope) = envelope else {
        if !is_needed {
            return Ok(Vec::new());
        }
        return Err(Rejection::new(
            ErrorCode::PermissionDenied,
            format!(
                "this needs the {what} signed by a key with the role `admin`, because there are such keys: \
                 give --sign-with, with one of those that `mobula keys list` shows"
            ),
        ));
    };
    let demand = Demand {
        what,
        statement,
        role: Role::Admin,
        signatures: 1,
    };
    Ok(envelope.check(demand, |id| find(reader, id))?)
}

/// Adds a key; the same again is the same key. After the first with the role `admin`, one of those signs it.
pub(super) fn add(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    spki: Vec<u8>,
    roles: BTreeSet<Role>,
    owner: String,
    envelope: Option<&Envelope>,
) -> Result<KeyRecord, Rejection> {
    let key = PublicKey::from_spki(&spki).map_err(|error| Rejection::invalid(error.to_string()))?;
    check_text("the owner", &owner)?;
    if roles.is_empty() {
        return Err(Rejection::invalid(
            "a key without a role can sign nothing: give it `stage`, `release`, `approve` or `admin`",
        ));
    }
    let id = key.id();
    if let Some(known) = find(txn, &id) {
        if let Some(revocation) = &known.revoked {
            return Err(Rejection::new(
                ErrorCode::FailedPrecondition,
                format!(
                    "key {id} was revoked ({}) and stays so: make another with `mobula keys create`",
                    revocation.reason
                ),
            ));
        }
        if known.roles != roles || known.owner != owner {
            return Err(Rejection::new(
                ErrorCode::AlreadyExists,
                format!("key {id} is known with other roles or another owner: make another key"),
            ));
        }
        return Ok(known);
    }
    if row::all::<KeyRecord>(txn, KEYS, &[]).len() >= KEYS_MAX {
        return Err(Rejection::new(
            ErrorCode::FailedPrecondition,
            format!("there are {KEYS_MAX} keys, the limit: sign with one of them"),
        ));
    }
    let change = KeyChange::Enrol {
        roles: &roles,
        owner: &owner,
    };
    let signers = check_admin(txn, "enrolment", &statement::key(&id, &change), envelope)?;
    let record = KeyRecord {
        id,
        spki,
        roles,
        owner,
        added_ms: context.now_ms,
        revoked: None,
    };
    row::put(txn, KEYS, record.id.as_bytes(), &record);
    let event = Event::KeyAdded {
        key: &record.id,
        public_key: key.to_pem(),
        roles: record.roles.iter().map(|role| role.as_str()).collect(),
        owner: &record.owner,
        signers: &signers,
        envelopes: envelope.map(Envelope::to_json).into_iter().collect(),
    };
    events::append(txn, context, &event);
    Ok(record)
}

/// Makes a key worthless for what is signed from now on; again changes nothing. After the first key with the
/// role `admin`, one of those signs it.
pub(super) fn revoke(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    id: &str,
    reason: String,
    envelope: Option<&Envelope>,
) -> Result<KeyRecord, Rejection> {
    check_text("the reason", &reason)?;
    let Some(mut record) = find(txn, id) else {
        let shown: String = id.chars().take(80).collect();
        return Err(Rejection::not_found(format!(
            "no key is called `{shown}`: see `mobula keys list`"
        )));
    };
    if record.revoked.is_some() {
        return Ok(record);
    }
    let change = KeyChange::Revoke { reason: &reason };
    let signers = check_admin(
        txn,
        "revocation",
        &statement::key(&record.id, &change),
        envelope,
    )?;
    if record.may(Role::Admin) {
        let keys = row::all::<KeyRecord>(txn, KEYS, &[]);
        let mut others = keys
            .iter()
            .map(|(_, key)| key)
            .filter(|key| key.id != record.id);
        if !others.any(|key| key.revoked.is_none() && key.may(Role::Admin)) {
            return Err(Rejection::new(
                ErrorCode::FailedPrecondition,
                format!(
                    "key {} is the last with the role `admin`, and without one no key could be added or \
                     revoked any more: add another such key first",
                    record.id
                ),
            ));
        }
    }
    let event = Event::KeyRevoked {
        key: &record.id,
        reason: &reason,
        signers: &signers,
        envelopes: envelope.map(Envelope::to_json).into_iter().collect(),
    };
    events::append(txn, context, &event);
    record.revoked = Some(Revocation {
        revoked_ms: context.now_ms,
        reason,
    });
    row::put(txn, KEYS, record.id.as_bytes(), &record);
    Ok(record)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by `openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256` and `openssl pkey -pubout`.
    const P256: &str = include_str!("testdata/p256.pub");

    #[test]
    fn a_key_of_openssl_is_read_and_written_the_same() {
        let key = PublicKey::from_pem(P256).unwrap();
        assert_eq!(key.algorithm(), Algorithm::EcdsaP256);
        assert_eq!(key.to_pem(), P256);
        // `openssl pkey -pubin -outform DER | sha256sum`.
        assert_eq!(
            key.id(),
            "09fbb6a5a845b5e31bd116c04bc5a458b950bbe0e562690cfffdd116a499ff58"
        );
        let again = PublicKey::from_spki(key.spki()).unwrap();
        assert_eq!(again, key);
    }

    #[test]
    fn what_is_no_key_of_ours_is_refused() {
        let key = PublicKey::from_pem(P256).unwrap();
        let mut compressed = key.spki().to_vec();
        compressed[26] = 2;
        let mut long = key.spki().to_vec();
        long.push(0);
        for spki in [&[][..], &key.spki()[..90], &compressed, &long] {
            assert_eq!(PublicKey::from_spki(spki), Err(KeyError::Algorithm));
        }
        for text in [
            "",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ] {
            let error = PublicKey::from_pem(text).unwrap_err();
            assert!(matches!(error, KeyError::Pem(_)), "{error}");
        }
    }
}
