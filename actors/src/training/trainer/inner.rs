//! What a trainer has beside its job's description.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::arriving::Arriving;
use crate::training::collective::SharedMemory;
use crate::training::collective::runner::{Board, RunnerHandle};
use crate::training::messages::{Epoch, Handover, KeepOrder, TrainerError};
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
    /// The newest orders that were heard to keep a state for a checkpoint, and for trainers that join.
    pub(super) keep_order: KeepOrder,
    pub(super) share_order: KeepOrder,
    /// The state that is, or is about to be, kept for trainers that join.
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
    /// Which order asked for it.
    pub(super) order: KeepOrder,
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
        if self.shared.take_if(|_| is_of_another).is_some() {
            let older = KeepOrder::before_all_of(epoch.driver_incarnation());
            let replica = Arc::clone(&self.replica);
            // It is busy for as long as a shard takes, and nobody waits for this.
            tokio::task::spawn_blocking(move || replica.lock().unshare(older));
        }
        Ok(())
    }

    /// Looks whether the driver that gives `order` was replaced.
    pub(super) fn admit_driver_of(&mut self, order: KeepOrder) -> Result<(), TrainerError> {
        let driver_incarnation = order.driver_incarnation;
        if driver_incarnation == self.epoch.driver_incarnation() {
            return Ok(());
        }
        self.admit(Epoch::first_of(driver_incarnation))
    }

    /// Looks whether an order to keep a state for a checkpoint counts. Answers the replica that keeps it; none where a later
    /// order came first.
    pub(super) fn admit_keep(
        &mut self,
        order: KeepOrder,
    ) -> Result<Option<Arc<Mutex<Replica>>>, TrainerError> {
        self.admit_driver_of(order)?;
        if order <= self.keep_order {
            return Ok(None);
        }
        self.keep_order = order;
        Ok(Some(Arc::clone(&self.replica)))
    }

    /// The same of an order to keep the state after `step` for trainers that join, which is noted.
    pub(super) fn admit_share(
        &mut self,
        order: KeepOrder,
        step: u64,
    ) -> Result<Option<Arc<Mutex<Replica>>>, TrainerError> {
        self.admit_driver_of(order)?;
        if order <= self.share_order {
            return Ok(None);
        }
        self.share_order = order;
        let state = None;
        self.shared = Some(Shared { order, step, state });
        Ok(Some(Arc::clone(&self.replica)))
    }

    /// What `order` or one before it asked to keep for a checkpoint has ended, and what still comes of that. Answers the
    /// replica that may keep it; none where a later order came first, which ended that. The driver that says so may have been
    /// replaced: what it asked for is still here until another order comes.
    pub(super) fn end_keep(&mut self, order: KeepOrder) -> Option<Arc<Mutex<Replica>>> {
        if order < self.keep_order {
            return None;
        }
        self.keep_order = order;
        Some(Arc::clone(&self.replica))
    }

    /// What `order` or one before it asked to keep for trainers that join has ended, and what still comes of that. Answers
    /// the replica that may keep it; none where its driver was replaced, with which that ended.
    pub(super) fn end_share(&mut self, order: KeepOrder) -> Option<Arc<Mutex<Replica>>> {
        self.admit_driver_of(order).ok()?;
        self.share_order = self.share_order.max(order);
        self.shared.take_if(|shared| shared.order <= order);
        Some(Arc::clone(&self.replica))
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
