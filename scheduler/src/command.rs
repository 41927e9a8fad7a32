//! What can be asked of the scheduler, and what it answers.
//!
//! Invariants:
//! 1. Variants are append-only: their position is their persisted tag (a test pins it).
//! 2. Every command may arrive twice with the same effect as once, or is fenced by an incarnation
//!    or by the sender's session.

use std::fmt;

use mobula_core::codec;
use mobula_core::label::Labels;
use mobula_core::order::WorkerEvent;
use mobula_core::spec::{ActorSpec, JobSpec};
use mobula_core::{ActorId, Incarnation, JobId, NodeId, Rejection, Resources, SessionId};
use serde::{Deserialize, Serialize};

use crate::limits::PAYLOAD_BYTES_MAX;

/// A change to nodes, jobs, actors, sessions or tokens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[expect(
    clippy::large_enum_variant,
    reason = "a command is made, encoded and dropped; none are kept side by side"
)]
pub enum Command {
    /// A worker agent joins, or says again that it is there. Answer: [`Response::Registered`].
    RegisterNode {
        /// Unique name of the worker; the same name is the same [`NodeId`] as long as it is known.
        name: String,
        /// Differs each time the agent starts without the hosts of the time before. With the same
        /// one the incarnation stays; with another one everything assigned before ends.
        boot_id: String,
        /// What the worker offers.
        capacity: Resources,
        /// The worker's labels.
        labels: Labels,
        /// Version of its binary, for people.
        version: String,
    },
    /// A worker's lease ran out. Answer: [`Response::Event`].
    NodeLost {
        /// The worker.
        node: NodeId,
        /// Which incarnation; another one is left alone.
        incarnation: Incarnation,
    },
    /// Something happened on a worker. Answer: [`Response::Event`].
    NodeEvent {
        /// The worker.
        node: NodeId,
        /// The worker's incarnation.
        incarnation: Incarnation,
        /// What happened.
        event: WorkerEvent,
    },
    /// Empties a worker and keeps it empty, or takes that back. Answer: [`Response::Done`].
    DrainNode {
        /// The worker.
        node: NodeId,
        /// Whether to drain, or to end the draining.
        on: bool,
    },
    /// Gives a worker notice that it will be gone. Answer: [`Response::Noticed`].
    PreemptNode {
        /// The worker.
        node: NodeId,
        /// How long it still has, in milliseconds.
        grace_ms: u64,
    },
    /// Starts a job. Answer: [`Response::JobSubmitted`].
    SubmitJob {
        /// What to run.
        spec: JobSpec,
    },
    /// Ends a job. Answer: [`Response::Done`], also when it has ended already.
    StopJob {
        /// The job.
        job: JobId,
    },
    /// Stores a job's result. Answer: [`Response::Done`].
    SetJobResult {
        /// The job.
        job: JobId,
        /// Its driver.
        actor: ActorId,
        /// The driver's incarnation: an older one is refused.
        incarnation: Incarnation,
        /// A JSON document of at most 64 KiB.
        result_json: String,
    },
    /// Creates actors. Answer: [`Response::ActorsCreated`], in the order asked for.
    CreateActors {
        /// The job that they belong to, or whose namespace keeps them if they are detached.
        job: JobId,
        /// The actors.
        actors: Vec<ActorSpec>,
        /// Whether they are placed all at once or not at all.
        gang: bool,
        /// Whether a living actor of the same name is taken instead of being an error.
        get_or_create: bool,
        /// The actor that creates them, refused when it is stale; `None` for a client's command.
        creator: Option<ActorIncarnation>,
    },
    /// Ends an actor for good. Answer: [`Response::Done`], also when it has ended already.
    StopActor {
        /// The job that the actor must belong to, or share a namespace with; a host has to name its
        /// own.
        job: Option<JobId>,
        /// The actor.
        actor: ActorId,
        /// How long it may take to end by itself, in milliseconds.
        grace_ms: u64,
    },
    /// An actor leaves a worker that was given notice or is draining, and starts elsewhere.
    /// Answer: [`Response::Done`].
    YieldActor {
        /// The job that the actor must belong to.
        job: JobId,
        /// The actor.
        actor: ActorId,
        /// Which incarnation.
        incarnation: Incarnation,
    },
    /// A placement pass's decisions. Answer: [`Response::Assigned`].
    Assign {
        /// Who goes where.
        assignments: Vec<Assignment>,
    },
    /// Opens an exactly-once context. Answer: [`Response::SessionOpened`].
    OpenSession {
        /// Who opens it: any text, which is needed again to close it.
        client: String,
    },
    /// Forgets an exactly-once context. Answer: [`Response::Done`].
    CloseSession {
        /// The session.
        session: SessionId,
        /// The text that it was opened with.
        client: String,
    },
    /// Stores a token's hash. Answer: [`Response::Done`].
    CreateToken {
        /// A name, shown in lists and used to revoke it.
        id: String,
        /// Hash of the secret; the secret itself is never replicated.
        secret_hash: [u8; 32],
        /// What whoever shows it may become.
        role: Role,
        /// Until when it works, in milliseconds since the Unix epoch.
        expires_at_ms: u64,
        /// How often something can join with it; `None`: as often as one likes. Never for a
        /// client's, which accompanies every call.
        uses: Option<u32>,
        /// The last characters of its text, by which people tell tokens apart. Short: what is here
        /// is no secret any more.
        ends_with: String,
        /// Whose namespaces its bearer enters; `None`: those of this token alone. Only for a client's.
        principal: Option<String>,
    },
    /// Shows a token and counts the use. Answer: [`Response::TokenAccepted`].
    UseToken {
        /// Hash of the secret that was shown.
        secret_hash: [u8; 32],
    },
    /// Makes a token useless. Answer: [`Response::Done`]; refused where there is none.
    RevokeToken {
        /// The token's name.
        id: String,
    },
    /// The tables were restored from a backup: ids that may have been given out since are left out.
    /// Answer: [`Response::Done`].
    Restored {
        /// How many of each kind.
        ids_left_out: u64,
    },
}

/// One incarnation of one actor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ActorIncarnation {
    /// The actor.
    pub actor: ActorId,
    /// Which incarnation.
    pub incarnation: Incarnation,
}

/// One actor goes to one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assignment {
    /// The actor.
    pub actor: ActorId,
    /// Where it shall run.
    pub node: NodeId,
    /// The node's incarnation that the decision was made for.
    pub node_incarnation: Incarnation,
}

/// What a token makes of whoever shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// May join as a worker.
    Worker,
    /// May use the control API.
    Client,
    /// May join as a head.
    Head,
    /// May read metrics.
    Metrics,
}

impl Role {
    /// The role as a stable word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Worker => "worker",
            Role::Client => "client",
            Role::Head => "head",
            Role::Metrics => "metrics",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What a command brought about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Response {
    /// What was asked for is so.
    Done,
    /// A worker is known.
    Registered {
        /// Its id.
        node: NodeId,
        /// Its incarnation, which all of its events must carry.
        incarnation: Incarnation,
    },
    /// What became of an event.
    Event(EventOutcome),
    /// A worker was given notice.
    Noticed {
        /// When it will be gone, in milliseconds since the Unix epoch.
        deadline_ms: u64,
    },
    /// A job exists.
    JobSubmitted {
        /// The job.
        job: JobId,
        /// Its driver.
        driver: ActorId,
        /// Whether this command created it; otherwise its idempotency key was known.
        created: bool,
    },
    /// Actors exist.
    ActorsCreated {
        /// Their ids, in the order asked for.
        actors: Vec<ActorId>,
    },
    /// What became of a pass's decisions.
    Assigned {
        /// Those that hold.
        assigned: Vec<ActorIncarnation>,
        /// Those whose precondition no longer held, and which one.
        skipped: Vec<SkippedAssignment>,
    },
    /// A session is open.
    SessionOpened {
        /// The session; its sequence numbers begin at 1.
        session: SessionId,
    },
    /// A token is good.
    TokenAccepted {
        /// Its name.
        id: String,
        /// What it makes of its bearer.
        role: Role,
    },
}

/// What became of an event. All of them acknowledge it: it need not be sent again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum EventOutcome {
    /// It changed something.
    Applied,
    /// It was known already, or is about an incarnation of an actor that is over.
    AlreadyKnown,
    /// The sender is a stale incarnation of its node: it must end everything it runs and register
    /// again. Nothing was changed.
    Fenced {
        /// The node's current incarnation.
        current: Incarnation,
    },
}

/// A decision that no longer holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SkippedAssignment {
    /// The actor that stays as it is.
    pub actor: ActorId,
    /// The precondition that failed.
    pub reason: String,
}

impl Command {
    /// The command as the payload of a [`mobula_core::control::Command`].
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        codec::encode_plain(self)
    }

    /// The command that `payload` spells.
    pub fn decode(payload: &[u8]) -> Result<Self, Rejection> {
        codec::decode(payload, PAYLOAD_BYTES_MAX)
            .map_err(|error| Rejection::invalid(format!("scheduler command: {error}")))
    }
}

impl Response {
    /// The response that an [`mobula_core::control::Applied`] of this module carries.
    pub fn decode(bytes: &[u8]) -> Result<Self, codec::DecodeError> {
        codec::decode(bytes, PAYLOAD_BYTES_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_where_they_were_and_values_survive() {
        let node = NodeId(1);
        let incarnation = Incarnation(2);
        let cases: Vec<(u32, Command)> = vec![
            (1, Command::NodeLost { node, incarnation }),
            (
                2,
                Command::NodeEvent {
                    node,
                    incarnation,
                    event: WorkerEvent::NoticeWithdrawn,
                },
            ),
            (3, Command::DrainNode { node, on: true }),
            (4, Command::PreemptNode { node, grace_ms: 5 }),
            (6, Command::StopJob { job: JobId(3) }),
            (
                9,
                Command::StopActor {
                    job: None,
                    actor: ActorId(4),
                    grace_ms: 1,
                },
            ),
            (
                10,
                Command::YieldActor {
                    job: JobId(3),
                    actor: ActorId(4),
                    incarnation,
                },
            ),
            (
                11,
                Command::Assign {
                    assignments: vec![],
                },
            ),
            (12, Command::OpenSession { client: "c".into() }),
            (
                15,
                Command::UseToken {
                    secret_hash: [7; 32],
                },
            ),
            (16, Command::RevokeToken { id: "t".into() }),
            (17, Command::Restored { ids_left_out: 9 }),
        ];
        for (tag, command) in cases {
            let bytes = command.encode();
            assert_eq!(bytes[..4], tag.to_le_bytes(), "{command:?}");
            assert_eq!(Command::decode(&bytes).unwrap(), command);
        }
    }
}
