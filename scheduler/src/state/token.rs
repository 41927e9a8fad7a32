//! Join and client tokens: stored hashed, expiring, with counted uses.
//!
//! Invariant: the secret is never here, only its hash; an expired, used-up or revoked token opens
//! nothing.

use mobula_core::control::Reader;
use mobula_core::{ErrorCode, Rejection};
use serde::{Deserialize, Serialize};

use super::{Apply, check_name, overloaded};
use crate::command::{Response, Role};
use crate::limits::{TOKEN_END_BYTES_MAX, TOKENS_MAX};
use crate::row::{self, Counter, TOKENS, TOKENS_BY_HASH};

/// A token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TokenRow {
    pub(crate) id: String,
    pub(crate) secret_hash: [u8; 32],
    pub(crate) role: Role,
    pub(crate) expires_at_ms: u64,
    pub(crate) uses_left: Option<u32>,
    pub(crate) ends_with: String,
    pub(crate) principal: Option<String>,
}

/// All tokens, in order of their names.
pub(crate) fn all(reader: &dyn Reader) -> impl Iterator<Item = TokenRow> + '_ {
    row::scan(reader, TOKENS, &[]).map(|(_, value)| row::from_bytes(TOKENS, &value))
}

/// At most `rows` tokens with a name larger than `after`.
pub(crate) fn page(reader: &dyn Reader, after: Option<&str>, rows: usize) -> Vec<TokenRow> {
    let found = reader.scan(TOKENS, &[], after.map(str::as_bytes), rows);
    found
        .iter()
        .map(|(_, value)| row::from_bytes(TOKENS, value))
        .collect()
}

/// What the token with this hash makes of its bearer, without counting a use: for tokens that
/// accompany every call. Joining uses [`crate::Command::UseToken`] instead.
pub fn check(reader: &dyn Reader, secret_hash: &[u8; 32], now_ms: u64) -> Result<Role, Rejection> {
    usable(reader, secret_hash, now_ms).map(|token| token.role)
}

/// The name of the token with this hash, if it is good: the principal in whose name its bearer acts.
pub fn principal(
    reader: &dyn Reader,
    secret_hash: &[u8; 32],
    now_ms: u64,
) -> Result<String, Rejection> {
    usable(reader, secret_hash, now_ms).map(|token| token.id)
}

pub(super) fn usable(
    reader: &dyn Reader,
    secret_hash: &[u8; 32],
    now_ms: u64,
) -> Result<TokenRow, Rejection> {
    let refuse = |message: String| Err(Rejection::new(ErrorCode::Unauthenticated, message));
    let Some(id) = row::get::<String>(reader, TOKENS_BY_HASH, secret_hash) else {
        return refuse(
            "this token is unknown to this cluster, or was revoked: ask for a new one".to_owned(),
        );
    };
    let token: TokenRow =
        row::get(reader, TOKENS, id.as_bytes()).expect("the index by hash names tokens that exist");
    if token.expires_at_ms <= now_ms {
        let ago_s = (now_ms - token.expires_at_ms) / 1000;
        return refuse(format!(
            "token `{id}` expired {ago_s} s ago: ask for a new one"
        ));
    }
    if token.uses_left == Some(0) {
        return refuse(format!(
            "token `{id}` has been used as often as it may be: ask for a new one"
        ));
    }
    Ok(token)
}

pub(crate) fn create(apply: &mut Apply<'_>, token: TokenRow) -> Result<Response, Rejection> {
    check_name("the token's name", &token.id)?;
    if token.ends_with.len() > TOKEN_END_BYTES_MAX {
        return Err(Rejection::invalid(format!(
            "token `{}` would show {} bytes of its end: at most {TOKEN_END_BYTES_MAX}",
            token.id,
            token.ends_with.len()
        )));
    }
    if token.expires_at_ms <= apply.now_ms() {
        return Err(Rejection::invalid(format!(
            "token `{}` would be expired from the start: give it a time to live",
            token.id
        )));
    }
    if let Some(principal) = &token.principal {
        check_name("the token's principal", principal)?;
        if token.role != Role::Client {
            return Err(Rejection::invalid(format!(
                "token `{}` is a {}'s, which submits no jobs: only a client's has a principal",
                token.id, token.role
            )));
        }
    }
    if token.uses_left == Some(0) {
        return Err(Rejection::invalid(format!(
            "token `{}` could never be used: allow at least one use",
            token.id
        )));
    }
    if token.uses_left.is_some() && token.role == Role::Client {
        return Err(Rejection::invalid(format!(
            "token `{}` is a client's, which goes with every call, so its uses are not counted: \
             give it a short time to live instead",
            token.id
        )));
    }
    if let Some(known) = row::get::<TokenRow>(apply.txn, TOKENS, token.id.as_bytes()) {
        if known.secret_hash == token.secret_hash && known.role == token.role {
            return Ok(Response::Done);
        }
        return Err(Rejection::new(
            ErrorCode::AlreadyExists,
            format!(
                "there is another token called `{}`: revoke it, or choose another name",
                token.id
            ),
        ));
    }
    if apply.txn.get(TOKENS_BY_HASH, &token.secret_hash).is_some() {
        return Err(Rejection::new(
            ErrorCode::AlreadyExists,
            format!(
                "the secret of token `{}` is in use already: draw a new one",
                token.id
            ),
        ));
    }
    if Counter::Tokens.value(apply.txn) >= TOKENS_MAX {
        remove_expired(apply);
        if Counter::Tokens.value(apply.txn) >= TOKENS_MAX {
            return Err(overloaded("tokens", TOKENS_MAX, "revoke some first"));
        }
    }
    Counter::Tokens.increment(apply.txn);
    row::put(apply.txn, TOKENS_BY_HASH, &token.secret_hash, &token.id);
    row::put(apply.txn, TOKENS, token.id.as_bytes(), &token);
    Ok(Response::Done)
}

fn remove_expired(apply: &mut Apply<'_>) {
    let now_ms = apply.now_ms();
    let expired: Vec<TokenRow> = all(apply.txn)
        .filter(|token| token.expires_at_ms <= now_ms)
        .collect();
    for token in expired {
        remove(apply, &token);
    }
}

fn remove(apply: &mut Apply<'_>, token: &TokenRow) {
    apply.txn.delete(TOKENS, token.id.as_bytes());
    apply.txn.delete(TOKENS_BY_HASH, &token.secret_hash);
    Counter::Tokens.decrement(apply.txn);
}

pub(crate) fn consume(
    apply: &mut Apply<'_>,
    secret_hash: &[u8; 32],
) -> Result<Response, Rejection> {
    let mut token = usable(apply.txn, secret_hash, apply.now_ms())?;
    if let Some(left) = token.uses_left.as_mut() {
        *left -= 1;
        row::put(apply.txn, TOKENS, token.id.as_bytes(), &token);
    }
    Ok(Response::TokenAccepted {
        id: token.id,
        role: token.role,
    })
}

pub(crate) fn revoke(apply: &mut Apply<'_>, id: &str) -> Result<Response, Rejection> {
    check_name("the token's name", id)?;
    let token = row::get::<TokenRow>(apply.txn, TOKENS, id.as_bytes()).ok_or_else(|| {
        Rejection::not_found(format!(
            "there is no token `{id}`: `mobula tokens list` shows those there are"
        ))
    })?;
    remove(apply, &token);
    Ok(Response::Done)
}
