//! Who calls: by client certificate, or by bearer token.

use mobula_core::control::{Caller, Reader};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::JobId;
use mobula_net::identity::{Identity, Role, Token};
use mobula_net::tcp::PeerInfo;
use mobula_scheduler::Role as TokenUse;
use tonic::{Request, Status};

use super::rejected;
use crate::context::HeadContext;
use crate::session::node_of_host_name;

/// Whose certificate the connection of `request` showed.
pub(super) fn peer_identity<T>(request: &Request<T>) -> Option<&Identity> {
    request.extensions().get::<PeerInfo>()?.identity.as_ref()
}

/// Who sent `request`.
pub(super) async fn caller<T>(
    context: &HeadContext,
    request: &Request<T>,
) -> Result<Caller, Status> {
    if let Some(identity) = peer_identity(request) {
        return caller_of(identity).map_err(|rejection| rejected(&rejection));
    }
    let text = bearer(request).map_err(|rejection| rejected(&rejection))?;
    caller_with_token(context, text).await
}

fn bearer<T>(request: &Request<T>) -> Result<&str, Rejection> {
    let missing = || {
        Rejection::new(
            ErrorCode::Unauthenticated,
            "no credentials: send `authorization: Bearer <client token>` (the head's data \
             directory holds one in tokens/client.token), or a client certificate of the cluster",
        )
    };
    let value = request
        .metadata()
        .get("authorization")
        .ok_or_else(missing)?;
    value
        .to_str()
        .ok()
        .and_then(|text| text.strip_prefix("Bearer "))
        .ok_or_else(missing)
}

/// The same, without asking the leader: a token that was revoked a moment ago may still pass. For
/// what is no secret to whoever had a token once.
pub(super) async fn caller_by_own_tables<T>(
    context: &HeadContext,
    request: &Request<T>,
) -> Result<Caller, Status> {
    if let Some(identity) = peer_identity(request) {
        return caller_of(identity).map_err(|rejection| rejected(&rejection));
    }
    let text = bearer(request).map_err(|rejection| rejected(&rejection))?;
    let token = parsed(context, text)?;
    role_to_caller(context, &context.raft.local_view().await?, &token)
}

async fn caller_with_token(context: &HeadContext, text: &str) -> Result<Caller, Status> {
    let token = parsed(context, text)?;
    let reader = context.raft.read().await?;
    role_to_caller(context, &reader, &token)
}

fn parsed(context: &HeadContext, text: &str) -> Result<Token, Status> {
    let token = Token::parse(text.trim()).map_err(|error| {
        rejected(&Rejection::new(
            ErrorCode::Unauthenticated,
            error.to_string(),
        ))
    })?;
    if token.ca_key_hash() != context.ca.key_hash() {
        return Err(rejected(&Rejection::new(
            ErrorCode::Unauthenticated,
            "the token is of another cluster: use one that this cluster's head made",
        )));
    }
    Ok(token)
}

fn role_to_caller(
    context: &HeadContext,
    reader: &dyn Reader,
    token: &Token,
) -> Result<Caller, Status> {
    let role = mobula_scheduler::check_token(reader, &token.secret_hash(), context.clock.now_ms())
        .map_err(|rejection| rejected(&rejection))?;
    match role {
        TokenUse::Client => Ok(Caller::Client),
        TokenUse::Worker | TokenUse::Head => Err(rejected(&Rejection::new(
            ErrorCode::PermissionDenied,
            format!("this is a {role} token, which can only be used to join: use a client token"),
        ))),
    }
}

fn caller_of(identity: &Identity) -> Result<Caller, Rejection> {
    let unreadable = || {
        Rejection::new(
            ErrorCode::Unauthenticated,
            format!("the certificate's name `{identity}` is not one that this head gives"),
        )
    };
    match identity.role {
        Role::Head => Ok(Caller::Head),
        // A revoked token is to open nothing at once, and a certificate cannot be revoked.
        Role::Client => Err(Rejection::new(
            ErrorCode::PermissionDenied,
            "a client's certificate is for calls to actors: show the control API a client token",
        )),
        Role::Node => Err(Rejection::new(
            ErrorCode::PermissionDenied,
            "a worker's certificate is for its session only: use a client token",
        )),
        Role::Host => Ok(Caller::Host {
            job: JobId(identity.job.ok_or_else(unreadable)?),
            node: node_of_host_name(&identity.id).ok_or_else(unreadable)?,
        }),
    }
}
