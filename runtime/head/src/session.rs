//! The leader's end of a worker's session: registration, lease renewal, orders out, events in.
//!
//! Invariants:
//! 1. An event is acknowledged only once it is applied, so a worker repeats what a crash lost.
//! 2. Who begins a session is told every standing order.

use std::sync::Arc;

use futures::StreamExt;
use futures::stream::FuturesOrdered;
use mobula_core::id::{ActorId, HostId, Incarnation, JobId, NodeId, SessionId, Term};
use mobula_core::order::{Order, WorkerEvent};
use mobula_net::endpoint::Connection;
use mobula_net::identity::{Identity, Role, Validity};
use mobula_net::lane::{FramedReceiver, FramedSender, FramedStream};
use mobula_scheduler::{Command, EventOutcome, Query, QueryResponse, Response};
use mobula_wire::session::{HeadMessage, STANDING_PIECE_MAX, Welcome, WorkerHello, WorkerMessage};

use crate::context::HeadContext;
use crate::sessions::{LogPiece, Outbox};

/// How many events of one worker may be in the log at the same time, so that they share fsyncs.
const EVENTS_IN_FLIGHT_MAX: usize = 64;

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
}
