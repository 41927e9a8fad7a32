//! Objects from node to node: agent to agent, on the bulk lane.
//!
//! Invariants:
//! 1. Every piece is checked against its digest before it is written. Digests are computed, and
//!    memory is copied, on blocking threads, of one piece while the network has another.
//! 2. Only agents may ask, each for the job of the process that it asks for.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use mobula_core::id::JobId;
use mobula_core::object::{ObjectError, ObjectId};
use mobula_net::endpoint::{Connection, Endpoint, LaneClass};
use mobula_net::identity::Role;
use mobula_net::lane::FramedStream;
use mobula_net::pool::{Pool, PoolLimits};
use mobula_wire::frame::FrameKind;
use mobula_wire::hello::Lane;
use mobula_wire::store::{PIECE_BYTES, PeerReply, PeerRequest};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, JoinSet};

use super::memory::Block;
use super::service::Input;
use super::watch;

/// Agents that this one serves at a time.
const PEERS_MAX: usize = 1024;

/// Streams of one agent at a time: twice the objects that it fetches at a time, and one for the
/// processes that it watches.
const STREAMS_MAX: usize = 17;

pub(super) type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// The way to and from other agents. Clones share their connections.
#[derive(Clone)]
pub(crate) struct Transfers {
    endpoint: Endpoint,
    pool: Arc<Pool>,
}

impl Transfers {
    pub(crate) fn new(endpoint: Endpoint) -> Transfers {
        let pool = Arc::new(Pool::new(endpoint.clone(), PoolLimits::PEERS));
        Transfers { endpoint, pool }
    }

    /// Serves other agents until the endpoint is closed.
    pub(crate) async fn serve(self, inputs: mpsc::Sender<Input>) {
        let mut peers = JoinSet::new();
        loop {
            tokio::select! {
                accepted = self.endpoint.accept() => {
                    let Some(connection) = accepted else { return };
                    if connection.peer().role != Role::Node {
                        connection.close("only agents may ask for objects here");
                    } else if peers.len() >= PEERS_MAX {
                        connection.close("this agent serves as many others as it may; ask later");
                    } else {
                        peers.spawn(serve_peer(connection, inputs.clone()));
                    }
                }
                Some(_) = peers.join_next() => {}
            }
        }
    }

    /// Gets an object from the agent at `agent`.
    pub(crate) async fn fetch(
        &self,
        object: ObjectId,
        job: JobId,
        block: &Block,
        agent: &str,
    ) -> Result<(), ObjectError> {
        match self.try_fetch(object, job, block, agent).await {
            Ok(result) => result,
            Err(error) => Err(ObjectError::Lost {
                object,
                reason: format!("the node at {agent}, which had it, does not send it: {error}"),
            }),
        }
    }

    async fn try_fetch(
        &self,
        object: ObjectId,
        job: JobId,
        block: &Block,
        agent: &str,
    ) -> Result<Result<(), ObjectError>, AnyError> {
        let mut stream = self.open(agent).await?;
        let request = PeerRequest::Fetch { object, job };
        stream.sender.send_message(&request).await?;
        match stream.receiver.receive_message::<PeerReply>().await? {
            Some(PeerReply::Begin { size_bytes }) if size_bytes == block.size_bytes => {}
            Some(PeerReply::Begin { size_bytes }) => {
                let expected = block.size_bytes;
                return Err(format!("it has {size_bytes} bytes there, not {expected}").into());
            }
            Some(PeerReply::Refused(error)) => return Ok(Err(error)),
            Some(PeerReply::Piece { .. } | PeerReply::Gone { .. }) | None => {
                return Err("it answers nothing".into());
            }
        }
        let mut writing = None;
        let received = receive_pieces(&mut stream, block, &mut writing).await;
        // Also where the rest does not come: the memory is given to another object when this is over.
        let written = match writing {
            Some(last) => last.await?,
            None => Ok(()),
        };
        received?;
        written?;
        Ok(Ok(()))
    }

    /// Tells the agent at `agent` that an object is not needed any more. In vain is no harm: it
    /// drops what its job has left when that has ended.
    pub(crate) async fn free(&self, object: ObjectId, job: JobId, agent: &str) {
        let freeing = async {
            let mut stream = self.open(agent).await?;
            let request = PeerRequest::Free { object, job };
            stream.sender.send_message(&request).await?;
            stream.sender.finish().await?;
            Ok::<(), AnyError>(())
        };
        if let Err(error) = freeing.await {
            tracing::debug!(%object, agent, %error, "an agent was not told of a freed object");
        }
    }

    pub(super) async fn open(&self, agent: &str) -> Result<FramedStream, AnyError> {
        let address: SocketAddr = agent.parse()?;
        let connection = self
            .pool
            .connection(address, LaneClass::Bulk, Role::Node)
            .await?;
        Ok(connection.open(Lane::Bulk).await?)
    }
}

/// A piece that is being written.
type Writing = JoinHandle<Result<(), AnyError>>;

/// Receives an object piece by piece into its memory; the last piece is still being written then.
async fn receive_pieces(
    stream: &mut FramedStream,
    block: &Block,
    writing: &mut Option<Writing>,
) -> Result<(), AnyError> {
    let mut at = 0;
    while at < block.size_bytes {
        let digest = match stream.receiver.receive_message::<PeerReply>().await? {
            Some(PeerReply::Piece { digest }) => digest,
            _ => return Err("it ends early".into()),
        };
        let Some(frame) = stream.receiver.receive().await? else {
            return Err("it ends early".into());
        };
        let piece = frame.payload;
        let fits = frame.kind == FrameKind::Chunk
            && !piece.is_empty()
            && piece.len() as u64 <= block.size_bytes - at;
        if !fits {
            return Err("a piece of it is not of the size that is missing".into());
        }
        if let Some(before) = writing.take() {
            before.await??;
        }
        let (memory, offset) = (block.memory.clone(), block.offset + at);
        at += piece.len() as u64;
        *writing = Some(tokio::task::spawn_blocking(move || {
            if blake3::hash(&piece) != digest {
                return Err("a piece of it is not what its digest says".into());
            }
            Ok(memory.write_at(&piece, offset)?)
        }));
    }
    Ok(())
}

async fn serve_peer(connection: Connection, inputs: mpsc::Sender<Input>) {
    let mut streams = JoinSet::new();
    loop {
        tokio::select! {
            accepted = connection.accept(), if streams.len() < STREAMS_MAX => match accepted {
                Ok((Lane::Bulk, stream)) => {
                    streams.spawn(serve_stream(stream, inputs.clone()));
                }
                // Dropping the stream resets it, and so refuses it.
                Ok((lane, _stream)) => tracing::warn!(%lane, "refused a stream"),
                Err(lost) => {
                    tracing::debug!(%lost, "another agent's connection ended");
                    break;
                }
            },
            Some(_) = streams.join_next() => {}
        }
    }
    // They end by themselves, as their connection has; each says then that it does not need its object any more.
    while streams.join_next().await.is_some() {}
}

async fn serve_stream(mut stream: FramedStream, inputs: mpsc::Sender<Input>) {
    match stream.receiver.receive_message::<PeerRequest>().await {
        Ok(Some(PeerRequest::Fetch { object, job })) => {
            let (answer, opened) = oneshot::channel();
            if inputs
                .send(Input::PeerOpen(object, job, answer))
                .await
                .is_err()
            {
                return;
            }
            let opened = match opened.await {
                Ok(opened) => opened,
                Err(_) => return,
            };
            let is_open = opened.is_ok();
            if let Err(error) = send(stream, opened).await {
                tracing::debug!(%object, %error, "an object was not sent to the end");
            }
            if is_open {
                let _ = inputs.send(Input::PeerClose(object)).await;
            }
        }
        Ok(Some(PeerRequest::Free { object, job })) => {
            let _ = inputs.send(Input::PeerFree(object, job)).await;
        }
        Ok(Some(PeerRequest::Watch { process, job })) => {
            if let Err(error) = watch::serve(stream, (process, job), inputs).await {
                tracing::debug!(%error, "another agent's stream of watches broke");
            }
        }
        Ok(None) => {}
        Err(error) => tracing::debug!(%error, "another agent asks for nothing"),
    }
}

async fn send(
    mut stream: FramedStream,
    opened: Result<Block, ObjectError>,
) -> Result<(), AnyError> {
    let block = match opened {
        Ok(block) => block,
        Err(error) => {
            let refused = PeerReply::Refused(error);
            stream.sender.send_message(&refused).await?;
            stream.sender.finish().await?;
            return Ok(());
        }
    };
    let size_bytes = block.size_bytes;
    let begin = PeerReply::Begin { size_bytes };
    stream.sender.send_message(&begin).await?;
    let mut at = 0;
    let mut next = read_piece(&block, at);
    while at < size_bytes {
        let (piece, digest) = next.await??;
        at += piece.len() as u64;
        // The next one is read while this one goes out.
        next = read_piece(&block, at);
        let announced = PeerReply::Piece { digest };
        stream.sender.send_message(&announced).await?;
        stream.sender.send_chunk(piece).await?;
    }
    stream.sender.finish().await?;
    Ok(())
}

/// The piece at `at`, and its digest; an empty one at the end.
fn read_piece(block: &Block, at: u64) -> JoinHandle<io::Result<(Bytes, [u8; 32])>> {
    let block = block.clone();
    tokio::task::spawn_blocking(move || {
        let length = (block.size_bytes - at).min(PIECE_BYTES as u64) as usize;
        let mut piece = vec![0; length];
        block.memory.read_at(&mut piece, block.offset + at)?;
        let digest = *blake3::hash(&piece).as_bytes();
        Ok((Bytes::from(piece), digest))
    })
}
