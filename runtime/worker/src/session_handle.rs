//! The agent's side of the session: the outbox, requests to the leader, and what comes from it.

use std::sync::Arc;
use std::time::Duration;

use mobula_core::id::{HostId, JobId};
use mobula_core::order::Order;
use mobula_wire::session::{Question, Welcome};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc, oneshot};

use crate::hosts::action::Key;
use crate::outbox::Outbox;

/// Requests of the agent that wait for the session: one for each launch under way and each log
/// that is read, of which a machine has far fewer.
const COMMANDS: usize = 1_024;

/// How long a launch waits for its certificate: longer than a change of leaders.
const SIGN_TIMEOUT: Duration = Duration::from_secs(30);

/// The outbox, with a bell for the session and one for whoever waits for it to empty.
#[derive(Debug, Default)]
pub(crate) struct SharedOutbox {
    outbox: Mutex<Outbox>,
    pub(crate) added: Notify,
    removed: Notify,
}

impl SharedOutbox {
    /// Changes the outbox, then sends what is new in it.
    pub(crate) fn update<T>(&self, change: impl FnOnce(&mut Outbox) -> T) -> T {
        let result = change(&mut self.outbox.lock());
        self.added.notify_one();
        result
    }

    /// Looks at the outbox.
    pub(crate) fn read<T>(&self, look: impl FnOnce(&Outbox) -> T) -> T {
        look(&self.outbox.lock())
    }

    /// Waits until everything is acknowledged.
    pub(crate) async fn emptied(&self) {
        while self.read(Outbox::len) > 0 {
            self.removed.notified().await;
        }
    }

    pub(crate) fn acknowledge(&self, sequence: u64) {
        self.outbox.lock().acknowledge(sequence);
        self.removed.notify_one();
    }
}

/// What the agent asks of the session.
#[derive(Debug)]
pub(crate) enum Command {
    Sign(Signing),
    Log {
        session: u64,
        request: u64,
        bytes: Vec<u8>,
        is_open: bool,
    },
    Answer {
        session: u64,
        request: u64,
        result: Result<Vec<u8>, String>,
    },
    Restart,
    Leave(oneshot::Sender<()>),
}

#[derive(Debug)]
pub(crate) struct Signing {
    pub(crate) csr_pem: String,
    pub(crate) job: JobId,
    pub(crate) host: HostId,
    pub(crate) reply: oneshot::Sender<Result<String, String>>,
}

/// The agent's side of the session.
#[derive(Debug, Clone)]
pub(crate) struct SessionHandle {
    commands: mpsc::Sender<Command>,
    pub(crate) outbox: Arc<SharedOutbox>,
}

impl SessionHandle {
    /// A handle, and the end at which the session takes its commands.
    pub(crate) fn new() -> (SessionHandle, mpsc::Receiver<Command>) {
        let (commands, receiver) = mpsc::channel(COMMANDS);
        (
            SessionHandle {
                commands,
                outbox: Arc::default(),
            },
            receiver,
        )
    }

    /// Has the leader sign a host's certificate.
    pub(crate) async fn sign_host(
        &self,
        csr_pem: String,
        job: JobId,
        host: HostId,
    ) -> Result<String, String> {
        let (reply, answer) = oneshot::channel();
        let ended = "the session with the leader has ended";
        let ask = async {
            let command = Command::Sign(Signing {
                csr_pem,
                job,
                host,
                reply,
            });
            self.commands
                .send(command)
                .await
                .map_err(|_| ended.to_owned())?;
            answer.await.map_err(|_| ended.to_owned())?
        };
        tokio::time::timeout(SIGN_TIMEOUT, ask)
            .await
            .unwrap_or_else(|_| {
                Err(format!(
                    "no leader signed the host's certificate within {SIGN_TIMEOUT:?}"
                ))
            })
    }

    /// Answers a question for a log. Without a session, or when too many answers wait, it is
    /// dropped: the leader asks again.
    pub(crate) fn send_log(&self, session: u64, request: u64, bytes: Vec<u8>, is_open: bool) {
        if self
            .commands
            .try_send(Command::Log {
                session,
                request,
                bytes,
                is_open,
            })
            .is_err()
        {
            tracing::debug!(request, "log answer dropped");
        }
    }

    /// Answers a question of somebody who looks, or drops the answer like that for a log.
    pub(crate) fn send_answer(&self, session: u64, request: u64, result: Result<Vec<u8>, String>) {
        let answer = Command::Answer {
            session,
            request,
            result,
        };
        if self.commands.try_send(answer).is_err() {
            tracing::debug!(request, "answer dropped");
        }
    }

    /// Tells the leader that this worker goes and that nothing runs on it any more. Returns when
    /// the leader has taken it in, or when nobody is there to hear it.
    pub(crate) async fn leave(&self) {
        let (left, done) = oneshot::channel();
        if self.commands.send(Command::Leave(left)).await.is_ok() {
            // Dropped without a word: the session broke meanwhile.
            let _ = done.await;
        }
    }

    /// Begins a new session, in which the leader repeats all orders that stand.
    pub(crate) fn restart(&self) {
        // A full queue means that one is being asked for already, or will be when it drains.
        let _ = self.commands.try_send(Command::Restart);
    }
}

/// What the leader says that is the agent's business.
#[derive(Debug)]
pub(crate) enum FromLeader {
    /// A session has begun. Dropping the sender says that the agent is ready for it.
    Welcome(Arc<Welcome>, oneshot::Sender<()>),
    Order(Order),
    /// The control API's addresses have changed.
    Heads(Vec<String>),
    /// All standing orders were sent; nothing else is to run.
    OrdersComplete(Vec<Key>),
    ReadLog {
        session: u64,
        request: u64,
        key: Key,
        offset: u64,
        limit_bytes: u32,
    },
    /// Somebody wants to know something.
    Ask {
        session: u64,
        request: u64,
        question: Question,
    },
}
