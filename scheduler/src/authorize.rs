//! Who may send which command (I14). Asked at the API, before anything is proposed.
//!
//! Invariants:
//! 1. A worker speaks only of itself, a host only for its own job, a client never as a node.
//! 2. What only the leader can know (which certificate a joining worker showed, that a lease ran
//!    out, that a token was shown, what a pass decided) only a head may say.
//! 3. What this cannot see without the tables (that an actor belongs to the host's job) the
//!    command itself names and `apply` checks by incarnation.

use mobula_core::control::Caller;
use mobula_core::{ErrorCode, Rejection};

use crate::command::Command;

pub(crate) fn authorize(caller: &Caller, command: &Command) -> Result<(), Rejection> {
    let allowed = match caller {
        Caller::Head => true,
        Caller::Client => client_may(command),
        Caller::Node(own) => matches!(command, Command::NodeEvent { node, .. } if node == own),
        Caller::Host { job: own, .. } => match command {
            Command::CreateActors { job, creator, .. } => job == own && creator.is_some(),
            Command::SetJobResult { job, .. } => job == own,
            Command::StopActor { job, .. } => *job == Some(*own),
            Command::YieldActor { job, .. } => job == own,
            Command::OpenSession { .. } | Command::CloseSession { .. } => true,
            _ => false,
        },
    };
    if allowed {
        return Ok(());
    }
    Err(Rejection::new(
        ErrorCode::PermissionDenied,
        format!(
            "{} may not send {}: {}",
            describe(caller),
            name(command),
            next_step(caller)
        ),
    ))
}

fn client_may(command: &Command) -> bool {
    match command {
        Command::DrainNode { .. }
        | Command::PreemptNode { .. }
        | Command::SubmitJob { .. }
        | Command::StopJob { .. }
        | Command::CreateActors { .. }
        | Command::StopActor { .. }
        | Command::OpenSession { .. }
        | Command::CloseSession { .. }
        | Command::CreateToken { .. }
        | Command::RevokeToken { .. } => true,
        Command::RegisterNode { .. }
        | Command::NodeLost { .. }
        | Command::NodeEvent { .. }
        | Command::SetJobResult { .. }
        | Command::YieldActor { .. }
        | Command::Assign { .. }
        | Command::UseToken { .. }
        | Command::Restored { .. } => false,
    }
}

pub(crate) fn describe(caller: &Caller) -> String {
    match caller {
        Caller::Head => "a head".to_owned(),
        Caller::Client => "a client".to_owned(),
        Caller::Node(node) => format!("the worker {node}"),
        Caller::Host { job, node } => format!("a host of {job} on {node}"),
    }
}

fn next_step(caller: &Caller) -> &'static str {
    match caller {
        Caller::Head => "this is a defect",
        Caller::Client => "only the cluster's own processes send it",
        Caller::Node(_) => "a worker reports only its own events",
        Caller::Host { .. } => {
            "a host acts only for its own job and names the acting actor; use a client token"
        }
    }
}

fn name(command: &Command) -> &'static str {
    match command {
        Command::RegisterNode { .. } => "RegisterNode",
        Command::NodeLost { .. } => "NodeLost",
        Command::NodeEvent { .. } => "NodeEvent",
        Command::DrainNode { .. } => "DrainNode",
        Command::PreemptNode { .. } => "PreemptNode",
        Command::SubmitJob { .. } => "SubmitJob",
        Command::StopJob { .. } => "StopJob",
        Command::SetJobResult { .. } => "SetJobResult",
        Command::CreateActors { .. } => "CreateActors",
        Command::StopActor { .. } => "StopActor",
        Command::YieldActor { .. } => "YieldActor",
        Command::Assign { .. } => "Assign",
        Command::OpenSession { .. } => "OpenSession",
        Command::CloseSession { .. } => "CloseSession",
        Command::CreateToken { .. } => "CreateToken",
        Command::UseToken { .. } => "UseToken",
        Command::RevokeToken { .. } => "RevokeToken",
        Command::Restored { .. } => "Restored",
    }
}
