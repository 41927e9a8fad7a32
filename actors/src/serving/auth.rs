//! Bearer tokens: only hashes are kept, and they are compared in constant time.
//!
//! There is no way to build a [`BearerAuth`] that lets everyone in.

use std::fmt;

use super::oip::OipError;

/// Tokens an endpoint may accept at once: enough to rotate them, and a bound on the work a wrong token causes.
pub const MAX_TOKENS: usize = 64;

/// The tokens an endpoint accepts.
#[derive(Clone)]
pub struct BearerAuth {
    /// BLAKE3 of each token. [`blake3::Hash`] compares in constant time.
    token_hashes: Vec<blake3::Hash>,
}

impl BearerAuth {
    /// Accepts one token.
    #[must_use]
    pub fn with_token(token: &str) -> Self {
        Self {
            token_hashes: vec![blake3::hash(token.as_bytes())],
        }
    }

    /// Accepts the tokens with these BLAKE3 hashes, of which there is at least one and at most [`MAX_TOKENS`]; `None`
    /// otherwise.
    #[must_use]
    pub fn with_token_hashes(token_hashes: Vec<[u8; 32]>) -> Option<Self> {
        let accepted = (1..=MAX_TOKENS).contains(&token_hashes.len());
        let token_hashes = token_hashes
            .into_iter()
            .map(blake3::Hash::from_bytes)
            .collect();
        accepted.then_some(Self { token_hashes })
    }

    /// Checks the value of an `Authorization` header.
    ///
    /// # Errors
    /// [`OipError::Unauthorized`], which says the same whatever is wrong.
    pub fn check(&self, authorization: Option<&[u8]>) -> Result<(), OipError> {
        let token = authorization
            .and_then(bearer_token)
            .ok_or(OipError::Unauthorized)?;
        let hash = blake3::hash(token);
        // No early exit: the time must not tell which of the tokens is close.
        let known = self
            .token_hashes
            .iter()
            .fold(false, |known, token| known | (*token == hash));
        if known {
            Ok(())
        } else {
            Err(OipError::Unauthorized)
        }
    }
}

impl fmt::Debug for BearerAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BearerAuth")
            .field("tokens", &self.token_hashes.len())
            .finish()
    }
}

/// The scheme is case-insensitive (RFC 9110), the token is not.
fn bearer_token(authorization: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = authorization.split_at_checked(7)?;
    scheme
        .eq_ignore_ascii_case(b"bearer ")
        .then(|| token.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_token_passes() {
        let auth = BearerAuth::with_token("secret");
        let passes = |value: &str| auth.check(Some(value.as_bytes())).is_ok();
        assert!(passes("Bearer secret"));
        assert!(passes("bearer secret"));
        for wrong in [
            "",
            "secret",
            "Bearer",
            "Bearer ",
            "Bearer secre",
            "Bearer secrets",
            "Basic secret",
        ] {
            assert!(!passes(wrong), "{wrong:?}");
        }
        assert_eq!(auth.check(None), Err(OipError::Unauthorized));
    }

    #[test]
    fn several_tokens_are_known_by_hash() {
        let hash = |token: &str| *blake3::hash(token.as_bytes()).as_bytes();
        let auth = BearerAuth::with_token_hashes(vec![hash("old"), hash("new")]).unwrap();
        assert!(auth.check(Some(b"Bearer old")).is_ok());
        assert!(auth.check(Some(b"Bearer new")).is_ok());
        assert!(BearerAuth::with_token_hashes(Vec::new()).is_none());
        assert!(BearerAuth::with_token_hashes(vec![[0; 32]; MAX_TOKENS + 1]).is_none());
    }
}
