//! The agent: takes what the leader, the hosts, the kernel and the notice sources say, one after
//! another, and performs what the [`Pool`](crate::hosts::pool::Pool) decides.
//!
//! Invariants:
//! 1. One task owns all tables; everything else only sends it an [`Input`].
//! 2. When a welcome names another incarnation of this node, every host of the old one is dead
//!    before anything that came after the welcome is looked at.
//! 3. The agent never waits for the leader, except for its last words, and then with a bound.

mod host_processes;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use mobula_core::exit::ExitReason;
use mobula_core::id::{HostId, JobId};
use mobula_core::order::{Order, WorkerEvent};
use mobula_gpu::Monitor;
use mobula_wire::host::{AgentMessage, HostMessage};
use mobula_wire::session::Welcome;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use crate::gather::Gathers;
use crate::hosts::action::{Action, Alarm};
use crate::hosts::connection::Connected;
use crate::hosts::devices::Devices;
use crate::hosts::graves::Graves;
use crate::hosts::launcher::{Launched, Launcher};
use crate::hosts::pool::Pool;
use crate::hosts::process::{HostProcess, ProcessEnd};
use crate::hosts::renewal::{HostCertificate, Renewals};
use crate::hosts::stopped::{LOOK_INTERVAL, StoppedProcesses};
use crate::logs::Logs;
use crate::metrics::WorkerMetrics;
use crate::notices::{AdviceChange, Notice, NoticeBoard, NoticeChange, NoticeSource, until};
use crate::objects::ObjectStore;
use crate::session_handle::{FromLeader, SessionHandle};
use crate::spans::Spans;
use crate::worker::{WorkerExit, WorkerStatus};

/// Inputs that wait for the agent. Who sends more waits, which is the backpressure on the leader's
/// stream and on hosts; each input takes the agent microseconds.
pub(crate) const INPUTS: usize = 4_096;

/// How long the last events may take to be acknowledged when the agent ends.
const LAST_WORDS_WAIT: Duration = Duration::from_secs(2);

/// How often the sizes of logs are looked at: at a full disk's speed (1 GB/s) a log stays below
/// some gigabytes, at an ordinary program's within a few per cent of its limit.
const LOG_TRIM_INTERVAL: Duration = Duration::from_secs(5);

/// Something for the agent to take in.
#[derive(Debug)]
pub(crate) enum Input {
    /// The leader says something.
    Leader(FromLeader),
    /// A notice source says something.
    Notice(NoticeChange),
    /// A notice source says something that has no deadline.
    Advice(AdviceChange),
    /// A host said hello.
    HostConnected(Connected),
    /// A host says something.
    HostMessage(HostId, HostMessage),
    /// A host's stream has ended and everything on it was read.
    HostDisconnected(HostId),
    /// A launch has come to its end.
    HostLaunched(HostId, Result<Launched, String>),
    /// The leader has signed a host's next certificate, or not.
    HostCertified(HostId, Result<HostCertificate, String>),
    /// A host's process is dead.
    HostDied(HostId, ProcessEnd),
    /// Hosts have had their time to answer a question.
    GatherDue(u64),
}

/// The agent's tables.
pub(crate) struct Agent {
    inputs: mpsc::Receiver<Input>,
    pub(crate) to_self: mpsc::Sender<Input>,
    launcher: Arc<Launcher>,
    objects: ObjectStore,
    pub(crate) session: SessionHandle,
    pub(crate) status: watch::Sender<WorkerStatus>,
    pub(crate) pool: Pool,
    pub(crate) logs: Logs,
    pub(crate) processes: BTreeMap<HostId, HostProcess>,
    stopped: StoppedProcesses,
    pub(crate) streams: BTreeMap<HostId, mpsc::Sender<AgentMessage>>,
    /// Hosts that said hello before their launch was reported here.
    early: BTreeMap<HostId, Connected>,
    alarms: BTreeMap<(Instant, u64), Alarm>,
    last_alarm: u64,
    renewals: Renewals,
    graves: Graves,
    notices: NoticeBoard,
    welcome: Option<Arc<Welcome>>,
    pub(crate) tasks: JoinSet<()>,
    pub(crate) gathers: Gathers,
    pub(crate) metrics: WorkerMetrics,
    pub(crate) gpus: Monitor,
    /// What the agent itself took time for.
    pub(crate) spans: Spans,
    /// Launches that are under way: for which job, and since when.
    launching: BTreeMap<HostId, (JobId, u64)>,
}

impl Agent {
    pub(crate) fn new(
        inputs: (mpsc::Sender<Input>, mpsc::Receiver<Input>),
        launcher: Launcher,
        objects: ObjectStore,
        session: SessionHandle,
        status: watch::Sender<WorkerStatus>,
        (devices, stopped): (Devices, StoppedProcesses),
        (logs, spans, gpus): (Logs, Spans, Monitor),
    ) -> Agent {
        let (to_self, inputs) = inputs;
        Agent {
            inputs,
            to_self,
            launcher: Arc::new(launcher),
            objects,
            session,
            status,
            pool: Pool::new(devices),
            logs,
            processes: BTreeMap::new(),
            stopped,
            streams: BTreeMap::new(),
            early: BTreeMap::new(),
            alarms: BTreeMap::new(),
            last_alarm: 0,
            renewals: Renewals::default(),
            graves: Graves::default(),
            notices: NoticeBoard::default(),
            welcome: None,
            tasks: JoinSet::new(),
            gathers: Gathers::default(),
            metrics: WorkerMetrics::default(),
            gpus,
            spans,
            launching: BTreeMap::new(),
        }
    }

    /// Works until it is told to stop or the machine is taken away; no host is left then.
    pub(crate) async fn run(mut self, mut stop: oneshot::Receiver<()>) -> WorkerExit {
        let mut trim = tokio::time::interval(LOG_TRIM_INTERVAL);
        let mut look = tokio::time::interval(LOOK_INTERVAL);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let is_limited = self.stopped.limit().is_some();
        let exit = loop {
            self.perform();
            if let Some(exit) = self.exit_when_empty() {
                break exit;
            }
            let next_alarm = self.alarms.first_key_value().map(|((at, _), _)| *at);
            let next_renewal = self.renewals.next_at();
            let notice = self.notices.current();
            tokio::select! {
                // Whoever holds the handle dropped it without a word: that is a stop as well.
                _ = &mut stop => break WorkerExit::Stopped,
                Some(input) = self.inputs.recv() => self.handle(input).await,
                () = sleep_until(next_alarm) => self.ring(),
                () = sleep_until(next_renewal) => self.renew_due(),
                () = self.graves.tended() => {}
                () = sleep_until_deadline(notice) => {
                    let source = notice.expect("the deadline is a notice's").source;
                    break WorkerExit::Preempted { source };
                }
                Some(_) = self.tasks.join_next() => {}
                _ = trim.tick() => self.logs.trim(),
                _ = look.tick(), if is_limited => self.kill_stopped(),
            }
        };
        self.leave(exit).await;
        exit
    }

    /// A worker that was asked to end by SIGTERM has no reason to stay when all actors have left.
    fn exit_when_empty(&self) -> Option<WorkerExit> {
        let notice = self.notices.current()?;
        let is_done = notice.source == NoticeSource::Sigterm && self.pool.actor_count() == 0;
        is_done.then_some(WorkerExit::Drained)
    }

    async fn leave(&mut self, exit: WorkerExit) {
        tracing::info!(%exit, actors = self.pool.actor_count(), "worker ends");
        let hosts = self.pool.end_all(&ExitReason::NodeLost);
        self.kill(&hosts).await;
        let is_orderly = match exit {
            WorkerExit::Stopped | WorkerExit::Drained => true,
            // A machine that is taken away says nothing, and so does one that plays it.
            WorkerExit::Preempted { source } => source == NoticeSource::Sigterm,
        };
        if is_orderly && self.status.borrow().connected {
            let last_words = async {
                // What ended before the hosts were killed has reasons of its own.
                self.session.outbox.emptied().await;
                self.session.leave().await;
            };
            if tokio::time::timeout(LAST_WORDS_WAIT, last_words)
                .await
                .is_err()
            {
                tracing::warn!("the leader did not take in the last words in time");
            }
        }
        self.tasks.shutdown().await;
    }

    async fn handle(&mut self, input: Input) {
        match input {
            Input::Leader(FromLeader::Welcome(welcome, ready)) => {
                self.handle_welcome(welcome).await;
                drop(ready);
            }
            Input::Leader(FromLeader::Heads(api_addresses)) => {
                if let Some(welcome) = &mut self.welcome {
                    // For the hosts that are launched from now on.
                    Arc::make_mut(welcome)
                        .api_addresses
                        .clone_from(&api_addresses);
                }
                self.pool.heads(&api_addresses);
            }
            Input::Leader(FromLeader::Order(order)) => self.handle_order(order),
            Input::Leader(FromLeader::ReadLog {
                session,
                request,
                key,
                offset,
                limit_bytes,
            }) => {
                // Looked at first: what is closed by now is read to its end.
                let is_open = self.logs.is_open(key);
                let bytes = self.logs.read(key, offset, limit_bytes);
                self.metrics.read_log(bytes.len());
                self.session.send_log(session, request, bytes, is_open);
            }
            Input::Leader(FromLeader::OrdersComplete(standing)) => self.pool.keep_only(&standing),
            Input::Notice(change) => self.handle_notice(change),
            Input::Advice(change) => {
                if change.stands {
                    let source = change.source.as_str();
                    tracing::warn!(source, "the cloud may take this machine away");
                }
                let stands = self.notices.advise(change);
                self.pool.advice(stands);
            }
            Input::HostConnected(connected) => self.handle_connected(connected),
            Input::Leader(FromLeader::Ask {
                session,
                request,
                question,
            }) => self.handle_question(session, request, question),
            Input::HostMessage(host, HostMessage::Answer { request, answer }) => {
                self.handle_answer(host, request, answer);
            }
            Input::HostMessage(host, message) => self.pool.message(host, message),
            Input::GatherDue(number) => self.handle_gather_due(number),
            Input::HostDisconnected(host) => {
                self.streams.remove(&host);
                self.handle_silence(host);
                self.pool.disconnected(host);
            }
            Input::HostLaunched(host, result) => self.handle_launched(host, result),
            Input::HostCertified(host, result) => self.handle_certified(host, result),
            Input::HostDied(host, end) => self.handle_died(host, end),
        }
    }

    async fn handle_welcome(&mut self, welcome: Arc<Welcome>) {
        self.pool.heads(&welcome.api_addresses);
        let before = self
            .welcome
            .replace(welcome.clone())
            .map(|old| old.incarnation);
        if before.is_none_or(|before| before == welcome.incarnation) {
            return;
        }
        let actors = self.pool.actor_count();
        tracing::warn!(
            incarnation = %welcome.incarnation, actors,
            "the leader had given this node up; killing every host of before"
        );
        let hosts = self.pool.end_all(&ExitReason::NodeLost);
        // The leader has counted these actors as lost already.
        drop(self.pool.take_actions());
        self.kill(&hosts).await;
        self.alarms.clear();
        self.session.outbox.update(|outbox| {
            outbox.forget_actors();
            // What the leader knew of the old incarnation's notices is void too.
            if let Some(notice) = self.notices.current() {
                outbox.push(notice_event(Some(notice)));
            }
        });
    }

    fn handle_order(&mut self, order: Order) {
        self.metrics.ordered(order.kind());
        match order {
            Order::Start(start) => {
                let actors = self.pool.actor_count();
                if self.session.outbox.read(|outbox| outbox.has_room(actors)) {
                    self.pool.start(start);
                } else {
                    // In a new session the leader repeats the order, when events have drained.
                    tracing::warn!(actor = %start.actor, "too many unacknowledged events");
                    self.session.restart();
                }
            }
            Order::Stop {
                actor,
                incarnation,
                grace_ms,
            } => {
                self.pool.stop(actor, incarnation, grace_ms);
            }
            Order::Notice { deadline_ms } => self.handle_notice(NoticeChange {
                source: NoticeSource::Command,
                deadline_ms: Some(deadline_ms),
            }),
            Order::NoticeWithdrawn => self.handle_notice(NoticeChange {
                source: NoticeSource::Command,
                deadline_ms: None,
            }),
            Order::JobEnded { job } => self.objects.job_ended(job),
        }
    }

    fn handle_notice(&mut self, change: NoticeChange) {
        let Some(current) = self.notices.apply(change) else {
            return;
        };
        match current {
            Some(Notice {
                deadline_ms,
                source,
            }) => {
                let left_ms = until(deadline_ms).as_millis();
                tracing::warn!(
                    source = source.as_str(),
                    left_ms,
                    "this machine will be taken away"
                );
            }
            None => tracing::info!("the notice is withdrawn"),
        }
        self.pool.notice(current.map(|notice| notice.deadline_ms));
        self.session
            .outbox
            .update(|outbox| outbox.push(notice_event(current)));
    }

    fn perform(&mut self) {
        loop {
            let actions = self.pool.take_actions();
            if actions.is_empty() {
                break;
            }
            for action in actions {
                self.perform_one(action);
            }
        }
        // A dead host is remembered until its last words are read.
        if self.processes.len() > self.pool.host_count() {
            self.processes.retain(|host, _| self.pool.has_host(*host));
            self.early.retain(|host, _| self.pool.has_host(*host));
        }
        self.status.send_if_modified(|status| {
            let actors = self.pool.actor_count();
            std::mem::replace(&mut status.actors, actors) != actors
        });
    }

    fn perform_one(&mut self, action: Action) {
        match action {
            Action::Launch(launch) => self.launch(*launch),
            Action::Send(host, message) => {
                let Some(stream) = self.streams.get(&host) else {
                    return;
                };
                if let Err(mpsc::error::TrySendError::Full(_)) = stream.try_send(message) {
                    tracing::warn!(%host, "killing a host that does not read its messages");
                    self.kill_one(host);
                }
            }
            Action::Kill(host) => self.kill_one(host),
            Action::Report(event) => {
                if let WorkerEvent::ActorExited { reason, .. } = &event {
                    self.metrics.exited(reason.code());
                }
                self.session.outbox.update(|outbox| outbox.push(event));
            }
            Action::Wake { after_ms, alarm } => {
                self.last_alarm += 1;
                let at = Instant::now() + Duration::from_millis(after_ms.min(ALARM_MS_MAX));
                self.alarms.insert((at, self.last_alarm), alarm);
            }
            Action::Logs(key, host) => self.logs.link(key, host),
        }
    }

    fn ring(&mut self) {
        let now = Instant::now();
        while let Some(entry) = self.alarms.first_entry() {
            if entry.key().0 > now {
                break;
            }
            self.pool.alarm(entry.remove());
        }
    }
}

/// A day; later alarms are of no use to anybody.
const ALARM_MS_MAX: u64 = 86_400_000;

fn notice_event(notice: Option<Notice>) -> WorkerEvent {
    match notice {
        Some(Notice {
            deadline_ms,
            source,
        }) => WorkerEvent::Notice {
            deadline_ms,
            source: source.as_str().to_owned(),
        },
        None => WorkerEvent::NoticeWithdrawn,
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn sleep_until_deadline(notice: Option<Notice>) {
    match notice {
        Some(notice) => tokio::time::sleep(until(notice.deadline_ms)).await,
        None => std::future::pending().await,
    }
}
