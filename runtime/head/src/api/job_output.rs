//! The output of all processes of a job: read from every worker that the job has been on, piece by
//! piece, each with where it comes from.
//!
//! Invariants:
//! 1. Nobody waits for another's output: in each round every log gets a few pieces at most.
//! 2. A worker without a session is asked again in the next round; what is not there by the end of the
//!    job is told as missing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mobula_core::codec;
use mobula_core::id::{ActorId, JobId, NodeId};
use mobula_scheduler::{Query, QueryResponse};
use mobula_wire::control as api;
use mobula_wire::session::{ANSWER_BYTES_MAX, LogFile, Question};
use tokio::sync::mpsc;
use tonic::Status;

use super::jobs;
use super::logs::LAST_LINES_WAIT;
use crate::context::HeadContext;

/// How often logs that are being followed are looked at: one question to each worker.
const ROUND_INTERVAL: Duration = Duration::from_millis(300);

/// How much is asked for at once; well below the control lane's frame.
const PIECE_BYTES: u32 = 256 * 1024;

/// Pieces of one log in a round.
const PIECES_PER_ROUND: usize = 8;

/// Workers that are asked for one job's output.
const NODES_MAX: usize = 128;

type Pieces = mpsc::Sender<Result<api::LogChunk, Status>>;

/// Sends what all processes of `job` have printed, and with `follow` what they print until it has
/// ended. Ends early if the client goes away.
pub(super) async fn send_all(context: &HeadContext, job: JobId, follow: bool, pieces: &Pieces) {
    let mut reading = Reading::default();
    if let Err(Stopped::Status(status)) = reading.run(context, job, follow, pieces).await {
        // The client may have gone meanwhile.
        let _ = pieces.send(Err(status)).await;
    }
}

enum Stopped {
    ClientGone,
    Status(Status),
}

impl From<Status> for Stopped {
    fn from(status: Status) -> Self {
        Stopped::Status(status)
    }
}

/// Where reading stands.
#[derive(Default)]
struct Reading {
    /// How much of each log was sent, in bytes.
    sent: BTreeMap<(NodeId, String), u64>,
    nodes: BTreeSet<NodeId>,
    /// Up to which actor this pass over them has come.
    looked_up_to: Option<ActorId>,
    /// Whether there was a pass over all of them.
    has_looked: bool,
}

/// What one round found.
#[derive(Default)]
struct Round {
    has_more: bool,
    has_open: bool,
    silent: Vec<NodeId>,
}

impl Reading {
    async fn run(
        &mut self,
        context: &HeadContext,
        job: JobId,
        follow: bool,
        pieces: &Pieces,
    ) -> Result<(), Stopped> {
        let mut waited = Duration::ZERO;
        loop {
            // Before the logs are read: what a job that is over has printed is read to its end.
            let is_over = !follow || jobs::view(context, job).await?.ended_ms.is_some();
            self.look_for_nodes(context, job).await?;
            let mut round = Round::default();
            for node in self.nodes.clone() {
                self.read_node(context, job, node, pieces, &mut round)
                    .await?;
            }
            if round.has_more {
                continue;
            }
            let may_print_more = follow && round.has_open && waited < LAST_LINES_WAIT;
            if is_over && !may_print_more {
                for node in round.silent {
                    let text =
                        format!("--- the output on {node} cannot be read: it has no session ---\n");
                    send(pieces, text.into_bytes(), node.to_string()).await?;
                }
                return Ok(());
            }
            if is_over {
                waited += ROUND_INTERVAL;
            }
            tokio::time::sleep(ROUND_INTERVAL).await;
        }
    }

    /// Looks where the job's actors are or were: at all of them the first time, then at a page in each
    /// round, over and over, as actors move.
    async fn look_for_nodes(&mut self, context: &HeadContext, job: JobId) -> Result<(), Status> {
        loop {
            let query = Query::ListActors {
                job: Some(job),
                after: self.looked_up_to,
                limit: 0,
            };
            let QueryResponse::Actors(actors) = context.ask(query).await? else {
                return Err(Status::internal("the scheduler answered another question"));
            };
            self.looked_up_to = actors.last().map(|actor| actor.actor);
            for start in actors.iter().flat_map(|actor| &actor.starts) {
                if self.nodes.len() < NODES_MAX {
                    self.nodes.insert(start.node);
                }
            }
            self.has_looked |= actors.is_empty();
            if self.has_looked {
                return Ok(());
            }
        }
    }

    async fn read_node(
        &mut self,
        context: &HeadContext,
        job: JobId,
        node: NodeId,
        pieces: &Pieces,
        round: &mut Round,
    ) -> Result<(), Stopped> {
        let Ok(bytes) = context.sessions.ask(node, Question::Logs { job }).await else {
            round.silent.push(node);
            return Ok(());
        };
        let files: Vec<LogFile> = codec::decode(&bytes, ANSWER_BYTES_MAX)
            .map_err(|error| Status::internal(format!("logs of {node}: {error}")))?;
        for file in files {
            round.has_open |= file.is_open;
            let source = format!("{node} {}", file.name);
            let key = (node, file.name);
            for turn in 0.. {
                let sent = self.sent.get(&key).copied().unwrap_or(0);
                if sent >= file.size_bytes {
                    break;
                }
                if turn == PIECES_PER_ROUND {
                    round.has_more = true;
                    break;
                }
                let question = Question::LogPiece {
                    job,
                    name: key.1.clone(),
                    offset: sent,
                    limit_bytes: PIECE_BYTES,
                };
                let Ok(bytes) = context.sessions.ask(node, question).await else {
                    round.silent.push(node);
                    return Ok(());
                };
                if bytes.is_empty() {
                    break;
                }
                self.sent.insert(key.clone(), sent + bytes.len() as u64);
                send(pieces, bytes, source.clone()).await?;
            }
        }
        Ok(())
    }
}

async fn send(pieces: &Pieces, data: Vec<u8>, source: String) -> Result<(), Stopped> {
    let chunk = api::LogChunk { data, source };
    pieces
        .send(Ok(chunk))
        .await
        .map_err(|_| Stopped::ClientGone)
}
