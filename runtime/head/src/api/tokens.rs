//! Tokens: made, listed and revoked by clients.

use mobula_core::control::Caller;
use mobula_core::error::{ErrorCode, Rejection};
use mobula_scheduler::{Command, Query, QueryResponse, Role};
use mobula_wire::control::{self as api, Empty};
use tonic::Status;

use super::{rejected, views};
use crate::context::HeadContext;
use crate::tokens;

/// The longest that a token may live: a year.
const TOKEN_TTL_MS_MAX: u64 = 365 * 24 * 3_600_000;

fn only_for_clients(caller: &Caller) -> Result<(), Status> {
    if matches!(caller, Caller::Client | Caller::Head) {
        return Ok(());
    }
    Err(rejected(&Rejection::new(
        ErrorCode::PermissionDenied,
        "tokens are made, listed and revoked by clients, not by jobs or workers",
    )))
}

pub(super) async fn create(
    context: &HeadContext,
    caller: &Caller,
    request: api::CreateTokenRequest,
) -> Result<api::CreateTokenReply, Status> {
    only_for_clients(caller)?;
    let role = match request.role.as_str() {
        "worker" => Role::Worker,
        "client" => Role::Client,
        "head" => Role::Head,
        "metrics" => Role::Metrics,
        other => {
            return Err(rejected(&Rejection::invalid(format!(
                "token role `{other}` is unknown: use `worker`, `client`, `head` or `metrics`"
            ))));
        }
    };
    if request.ttl_ms == 0 || request.ttl_ms > TOKEN_TTL_MS_MAX {
        return Err(rejected(&Rejection::invalid(format!(
            "a token cannot live for {} ms: give 1 ms to 365 days",
            request.ttl_ms
        ))));
    }
    let uses = (request.uses != 0).then_some(request.uses);
    // Never answered from a session's window: that would name another secret than was stored. What
    // a lost reply leaves behind is a token that nobody knows, which expires.
    let wanted = tokens::Wanted {
        role,
        ttl_ms: request.ttl_ms,
        uses,
        principal: request.principal,
    };
    let made = tokens::create(context, wanted).await?;
    Ok(api::CreateTokenReply {
        token: made.text,
        expires_at_ms: made.expires_at_ms,
        id: made.id,
    })
}

pub(super) async fn list(
    context: &HeadContext,
    caller: &Caller,
    _request: api::ListTokensRequest,
) -> Result<api::ListTokensReply, Status> {
    only_for_clients(caller)?;
    let mut tokens = Vec::new();
    let mut after = None;
    loop {
        let page = match context.ask(Query::ListTokens { after, limit: 0 }).await? {
            QueryResponse::Tokens(page) => page,
            _ => Vec::new(),
        };
        let Some(last) = page.last() else { break };
        after = Some(last.token.clone());
        tokens.extend(page.into_iter().map(views::token));
    }
    Ok(api::ListTokensReply { tokens })
}

pub(super) async fn revoke(
    context: &HeadContext,
    caller: &Caller,
    request: api::RevokeTokenRequest,
) -> Result<Empty, Status> {
    let command = Command::RevokeToken { id: request.id };
    context.change(caller, request.stamp, command).await
}
