//! The driver's inbox: one queue, with a bound for each kind of sender.
//!
//! Invariants:
//! 1. Requests and messages of other heads have bounds of their own: a flood of the one never keeps
//!    the other out, for a leader that cannot hear its followers loses its lead.
//! 2. Nobody who sends here waits, except at the end of the process.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use mobula_core::control::{Command, Origin};
use mobula_storage::engine::RocksSnapshot;
use mobula_storage::raft_log::RaftMessage as _;
use mobula_storage::snapshot::SnapshotInstall;
use mobula_wire::raft::StateClaim;
use raft::eraftpb::Message;
use tokio::sync::oneshot;

use super::membership::GroupChange;
use super::proposals::{ChangeError, GroupProgress, Outcome, ProposeError, TableView};
use super::reads::ReadReply;

/// How many requests may wait for the driver: at 1 ms an fsync and hundreds in a batch, this is
/// well under a second of work, and at most a few MiB.
const REQUESTS_MAX: usize = 4096;

/// How many messages of other heads may wait. Most are heartbeats and acknowledgements.
const MESSAGES_MAX: usize = 4096;

/// How many bytes they may have in all: what is in flight to one follower, 256 times 256 KiB.
const MESSAGE_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Reports of the transport beside them, and what other heads say of their state: a few for each of
/// the other heads.
const REPORTS_MAX: usize = 256;

/// What the driver is asked or told. `S` is what a snapshot of its engine is.
pub(crate) enum Input<S = RocksSnapshot> {
    /// Put this command into the log.
    Propose {
        command: Command,
        reply: oneshot::Sender<Result<Outcome, ProposeError>>,
    },
    /// Answer once everything that was committed before is applied.
    Read { reply: ReadReply<S> },
    /// Answer with what is applied here.
    LocalView {
        reply: oneshot::Sender<TableView<S>>,
    },
    /// Change the group.
    Change {
        change: GroupChange,
        /// Whose call it comes of.
        origin: Option<Origin>,
        reply: oneshot::Sender<Result<(), ChangeError>>,
    },
    /// Hand leadership to this voter, or to the one that is furthest; answers to whom.
    Transfer {
        to: Option<u64>,
        reply: oneshot::Sender<Result<u64, ChangeError>>,
    },
    /// How far the members are.
    Progress {
        reply: oneshot::Sender<GroupProgress>,
    },
    /// Another head says.
    Step(Box<Message>),
    /// Another head says what its state is.
    Claim {
        /// Its Raft id.
        from: u64,
        /// What it says.
        claim: StateClaim,
    },
    /// Another head cannot be reached.
    Unreachable(u64),
    /// What became of a snapshot that was sent.
    SnapshotSent { to: u64, arrived: bool },
    /// Another head sent a snapshot, of which everything was verified.
    SnapshotArrived {
        message: Box<Message>,
        install: Box<SnapshotInstall>,
        reply: oneshot::Sender<Result<(), String>>,
    },
    /// End the thread.
    Stop,
}

/// Why an input was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NotTaken {
    /// Its kind's bound is reached.
    Full,
    /// The driver has ended.
    Stopped,
}

#[derive(Debug, Default)]
struct Waiting {
    requests: AtomicUsize,
    messages: AtomicUsize,
    message_bytes: AtomicUsize,
    reports: AtomicUsize,
}

/// The senders' end; cheap to clone.
#[derive(Clone)]
pub(crate) struct InputSender {
    queue: SyncSender<Input>,
    waiting: Arc<Waiting>,
}

/// The driver's end.
pub(crate) struct InputReceiver<S = RocksSnapshot> {
    pub(super) queue: Receiver<Input<S>>,
    waiting: Arc<Waiting>,
}

/// An inbox.
pub(crate) fn input_queue() -> (InputSender, InputReceiver) {
    // The sum of the bounds and one for the end, so that only they decide.
    let (sender, queue) = sync_channel(REQUESTS_MAX + MESSAGES_MAX + REPORTS_MAX + 1);
    let waiting = Arc::new(Waiting::default());
    (
        InputSender {
            queue: sender,
            waiting: waiting.clone(),
        },
        InputReceiver { queue, waiting },
    )
}

impl Waiting {
    fn counter<S>(&self, input: &Input<S>) -> Option<(&AtomicUsize, usize)> {
        match input {
            Input::Propose { .. }
            | Input::Read { .. }
            | Input::LocalView { .. }
            | Input::Change { .. }
            | Input::Transfer { .. }
            | Input::Progress { .. } => Some((&self.requests, REQUESTS_MAX)),
            Input::Step(_) => Some((&self.messages, MESSAGES_MAX)),
            Input::Claim { .. }
            | Input::Unreachable(_)
            | Input::SnapshotSent { .. }
            | Input::SnapshotArrived { .. } => Some((&self.reports, REPORTS_MAX)),
            Input::Stop => None,
        }
    }
}

fn message_bytes<S>(input: &Input<S>) -> usize {
    match input {
        Input::Step(message) => message.encoded_len(),
        _ => 0,
    }
}

impl InputSender {
    /// Puts `input` into the inbox, if its kind's bound allows.
    pub(crate) fn send(&self, input: Input) -> Result<(), NotTaken> {
        let size_bytes = message_bytes(&input);
        let before = self
            .waiting
            .message_bytes
            .fetch_add(size_bytes, Ordering::Relaxed);
        let undo_bytes = || {
            self.waiting
                .message_bytes
                .fetch_sub(size_bytes, Ordering::Relaxed)
        };
        if size_bytes > 0 && before + size_bytes > MESSAGE_BYTES_MAX {
            undo_bytes();
            return Err(NotTaken::Full);
        }
        let counted = self.waiting.counter(&input);
        if let Some((count, max)) = counted
            && count.fetch_add(1, Ordering::Relaxed) >= max
        {
            count.fetch_sub(1, Ordering::Relaxed);
            undo_bytes();
            return Err(NotTaken::Full);
        }
        self.queue.try_send(input).map_err(|error| match error {
            TrySendError::Full(_) => NotTaken::Full,
            TrySendError::Disconnected(_) => NotTaken::Stopped,
        })
    }

    /// Tells the driver to end, after what waits.
    pub(crate) fn stop(&self) {
        // An error means that it has ended already.
        let _ = self.queue.send(Input::Stop);
    }
}

impl<S> InputReceiver<S> {
    /// Notes that `input` waits no longer.
    pub(super) fn taken(&self, input: &Input<S>) {
        if let Some((count, _)) = self.waiting.counter(input) {
            count.fetch_sub(1, Ordering::Relaxed);
        }
        self.waiting
            .message_bytes
            .fetch_sub(message_bytes(input), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_messages_keeps_no_request_out_and_the_other_way_round() {
        let (sender, receiver) = input_queue();
        let message = || Input::Step(Box::default());
        while sender.send(message()).is_ok() {}
        assert_eq!(sender.send(message()), Err(NotTaken::Full));
        let request = || Input::Progress {
            reply: oneshot::channel().0,
        };
        while sender.send(request()).is_ok() {}
        assert_eq!(sender.send(Input::Unreachable(2)), Ok(()));
        let first = receiver.queue.recv().unwrap();
        receiver.taken(&first);
        assert_eq!(sender.send(message()), Ok(()));
        sender.stop();
    }

    #[test]
    fn messages_are_bounded_in_bytes_too() {
        let (sender, receiver) = input_queue();
        let message = || {
            Input::Step(Box::new(Message {
                context: vec![0; 16 * 1024 * 1024],
                ..Message::default()
            }))
        };
        let taken = (0..8).filter(|_| sender.send(message()).is_ok()).count();
        assert_eq!(taken, 3, "four with their heads are above 64 MiB");
        let first = receiver.queue.recv().unwrap();
        receiver.taken(&first);
        assert_eq!(sender.send(message()), Ok(()));
    }
}
