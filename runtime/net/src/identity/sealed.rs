//! A secret on its way to one reader: X25519 for one answer only, then ChaCha20-Poly1305.
//!
//! For the CA's key when it goes to a new head. The connection is TLS with certificates on both
//! sides already; sealing keeps the key out of every message, and so out of whatever prints,
//! records or buffers messages.
//!
//! Invariant: a key pair is made for one secret and used once, on either side, so the nonce never
//! repeats under a key.

use std::fmt;

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::agreement::{EphemeralPrivateKey, UnparsedPublicKey, X25519, agree_ephemeral};
use ring::rand::SystemRandom;

/// Separates these keys from all others that are made of a shared secret.
const CONTEXT: &str = "mobula 2026-11 sealed secret";

/// Why a secret cannot be sealed or opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// The other side's key is no X25519 key.
    #[error("the other side's public key is not usable; ask again")]
    PublicKey,
    /// The bytes are not what was sealed for this reader, or were changed on the way.
    #[error("the sealed secret is not for this reader, or is damaged; ask again")]
    Sealed,
}

/// Who waits for a secret.
pub struct SecretReader {
    private: EphemeralPrivateKey,
    public: Vec<u8>,
}

impl SecretReader {
    /// A reader with a key pair of its own.
    ///
    /// # Panics
    /// If the system has no randomness to give.
    #[must_use]
    pub fn new() -> Self {
        let (private, public) = key_pair();
        SecretReader { private, public }
    }

    /// What the sender needs to know.
    #[must_use]
    pub fn public_key(&self) -> &[u8] {
        &self.public
    }

    /// Opens what [`seal`] made for this reader.
    pub fn open(self, sender: &[u8], sealed: &[u8]) -> Result<Vec<u8>, SealError> {
        let key = agree(self.private, sender, sender, &self.public)?;
        let mut bytes = sealed.to_vec();
        let opened = key
            .open_in_place(nonce(), Aad::empty(), &mut bytes)
            .map_err(|_| SealError::Sealed)?;
        Ok(opened.to_vec())
    }
}

impl Default for SecretReader {
    fn default() -> Self {
        SecretReader::new()
    }
}

impl fmt::Debug for SecretReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretReader(..)")
    }
}

/// Seals `secret` for the reader with this public key: our own public key, and the sealed bytes.
pub fn seal(secret: &[u8], reader: &[u8]) -> Result<(Vec<u8>, Vec<u8>), SealError> {
    let (private, public) = key_pair();
    let key = agree(private, reader, &public, reader)?;
    let mut bytes = secret.to_vec();
    key.seal_in_place_append_tag(nonce(), Aad::empty(), &mut bytes)
        .map_err(|_| SealError::Sealed)?;
    Ok((public, bytes))
}

fn key_pair() -> (EphemeralPrivateKey, Vec<u8>) {
    let private = EphemeralPrivateKey::generate(&X25519, &SystemRandom::new())
        .expect("the system's random source works; without it no secret can be made");
    let public = private
        .compute_public_key()
        .expect("a key that was just made has a public half");
    (private, public.as_ref().to_vec())
}

fn agree(
    private: EphemeralPrivateKey,
    peer: &[u8],
    sender: &[u8],
    reader: &[u8],
) -> Result<LessSafeKey, SealError> {
    let derive = |shared: &[u8]| {
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(shared).update(sender).update(reader);
        *hasher.finalize().as_bytes()
    };
    let key = agree_ephemeral(private, &UnparsedPublicKey::new(&X25519, peer), derive)
        .map_err(|_| SealError::PublicKey)?;
    let key = UnboundKey::new(&CHACHA20_POLY1305, &key).expect("the key has 32 bytes");
    Ok(LessSafeKey::new(key))
}

/// Always the same: each key seals one secret.
fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; NONCE_LEN])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reader_opens_it() {
        let (reader, other) = (SecretReader::new(), SecretReader::new());
        let (sender, sealed) = seal(b"the key", reader.public_key()).unwrap();
        assert!(!sealed.windows(7).any(|part| part == b"the key"));
        assert_eq!(other.open(&sender, &sealed), Err(SealError::Sealed));
        assert_eq!(reader.open(&sender, &sealed).unwrap(), b"the key");
    }

    #[test]
    fn what_was_changed_does_not_open() {
        let reader = SecretReader::new();
        let (sender, mut sealed) = seal(b"the key", reader.public_key()).unwrap();
        sealed[3] ^= 1;
        assert_eq!(reader.open(&sender, &sealed), Err(SealError::Sealed));
        assert_eq!(seal(b"x", &[1, 2, 3]).unwrap_err(), SealError::PublicKey);
        assert_eq!(
            SecretReader::new().open(&[0; 32], b""),
            Err(SealError::PublicKey),
            "a key that makes every secret the same"
        );
    }
}
