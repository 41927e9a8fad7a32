//! What must not be seen: bytes that no log, error or `Debug` output shows.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A secret of a user's, or the sealed form of one. `Debug` says only how long it is.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// Keeps `bytes` from being shown.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Secret(bytes)
    }

    /// The bytes, for whoever needs them. Nothing that prints may.
    #[must_use]
    pub fn reveal(&self) -> &[u8] {
        &self.0
    }

    /// Its length, in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> usize {
        self.0.len()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({} bytes)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_sent_whole_and_never_printed() {
        let secret = Secret::new(b"hunter2".to_vec());
        assert_eq!(format!("{secret:?}"), "Secret(7 bytes)");
        let bytes = crate::codec::encode_plain(&secret);
        let back: Secret = crate::codec::decode(&bytes, 1024).unwrap();
        assert_eq!(back.reveal(), b"hunter2");
    }
}
