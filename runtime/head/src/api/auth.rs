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
    identify(context, request).await.map(|(caller, _)| caller)
}

/// Who sent `request`, and in whose name, as the audit log tells it: the name of a token or of a
/// certificate.
pub(super) async fn identify<T>(
    context: &HeadContext,
    request: &Request<T>,
) -> Result<(Caller, String), Status> {
    if let Some(identity) = peer_identity(request) {
        let caller = caller_of(identity).map_err(|rejection| rejected(&rejection))?;
        return Ok((caller, identity.to_string()));
    }
    let text = bearer(request).map_err(|rejection| rejected(&rejection))?;
    let token = parsed(context, text)?;
    let reader = context.raft.read().await?;
    let caller = role_to_caller(context, &reader, &token)?;
    let now_ms = context.clock.now_ms();
    let name = mobula_scheduler::token_principal(&reader, &token.secret_hash(), now_ms)
        .map_err(|rejection| rejected(&rejection))?;
    Ok((caller, name))
}

/// In whose name somebody joins: by the certificate that is shown, or by the token in the message.
pub(super) async fn joining(
    context: &HeadContext,
    peer: Option<&Identity>,
    token: &str,
) -> Result<String, Status> {
    if let Some(peer) = peer {
        return Ok(peer.to_string());
    }
    let Ok(token) = Token::parse(token.trim()) else {
        return Ok(String::new());
    };
    let reader = context.raft.read().await?;
    let now_ms = context.clock.now_ms();
    // One that is not good is refused where it is used up, and there without a record.
    let name = mobula_scheduler::token_principal(&reader, &token.secret_hash(), now_ms);
    Ok(name.unwrap_or_default())
}

/// Refuses whoever may not read metrics over plain HTTP: clients may, and tokens made for that.
pub(super) async fn may_scrape(
    context: &HeadContext,
    headers: &axum::http::HeaderMap,
    extensions: axum::http::Extensions,
) -> Result<(), Status> {
    let metadata = tonic::metadata::MetadataMap::from_headers(headers.clone());
    let request = Request::from_parts(metadata, extensions, ());
    if let Some(identity) = peer_identity(&request) {
        let caller = caller_of(identity).map_err(|rejection| rejected(&rejection))?;
        return super::access::not_for_jobs(&caller, "the cluster's metrics");
    }
    let text = bearer(&request).map_err(|rejection| rejected(&rejection))?;
    let token = parsed(context, text)?;
    // Of this head's own tables: a follower answers for itself, and a head without a leader is
    // just what somebody wants to see.
    match role_of(context, &context.raft.local_view().await?, &token)? {
        TokenUse::Client | TokenUse::Metrics => Ok(()),
        role => Err(only_to_join(role)),
    }
}

fn only_to_join(role: TokenUse) -> Status {
    rejected(&Rejection::new(
        ErrorCode::PermissionDenied,
        format!("this is a {role} token, which can only be used to join: use a client token"),
    ))
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

fn role_of(context: &HeadContext, reader: &dyn Reader, token: &Token) -> Result<TokenUse, Status> {
    mobula_scheduler::check_token(reader, &token.secret_hash(), context.clock.now_ms())
        .map_err(|rejection| rejected(&rejection))
}

fn role_to_caller(
    context: &HeadContext,
    reader: &dyn Reader,
    token: &Token,
) -> Result<Caller, Status> {
    match role_of(context, reader, token)? {
        TokenUse::Client => Ok(Caller::Client),
        TokenUse::Metrics => Err(rejected(&Rejection::new(
            ErrorCode::PermissionDenied,
            "this is a metrics token, which can only read `/metrics`: use a client token",
        ))),
        role @ (TokenUse::Worker | TokenUse::Head) => Err(only_to_join(role)),
    }
}

/// Whose namespaces `request` may name: those of the principal that its token was made for.
pub(super) async fn namespace_owner<T>(
    context: &HeadContext,
    request: &Request<T>,
) -> Result<String, Status> {
    if let Some(identity) = peer_identity(request) {
        return Ok(identity.to_string());
    }
    let text = bearer(request).map_err(|rejection| rejected(&rejection))?;
    let token = parsed(context, text)?;
    let reader = context.raft.read().await?;
    mobula_scheduler::namespace_owner(&reader, &token.secret_hash(), context.clock.now_ms())
        .map_err(|rejection| rejected(&rejection))
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
