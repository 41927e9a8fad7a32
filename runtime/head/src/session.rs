//! The leader's end of a worker's session: registration, lease renewal, orders out, events in.
//!
//! Invariants:
//! 1. An event is acknowledged only once it is applied, so a worker repeats what a crash lost.
//! 2. A node has one session: a newer one replaces the older.
//! 3. A session whose outbox is full is ended; its successor gets every standing order again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesOrdered;
use mobula_core::id::{ActorId, HostId, Incarnation, JobId, NodeId, SessionId, Term};
use mobula_core::order::{Order, WorkerEvent};
use mobula_net::endpoint::Connection;
use mobula_net::identity::{Identity, Role, Validity};
use mobula_net::lane::{FramedReceiver, FramedSender, FramedStream};
use mobula_scheduler::{Command, EventOutcome, Query, QueryResponse, Response};
use mobula_wire::session::{
    HeadMessage, Question, STANDING_PIECE_MAX, Welcome, WorkerHello, WorkerMessage,
};
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::context::HeadContext;

/// Messages that may wait for one worker; an order has a few KiB at the most. Orders beyond it are
/// dropped, and all that stand are told again when the worker has read the others.
const OUTBOX_CAPACITY: usize = 4096;

/// How many events of one worker may be in the log at the same time, so that they share fsyncs.
const EVENTS_IN_FLIGHT_MAX: usize = 64;

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
struct Outbox {
    messages: mpsc::Receiver<HeadMessage>,
    is_behind: Arc<AtomicBool>,
}

impl Outbox {
    /// Whether orders were dropped, once all that were not have been taken out.
    fn take_behind(&self) -> bool {
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
    fn open(&self, node: NodeId, incarnation: Incarnation) -> (u64, Outbox) {
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

    fn close(&self, node: NodeId, serial: u64) {
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

    fn renew(&self, node: NodeId, serial: u64) {
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

    fn answer_question(&self, node: NodeId, request: u64, result: Result<Vec<u8>, String>) {
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

    fn answer_log(&self, node: NodeId, request: u64, piece: LogPiece) {
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

/// Serves one connection of a worker until it ends.
pub(crate) async fn serve(context: Arc<HeadContext>, connection: Connection) {
    let peer = connection.peer().clone();
    match connection.accept().await {
        Ok((mobula_wire::hello::Lane::Control, stream)) => {
            if let Err(reason) = serve_stream(&context, &peer, stream).await {
                tracing::info!(worker = %peer.id, %reason, "worker session ended");
            }
        }
        Ok((lane, _)) => tracing::warn!(worker = %peer.id, ?lane, "unexpected lane"),
        Err(lost) => {
            tracing::debug!(worker = %peer.id, %lost, "connection lost before its session")
        }
    }
}

async fn serve_stream(
    context: &Arc<HeadContext>,
    peer: &Identity,
    stream: FramedStream,
) -> Result<(), String> {
    let FramedStream {
        mut sender,
        mut receiver,
    } = stream;
    let hello = match receiver.receive_message::<WorkerMessage>().await {
        Ok(Some(WorkerMessage::Hello(hello))) => hello,
        other => return Err(format!("expected a hello, got {other:?}")),
    };
    let registered = register(context, peer, hello).await;
    let (node, incarnation) = match registered {
        Ok(registered) => registered,
        Err(reason) => {
            let refusal = HeadMessage::Refused {
                reason: reason.clone(),
            };
            // The refusal is a courtesy; the stream may be gone already.
            let _ = sender.send_message(&refusal).await;
            let _ = sender.finish().await;
            return Err(reason);
        }
    };
    let (serial, outbox) = context.sessions.open(node, incarnation);
    context.metrics.opened_session();
    let session = Session {
        context: context.clone(),
        node,
        incarnation,
        serial,
    };
    let result = session.run(sender, receiver, outbox).await;
    context.sessions.close(node, serial);
    result
}

async fn register(
    context: &HeadContext,
    peer: &Identity,
    hello: WorkerHello,
) -> Result<(NodeId, Incarnation), String> {
    if peer.id != hello.name {
        return Err(format!(
            "the certificate is for `{}`, but the worker says that it is `{}`: join again with \
             that name",
            peer.id, hello.name
        ));
    }
    let command = Command::RegisterNode {
        name: hello.name,
        boot_id: hello.boot_id,
        capacity: hello.capacity,
        labels: hello.labels,
        version: hello.version,
    };
    match context
        .propose_scheduler(SessionId::INTERNAL, 0, &command)
        .await
    {
        Ok(Response::Registered { node, incarnation }) => Ok((node, incarnation)),
        Ok(other) => Err(format!("unexpected answer to a registration: {other:?}")),
        Err(error) => Err(error.to_string()),
    }
}

struct Session {
    context: Arc<HeadContext>,
    node: NodeId,
    incarnation: Incarnation,
    serial: u64,
}

impl Session {
    fn term(&self) -> Term {
        Term(self.context.raft.leadership().borrow().term)
    }

    async fn run(
        &self,
        mut sender: FramedSender,
        mut receiver: FramedReceiver,
        mut outbox: Outbox,
    ) -> Result<(), String> {
        self.greet(&mut sender).await?;
        let mut events = FuturesOrdered::new();
        let mut group = self.context.raft.group();
        loop {
            if outbox.take_behind() {
                tracing::warn!(node = %self.node, "orders were dropped; telling all that stand");
                self.tell_standing_orders(&mut sender).await?;
            }
            // Whatever may lead to an answer waits for room, and writing waits beside reading.
            let has_room = sender.has_room();
            tokio::select! {
                flushed = sender.flush(), if sender.queued_bytes() > 0 => {
                    flushed.map_err(|error| error.to_string())?;
                }
                Ok(()) = group.changed(), if has_room => {
                    let api_addresses = self.context.api_addresses();
                    queue(&mut sender, &HeadMessage::Heads { api_addresses })?;
                }
                message = outbox.messages.recv(), if has_room => {
                    let Some(message) = message else {
                        return Err("a newer session replaced this one, or leadership ended".into());
                    };
                    queue(&mut sender, &message)?;
                    // What waits together leaves together.
                    while sender.has_room()
                        && let Ok(message) = outbox.messages.try_recv()
                    {
                        queue(&mut sender, &message)?;
                    }
                }
                Some((sequence, applied)) = events.next(), if has_room && !events.is_empty() => {
                    queue(&mut sender, &self.answer_event(sequence, applied)?)?;
                }
                message = receiver.receive_message::<WorkerMessage>(),
                    if has_room && events.len() < EVENTS_IN_FLIGHT_MAX =>
                {
                    let Some(message) = message.map_err(|e| e.to_string())? else {
                        return Err("the worker closed its stream".into());
                    };
                    // Any word of the worker shows that it lives.
                    self.context.sessions.renew(self.node, self.serial);
                    match message {
                        WorkerMessage::Renew { sequence } => {
                            let answer = HeadMessage::Renewed { term: self.term(), sequence };
                            queue(&mut sender, &answer)?;
                        }
                        WorkerMessage::Event { sequence, event } => {
                            events.push_back(self.apply_event(sequence, event));
                        }
                        WorkerMessage::SignHost { request, csr_pem, job, host } => {
                            let result = self.sign_host(&csr_pem, job, host).await;
                            queue(&mut sender, &HeadMessage::HostSigned { request, result })?;
                        }
                        WorkerMessage::Log { request, bytes, is_open } => {
                            let piece = LogPiece { bytes, is_open };
                            self.context.sessions.answer_log(self.node, request, piece);
                        }
                        WorkerMessage::Answer { request, result } => {
                            self.context.sessions.answer_question(self.node, request, result);
                        }
                        WorkerMessage::Leaving => return self.leave().await,
                        WorkerMessage::Hello(_) => return Err("a second hello".into()),
                    }
                }
            }
        }
    }

    async fn greet(&self, sender: &mut FramedSender) -> Result<(), String> {
        let welcome = self
            .context
            .welcome(self.term(), self.node, self.incarnation);
        sender
            .send_message(&HeadMessage::Welcome(welcome))
            .await
            .map_err(|error| error.to_string())?;
        self.tell_standing_orders(sender).await
    }

    /// However many there are: they leave as the worker reads, which it does whatever it has to say.
    async fn tell_standing_orders(&self, sender: &mut FramedSender) -> Result<(), String> {
        let orders = self
            .context
            .standing_orders(self.node)
            .await
            .map_err(|error| error.to_string())?;
        let standing: Vec<_> = orders.iter().filter_map(incarnation_of).collect();
        for order in orders {
            self.context.metrics.ordered(order.kind());
            self.context
                .lives
                .ordered(&order, crate::timeline::now_us());
            queue(sender, &self.context.order_message(self.term(), order))?;
            if !sender.has_room() {
                sender.flush().await.map_err(|error| error.to_string())?;
            }
        }
        let mut pieces = standing.chunks(STANDING_PIECE_MAX).peekable();
        loop {
            let piece = pieces.next().unwrap_or_default();
            let is_last = pieces.peek().is_none();
            let complete = HeadMessage::OrdersComplete {
                term: self.term(),
                standing: piece.to_vec(),
                is_last,
            };
            sender
                .send_message(&complete)
                .await
                .map_err(|error| error.to_string())?;
            if is_last {
                return Ok(());
            }
        }
    }

    async fn apply_event(
        &self,
        sequence: u64,
        event: WorkerEvent,
    ) -> (u64, Result<Response, String>) {
        self.context.metrics.heard(event.kind());
        self.context.lives.heard(&event, crate::timeline::now_us());
        let command = Command::NodeEvent {
            node: self.node,
            incarnation: self.incarnation,
            event,
        };
        let applied = self
            .context
            .propose_scheduler(SessionId::INTERNAL, 0, &command)
            .await;
        (sequence, applied.map_err(|error| error.to_string()))
    }

    fn answer_event(
        &self,
        sequence: u64,
        applied: Result<Response, String>,
    ) -> Result<HeadMessage, String> {
        match applied? {
            Response::Event(EventOutcome::Fenced { current }) => Err(format!(
                "{} {} is fenced: {current} has taken over",
                self.node, self.incarnation
            )),
            _ => Ok(HeadMessage::EventAcknowledged { sequence }),
        }
    }

    /// A worker gets certificates for what it was told to run, and for nothing else.
    async fn sign_host(&self, csr_pem: &str, job: JobId, host: HostId) -> Result<String, String> {
        let orders = self.context.standing_orders(self.node).await;
        let is_ordered = |order: &Order| matches!(order, Order::Start(start) if start.job == job);
        if !orders
            .map_err(|error| error.to_string())?
            .iter()
            .any(is_ordered)
        {
            return Err(format!(
                "{} has no order to run anything of {job}, so its hosts get no certificate for it",
                self.node
            ));
        }
        let view = self.context.ask(Query::Job { job }).await;
        let namespace = match view.map_err(|status| status.to_string())? {
            QueryResponse::Job(view) => view.namespace,
            _ => None,
        };
        let identity = Identity::new(
            &self.context.cluster_id,
            Role::Host,
            host_name(self.node, host),
            self.incarnation.0,
        )
        .with_job(job.0)
        .with_namespace(namespace);
        self.context.metrics.signed_host();
        self.context
            .ca
            .issue(
                csr_pem,
                &identity,
                Validity::for_ttl(self.context.host_certificate_ttl),
            )
            .map_err(|error| error.to_string())
    }

    async fn leave(&self) -> Result<(), String> {
        let command = Command::NodeLost {
            node: self.node,
            incarnation: self.incarnation,
        };
        self.context
            .propose_scheduler(SessionId::INTERNAL, 0, &command)
            .await
            .map_err(|error| error.to_string())?;
        tracing::info!(node = %self.node, "worker left");
        Ok(())
    }
}

fn queue(sender: &mut FramedSender, message: &HeadMessage) -> Result<(), String> {
    sender
        .queue_message(message)
        .map_err(|error| error.to_string())
}

fn incarnation_of(order: &Order) -> Option<(ActorId, Incarnation)> {
    match order {
        Order::Start(start) => Some((start.actor, start.incarnation)),
        Order::Stop {
            actor, incarnation, ..
        } => Some((*actor, *incarnation)),
        Order::Notice { .. } | Order::NoticeWithdrawn | Order::JobEnded { .. } => None,
    }
}

/// The name in a host's certificate: its node and its number there.
fn host_name(node: NodeId, host: HostId) -> String {
    format!("{node}.{host}")
}

/// The node in a host certificate's name.
pub(crate) fn node_of_host_name(name: &str) -> Option<NodeId> {
    name.split_once('.')?.0.parse().ok()
}

/// What a worker is told first.
impl HeadContext {
    fn welcome(&self, term: Term, node: NodeId, incarnation: Incarnation) -> Welcome {
        Welcome {
            term,
            node,
            incarnation,
            lease_ms: self.limits.lease_ms,
            renew_ms: self.limits.renew_ms,
            storage: self.storage_location.clone(),
            api_addresses: self.api_addresses(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_name_gives_its_node_back() {
        assert_eq!(
            node_of_host_name(&host_name(NodeId(3), HostId(9))),
            Some(NodeId(3))
        );
        assert_eq!(node_of_host_name("worker-1"), None);
    }

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
