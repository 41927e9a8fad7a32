//! The cluster itself: joining, tokens, sessions, status.

use std::time::Duration;

use mobula_core::control::Caller;
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::SessionId;
use mobula_net::identity::{Identity, Role, Token, Validity};
use mobula_scheduler::{Command, NodeView, Query, QueryResponse, Response, Role as TokenUse};
use mobula_wire::control as api;
use tonic::Status;

use super::heads;
use super::jobs::unexpected;
use super::modules::{own_session, principal};
use super::rejected;
use crate::context::HeadContext;

/// How long the certificate of a worker or client lives; it joins again before.
const CERTIFICATE_TTL: Duration = Duration::from_secs(24 * 3600);

/// The longest name of a worker or client.
const NAME_BYTES_MAX: usize = 63;

pub(super) async fn join(
    context: &HeadContext,
    peer: Option<Identity>,
    request: api::JoinRequest,
) -> Result<api::JoinReply, Status> {
    check_name(&request.name)?;
    let role = match peer {
        // A worker that still has a certificate for this name gets the next one for it. Clients
        // show their token again, which may have been revoked.
        Some(peer)
            if request.token.is_empty() && peer.id == request.name && peer.role == Role::Node =>
        {
            peer.role
        }
        peer => {
            let is_known = |peer: &Identity| peer.id == request.name && peer.role == Role::Node;
            if !peer.as_ref().is_some_and(is_known)
                && is_for_workers(context, &request.token).await?
            {
                // Before the token is used up.
                refuse_a_living_name(context, &request.name).await?;
            }
            role_by_token(context, &request.token).await?
        }
    };
    // A head's certificate is for one life of its disk, which its Raft id stands for.
    let (raft_id, heads) = match role {
        Role::Head => heads::allocate(context).await?,
        _ => (0, Vec::new()),
    };
    let identity = Identity::new(&context.cluster_id, role, &request.name, raft_id);
    let certificate_pem = context
        .ca
        .issue(
            &request.csr_pem,
            &identity,
            Validity::for_ttl(CERTIFICATE_TTL),
        )
        .map_err(|error| rejected(&Rejection::invalid(error.to_string())))?;
    Ok(api::JoinReply {
        certificate_pem,
        ca_pem: context.ca.certificate_pem().to_owned(),
        cluster_id: context.cluster_id.clone(),
        cluster_address: context.leading_or_own().cluster_address,
        raft_id,
        heads,
    })
}

/// Whether a token makes workers; nothing is told of names to who has none.
async fn is_for_workers(context: &HeadContext, text: &str) -> Result<bool, Status> {
    let Ok(token) = Token::parse(text.trim()) else {
        return Ok(false);
    };
    let reader = context.raft.read().await?;
    let now_ms = context.clock.now_ms();
    let role = mobula_scheduler::check_token(&reader, &token.secret_hash(), now_ms);
    Ok(matches!(role, Ok(TokenUse::Worker)))
}

/// A worker that has no identity yet is another one than the one that lives under this name.
async fn refuse_a_living_name(context: &HeadContext, name: &str) -> Result<(), Status> {
    let QueryResponse::Nodes(nodes) = context.ask(Query::ListNodes).await? else {
        return Err(Status::internal("the scheduler answered another question"));
    };
    let is_alive = |node: &NodeView| node.name == name && node.lost_ms.is_none();
    match nodes.into_iter().find(is_alive) {
        None => Ok(()),
        Some(node) => Err(rejected(&Rejection::new(
            ErrorCode::AlreadyExists,
            format!(
                "a worker called `{name}` is in the cluster as {} and its lease is alive: give this \
                 one another name, or, if it is to take that one's place, stop that one and join \
                 again when its lease is over ({} ms after its last word)",
                node.node, context.limits.lease_ms
            ),
        ))),
    }
}

/// The role that a token gives, which counts as a use of it.
async fn role_by_token(context: &HeadContext, text: &str) -> Result<Role, Status> {
    let unauthenticated =
        |message: String| rejected(&Rejection::new(ErrorCode::Unauthenticated, message));
    let token = Token::parse(text.trim()).map_err(|error| unauthenticated(error.to_string()))?;
    if token.ca_key_hash() != context.ca.key_hash() {
        return Err(unauthenticated(
            "the token is of another cluster: use one that this cluster's head made".into(),
        ));
    }
    let command = Command::UseToken {
        secret_hash: token.secret_hash(),
    };
    match context
        .propose_scheduler(SessionId::INTERNAL, 0, &command)
        .await?
    {
        Response::TokenAccepted {
            role: TokenUse::Worker,
            ..
        } => Ok(Role::Node),
        Response::TokenAccepted {
            role: TokenUse::Client,
            ..
        } => Ok(Role::Client),
        Response::TokenAccepted {
            role: TokenUse::Head,
            ..
        } => Ok(Role::Head),
        other => Err(unexpected(&other)),
    }
}

/// Names become part of certificates and paths.
fn check_name(name: &str) -> Result<(), Status> {
    let is_plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b);
    if !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.bytes().all(is_plain) {
        return Ok(());
    }
    Err(rejected(&Rejection::invalid(format!(
        "the name `{}` is not usable: 1 to {NAME_BYTES_MAX} of a-z, 0-9, `-`, `_` and `.`",
        name.chars().take(NAME_BYTES_MAX).collect::<String>()
    ))))
}

fn swept(context: &HeadContext) -> api::Sweep {
    let report = context.sweeps.lock().clone();
    api::Sweep {
        last_ms: report.last_ms,
        checkpoints_kept: report.kept,
        blobs_deleted: report.deleted,
        bytes_deleted: report.deleted_bytes,
        problem: report.problem.unwrap_or_default(),
    }
}

/// What is kept of a client's own name for itself; the whole must fit the scheduler's limit.
fn shortened(name: &str) -> String {
    const KEPT_CHARS_MAX: usize = 64;
    name.chars()
        .filter(char::is_ascii)
        .take(KEPT_CHARS_MAX)
        .collect()
}

pub(super) async fn open_session(
    context: &HeadContext,
    caller: &Caller,
    request: api::OpenSessionRequest,
) -> Result<api::OpenSessionReply, Status> {
    let command = Command::OpenSession {
        client: principal(caller) + &shortened(&request.client),
    };
    context.authorize_scheduler(caller, &command)?;
    match context
        .propose_scheduler(SessionId::INTERNAL, 0, &command)
        .await?
    {
        Response::SessionOpened { session } => Ok(api::OpenSessionReply { session: session.0 }),
        other => Err(unexpected(&other)),
    }
}

pub(super) async fn close_session(
    context: &HeadContext,
    caller: &Caller,
    request: api::CloseSessionRequest,
) -> Result<api::Empty, Status> {
    let session = SessionId(request.session);
    // Closed already, or expired: it is as was asked for.
    let Some(client) = own_session(context, caller, session).await? else {
        return Ok(api::Empty {});
    };
    let command = Command::CloseSession { session, client };
    context.authorize_scheduler(caller, &command)?;
    context
        .propose_scheduler(SessionId::INTERNAL, 0, &command)
        .await?;
    Ok(api::Empty {})
}

/// What is to be said of heads whose state differs from this one's.
fn state_problem(context: &HeadContext) -> String {
    let states = context.raft.peer_states();
    let differing: Vec<String> = states
        .iter()
        .filter(|state| state.differs)
        .map(|state| format!("head {} at entry {}", state.raft_id, state.index))
        .collect();
    if differing.is_empty() {
        return String::new();
    }
    format!(
        "the state of this head ({}) differs from that of {}: one of them is wrong; with a majority \
         the wrong one ends by itself, without one compare backups of both before one is removed",
        context.raft_id,
        differing.join(", ")
    )
}

pub(super) async fn status(context: &HeadContext) -> Result<api::StatusReply, Status> {
    let QueryResponse::Status(counts) = context.ask(Query::Status).await? else {
        return Err(Status::internal("the scheduler answered another question"));
    };
    let leadership = *context.raft.leadership().borrow();
    let leader = context.leader();
    let storage_problem = context.store_health.problem_now().await.unwrap_or_default();
    let nodes_total =
        counts.nodes_alive + counts.nodes_noticed + counts.nodes_draining + counts.nodes_lost;
    Ok(api::StatusReply {
        cluster_id: context.cluster_id.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        role: if leadership.is_leader {
            "leader"
        } else {
            "follower"
        }
        .to_owned(),
        term: leadership.term,
        applied_index: leadership.applied_index,
        first_log_index: leadership.first_log_index,
        nodes_alive: u64::from(counts.nodes_alive),
        nodes_total: u64::from(nodes_total),
        jobs_running: counts.jobs_live,
        actors_running: counts.actors_live - counts.actors_pending,
        actors_pending: counts.actors_pending,
        storage_url: context.storage_location.url.clone(),
        api_address: context.api_address.to_string(),
        cluster_address: context.cluster_address.to_string(),
        started_ms: context.started_ms,
        storage_problem,
        state_problem: state_problem(context),
        sweep: Some(swept(context)),
        leader_api_address: leader
            .as_ref()
            .map_or_else(String::new, |leader| leader.api_address.clone()),
        leader_cluster_address: leader.map_or_else(String::new, |leader| leader.cluster_address),
        api_addresses: context.api_addresses(),
    })
}
