//! The tokens of an endpoint, as a door checks them.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use super::state::{Access, Token};
use crate::serving::auth::{Caller, Gate, Subject, bearer_token};
use crate::serving::oip::OipError;

/// Tokens that open one endpoint.
#[derive(Debug, Clone, Default)]
pub struct Keyring {
    keys: Vec<Key>,
}

#[derive(Debug, Clone)]
struct Key {
    /// [`blake3::Hash`] compares in constant time.
    hash: blake3::Hash,
    name: Arc<str>,
    expires_ms: Option<u64>,
}

/// What a caller shows: the hash of a token.
#[derive(Clone, Copy)]
pub struct Shown(blake3::Hash);

impl Shown {
    /// What the value of an `Authorization` header shows.
    #[must_use]
    pub fn of(authorization: Option<&[u8]>) -> Option<Self> {
        let token = bearer_token(authorization?)?;
        Some(Shown(blake3::hash(token)))
    }
}

impl Keyring {
    /// The keyring of these tokens.
    #[must_use]
    pub fn new(tokens: &[Token]) -> Self {
        let key = |token: &Token| Key {
            hash: blake3::Hash::from_bytes(token.hash),
            name: Arc::from(token.name.as_str()),
            expires_ms: token.expires_ms,
        };
        Keyring {
            keys: tokens.iter().map(key).collect(),
        }
    }

    /// The name of the token that is shown, if it opens the endpoint now.
    #[must_use]
    pub fn find(&self, shown: Shown, now_ms: u64) -> Option<&Arc<str>> {
        // No early exit: the time must not tell which of the tokens is close.
        let found = self.keys.iter().fold(None, |found, key| {
            let is_this = key.hash == shown.0;
            if is_this { Some(key) } else { found }
        })?;
        let is_expired = found
            .expires_ms
            .is_some_and(|expires_ms| expires_ms <= now_ms);
        (!is_expired).then_some(&found.name)
    }
}

/// Milliseconds since the Unix epoch.
#[must_use]
pub fn now_ms() -> u64 {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since_epoch.as_millis()).unwrap_or(u64::MAX)
}

/// The gate of one endpoint: whoever has one of its tokens may ask everything that its router answers.
#[derive(Clone)]
pub struct EndpointGate {
    endpoint: Arc<str>,
    access: watch::Receiver<Arc<Access>>,
}

impl EndpointGate {
    /// The gate of `endpoint`.
    #[must_use]
    pub fn new(endpoint: &str, access: watch::Receiver<Arc<Access>>) -> Self {
        EndpointGate {
            endpoint: Arc::from(endpoint),
            access,
        }
    }
}

impl Gate for EndpointGate {
    fn admit(
        &self,
        authorization: Option<&[u8]>,
        _subject: Subject<'_>,
    ) -> Result<Caller, OipError> {
        let shown = Shown::of(authorization).ok_or(OipError::Unauthorized)?;
        let access = Arc::clone(&self.access.borrow());
        // Sixteen hashes are copied faster than a lock would be taken.
        let token = Keyring::new(&access.tokens)
            .find(shown, now_ms())
            .map(Arc::clone);
        Ok(Caller {
            model: Some(Arc::clone(&self.endpoint)),
            token: Some(token.ok_or(OipError::Unauthorized)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(name: &str, text: &str, expires_ms: Option<u64>) -> Token {
        Token {
            name: name.to_owned(),
            hash: *blake3::hash(text.as_bytes()).as_bytes(),
            created_ms: 0,
            expires_ms,
            per_second: None,
        }
    }

    #[test]
    fn a_token_opens_until_it_expires_or_is_revoked() {
        let tokens = [token("ann", "a", None), token("bob", "b", Some(10))];
        let found = |keyring: &Keyring, text: &str, now_ms| {
            let shown = Shown::of(Some(format!("Bearer {text}").as_bytes())).unwrap();
            keyring.find(shown, now_ms).map(|name| name.to_string())
        };
        let keyring = Keyring::new(&tokens);
        assert_eq!(found(&keyring, "a", u64::MAX).as_deref(), Some("ann"));
        assert_eq!(found(&keyring, "b", 9).as_deref(), Some("bob"));
        assert_eq!(found(&keyring, "b", 10), None);
        assert_eq!(found(&keyring, "c", 0), None);
        assert_eq!(found(&Keyring::new(&tokens[1..]), "a", 0), None);
        assert_eq!(found(&Keyring::default(), "", 0), None);
    }

    #[test]
    fn an_endpoints_gate_follows_its_tokens() {
        let access = |tokens: &[Token]| {
            Arc::new(Access {
                tokens: tokens.to_vec(),
                rules: Vec::new(),
            })
        };
        let (sender, receiver) = watch::channel(access(&[token("ann", "a", None)]));
        let gate = EndpointGate::new("digits", receiver);
        let caller = gate.admit(Some(b"Bearer a"), Subject::Health).unwrap();
        assert_eq!(
            (caller.model.as_deref(), caller.token.as_deref()),
            (Some("digits"), Some("ann"))
        );
        sender.send_replace(access(&[]));
        let refused = gate.admit(Some(b"Bearer a"), Subject::Model("digits"));
        assert_eq!(refused, Err(OipError::Unauthorized));
        assert_eq!(
            gate.admit(None, Subject::Health),
            Err(OipError::Unauthorized)
        );
    }
}
