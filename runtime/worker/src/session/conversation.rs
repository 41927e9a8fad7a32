//! One connection of the session: the hello, then orders, renewals and events until it ends.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mobula_core::id::Term;
use mobula_net::lane::{FramedReceiver, FramedSender, FramedStream};
use mobula_wire::session::{HeadMessage, Welcome, WorkerMessage};
use tokio::sync::oneshot;

use super::{SILENCE_MAX, Session, SessionEnd, WELCOME_TIMEOUT};
use crate::agent::Input;
use crate::hosts::action::Key;
use crate::lease::Lease;
use crate::options::ACTORS_MAX;
use crate::session_handle::{Command, FromLeader, SharedOutbox, Signing};

/// Certificates that are being waited for; as many launches at a time as the spawner queues.
const SIGNINGS_MAX: usize = 256;

/// Events that are unacknowledged for this long are sent again: the leader may have lost one on its
/// way through the log.
const RESEND_INTERVAL: Duration = Duration::from_secs(5);

/// Incarnations that a leader may name: all that run here, and as many that are ending.
const STANDING_MAX: usize = 2 * ACTORS_MAX;

/// Events that are copied out of the outbox at once.
const EVENT_BATCH: usize = 256;

impl Session {
    /// Speaks with the leader until that ends.
    pub(super) async fn converse(
        &mut self,
        stream: FramedStream,
    ) -> Result<std::convert::Infallible, SessionEnd> {
        let (mut sender, mut receiver) = stream.split();
        self.number += 1;
        let sent_at = Instant::now();
        let hello = WorkerMessage::Hello(self.hello.clone());
        let greet = async {
            send(&mut sender, &hello).await?;
            self.receive_welcome(&mut receiver).await
        };
        let welcome = tokio::time::timeout(WELCOME_TIMEOUT, greet)
            .await
            .map_err(|_| SessionEnd::NoWelcome)??;
        self.highest_term = welcome.term;
        self.status.send_modify(|status| {
            status.connected = true;
            status.node = Some(welcome.node);
            status.incarnation = Some(welcome.incarnation);
            status.problem = None;
        });
        tracing::info!(
            node = %welcome.node, incarnation = %welcome.incarnation, term = welcome.term.0,
            "session with the leader"
        );
        self.joiner.learn(&welcome.api_addresses);
        let lease = Lease::granted(welcome.lease_ms, sent_at);
        let renew_period = Duration::from_millis(welcome.renew_ms.max(10));
        // No event of a lost incarnation may be sent in the name of the new one: wait until the
        // agent has dropped those. Its bound is well within a lease.
        let (ready, is_ready) = oneshot::channel();
        self.to_agent(FromLeader::Welcome(Arc::new(welcome), ready))
            .await?;
        let _ = is_ready.await;
        for (request, signing) in &self.signings {
            send(&mut sender, &sign_message(*request, signing)).await?;
        }
        let mut talk = Talk {
            sender,
            lease,
            standing: Vec::new(),
            has_events: true,
            sent_up_to: 0,
            sent_at_last_resend: 0,
        };
        self.talk(&mut talk, &mut receiver, renew_period).await
    }

    async fn receive_welcome(&self, receiver: &mut FramedReceiver) -> Result<Welcome, SessionEnd> {
        match receive(receiver).await? {
            HeadMessage::Welcome(welcome) if welcome.term < self.highest_term => {
                Err(SessionEnd::Stale {
                    found: welcome.term.0,
                    newest: self.highest_term.0,
                })
            }
            HeadMessage::Welcome(welcome) => Ok(welcome),
            HeadMessage::Refused { reason } => Err(SessionEnd::Refused(reason)),
            _ => Err(SessionEnd::Protocol),
        }
    }

    async fn talk(
        &mut self,
        talk: &mut Talk,
        receiver: &mut FramedReceiver,
        renew_period: Duration,
    ) -> Result<std::convert::Infallible, SessionEnd> {
        let outbox = self.handle.outbox.clone();
        let mut renew = tokio::time::interval(renew_period);
        renew.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut resend = tokio::time::interval(RESEND_INTERVAL);
        resend.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            talk.queue_events(&outbox)?;
            let has_room = talk.sender.has_room();
            let lease_end = tokio::time::Instant::from_std(talk.lease.held_until());
            tokio::select! {
                message = receive(receiver) => self.handle_message(message?, talk).await?,
                flushed = talk.sender.flush(), if talk.sender.queued_bytes() > 0 => {
                    flushed.map_err(|error| SessionEnd::Broken(error.to_string()))?;
                }
                _ = renew.tick(), if has_room => {
                    talk.renew()?;
                    if talk.lease.is_answer_overdue(SILENCE_MAX, Instant::now()) {
                        self.check_who_leads().await?;
                    }
                }
                () = outbox.added.notified() => talk.has_events = true,
                _ = resend.tick() => talk.resend_events(&outbox),
                command = self.commands.recv(), if has_room => match command {
                    Some(Command::Leave(left)) => {
                        send(&mut talk.sender, &WorkerMessage::Leaving).await?;
                        // The leader ends the session when it has taken this in.
                        while receive(receiver).await.is_ok() {}
                        // Whoever asked may wait no longer.
                        let _ = left.send(());
                        return Err(SessionEnd::AgentEnded);
                    }
                    Some(command) => self.handle_command(command, talk)?,
                    None => return Err(SessionEnd::AgentEnded),
                },
                () = tokio::time::sleep_until(lease_end) => return Err(SessionEnd::LeaseLost),
                changed = self.membership.changed() => return Err(match changed {
                    Ok(()) => SessionEnd::CertificateRenewed,
                    Err(_) => SessionEnd::AgentEnded,
                }),
            }
        }
    }

    async fn handle_message(
        &mut self,
        message: HeadMessage,
        talk: &mut Talk,
    ) -> Result<(), SessionEnd> {
        match message {
            HeadMessage::Renewed { term, sequence } => {
                if self.is_current(term) {
                    talk.lease.acknowledge(sequence);
                }
            }
            HeadMessage::Order { term, order } => {
                if self.is_current(term) {
                    self.to_agent(FromLeader::Order(order)).await?;
                }
            }
            HeadMessage::EventAcknowledged { sequence } => {
                self.handle.outbox.acknowledge(sequence);
            }
            HeadMessage::HostSigned { request, result } => {
                if let Some(signing) = self.signings.remove(&request) {
                    // The launch may have given up meanwhile.
                    let _ = signing.reply.send(result);
                }
            }
            HeadMessage::ReadLog {
                request,
                actor,
                incarnation,
                offset,
                limit_bytes,
            } => {
                let key = (actor, incarnation);
                let session = self.number;
                let read = FromLeader::ReadLog {
                    session,
                    request,
                    key,
                    offset,
                    limit_bytes,
                };
                self.to_agent(read).await?;
            }
            HeadMessage::Ask { request, question } => {
                let session = self.number;
                let ask = FromLeader::Ask {
                    session,
                    request,
                    question,
                };
                self.to_agent(ask).await?;
            }
            HeadMessage::OrdersComplete {
                term,
                standing,
                is_last,
            } => {
                if talk.standing.len() + standing.len() > STANDING_MAX {
                    return Err(SessionEnd::Protocol);
                }
                talk.standing.extend(standing);
                if is_last && self.is_current(term) {
                    let standing = std::mem::take(&mut talk.standing);
                    self.to_agent(FromLeader::OrdersComplete(standing)).await?;
                }
            }
            HeadMessage::Heads { api_addresses } => {
                self.joiner.learn(&api_addresses);
                self.to_agent(FromLeader::Heads(api_addresses)).await?;
            }
            HeadMessage::Refused { reason } => return Err(SessionEnd::Refused(reason)),
            HeadMessage::Welcome(_) => return Err(SessionEnd::Protocol),
        }
        Ok(())
    }

    /// Whether a message of `term` counts; remembers the highest.
    fn is_current(&mut self, term: Term) -> bool {
        if term < self.highest_term {
            self.status.send_modify(|status| status.stale_messages += 1);
            tracing::warn!(
                found = term.0,
                newest = self.highest_term.0,
                "dropped a message of a leader that has been replaced"
            );
            return false;
        }
        self.highest_term = term;
        true
    }

    fn handle_command(&mut self, command: Command, talk: &mut Talk) -> Result<(), SessionEnd> {
        match command {
            Command::Sign(signing) => {
                self.signings
                    .retain(|_, signing| !signing.reply.is_closed());
                if self.signings.len() >= SIGNINGS_MAX {
                    let reason = format!("{SIGNINGS_MAX} certificates are being waited for");
                    let _ = signing.reply.send(Err(reason));
                    return Ok(());
                }
                self.last_signing += 1;
                let message = sign_message(self.last_signing, &signing);
                self.signings.insert(self.last_signing, signing);
                talk.queue(&message)
            }
            Command::Log {
                session,
                request,
                bytes,
                is_open,
            } if session == self.number => {
                let message = WorkerMessage::Log {
                    request,
                    bytes,
                    is_open,
                };
                talk.queue(&message)
            }
            Command::Answer {
                session,
                request,
                result,
            } if session == self.number => talk.queue(&WorkerMessage::Answer { request, result }),
            // Of a session that is over: nobody waits for it any more.
            Command::Log { .. } | Command::Answer { .. } => Ok(()),
            Command::Restart => Err(SessionEnd::Restarted),
            Command::Leave(_) => Err(SessionEnd::AgentEnded),
        }
    }

    async fn to_agent(&self, message: FromLeader) -> Result<(), SessionEnd> {
        self.inputs
            .send(Input::Leader(message))
            .await
            .map_err(|_| SessionEnd::AgentEnded)
    }
}

/// The state of one connection.
struct Talk {
    sender: FramedSender,
    lease: Lease,
    /// What stands, as far as the leader has said it.
    standing: Vec<Key>,
    /// Whether the outbox may hold what was not queued yet.
    has_events: bool,
    /// The newest event that was queued in this session.
    sent_up_to: u64,
    /// What that was at the last look for events to send again.
    sent_at_last_resend: u64,
}

impl Talk {
    fn queue(&mut self, message: &WorkerMessage) -> Result<(), SessionEnd> {
        let queued = self.sender.queue_message(message);
        queued.map_err(|error| SessionEnd::Broken(error.to_string()))
    }

    fn renew(&mut self) -> Result<(), SessionEnd> {
        let sequence = self.lease.renew(Instant::now());
        self.queue(&WorkerMessage::Renew { sequence })
    }

    /// Queues events while there is room; the rest goes when the head has read some.
    fn queue_events(&mut self, outbox: &SharedOutbox) -> Result<(), SessionEnd> {
        while self.has_events && self.sender.has_room() {
            let events = outbox.read(|outbox| outbox.after(self.sent_up_to, EVENT_BATCH));
            self.has_events = !events.is_empty();
            for (sequence, event) in events {
                if !self.sender.has_room() {
                    break;
                }
                self.queue(&WorkerMessage::Event { sequence, event })?;
                self.sent_up_to = sequence;
            }
        }
        Ok(())
    }

    fn resend_events(&mut self, outbox: &SharedOutbox) {
        let oldest = outbox.read(|outbox| outbox.after(0, 1).first().map(|(number, _)| *number));
        if oldest.is_some_and(|oldest| oldest <= self.sent_at_last_resend) {
            self.sent_up_to = 0;
            self.has_events = true;
        }
        self.sent_at_last_resend = self.sent_up_to;
    }
}

fn sign_message(request: u64, signing: &Signing) -> WorkerMessage {
    WorkerMessage::SignHost {
        request,
        csr_pem: signing.csr_pem.clone(),
        job: signing.job,
        host: signing.host,
    }
}

async fn send(sender: &mut FramedSender, message: &WorkerMessage) -> Result<(), SessionEnd> {
    // A head that does not read for this long is gone, whatever its transport says.
    tokio::time::timeout(WELCOME_TIMEOUT, sender.send_message(message))
        .await
        .map_err(|_| SessionEnd::Broken("the head does not read".to_owned()))?
        .map_err(|error| SessionEnd::Broken(error.to_string()))
}

async fn receive(receiver: &mut FramedReceiver) -> Result<HeadMessage, SessionEnd> {
    match receiver.receive_message().await {
        Ok(Some(message)) => Ok(message),
        Ok(None) => Err(SessionEnd::Finished),
        Err(error) => Err(SessionEnd::Broken(error.to_string())),
    }
}
