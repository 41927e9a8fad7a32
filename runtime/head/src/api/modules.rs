//! Commands and questions of domain modules, which only those modules understand.

use std::sync::Arc;
use std::time::Duration;

use mobula_core::control::{Caller, ModuleId, StateModule, Subject};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::SessionId;
use mobula_wire::control as api;
use tonic::Status;

use super::rejected;
use crate::context::HeadContext;

/// The longest that one request may wait; clients ask again.
pub(super) const WAIT_MAX: Duration = Duration::from_secs(30);

fn module(context: &HeadContext, id: u32) -> Result<(ModuleId, Arc<dyn StateModule>), Status> {
    u8::try_from(id)
        .ok()
        .map(ModuleId)
        // The scheduler and the heads have methods of their own.
        .filter(|id| ![ModuleId::SCHEDULER, ModuleId::HEADS].contains(id))
        .and_then(|id| Some((id, context.modules.get(&id)?.clone())))
        .ok_or_else(|| {
            rejected(&Rejection::not_found(format!(
                "no domain module has id {id}"
            )))
        })
}

/// Who a session belongs to: the beginning of its stored name. Clients share one, for a client
/// token may do everything anyway.
pub(super) fn principal(caller: &Caller) -> String {
    match caller {
        Caller::Host { job, node } => format!("{job}@{node}/"),
        Caller::Client => "client/".to_owned(),
        Caller::Node(node) => format!("{node}/"),
        Caller::Head => "head/".to_owned(),
    }
}

/// The text that a session was opened with, which must be the caller's own; `None` where there is no such
/// session.
pub(super) async fn own_session(
    context: &HeadContext,
    caller: &Caller,
    session: SessionId,
) -> Result<Option<String>, Status> {
    let reader = context.raft.read().await?;
    let opened_with = mobula_scheduler::session::owner(&reader, session);
    let is_own = |text: &String| text.starts_with(&principal(caller));
    if opened_with.as_ref().is_some_and(|text| !is_own(text)) {
        return Err(rejected(&Rejection::new(
            ErrorCode::PermissionDenied,
            format!("{session} was opened by someone else: open one of your own"),
        )));
    }
    Ok(opened_with)
}

/// The exactly-once context of a request, which must be the caller's own: in another's, a command
/// would be taken for one that was answered, or push that one's answers out.
pub(crate) async fn stamp(
    context: &HeadContext,
    caller: &Caller,
    stamp: Option<api::Stamp>,
) -> Result<(SessionId, u64), Status> {
    let stamp = stamp.unwrap_or_default();
    let session = SessionId(stamp.session);
    // The read is linearizable, so one that is not known here is over, or is yet to be opened: by the time that the
    // command is applied it could be somebody else's.
    if session != SessionId::INTERNAL && own_session(context, caller, session).await?.is_none() {
        return Err(rejected(&Rejection::new(
            ErrorCode::SessionExpired,
            format!("{session} is not known any more: open another one"),
        )));
    }
    Ok((session, stamp.sequence))
}

pub(super) async fn apply(
    context: &HeadContext,
    caller: &Caller,
    request: api::ApplyRequest,
) -> Result<api::ApplyReply, Status> {
    let (id, module) = module(context, request.module)?;
    module
        .authorize(caller, &request.payload)
        .map_err(|rejection| rejected(&rejection))?;
    let (session, seq) = stamp(context, caller, request.stamp).await?;
    let (index, response) = context.propose(session, seq, id, request.payload).await?;
    Ok(api::ApplyReply { response, index })
}

pub(super) async fn query(
    context: &HeadContext,
    caller: &Caller,
    request: api::QueryRequest,
) -> Result<api::QueryReply, Status> {
    let (_, module) = module(context, request.module)?;
    module
        .authorize_query(caller, &request.payload)
        .map_err(|rejection| rejected(&rejection))?;
    let reader = context.raft.read().await?;
    let payload = module
        .query(&reader, context.clock.now_ms(), &request.payload)
        .map_err(|rejection| rejected(&rejection))?;
    Ok(api::QueryReply { payload })
}

pub(super) async fn wait(
    context: &HeadContext,
    _caller: &Caller,
    request: api::WaitModuleRequest,
) -> Result<api::WaitModuleReply, Status> {
    let (id, _) = module(context, request.module)?;
    let mut ticket = context.changes.follow(Subject::Module(id));
    let limit = Duration::from_millis(request.timeout_ms).min(WAIT_MAX);
    // Whether it changed or the time is over, the answer is the revision now. A head that is behind
    // waits until it knows something that is new to the client.
    let is_new = |revision: &u64| *revision > request.seen_revision;
    let _ = tokio::time::timeout(limit, ticket.wait_for(is_new)).await;
    Ok(api::WaitModuleReply {
        revision: context.changes.module_revision(id),
    })
}
