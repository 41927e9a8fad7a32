//! Processes that end, told from agent to agent: one stream to each agent that is asked, as long as
//! something is asked.
//!
//! Invariants:
//! 1. What is watched is asked for again on every new stream, so a broken one loses nothing.
//! 2. Silence says nothing: only the agent's word, or that nobody listens at its address any more
//!    (hosts do not outlive their agent), ends a process here.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use mobula_core::id::JobId;
use mobula_core::object::ProcessId;
use mobula_net::lane::FramedStream;
use mobula_net::probe::nobody_listens;
use mobula_wire::store::{PeerReply, PeerRequest};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::service::Input;
use super::transfer::{AnyError, Transfers};

/// Agents that are asked, at a time. Owners on more nodes than that are found to be gone by their
/// silence only.
const AGENTS_MAX: usize = 1024;

/// Changes that wait for one stream: as many as processes start and end within its round trip.
const CHANGES_MAX: usize = 4096;

/// Processes that one agent may watch here.
const WATCHED_MAX: usize = 64 * 1024;

/// Between two attempts to reach an agent.
const RETRY: Duration = Duration::from_millis(500);

#[derive(Debug)]
enum Change {
    Watch(ProcessId, JobId),
    Unwatch(ProcessId, JobId),
}

/// The streams to other agents.
pub(super) struct Watchers {
    transfers: Transfers,
    inputs: mpsc::Sender<Input>,
    agents: BTreeMap<String, mpsc::Sender<Change>>,
    /// Owned here, so that they end with the service.
    tasks: JoinSet<()>,
}

impl Watchers {
    pub(super) fn new(transfers: Transfers, inputs: mpsc::Sender<Input>) -> Watchers {
        Watchers {
            transfers,
            inputs,
            agents: BTreeMap::new(),
            tasks: JoinSet::new(),
        }
    }

    /// Reports `process` as soon as the agent at `agent` says that it has ended.
    pub(super) fn watch(&mut self, agent: String, process: ProcessId, job: JobId) {
        if !self.agents.contains_key(&agent) {
            if self.agents.len() >= AGENTS_MAX {
                return tracing::debug!(agent, "too many agents are asked for their processes");
            }
            let (changes, waiting) = mpsc::channel(CHANGES_MAX);
            let stream = follow(
                agent.clone(),
                self.transfers.clone(),
                waiting,
                self.inputs.clone(),
            );
            self.tasks.spawn(stream);
            self.agents.insert(agent.clone(), changes);
        }
        self.change(&agent, Change::Watch(process, job));
    }

    pub(super) fn unwatch(&mut self, agent: &str, process: ProcessId, job: JobId) {
        self.change(agent, Change::Unwatch(process, job));
    }

    fn change(&self, agent: &str, change: Change) {
        if let Some(changes) = self.agents.get(agent)
            && let Err(error) = changes.try_send(change)
        {
            tracing::debug!(agent, %error, "a process is not watched");
        }
    }
}

/// What is watched at one agent.
struct Watched {
    agent: String,
    processes: BTreeSet<(ProcessId, JobId)>,
    changes: mpsc::Receiver<Change>,
    inputs: mpsc::Sender<Input>,
}

async fn follow(
    agent: String,
    transfers: Transfers,
    changes: mpsc::Receiver<Change>,
    inputs: mpsc::Sender<Input>,
) {
    let mut watched = Watched {
        agent,
        processes: BTreeSet::new(),
        changes,
        inputs,
    };
    while watched.until_needed().await {
        let Err(error) = watched.ask(&transfers).await else {
            continue;
        };
        let agent = &watched.agent;
        tracing::debug!(agent, %error, "an agent does not say which processes end");
        if watched.is_agent_gone().await {
            for (process, job) in std::mem::take(&mut watched.processes) {
                watched.gone(process, job).await;
            }
        }
        tokio::time::sleep(RETRY).await;
    }
}

impl Watched {
    /// Waits until something is to be watched; false when nothing ever will.
    async fn until_needed(&mut self) -> bool {
        while self.processes.is_empty() {
            match self.changes.recv().await {
                Some(change) => drop(self.take_in(change)),
                None => return false,
            }
        }
        true
    }

    /// Answers what is to be asked because of a change, if anything.
    fn take_in(&mut self, change: Change) -> Option<PeerRequest> {
        match change {
            Change::Watch(process, job) => {
                self.processes.insert((process, job));
                Some(PeerRequest::Watch { process, job })
            }
            Change::Unwatch(process, job) => {
                self.processes.remove(&(process, job));
                None
            }
        }
    }

    /// Asks on one stream until it breaks, or nothing is watched any more.
    async fn ask(&mut self, transfers: &Transfers) -> Result<(), AnyError> {
        let stream = transfers.open(&self.agent).await?;
        let (mut sender, mut receiver) = stream.split();
        for (process, job) in self.processes.clone() {
            sender
                .send_message(&PeerRequest::Watch { process, job })
                .await?;
        }
        while !self.processes.is_empty() {
            tokio::select! {
                change = self.changes.recv() => {
                    let Some(change) = change else {
                        return Ok(());
                    };
                    if let Some(request) = self.take_in(change) {
                        sender.send_message(&request).await?;
                    }
                }
                reply = receiver.receive_message::<PeerReply>() => match reply? {
                    Some(PeerReply::Gone { process, job }) => {
                        self.processes.remove(&(process, job));
                        self.gone(process, job).await;
                    }
                    _ => return Err("it answers something else".into()),
                }
            }
        }
        Ok(())
    }

    async fn gone(&self, process: ProcessId, job: JobId) {
        // Nobody is left to tell when the agent is ending.
        let _ = self.inputs.send(Input::ProcessGone(process, job)).await;
    }

    async fn is_agent_gone(&self) -> bool {
        match self.agent.parse::<SocketAddr>() {
            Ok(address) => nobody_listens(address).await,
            Err(_) => false,
        }
    }
}

/// Serves another agent's stream, whose first request is that for `first`.
pub(super) async fn serve(
    stream: FramedStream,
    first: (ProcessId, JobId),
    inputs: mpsc::Sender<Input>,
) -> Result<(), AnyError> {
    let (mut sender, mut receiver) = stream.split();
    let (gone, mut ended) = mpsc::channel(WATCHED_MAX);
    let watch = async |(process, job)| {
        let input = Input::PeerWatch(process, job, gone.clone());
        inputs.send(input).await.map_err(|_| "this agent ends")
    };
    watch(first).await?;
    let mut count = 1;
    loop {
        tokio::select! {
            request = receiver.receive_message::<PeerRequest>() => match request? {
                Some(PeerRequest::Watch { process, job }) if count < WATCHED_MAX => {
                    count += 1;
                    watch((process, job)).await?;
                }
                Some(PeerRequest::Watch { .. }) => {
                    return Err(format!("it watches {WATCHED_MAX} processes, its limit").into());
                }
                Some(_) => return Err("it asks for something else".into()),
                None => return Ok(()),
            },
            Some((process, job)) = ended.recv() => {
                count = count.saturating_sub(1);
                sender.send_message(&PeerReply::Gone { process, job }).await?;
            }
        }
    }
}
