//! A snapshot on its way from the leader to a follower: a stream of the bulk lane, on a connection
//! of its own, so that it delays no heartbeat and no entry.
//!
//! ```text
//! leader ─► offer (raft's message) ─► chunks, each checked ─► end ─► follower: verify, install
//! leader ◄──────────────────────────── taken or refused ◄──┘
//! ```
//!
//! Invariants:
//! 1. The sender reports the end of every snapshot, also when its task is dropped.
//! 2. The receiver believes nothing before the end frame with the hash of everything: see
//!    `mobula_storage::snapshot`.
//! 3. Both sides give up when nothing moves for [`STALL_TIMEOUT`].

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use mobula_net::endpoint::{Endpoint, LaneClass};
use mobula_net::identity::Role;
use mobula_net::lane::FramedStream;
use mobula_net::{FrameKind, Lane};
use mobula_storage::raft_log::{decode_raft, encode_raft};
use mobula_storage::snapshot::SnapshotInstall;
use mobula_wire::raft::{SnapshotAnswer, SnapshotOffer};
use raft::prelude::{Message, MessageType};
use tokio::sync::{mpsc, oneshot};

use super::inputs::{Input, InputSender};
use super::snapshots::PinnedTables;

/// Nothing moved for so long: the peer is gone, or its disk is.
const STALL_TIMEOUT: Duration = Duration::from_secs(20);

/// How long the whole may take: at 10 MiB/s this is far above the limit of its size.
const TOTAL_TIMEOUT: Duration = Duration::from_secs(300);

/// Chunks that are read ahead of the network; 1 MiB each.
const CHUNKS_AHEAD_MAX: usize = 4;

/// The rows that a head can receive: they are held in memory, to be installed in one batch.
const ROWS_BYTES_MAX: u64 = 1024 * 1024 * 1024;

/// Tells the driver how a snapshot ended, at the latest when it is dropped.
struct Report {
    inputs: InputSender,
    to: u64,
    arrived: bool,
}

impl Drop for Report {
    fn drop(&mut self) {
        let (to, arrived) = (self.to, self.arrived);
        // There is a place: raft sends one snapshot to a follower at a time.
        if self
            .inputs
            .send(Input::SnapshotSent { to, arrived })
            .is_err()
        {
            tracing::warn!(to, "the end of a snapshot could not be reported");
        }
    }
}

/// Sends `tables` as the snapshot that `message` announces.
pub(super) async fn send(
    endpoint: Endpoint,
    address: Option<SocketAddr>,
    inputs: InputSender,
    message: Message,
    tables: PinnedTables,
) {
    let to = message.to;
    let mut report = Report {
        inputs,
        to,
        arrived: false,
    };
    let Some(address) = address else {
        tracing::warn!(
            to,
            "a snapshot cannot be sent: where the head is, is not known"
        );
        return;
    };
    let sending = send_to(&endpoint, address, &message, tables);
    match tokio::time::timeout(TOTAL_TIMEOUT, sending).await {
        Ok(Ok(size_bytes)) => {
            tracing::info!(to, size_bytes, "a snapshot was taken");
            report.arrived = true;
        }
        Ok(Err(reason)) => tracing::warn!(to, reason, "a snapshot was not taken"),
        Err(_) => tracing::warn!(to, "a snapshot took more than {TOTAL_TIMEOUT:?}"),
    }
}

async fn moving<T>(step: impl Future<Output = T>) -> Result<T, String> {
    tokio::time::timeout(STALL_TIMEOUT, step)
        .await
        .map_err(|_| format!("nothing moved for {STALL_TIMEOUT:?}"))
}

async fn send_to(
    endpoint: &Endpoint,
    address: SocketAddr,
    message: &Message,
    tables: PinnedTables,
) -> Result<u64, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let connection = endpoint
        .connect(address, LaneClass::Bulk, Role::Head)
        .await
        .map_err(|error| text(&error))?;
    if connection.peer().incarnation != message.to {
        return Err(format!("head {} is there", connection.peer().incarnation));
    }
    let stream = connection.open(Lane::Bulk).await.map_err(|e| text(&e))?;
    let (mut sender, mut receiver) = stream.split();
    let offer = SnapshotOffer {
        from: message.from,
        to: message.to,
        message: encode_raft(message),
    };
    moving(sender.send_message(&offer))
        .await?
        .map_err(|error| text(&error))?;
    let (chunks, mut ahead) = mpsc::channel(CHUNKS_AHEAD_MAX);
    let reading = tokio::task::spawn_blocking(move || read_tables(&tables, &chunks));
    let mut size_bytes = 0;
    while let Some(chunk) = ahead.recv().await {
        size_bytes += chunk.len() as u64;
        moving(sender.send_chunk(chunk))
            .await?
            .map_err(|error| text(&error))?;
    }
    reading.await.map_err(|error| text(&error))??;
    moving(sender.finish()).await?.map_err(|e| text(&e))?;
    let answer = moving(receiver.receive_message::<SnapshotAnswer>()).await?;
    match answer.map_err(|error| text(&error))? {
        Some(SnapshotAnswer::Taken) => Ok(size_bytes),
        Some(SnapshotAnswer::Refused { reason }) => Err(reason),
        None => Err("it ended the stream without an answer".into()),
    }
}

/// Reads the tables, chunk by chunk, until they end or nobody wants more.
fn read_tables(tables: &PinnedTables, chunks: &mpsc::Sender<Bytes>) -> Result<(), String> {
    let mut export = tables.export();
    while let Some(frame) = export.next_frame().map_err(|error| error.to_string())? {
        if chunks.blocking_send(frame.into()).is_err() {
            return Err("the sending was given up".into());
        }
    }
    Ok(())
}

/// Receives a snapshot that `peer` sends, and hands it to the driver.
pub(super) async fn receive(
    raft_id: u64,
    peer: u64,
    inputs: &InputSender,
    mut stream: FramedStream,
) {
    let received = tokio::time::timeout(
        TOTAL_TIMEOUT,
        receive_from(raft_id, peer, inputs, &mut stream),
    );
    let answer = match received.await {
        Ok(Ok(())) => SnapshotAnswer::Taken,
        Ok(Err(reason)) => {
            tracing::warn!(peer, reason, "a snapshot is refused");
            SnapshotAnswer::Refused { reason }
        }
        Err(_) => SnapshotAnswer::Refused {
            reason: format!("it took more than {TOTAL_TIMEOUT:?}"),
        },
    };
    // The sender may have given up; then it knows.
    let _ = moving(async {
        stream.sender.send_message(&answer).await?;
        stream.sender.finish().await
    })
    .await;
}

async fn receive_from(
    raft_id: u64,
    peer: u64,
    inputs: &InputSender,
    stream: &mut FramedStream,
) -> Result<(), String> {
    let receiver = &mut stream.receiver;
    let offer = moving(receiver.receive_message::<SnapshotOffer>()).await?;
    let offer = offer
        .map_err(|error| error.to_string())?
        .ok_or("the stream ended before its offer")?;
    let message: Message = decode_raft(&offer.message).map_err(|error| error.to_string())?;
    let is_ours = message.get_msg_type() == MessageType::MsgSnapshot
        && (offer.from, message.from) == (peer, peer)
        && (offer.to, message.to) == (raft_id, raft_id);
    if !is_ours {
        return Err(format!(
            "it is not a snapshot of head {peer} for head {raft_id}"
        ));
    }
    let mut install = SnapshotInstall::new(ROWS_BYTES_MAX);
    while !install.is_complete() {
        let frame = moving(receiver.receive())
            .await?
            .map_err(|error| error.to_string())?;
        match frame {
            Some(frame) if frame.kind == FrameKind::Chunk => install
                .push_frame(&frame.payload)
                .map_err(|error| error.to_string())?,
            _ => return Err("the stream ended before the snapshot".into()),
        }
    }
    let metadata = message.get_snapshot().get_metadata();
    let place = install.place().map(|place| place.applied);
    if place.map(|applied| (applied.index, applied.term)) != Some((metadata.index, metadata.term)) {
        return Err("its bytes are of another entry than its announcement".into());
    }
    let (reply, installed) = oneshot::channel();
    let arrived = Input::SnapshotArrived {
        message: Box::new(message),
        install: Box::new(install),
        reply,
    };
    inputs
        .send(arrived)
        .map_err(|_| "this head takes no snapshot now")?;
    moving(installed)
        .await?
        .map_err(|error| error.to_string())?
}
