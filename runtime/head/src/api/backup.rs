//! Everything that the heads hold, for whoever makes a backup of it.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use mobula_core::control::Caller;
use mobula_core::error::{ErrorCode, Rejection};
use mobula_net::identity::seal;
use mobula_storage::raft_log::LogView;
use mobula_storage::snapshot::{SnapshotExport, SnapshotPlace};
use mobula_wire::control as api;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{heads, rejected};
use crate::context::HeadContext;
use crate::raft::TableView;

/// Backups that are sent at the same time: each keeps a moment of the store pinned, which keeps what
/// was overwritten since on the disk.
pub(crate) const BACKUPS_MAX: usize = 2;

/// Frames that are read ahead of the client; 1 MiB each.
const FRAMES_AHEAD_MAX: usize = 4;

/// A client that takes nothing for so long is gone, and the store is not pinned for it any longer.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);

pub(super) type PartStream = Pin<Box<dyn Stream<Item = Result<api::BackupPart, Status>> + Send>>;

pub(super) async fn backup(
    context: &Arc<HeadContext>,
    caller: &Caller,
    request: api::BackupRequest,
) -> Result<PartStream, Status> {
    heads::only_operators(caller)?;
    let slot = Arc::clone(&context.backups)
        .try_acquire_owned()
        .map_err(|_| {
            rejected(&Rejection::new(
                ErrorCode::Overloaded,
                format!("{BACKUPS_MAX} backups are being made already: try again later"),
            ))
        })?;
    let view = if request.local {
        context.raft.local_view().await?
    } else {
        // It gives the key of the CA away, so it is recorded, and is part of what it reads.
        context.note("all tables, and the key of the CA").await?;
        context.raft.read().await?
    };
    let (public_key, sealed_key) = seal(context.ca.key_pem().as_bytes(), &request.public_key)
        .map_err(|error| rejected(&Rejection::invalid(error.to_string())))?;
    tracing::info!(?caller, "a backup is made, with the key of the CA");
    let start = api::BackupStart {
        raft_id: context.raft_id,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        made_ms: context.clock.now_ms(),
        ca_pem: context.ca.certificate_pem().to_owned(),
        public_key,
        sealed_key,
    };
    let (parts, stream) = mpsc::channel(FRAMES_AHEAD_MAX);
    let sender = PartSender {
        parts,
        runtime: tokio::runtime::Handle::current(),
    };
    // It ends with the stream, or when nobody reads that; its slot is given back then.
    tokio::task::spawn_blocking(move || {
        if let Err(reason) = send(view, start, &sender) {
            tracing::warn!(reason, "a backup broke off");
            sender.part(Err(Status::internal(reason)));
        }
        drop(slot);
    });
    Ok(Box::pin(ReceiverStream::new(stream)))
}

struct PartSender {
    parts: mpsc::Sender<Result<api::BackupPart, Status>>,
    runtime: tokio::runtime::Handle,
}

impl PartSender {
    /// Whether the client takes it.
    fn part(&self, part: Result<api::BackupPart, Status>) -> bool {
        let sending = tokio::time::timeout(STALL_TIMEOUT, self.parts.send(part));
        matches!(self.runtime.block_on(sending), Ok(Ok(())))
    }
}

fn send(view: TableView, start: api::BackupStart, sender: &PartSender) -> Result<(), String> {
    let gone = || "nobody reads it any more".to_owned();
    let view = view.into_base();
    let log = LogView::new(&view);
    let place = SnapshotPlace {
        applied: log.applied().map_err(|error| error.to_string())?,
        conf_state: log.conf_state().map_err(|error| error.to_string())?,
    };
    let first = api::BackupPart {
        start: Some(start),
        frame: Vec::new(),
    };
    if !sender.part(Ok(first)) {
        return Err(gone());
    }
    let mut export = SnapshotExport::new(view, place);
    while let Some(frame) = export.next_frame().map_err(|error| error.to_string())? {
        let part = api::BackupPart { start: None, frame };
        if !sender.part(Ok(part)) {
            return Err(gone());
        }
    }
    Ok(())
}
