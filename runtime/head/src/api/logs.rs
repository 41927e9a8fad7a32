//! A job's output: read piece by piece from the worker that runs its driver, start after start.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use mobula_core::control::Caller;
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::{ActorId, JobId};
use mobula_scheduler::{Query, QueryResponse, Start};
use mobula_wire::control as api;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{access, job_output, jobs, rejected};
use crate::context::HeadContext;
use crate::sessions::LogPiece;

/// How much is asked for at once; well below the control lane's frame.
const PIECE_BYTES: u32 = 256 * 1024;

/// How often a log that is being followed is looked at.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(150);

/// How long a process that has reported its end may take to be dead: it is killed soon after.
pub(super) const LAST_LINES_WAIT: Duration = Duration::from_secs(6);

/// How many pieces wait for a slow client.
const PIECES_WAITING_MAX: usize = 4;

/// Logs that are being read at the same time: each asks the tables twice and a worker once in
/// every [`FOLLOW_INTERVAL`], together some thousand cheap reads a second.
pub(crate) const LOG_STREAMS_MAX: usize = 128;

pub(super) type LogStream = Pin<Box<dyn Stream<Item = Result<api::LogChunk, Status>> + Send>>;

pub(super) async fn job_logs(
    context: &Arc<HeadContext>,
    caller: &Caller,
    request: api::JobLogsRequest,
) -> Result<LogStream, Status> {
    let job = JobId(request.job);
    access::may_read(caller, job)?;
    // Refused here, so that a wrong id is an error and not an empty log.
    let view = jobs::view(context, job).await?;
    // A job without a driver has printed what its other processes have.
    let all_processes = request.all_processes || view.driver == 0;
    let request = api::JobLogsRequest {
        all_processes,
        ..request
    };
    let slot = Arc::clone(&context.log_streams)
        .try_acquire_owned()
        .map_err(|_| {
            rejected(&Rejection::new(
                ErrorCode::Overloaded,
                format!("{LOG_STREAMS_MAX} logs are being read already: try again later"),
            ))
        })?;
    let (pieces, stream) = mpsc::channel(PIECES_WAITING_MAX);
    let log = send_log(context.clone(), request, pieces);
    // The task ends with the stream, and gives its slot back then.
    tokio::spawn(async move {
        log.await;
        drop(slot);
    });
    Ok(Box::pin(ReceiverStream::new(stream)))
}

/// Where reading stands.
struct Position {
    start: Start,
    offset: u64,
    /// How long the last lines of a start that is over were waited for.
    waited: Duration,
}

/// What there is to read of a job.
struct Readable {
    driver: ActorId,
    /// The driver's starts, oldest first.
    starts: Vec<Start>,
    has_ended: bool,
}

async fn readable(context: &HeadContext, job: JobId) -> Result<Readable, Status> {
    let view = jobs::view(context, job).await?;
    let actor = ActorId(view.driver);
    match context.ask(Query::Actor { actor }).await? {
        QueryResponse::Actor(driver) => Ok(Readable {
            driver: actor,
            starts: driver.starts,
            has_ended: view.ended_ms.is_some(),
        }),
        _ => Err(Status::internal("the scheduler answered another question")),
    }
}

/// A client that went away; nobody is left to tell.
struct ClientGone;

struct Sender(mpsc::Sender<Result<api::LogChunk, Status>>);

impl Sender {
    async fn send(&self, data: Vec<u8>) -> Result<(), ClientGone> {
        let source = String::new();
        let chunk = Ok(api::LogChunk { data, source });
        self.0.send(chunk).await.map_err(|_| ClientGone)
    }

    async fn note(&self, text: String) -> Result<(), ClientGone> {
        self.send(format!("--- {text} ---\n").into_bytes()).await
    }
}

async fn send_log(
    context: Arc<HeadContext>,
    request: api::JobLogsRequest,
    pieces: mpsc::Sender<Result<api::LogChunk, Status>>,
) {
    let (job, follow) = (JobId(request.job), request.follow);
    let gone = pieces.clone();
    let sender = Sender(pieces);
    let sending = async {
        if request.all_processes {
            job_output::send_all(&context, job, follow, &sender.0).await;
        } else {
            // An error means that the client is gone, which concerns nobody else.
            let _ = send_starts(&context, job, follow, &sender).await;
        }
    };
    tokio::select! {
        () = sending => {}
        // A quiet job has nothing to send, so this is how its follower's end is noticed.
        () = gone.closed() => {}
    }
}

/// Sends the output of one start of the driver after the other.
async fn send_starts(
    context: &HeadContext,
    job: JobId,
    follow: bool,
    sender: &Sender,
) -> Result<(), ClientGone> {
    let mut position: Option<Position> = None;
    loop {
        let readable = match readable(context, job).await {
            Ok(readable) => readable,
            Err(status) => {
                return sender.0.send(Err(status)).await.map_err(|_| ClientGone);
            }
        };
        let is_over = readable.has_ended || !follow;
        if position.is_none() {
            position = readable.starts.first().map(|start| Position {
                start: *start,
                offset: 0,
                waited: Duration::ZERO,
            });
        }
        let Some(here) = &mut position else {
            if is_over {
                return Ok(());
            }
            tokio::time::sleep(FOLLOW_INTERVAL).await;
            continue;
        };
        let next = readable
            .starts
            .iter()
            .find(|start| start.incarnation > here.start.incarnation);
        match read_piece(context, readable.driver, here).await {
            Some(LogPiece { bytes, .. }) if !bytes.is_empty() => {
                here.offset += bytes.len() as u64;
                sender.send(bytes).await?;
                continue;
            }
            // The process has said how it ends, and is not dead yet: it may print some more.
            Some(LogPiece { is_open: true, .. })
                if (next.is_some() || readable.has_ended) && here.waited < LAST_LINES_WAIT =>
            {
                here.waited += FOLLOW_INTERVAL;
                tokio::time::sleep(FOLLOW_INTERVAL).await;
                continue;
            }
            Some(_) => {}
            None if next.is_some() || is_over => {
                let node = here.start.node;
                sender
                    .note(format!(
                        "the output on {node} cannot be read: it has no session"
                    ))
                    .await?;
            }
            None => {}
        }
        match next {
            Some(start) => {
                let Start {
                    node, incarnation, ..
                } = *start;
                sender
                    .note(format!("started again on {node} ({incarnation})"))
                    .await?;
                position = Some(Position {
                    start: *start,
                    offset: 0,
                    waited: Duration::ZERO,
                });
            }
            None if is_over => return Ok(()),
            None => tokio::time::sleep(FOLLOW_INTERVAL).await,
        }
    }
}

async fn read_piece(
    context: &HeadContext,
    driver: ActorId,
    position: &Position,
) -> Option<LogPiece> {
    let Start {
        node, incarnation, ..
    } = position.start;
    context
        .sessions
        .read_log(node, driver, incarnation, position.offset, PIECE_BYTES)
        .await
}
