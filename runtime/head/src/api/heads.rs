//! The heads themselves: who they are, and changes of the group.

use std::time::Duration;

use mobula_core::control::{Caller, ModuleId};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::SessionId;
use mobula_net::identity::{Identity, Role, seal};
use mobula_wire::control::{self as api, Empty};
use tonic::Status;

use super::rejected;
use crate::context::{CommandError, HeadContext};
use crate::raft::{
    ChangeError, GroupChange, HeadCommand, MEMBERS_MAX, Member, MemberProgress, ProposeError,
    allocated_id,
};

/// How long a transfer of leadership may take: raft gives up after one election timeout.
const TRANSFER_LIMIT: Duration = Duration::from_secs(3);

/// The longest address in a row.
const ADDRESS_BYTES_MAX: usize = 64;

impl From<ChangeError> for Status {
    fn from(error: ChangeError) -> Self {
        match error {
            ChangeError::Propose(error) => error.into(),
            ChangeError::Refused(rejection) => rejected(&rejection),
            ChangeError::IsLeader(_) => {
                CommandError::Propose(ProposeError::NotLeader { leader: None }).into()
            }
        }
    }
}

pub(super) fn only_operators(caller: &Caller) -> Result<(), Status> {
    match caller {
        Caller::Client | Caller::Head => Ok(()),
        Caller::Node(_) | Caller::Host { .. } => Err(rejected(&Rejection::new(
            ErrorCode::PermissionDenied,
            "the group of heads is for clients and heads to change and to back up, not for jobs or workers",
        ))),
    }
}

/// The head whose certificate a request shows.
fn only_heads(context: &HeadContext, peer: Option<&Identity>) -> Result<u64, Status> {
    let denied = |why: &str| Err(rejected(&Rejection::new(ErrorCode::PermissionDenied, why)));
    let Some(peer) = peer.filter(|peer| peer.role == Role::Head) else {
        return denied("only a head's certificate may ask for this");
    };
    if context
        .raft
        .group()
        .borrow()
        .removed
        .contains(&peer.incarnation)
    {
        return denied("this head was removed from the group: empty its data directory and join");
    }
    Ok(peer.incarnation)
}

/// The heads as messages; what the leader knows besides is in `progress`.
fn heads(
    context: &HeadContext,
    leader: Option<u64>,
    progress: &[MemberProgress],
) -> Vec<api::Head> {
    let view = context.raft.group().borrow().clone();
    // The table says so a moment later than the head itself.
    let own = context.own();
    let states = context.raft.peer_states();
    let voters = view.voters.iter().map(|id| (*id, "voter"));
    let learners = view.learners.iter().map(|id| (*id, "learner"));
    let mut heads: Vec<api::Head> = voters
        .chain(learners)
        .map(|(raft_id, role)| {
            let member = if raft_id == own.raft_id {
                Some(&own)
            } else {
                view.member(raft_id)
            };
            let text = |of: fn(&Member) -> &String| member.map(of).cloned().unwrap_or_default();
            let known = progress.iter().find(|member| member.raft_id == raft_id);
            let state = states.iter().find(|state| state.raft_id == raft_id);
            api::Head {
                raft_id,
                name: text(|member| &member.name),
                api_address: text(|member| &member.api_address),
                cluster_address: text(|member| &member.cluster_address),
                role: role.to_owned(),
                leader: leader == Some(raft_id),
                active: known.map(|member| member.active),
                replication: known.map(|member| member.replication.to_owned()),
                matched_index: known.map(|member| member.matched_index),
                state_compared_index: state.map(|state| state.index),
                state_differs: state.map(|state| state.differs),
            }
        })
        .collect();
    heads.sort_by_key(|head| head.raft_id);
    heads
}

/// What a head knows without asking others: also one without a leader must be able to say where the
/// others are.
pub(super) async fn list(
    context: &HeadContext,
    _caller: &Caller,
    request: api::ListHeadsRequest,
) -> Result<api::ListHeadsReply, Status> {
    let leadership = *context.raft.leadership().borrow();
    if request.by_leader && !leadership.is_leader {
        return Err(ProposeError::NotLeader {
            leader: leadership.leader,
        }
        .into());
    }
    let progress = context.raft.progress().await?;
    Ok(api::ListHeadsReply {
        heads: heads(context, leadership.leader, &progress.members),
        answered_by: context.raft_id,
        term: progress.term,
        committed_index: progress.committed_index,
    })
}

/// A Raft id for a new head, and the heads that it will find.
pub(super) async fn allocate(context: &HeadContext) -> Result<(u64, Vec<api::Head>), Status> {
    if context.raft.group().borrow().members.len() >= MEMBERS_MAX {
        return Err(rejected(&Rejection::new(
            ErrorCode::Overloaded,
            format!("there are {MEMBERS_MAX} heads, the most there may be: remove one first"),
        )));
    }
    let command = HeadCommand::Allocate.encode();
    let (_, response) = context
        .propose(SessionId::INTERNAL, 0, ModuleId::HEADS, command)
        .await?;
    let raft_id = allocated_id(&response)
        .ok_or_else(|| Status::internal("a Raft id that was given out is no number"))?;
    let leader = context.raft.leadership().borrow().leader;
    Ok((raft_id, heads(context, leader, &[])))
}

/// The CA's key, for a head.
pub(super) fn key(
    context: &HeadContext,
    peer: Option<&Identity>,
    request: &api::HeadKeyRequest,
) -> Result<api::HeadKeyReply, Status> {
    let raft_id = only_heads(context, peer)?;
    let (public_key, sealed_key) = seal(context.ca.key_pem().as_bytes(), &request.public_key)
        .map_err(|error| rejected(&Rejection::invalid(error.to_string())))?;
    tracing::info!(raft_id, "the key of the CA goes to a new head");
    Ok(api::HeadKeyReply {
        public_key,
        sealed_key,
    })
}

fn checked_address(what: &str, text: &str) -> Result<String, Status> {
    let is_address = text.len() <= ADDRESS_BYTES_MAX
        && text
            .parse::<std::net::SocketAddr>()
            .is_ok_and(|address| address.port() != 0 && !address.ip().is_unspecified());
    if is_address {
        return Ok(text.to_owned());
    }
    Err(rejected(&Rejection::invalid(format!(
        "the head's {what} is `{}`: expected ip:port, at which the others reach it",
        text.chars().take(ADDRESS_BYTES_MAX).collect::<String>()
    ))))
}

pub(super) async fn announce(
    context: &HeadContext,
    peer: Option<&Identity>,
    request: api::AnnounceHeadRequest,
) -> Result<Empty, Status> {
    let Some(peer) = peer.filter(|peer| peer.role == Role::Head) else {
        return Err(rejected(&Rejection::new(
            ErrorCode::PermissionDenied,
            "only a head's certificate may ask for this",
        )));
    };
    let member = Member {
        raft_id: peer.incarnation,
        name: peer.id.clone(),
        api_address: checked_address("control API", &request.api_address)?,
        cluster_address: checked_address("cluster endpoint", &request.cluster_address)?,
    };
    let view = context.raft.group().borrow().clone();
    if !view.contains(member.raft_id) {
        context
            .raft
            .change_group(GroupChange::AddLearner(member))
            .await?;
    } else if view.member(member.raft_id) != Some(&member) {
        let command = HeadCommand::SetAddress(member).encode();
        context
            .propose(SessionId::INTERNAL, 0, ModuleId::HEADS, command)
            .await?;
    }
    Ok(Empty {})
}

pub(super) async fn promote(
    context: &HeadContext,
    caller: &Caller,
    request: api::PromoteHeadRequest,
) -> Result<Empty, Status> {
    only_operators(caller)?;
    context
        .raft
        .change_group(GroupChange::Promote(request.raft_id))
        .await?;
    Ok(Empty {})
}

pub(super) async fn remove(
    context: &HeadContext,
    caller: &Caller,
    request: api::RemoveHeadRequest,
) -> Result<Empty, Status> {
    only_operators(caller)?;
    let change = GroupChange::Remove(request.raft_id);
    match context.raft.change_group(change).await {
        Ok(()) => Ok(Empty {}),
        Err(error @ ChangeError::IsLeader(_)) => {
            let leader = transfer_to(context, None).await?;
            tracing::info!(
                leader,
                "leadership was handed over: this head is to be removed"
            );
            // The new leader removes this head: whoever asked is told to ask there.
            Err(error.into())
        }
        Err(error) => Err(error.into()),
    }
}

pub(super) async fn transfer(
    context: &HeadContext,
    caller: &Caller,
    request: api::TransferLeadershipRequest,
) -> Result<api::TransferLeadershipReply, Status> {
    only_operators(caller)?;
    let to = (request.raft_id != 0).then_some(request.raft_id);
    let subject = to.map_or_else(
        || "whoever is furthest".to_owned(),
        |id| format!("head {id}"),
    );
    context.note(&subject).await?;
    let leader = transfer_to(context, to).await?;
    Ok(api::TransferLeadershipReply { leader })
}

/// Hands leadership over and waits until the other leads.
async fn transfer_to(context: &HeadContext, to: Option<u64>) -> Result<u64, Status> {
    let to = context.raft.transfer_leadership(to).await?;
    let mut leadership = context.raft.leadership();
    let arrived = leadership.wait_for(|now| now.leader == Some(to));
    match tokio::time::timeout(TRANSFER_LIMIT, arrived).await {
        Ok(Ok(_)) => Ok(to),
        _ => Err(rejected(&Rejection::new(
            ErrorCode::FailedPrecondition,
            format!(
                "head {to} did not take over within {} s: see `mobula head members` for how far it \
                 is, and try again",
                TRANSFER_LIMIT.as_secs()
            ),
        ))),
    }
}
