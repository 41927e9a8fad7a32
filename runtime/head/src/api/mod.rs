//! The gRPC control API. `service` is the table of contents: one line a method; the files beside
//! it hold what the methods do.

mod access;
mod actors;
mod artifacts;
mod audit;
mod auth;
mod backup;
mod heads;
mod job_output;
mod jobs;
mod logs;
mod modules;
mod nodes;
mod observe;
mod page;
mod service;
mod status;
mod tokens;
mod views;

pub(crate) use artifacts::ARTIFACT_BYTES_MAX;
pub use audit::{ends_of, record_of};
pub(crate) use backup::BACKUPS_MAX;
pub(crate) use logs::LOG_STREAMS_MAX;
pub(crate) use modules::stamp;
pub(crate) use observe::{measure, scrape};
pub(crate) use service::ControlService;

use mobula_core::error::{ErrorCode, Rejection};
use tonic::{Code, Status};

use crate::context::{CommandError, HeadContext};
use crate::raft::ProposeError;

/// The metadata key with the finer kind of an error.
const CODE_KEY: &str = "mobula-code";
/// The metadata key that says whether the request took effect.
const EXECUTED_KEY: &str = "mobula-executed";

/// The metadata key with the API address of the leader, beside a refusal of a head that does not
/// lead.
pub(crate) const LEADER_KEY: &str = "mobula-leader";

/// The largest message of a client: an artifact's chunk, or a domain command.
pub(crate) const MESSAGE_BYTES_MAX: usize = 8 * 1024 * 1024;

fn grpc_code(code: ErrorCode) -> Code {
    match code {
        ErrorCode::InvalidArgument => Code::InvalidArgument,
        ErrorCode::NotFound => Code::NotFound,
        ErrorCode::AlreadyExists => Code::AlreadyExists,
        ErrorCode::FailedPrecondition => Code::FailedPrecondition,
        ErrorCode::Fenced => Code::Aborted,
        ErrorCode::PermissionDenied => Code::PermissionDenied,
        ErrorCode::Unauthenticated => Code::Unauthenticated,
        ErrorCode::Overloaded => Code::ResourceExhausted,
        ErrorCode::Unavailable => Code::Unavailable,
        ErrorCode::DeadlineExceeded => Code::DeadlineExceeded,
        ErrorCode::Internal => Code::Internal,
        ErrorCode::SessionExpired => Code::FailedPrecondition,
    }
}

fn status(code: ErrorCode, executed: &str, message: String) -> Status {
    let mut status = Status::new(grpc_code(code), message);
    let metadata = status.metadata_mut();
    if let Ok(value) = code.as_str().parse() {
        metadata.insert(CODE_KEY, value);
    }
    if let Ok(value) = executed.parse() {
        metadata.insert(EXECUTED_KEY, value);
    }
    status
}

/// Puts the leader's address beside what another head may do better.
pub(crate) fn with_leader(context: &HeadContext, mut status: Status) -> Status {
    if status.code() == Code::Unavailable
        && let Some(leader) = context.leader()
        && leader.raft_id != context.raft_id
        && let Ok(address) = leader.api_address.parse()
    {
        status.metadata_mut().insert(LEADER_KEY, address);
    }
    status
}

/// A refusal as a gRPC status.
pub(crate) fn rejected(rejection: &Rejection) -> Status {
    status(rejection.code, "no", rejection.message.clone())
}

impl From<CommandError> for Status {
    fn from(error: CommandError) -> Self {
        use mobula_core::error::Executed;
        let executed = match error.executed() {
            Executed::Yes => "yes",
            Executed::No => "no",
            Executed::Unknown => "unknown",
        };
        status(error.code(), executed, error.to_string())
    }
}

impl From<ProposeError> for Status {
    fn from(error: ProposeError) -> Self {
        CommandError::from(error).into()
    }
}
