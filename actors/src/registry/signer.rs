//! Private keys: who has one signs, and nobody else sees it.
//!
//! Keys are files by default; what else holds keys (a hardware module, a cloud's key service) implements
//! [`Signer`].
//!
//! Invariants:
//! 1. A private key is in a file that its owner alone can read, and in the memory of the process that signs:
//!    in no table, message, log, `Debug` text or argument.
//! 2. A signer is asked to sign an in-toto statement, never bytes of another meaning: what is signed begins
//!    with the statement's type (see [`envelope::pae`](super::envelope::pae)).

use std::fmt;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair};
use rustls_pki_types::pem::{PemObject, SectionKind};

use super::envelope::{Envelope, PAYLOAD_TYPE, Signature, pae};
use super::keys::{Algorithm, PublicKey, pem};

/// The largest key file: a key of ours has 250 bytes.
const KEY_FILE_BYTES_MAX: u64 = 16 * 1024;

/// Something that signs.
pub trait Signer: Send + Sync {
    /// The public half.
    fn public_key(&self) -> &PublicKey;

    /// Signs `message`: in ASN.1 DER for ECDSA, raw for Ed25519.
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SignError>;
}

/// Why something was not signed.
#[derive(Debug, thiserror::Error)]
#[error("key {key} did not sign: {reason}")]
pub struct SignError {
    /// The key's name.
    pub key: String,
    /// Why.
    pub reason: String,
}

/// Adds a signature to an envelope.
pub fn sign(signer: &dyn Signer, envelope: &mut Envelope) -> Result<(), SignError> {
    let bytes = signer.sign(&pae(PAYLOAD_TYPE, &envelope.payload))?;
    let key = signer.public_key().id();
    envelope.signatures.push(Signature { key, bytes });
    Ok(())
}

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The file cannot be read or written.
    #[error("key file {}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// Others than its owner can read it.
    #[error(
        "key file {} can be read by others (mode {mode:o}): whoever can read it can sign; make another \
         key, or `chmod 600` it if you know that nobody did", path.display()
    )]
    Readable {
        /// Which.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// Not a key of ours.
    #[error(
        "key file {} holds no private key of ECDSA on P-256 or of Ed25519 in PKCS#8 (`-----BEGIN PRIVATE \
         KEY-----`): make one with `mobula keys create`, or convert it with `openssl pkcs8 -topk8 -nocrypt`",
        path.display()
    )]
    Malformed {
        /// Which.
        path: PathBuf,
    },
    /// The system gave no random numbers.
    #[error("the system gave no random numbers for a key")]
    NoRandomness,
}

enum Pair {
    EcdsaP256(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
}

/// A private key in this process's memory.
pub struct PrivateKey {
    pair: Pair,
    public: PublicKey,
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey({})", self.public.id())
    }
}

impl Signer for PrivateKey {
    fn public_key(&self) -> &PublicKey {
        &self.public
    }

    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, SignError> {
        match &self.pair {
            Pair::EcdsaP256(pair) => match pair.sign(&SystemRandom::new(), message) {
                Ok(signature) => Ok(signature.as_ref().to_vec()),
                Err(_) => Err(SignError {
                    key: self.public.id(),
                    reason: "the system gave no random numbers".to_owned(),
                }),
            },
            Pair::Ed25519(pair) => Ok(pair.sign(message).as_ref().to_vec()),
        }
    }
}

impl PrivateKey {
    /// The key that PKCS#8 in DER holds; `None` if it holds none of ours.
    fn from_pkcs8(der: &[u8]) -> Option<Self> {
        let random = SystemRandom::new();
        let ecdsa = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, der, &random);
        let (pair, algorithm, public) = match ecdsa {
            Ok(pair) => {
                let public = pair.public_key().as_ref().to_vec();
                (Pair::EcdsaP256(pair), Algorithm::EcdsaP256, public)
            }
            // OpenSSL's keys lack the public half, which is computed then.
            Err(_) => {
                let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der).ok()?;
                let public = pair.public_key().as_ref().to_vec();
                (Pair::Ed25519(pair), Algorithm::Ed25519, public)
            }
        };
        let public =
            PublicKey::from_raw(algorithm, &public).expect("ring writes it as it reads it");
        Some(PrivateKey { pair, public })
    }

    /// Makes a key and writes it into the new file `path`, which its owner alone can read, as PKCS#8 in PEM.
    pub fn create(path: &Path, algorithm: Algorithm) -> Result<Self, KeyFileError> {
        let random = SystemRandom::new();
        let document = match algorithm {
            Algorithm::EcdsaP256 => {
                EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random)
            }
            Algorithm::Ed25519 => Ed25519KeyPair::generate_pkcs8(&random),
        };
        let document = document.map_err(|_| KeyFileError::NoRandomness)?;
        let key = PrivateKey::from_pkcs8(document.as_ref()).expect("ring reads what it wrote");
        let failed = |error| KeyFileError::File {
            path: path.to_owned(),
            error,
        };
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(failed)?;
        file.write_all(pem("PRIVATE KEY", document.as_ref()).as_bytes())
            .and_then(|()| file.sync_all())
            .map_err(failed)?;
        Ok(key)
    }

    /// Reads the key in the file `path`.
    pub fn open(path: &Path) -> Result<Self, KeyFileError> {
        let failed = |error| KeyFileError::File {
            path: path.to_owned(),
            error,
        };
        let metadata = std::fs::metadata(path).map_err(failed)?;
        let mode = metadata.permissions().mode() & 0o777;
        let path = || path.to_owned();
        if mode & 0o077 != 0 {
            return Err(KeyFileError::Readable { path: path(), mode });
        }
        let malformed = || KeyFileError::Malformed { path: path() };
        if metadata.len() > KEY_FILE_BYTES_MAX {
            return Err(malformed());
        }
        let text = std::fs::read(path()).map_err(failed)?;
        match <(SectionKind, Vec<u8>)>::from_pem_slice(&text) {
            Ok((SectionKind::PrivateKey, der)) => {
                PrivateKey::from_pkcs8(&der).ok_or_else(malformed)
            }
            _ => Err(malformed()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::registry::keys::{KeyRecord, Role};

    /// A new key.
    pub(crate) fn key() -> PrivateKey {
        let random = SystemRandom::new();
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random);
        PrivateKey::from_pkcs8(document.unwrap().as_ref()).unwrap()
    }

    /// The row of such a key.
    pub(crate) fn record_of(key: &PrivateKey, roles: &[Role]) -> KeyRecord {
        KeyRecord {
            id: key.public_key().id(),
            spki: key.public_key().spki().to_vec(),
            roles: roles.iter().copied().collect(),
            owner: "someone".to_owned(),
            added_ms: 1,
            revoked: None,
        }
    }

    #[test]
    fn a_key_survives_in_its_file_and_signs_what_it_alone_could() {
        let dir = tempfile::tempdir().unwrap();
        for algorithm in [Algorithm::EcdsaP256, Algorithm::Ed25519] {
            let path = dir.path().join(algorithm.as_str());
            let made = PrivateKey::create(&path, algorithm).unwrap();
            let mode = std::fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
            let read = PrivateKey::open(&path).unwrap();
            assert_eq!(read.public_key(), made.public_key());
            assert_eq!(read.public_key().algorithm(), algorithm);
            let signature = read.sign(b"message").unwrap();
            let public = made.public_key();
            assert!(public.verifies(b"message", &signature));
            assert!(!public.verifies(b"messagE", &signature));
            assert!(!key().public_key().verifies(b"message", &signature));
            let shown = format!("{made:?}");
            assert_eq!(shown, format!("PrivateKey({})", public.id()));
            let again = PrivateKey::create(&path, algorithm).unwrap_err();
            assert!(matches!(again, KeyFileError::File { .. }), "{again}");
        }
    }

    #[test]
    fn a_key_that_others_can_read_or_that_is_none_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        PrivateKey::create(&path, Algorithm::EcdsaP256).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = PrivateKey::open(&path).unwrap_err();
        assert!(error.to_string().contains("mode 640"), "{error}");
        let path = dir.path().join("text");
        std::fs::write(&path, "hello").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let error = PrivateKey::open(&path).unwrap_err();
        assert!(matches!(error, KeyFileError::Malformed { .. }), "{error}");
        let error = PrivateKey::open(&dir.path().join("absent")).unwrap_err();
        assert!(matches!(error, KeyFileError::File { .. }), "{error}");
    }
}
