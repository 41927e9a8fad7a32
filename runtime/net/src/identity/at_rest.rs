//! Secrets of jobs where they lie: in the replicated tables and their log, sealed under a key that
//! every head can make of the CA's key and nobody else.
//!
//! Invariants:
//! 1. Who has a head's disk without its CA key, or the tables without the disk, reads no secret.
//! 2. A nonce is made of what it is for (the secret, and the context that it is bound to), so it
//!    repeats under the key only where the whole message does. Equal secrets in one context look
//!    equal, and nothing else is told. A repeated request seals to the same bytes.

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use super::sealed::SealError;

/// Separates the two keys from all others that are made of the CA's.
const SEALING_CONTEXT: &str = "mobula 2026-11 secrets at rest, key";
const NONCE_CONTEXT: &str = "mobula 2026-11 secrets at rest, nonce";

/// Seals and opens secrets at rest. Never prints its keys.
pub struct AtRest {
    key: LessSafeKey,
    nonce_key: [u8; 32],
}

impl AtRest {
    /// The keys that are made of `root`, which is a secret itself.
    pub(super) fn from_root(root: &[u8]) -> AtRest {
        let key = blake3::derive_key(SEALING_CONTEXT, root);
        let key = UnboundKey::new(&CHACHA20_POLY1305, &key).expect("the key has 32 bytes");
        AtRest {
            key: LessSafeKey::new(key),
            nonce_key: blake3::derive_key(NONCE_CONTEXT, root),
        }
    }

    /// Seals `secret`; only the same `context` opens it again.
    #[must_use]
    pub fn seal(&self, secret: &[u8], context: &str) -> Vec<u8> {
        let mut hasher = blake3::Hasher::new_keyed(&self.nonce_key);
        // The length keeps a context and a secret from trading bytes.
        hasher.update(&(context.len() as u64).to_le_bytes());
        hasher.update(context.as_bytes()).update(secret);
        let mut nonce = [0; NONCE_LEN];
        nonce.copy_from_slice(&hasher.finalize().as_bytes()[..NONCE_LEN]);
        let mut sealed = secret.to_vec();
        self.key
            .seal_in_place_append_tag(
                Nonce::assume_unique_for_key(nonce),
                Aad::from(context.as_bytes()),
                &mut sealed,
            )
            .expect("a secret is far below the cipher's limit");
        sealed.splice(..0, nonce);
        sealed
    }

    /// Opens what [`AtRest::seal`] made.
    pub fn open(&self, sealed: &[u8], context: &str) -> Result<Vec<u8>, SealError> {
        let (nonce, rest) = sealed
            .split_at_checked(NONCE_LEN)
            .ok_or(SealError::Sealed)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| SealError::Sealed)?;
        let mut bytes = rest.to_vec();
        let opened = self
            .key
            .open_in_place(nonce, Aad::from(context.as_bytes()), &mut bytes)
            .map_err(|_| SealError::Sealed)?;
        Ok(opened.to_vec())
    }
}

impl std::fmt::Debug for AtRest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AtRest(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_root_and_context_open_a_secret() {
        let keys = AtRest::from_root(b"root");
        let sealed = keys.seal(b"hunter2", "TOKEN");
        assert_eq!(keys.open(&sealed, "TOKEN").unwrap(), b"hunter2");
        assert_eq!(keys.seal(b"hunter2", "TOKEN"), sealed);
        assert!(!sealed.windows(7).any(|part| part == b"hunter2"));
        assert_ne!(
            keys.seal(b"hunter2", "OTHER")[..NONCE_LEN],
            sealed[..NONCE_LEN]
        );
        assert_eq!(keys.open(&sealed, "OTHER"), Err(SealError::Sealed));
        assert_eq!(
            AtRest::from_root(b"other").open(&sealed, "TOKEN"),
            Err(SealError::Sealed)
        );
        assert_eq!(keys.open(&sealed[..5], "TOKEN"), Err(SealError::Sealed));
        let mut damaged = sealed;
        damaged[NONCE_LEN] ^= 1;
        assert_eq!(keys.open(&damaged, "TOKEN"), Err(SealError::Sealed));
    }
}
