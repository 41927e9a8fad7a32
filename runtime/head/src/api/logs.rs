//! A job's output: read piece by piece from the worker that runs its driver, start after start.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use mobula_core::control::Caller;
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::{Incarnation, JobId, NodeId};
use mobula_wire::control as api;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{jobs, rejected};
use crate::context::HeadContext;

/// How much is asked for at once; well below the control lane's frame.
const PIECE_BYTES: u32 = 256 * 1024;

/// How often a log that is being followed is looked at.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(150);

/// How many pieces wait for a slow client.
const PIECES_WAITING_MAX: usize = 4;

pub(super) type LogStream = Pin<Box<dyn Stream<Item = Result<api::LogChunk, Status>> + Send>>;

pub(super) async fn job_logs(
    context: &Arc<HeadContext>,
    caller: &Caller,
    request: api::JobLogsRequest,
) -> Result<LogStream, Status> {
    let job = JobId(request.job);
    if matches!(caller, Caller::Host { job: own, .. } if *own != job) {
        return Err(rejected(&Rejection::new(
            ErrorCode::PermissionDenied,
            format!("the output of {job} is not for other jobs"),
        )));
    }
    // Refused here, so that a wrong id is an error and not an empty log.
    jobs::view(context, job).await?;
    let (pieces, stream) = mpsc::channel(PIECES_WAITING_MAX);
    // The task ends with the stream: sending fails once the client is gone.
    tokio::spawn(send_log(context.clone(), job, request.follow, pieces));
    Ok(Box::pin(ReceiverStream::new(stream)))
}

/// Where reading stands.
#[derive(PartialEq, Eq)]
struct Position {
    node: NodeId,
    incarnation: Incarnation,
    offset: u64,
}

async fn send_log(
    context: Arc<HeadContext>,
    job: JobId,
    follow: bool,
    pieces: mpsc::Sender<Result<api::LogChunk, Status>>,
) {
    let mut position: Option<Position> = None;
    while !pieces.is_closed() {
        let (view, driver) = match jobs::view_with_driver(&context, job).await {
            Ok(found) => found,
            Err(status) => {
                let _ = pieces.send(Err(status)).await;
                return;
            }
        };
        let ended = view.ended_ms.is_some();
        if let Some((node, incarnation)) = jobs::place_of(&driver) {
            let restarted = position
                .as_ref()
                .is_some_and(|p| p.incarnation != incarnation);
            if restarted {
                let note = format!("--- restarted on {node} ({incarnation}) ---\n");
                if pieces
                    .send(Ok(api::LogChunk {
                        data: note.into_bytes(),
                    }))
                    .await
                    .is_err()
                {
                    return;
                }
            }
            if restarted || position.is_none() {
                position = Some(Position {
                    node,
                    incarnation,
                    offset: 0,
                });
            }
        }
        let mut read = 0;
        if let Some(position) = &mut position {
            match read_piece(&context, &driver, position).await {
                Some(data) => {
                    read = data.len();
                    position.offset += read as u64;
                    if read > 0 && pieces.send(Ok(api::LogChunk { data })).await.is_err() {
                        return;
                    }
                }
                None if ended || !follow => {
                    let note = format!(
                        "--- the output on {} cannot be read: no session ---\n",
                        position.node
                    );
                    let _ = pieces
                        .send(Ok(api::LogChunk {
                            data: note.into_bytes(),
                        }))
                        .await;
                    return;
                }
                None => {}
            }
        }
        if read == 0 {
            if ended || !follow {
                return;
            }
            tokio::time::sleep(FOLLOW_INTERVAL).await;
        }
    }
}

async fn read_piece(
    context: &HeadContext,
    driver: &api::Actor,
    position: &Position,
) -> Option<Vec<u8>> {
    context
        .sessions
        .read_log(
            position.node,
            mobula_core::id::ActorId(driver.id),
            position.incarnation,
            position.offset,
            PIECE_BYTES,
        )
        .await
}
