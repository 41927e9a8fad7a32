//! Bearer tokens: only hashes are kept, and they are compared in constant time.
//!
//! A server asks its [`Gate`] before anything of a request is read. There is no way to build one here that lets
//! everyone in.

use std::fmt;
use std::sync::Arc;

use super::oip::OipError;

/// Tokens an endpoint may accept at once: enough to rotate them, and a bound on the work a wrong token causes.
pub const MAX_TOKENS: usize = 64;

/// What a caller asks about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject<'a> {
    /// Whether the server lives and takes requests: it says nothing else.
    Health,
    /// The server, or all that the caller may ask.
    Server,
    /// One model.
    Model(&'a str),
}

impl<'a> Subject<'a> {
    /// What a path is about. A model's name is compared as it stands there: one that is written in another way is no
    /// model's, and its caller is refused.
    #[must_use]
    pub fn of_path(path: &'a str) -> Self {
        if matches!(path, "/v2/health/live" | "/v2/health/ready") {
            return Subject::Health;
        }
        let rest = path
            .strip_prefix("/v2/models/")
            .or_else(|| path.strip_prefix("/v2/repository/models/"));
        match rest.and_then(|rest| rest.split('/').next()) {
            Some(model) if !model.is_empty() => Subject::Model(model),
            _ => Subject::Server,
        }
    }
}

/// A caller whose token is right.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Caller {
    /// The model that its token is for; `None` where all tokens are for all models of the server.
    pub model: Option<Arc<str>>,
    /// The name of its token, where tokens have names.
    pub token: Option<Arc<str>>,
}

/// Says who may ask what.
pub trait Gate: Send + Sync + 'static {
    /// Who it is that shows this value of an `Authorization` header, if that one may ask about this.
    ///
    /// # Errors
    /// [`OipError::Unauthorized`], which says the same whatever is wrong, or why a caller whose token is right is
    /// refused.
    fn admit(&self, authorization: Option<&[u8]>, subject: Subject<'_>)
    -> Result<Caller, OipError>;
}

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

impl Gate for BearerAuth {
    fn admit(
        &self,
        authorization: Option<&[u8]>,
        _subject: Subject<'_>,
    ) -> Result<Caller, OipError> {
        self.check(authorization).map(|()| Caller::default())
    }
}

impl fmt::Debug for BearerAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BearerAuth")
            .field("tokens", &self.token_hashes.len())
            .finish()
    }
}

/// The token in the value of an `Authorization` header. The scheme is case-insensitive (RFC 9110), the token is not.
pub(super) fn bearer_token(authorization: &[u8]) -> Option<&[u8]> {
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
    fn a_path_says_what_it_is_about() {
        for (path, subject) in [
            ("/v2/health/live", Subject::Health),
            ("/v2/health/ready", Subject::Health),
            ("/v2/health/other", Subject::Server),
            ("/v2", Subject::Server),
            ("/v2/models/", Subject::Server),
            ("/v2/repository/index", Subject::Server),
            ("/v2/models/digits", Subject::Model("digits")),
            (
                "/v2/models/digits/versions/1/infer",
                Subject::Model("digits"),
            ),
            (
                "/v2/repository/models/digits/load",
                Subject::Model("digits"),
            ),
            ("/v2/models/%64igits", Subject::Model("%64igits")),
        ] {
            assert_eq!(Subject::of_path(path), subject, "{path}");
        }
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
