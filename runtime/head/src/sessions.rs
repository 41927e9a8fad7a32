//! The sessions of workers that this head leads, and the ways into each: orders, and questions with their
//! answers.
//!
//! Invariants:
//! 1. A node has one session: a newer one replaces the older.
//! 2. A session whose worker reads too slowly loses orders, and knows it: then it tells again all that
//!    stand.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use mobula_core::id::{ActorId, Incarnation, NodeId};
use mobula_wire::session::{HeadMessage, Question};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// Messages that may wait for one worker; an order has a few KiB at the most. Orders beyond it are
/// dropped, and all that stand are told again when the worker has read the others.
const OUTBOX_CAPACITY: usize = 4096;

/// Questions to one worker that wait for their answer: each is a person or a scraper.
const QUESTIONS_MAX: usize = 64;

/// How long to wait for a worker's piece of a log.
const LOG_TIMEOUT: Duration = Duration::from_secs(5);

/// A piece of a log.
pub(crate) struct LogPiece {
    /// Empty at the end.
    pub(crate) bytes: Vec<u8>,
    /// Whether a process may still write to it.
    pub(crate) is_open: bool,
}

/// What is to be told to one worker.
pub(crate) struct Outbox {
    pub(crate) messages: mpsc::Receiver<HeadMessage>,
    is_behind: Arc<AtomicBool>,
}

impl Outbox {
    /// Whether orders were dropped, once all that were not have been taken out.
    pub(crate) fn take_behind(&self) -> bool {
        self.messages.is_empty() && self.is_behind.swap(false, Ordering::AcqRel)
    }
}

/// The sessions of this leader.
#[derive(Clone, Default)]
pub(crate) struct Sessions {
    entries: Arc<Mutex<BTreeMap<NodeId, SessionEntry>>>,
    next_request: Arc<AtomicU64>,
}

struct SessionEntry {
    incarnation: Incarnation,
    /// Tells this session from a newer one of the same incarnation.
    serial: u64,
    outbox: mpsc::Sender<HeadMessage>,
    /// Orders were dropped because the outbox was full.
    is_behind: Arc<AtomicBool>,
    last_renewal: Instant,
    log_requests: BTreeMap<u64, oneshot::Sender<LogPiece>>,
    questions: BTreeMap<u64, oneshot::Sender<Result<Vec<u8>, String>>>,
}

impl Sessions {
    pub(crate) fn open(&self, node: NodeId, incarnation: Incarnation) -> (u64, Outbox) {
        let (outbox, messages) = mpsc::channel(OUTBOX_CAPACITY);
        let serial = self.next_request.fetch_add(1, Ordering::Relaxed);
        let is_behind = Arc::new(AtomicBool::new(false));
        let receiver = Outbox {
            messages,
            is_behind: Arc::clone(&is_behind),
        };
        let entry = SessionEntry {
            incarnation,
            serial,
            outbox,
            is_behind,
            last_renewal: Instant::now(),
            log_requests: BTreeMap::new(),
            questions: BTreeMap::new(),
        };
        self.entries.lock().insert(node, entry);
        (serial, receiver)
    }

    /// Ends the session of a node's life, if there is one.
    pub(crate) fn end(&self, node: NodeId, incarnation: Incarnation) {
        let mut entries = self.entries.lock();
        if entries
            .get(&node)
            .is_some_and(|entry| entry.incarnation == incarnation)
        {
            entries.remove(&node);
        }
    }

    /// The lives of nodes that have a session.
    pub(crate) fn lives(&self) -> Vec<(NodeId, Incarnation)> {
        let entries = self.entries.lock();
        let life = |(node, entry): (&NodeId, &SessionEntry)| (*node, entry.incarnation);
        entries.iter().map(life).collect()
    }

    /// Ends the sessions of lives that are over. Those in `before` had one before it was asked which are
    /// `live`; whoever has come since may not be among these yet.
    pub(crate) fn end_lost(
        &self,
        before: &[(NodeId, Incarnation)],
        live: &[(NodeId, Incarnation)],
    ) {
        for (node, incarnation) in before.iter().filter(|life| !live.contains(life)) {
            self.end(*node, *incarnation);
        }
    }

    pub(crate) fn close(&self, node: NodeId, serial: u64) {
        let mut entries = self.entries.lock();
        if entries
            .get(&node)
            .is_some_and(|entry| entry.serial == serial)
        {
            entries.remove(&node);
        }
    }

    /// Ends all sessions: this head leads no more.
    pub(crate) fn clear(&self) {
        self.entries.lock().clear();
    }

    /// Sends `message` to a node that has a session; without one it is dropped, for a new session
    /// begins with every standing order.
    pub(crate) fn send(&self, node: NodeId, message: HeadMessage) {
        let entries = self.entries.lock();
        let Some(entry) = entries.get(&node) else {
            return;
        };
        if entry.outbox.try_send(message).is_err() {
            entry.is_behind.store(true, Ordering::Release);
        }
    }

    pub(crate) fn renew(&self, node: NodeId, serial: u64) {
        if let Some(entry) = self.entries.lock().get_mut(&node)
            && entry.serial == serial
        {
            entry.last_renewal = Instant::now();
        }
    }

    /// The nodes that have a session.
    pub(crate) fn nodes(&self) -> Vec<NodeId> {
        self.entries.lock().keys().copied().collect()
    }

    /// When this incarnation of a node last renewed, where it has a session.
    pub(crate) fn last_renewal(&self, node: NodeId, incarnation: Incarnation) -> Option<Instant> {
        self.entries
            .lock()
            .get(&node)
            .filter(|entry| entry.incarnation == incarnation)
            .map(|entry| entry.last_renewal)
    }

    /// A piece of the output of an actor's host; `None` if the worker cannot be asked.
    pub(crate) async fn read_log(
        &self,
        node: NodeId,
        actor: ActorId,
        incarnation: Incarnation,
        offset: u64,
        limit_bytes: u32,
    ) -> Option<LogPiece> {
        let request = self.next_request.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        {
            let mut entries = self.entries.lock();
            let entry = entries.get_mut(&node)?;
            entry.log_requests.retain(|_, waiting| !waiting.is_closed());
            entry.log_requests.insert(request, reply);
            let message = HeadMessage::ReadLog {
                request,
                actor,
                incarnation,
                offset,
                limit_bytes,
            };
            entry.outbox.try_send(message).ok()?;
        }
        tokio::time::timeout(LOG_TIMEOUT, answer).await.ok()?.ok()
    }

    /// Asks a worker something for somebody who looks; the error is for people.
    pub(crate) async fn ask(&self, node: NodeId, question: Question) -> Result<Vec<u8>, String> {
        let request = self.next_request.fetch_add(1, Ordering::Relaxed);
        let (reply, answer) = oneshot::channel();
        {
            let mut entries = self.entries.lock();
            let entry = entries.get_mut(&node).ok_or("it has no session")?;
            entry.questions.retain(|_, waiting| !waiting.is_closed());
            if entry.questions.len() >= QUESTIONS_MAX {
                return Err(format!("{QUESTIONS_MAX} questions wait for it already"));
            }
            entry.questions.insert(request, reply);
            let message = HeadMessage::Ask { request, question };
            let sent = entry.outbox.try_send(message);
            sent.map_err(|_| "its outbox is full or closed")?;
        }
        match tokio::time::timeout(LOG_TIMEOUT, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err("its session ended".to_owned()),
            Err(_) => Err(format!(
                "it said nothing within {} s",
                LOG_TIMEOUT.as_secs()
            )),
        }
    }

    pub(crate) fn answer_question(
        &self,
        node: NodeId,
        request: u64,
        result: Result<Vec<u8>, String>,
    ) {
        let mut entries = self.entries.lock();
        let waiting = entries
            .get_mut(&node)
            .and_then(|e| e.questions.remove(&request));
        if let Some(reply) = waiting {
            // Whoever asked may have given up.
            let _ = reply.send(result);
        }
    }

    /// How many sessions there are, and how many messages wait for workers.
    pub(crate) fn count(&self) -> (u64, u64) {
        let entries = self.entries.lock();
        let waiting = |entry: &SessionEntry| OUTBOX_CAPACITY - entry.outbox.capacity();
        let queued: usize = entries.values().map(waiting).sum();
        (entries.len() as u64, queued as u64)
    }

    pub(crate) fn answer_log(&self, node: NodeId, request: u64, piece: LogPiece) {
        let waiting = self
            .entries
            .lock()
            .get_mut(&node)
            .and_then(|e| e.log_requests.remove(&request));
        if let Some(reply) = waiting {
            // Whoever asked may have given up; then nobody needs the bytes.
            let _ = reply.send(piece);
        }
    }
}
#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn orders_beyond_a_full_outbox_are_told_again_once_it_is_empty() {
        let sessions = Sessions::default();
        let (_, mut outbox) = sessions.open(NodeId(1), Incarnation(1));
        let message = || HeadMessage::EventAcknowledged { sequence: 1 };
        for _ in 0..OUTBOX_CAPACITY {
            sessions.send(NodeId(1), message());
        }
        assert!(!outbox.is_behind.load(Ordering::Acquire));
        sessions.send(NodeId(1), message());
        assert_eq!(sessions.nodes(), [NodeId(1)]);
        assert!(!outbox.take_behind(), "what waits comes first");
        while outbox.messages.try_recv().is_ok() {}
        assert!(outbox.take_behind());
        assert!(!outbox.take_behind(), "once");
    }

    /// A worker that registered again at the moment at which its lease ran out: its session was opened when
    /// that of the lost node had just been ended, and it would have renewed in it for ever.
    #[tokio::test]
    async fn a_session_that_a_lost_node_opened_late_ends_with_the_next_look() {
        let sessions = Sessions::default();
        let (lost, alive, new) = (
            (NodeId(1), Incarnation(1)),
            (NodeId(2), Incarnation(2)),
            (NodeId(3), Incarnation(9)),
        );
        sessions.end(lost.0, lost.1);
        let _outboxes = [lost, alive].map(|(node, life)| sessions.open(node, life).1);
        let before = sessions.lives();
        assert_eq!(before, [lost, alive]);
        // It registers while the tables are read.
        let _outbox = sessions.open(new.0, new.1).1;
        sessions.end_lost(&before, &[alive]);
        assert_eq!(sessions.lives(), [alive, new]);
    }

    #[tokio::test]
    async fn an_old_session_does_not_close_its_successor() {
        let sessions = Sessions::default();
        let (old, _old_messages) = sessions.open(NodeId(1), Incarnation(1));
        let (_, _messages) = sessions.open(NodeId(1), Incarnation(2));
        sessions.close(NodeId(1), old);
        assert!(sessions.last_renewal(NodeId(1), Incarnation(2)).is_some());
        assert!(sessions.last_renewal(NodeId(1), Incarnation(1)).is_none());
    }
}
