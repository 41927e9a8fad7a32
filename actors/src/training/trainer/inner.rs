//! What a trainer has beside its job's description.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::arriving::Arriving;
use crate::training::collective::SharedMemory;
use crate::training::collective::runner::{Board, RunnerHandle};
use crate::training::messages::{Epoch, Handover, TrainerError};
use crate::training::protocol::plan::MemberId;
use crate::training::replica::Replica;
use crate::training::snapshot::StateSnapshot;

/// What a trainer has.
pub(super) struct Inner {
    pub(super) epoch: Epoch,
    pub(super) replica: Arc<Mutex<Replica>>,
    /// A state on its way here.
    pub(super) arriving: Arriving,
    /// A copy of the own state, on its way to a driver.
    pub(super) leaving: Vec<u8>,
    /// The state that is kept for trainers that join.
    pub(super) shared: Option<Shared>,
    /// What the last driver that left has left here for the next.
    pub(super) handover: Option<Handover>,
    /// States that were taken over.
    pub(super) entries: u64,
    /// For sums to and from processes of this machine; there from the first state on.
    pub(super) memory: Option<Arc<SharedMemory>>,
    pub(super) running: Option<Running>,
}

/// A state that is kept for trainers that join.
pub(super) struct Shared {
    /// The step after which it is.
    pub(super) step: u64,
    /// The state, once it was asked for: the replica is busy for as long as a shard takes.
    pub(super) state: Option<Arc<StateSnapshot>>,
}

/// What others may know of what runs.
#[derive(Clone)]
pub(super) struct Shown {
    pub(super) member: MemberId,
    pub(super) memory: Arc<SharedMemory>,
    pub(super) handle: RunnerHandle,
    pub(super) board: watch::Receiver<Board>,
}

/// What computes.
pub(super) struct Running {
    pub(super) shown: Shown,
    /// Ends the runner when it is dropped.
    pub(super) _task: JoinSet<()>,
}

impl Inner {
    /// Looks whether an order of `epoch` counts. With a newer driver's first one ends what is kept for those who join, for
    /// the one that asked for it is gone.
    pub(super) fn admit(&mut self, epoch: Epoch) -> Result<(), TrainerError> {
        if epoch < self.epoch {
            return Err(TrainerError::Stale {
                found: epoch,
                current: self.epoch,
            });
        }
        let is_of_another = epoch.driver_incarnation() > self.epoch.driver_incarnation();
        self.epoch = epoch;
        if let Some(shared) = self.shared.take_if(|_| is_of_another) {
            let replica = Arc::clone(&self.replica);
            // It is busy for as long as a shard takes, and nobody waits for this.
            tokio::task::spawn_blocking(move || replica.lock().unshare(shared.step));
        }
        Ok(())
    }

    pub(super) fn shown(&self) -> Result<Shown, TrainerError> {
        let running = self.running.as_ref().ok_or(TrainerError::Unprepared)?;
        Ok(running.shown.clone())
    }
}

impl Shown {
    /// Why the runner does not answer any more.
    pub(super) fn ended(&self) -> TrainerError {
        let failed = self.board.borrow().failed.clone();
        failed.unwrap_or(TrainerError::Unprepared)
    }
}
