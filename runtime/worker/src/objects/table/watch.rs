//! Who wants to know when which process ends: processes and their owners on other nodes, other agents
//! and processes of this one.
//!
//! Invariants:
//! 1. Who watches a process that is not here, or of another job, is told at once that it is gone.
//! 2. Each is told once.

use std::collections::{BTreeMap, BTreeSet};

use mobula_core::id::JobId;
use mobula_core::object::ProcessId;
use mobula_wire::store::StoreReply;
use tokio::sync::mpsc;

use super::{Action, Table};

/// Processes of other nodes that are watched for processes of this one. Who cannot be watched is
/// found to be gone more slowly, by its silence.
const WATCHED_MAX: usize = 64 * 1024;

/// A process of another node.
#[derive(Debug)]
struct Watched {
    agent: String,
    links: BTreeSet<u64>,
}

/// Who watches whom.
#[derive(Debug, Default)]
pub(super) struct Watches {
    /// By job too: of another job's process nobody is told more than that it is not there.
    elsewhere: BTreeMap<(JobId, ProcessId), Watched>,
    /// Processes of this node, and agents that watch them.
    here: BTreeMap<ProcessId, Vec<mpsc::Sender<(ProcessId, JobId)>>>,
}

impl Table {
    /// The process behind `link` wants to know when `process` ends, of the node at `agent`.
    pub(super) fn watch(&mut self, link: u64, process: ProcessId, agent: String) {
        let Some(job) = self.links.get(&link).map(|link| link.job) else {
            return;
        };
        if agent == self.limits.agent {
            // Every process of the job is told when it ends.
            if !self.is_here(process, job) {
                self.answer(link, StoreReply::ProcessGone { process }, None);
            }
            return;
        }
        if let Some(watched) = self.watches.elsewhere.get_mut(&(job, process)) {
            watched.links.insert(link);
        } else if self.watches.elsewhere.len() < WATCHED_MAX {
            self.actions
                .push(Action::Watch(agent.clone(), process, job));
            let links = BTreeSet::from([link]);
            let watched = Watched { agent, links };
            self.watches.elsewhere.insert((job, process), watched);
        }
    }

    /// The process behind `link`, of `job`, need not be told any more.
    pub(super) fn unwatch(&mut self, link: u64, job: JobId, process: ProcessId) {
        let Some(watched) = self.watches.elsewhere.get_mut(&(job, process)) else {
            return;
        };
        watched.links.remove(&link);
        if watched.links.is_empty()
            && let Some(watched) = self.watches.elsewhere.remove(&(job, process))
        {
            self.actions
                .push(Action::Unwatch(watched.agent, process, job));
        }
    }

    /// A watched process of another node has ended.
    pub(crate) fn process_gone(&mut self, process: ProcessId, job: JobId) {
        let watched = self.watches.elsewhere.remove(&(job, process));
        for link in watched.into_iter().flat_map(|watched| watched.links) {
            self.answer(link, StoreReply::ProcessGone { process }, None);
        }
    }

    /// Another agent wants to know when `process` of `job` ends.
    pub(crate) fn peer_watch(
        &mut self,
        process: ProcessId,
        job: JobId,
        gone: mpsc::Sender<(ProcessId, JobId)>,
    ) {
        if !self.is_here(process, job) {
            return tell(&gone, process, job);
        }
        let watchers = self.watches.here.entry(process).or_default();
        watchers.retain(|other| !other.is_closed() && !other.same_channel(&gone));
        watchers.push(gone);
    }

    fn is_here(&self, process: ProcessId, job: JobId) -> bool {
        self.links
            .values()
            .any(|link| link.process == process && link.job == job)
    }

    /// A process of this node has ended: it watches nobody, and who watches it is told.
    pub(super) fn end_watches(&mut self, link: u64, process: ProcessId, job: JobId) {
        let own: Vec<ProcessId> = self
            .watches
            .elsewhere
            .iter()
            .filter(|(_, watched)| watched.links.contains(&link))
            .map(|((_, process), _)| *process)
            .collect();
        for watched in own {
            self.unwatch(link, job, watched);
        }
        for gone in self.watches.here.remove(&process).unwrap_or_default() {
            tell(&gone, process, job);
        }
        let others: Vec<u64> = self
            .links
            .iter()
            .filter(|(_, link)| link.job == job)
            .map(|(link, _)| *link)
            .collect();
        for other in others {
            self.answer(other, StoreReply::ProcessGone { process }, None);
        }
    }
}

/// There is room for each process that an agent watches; one that is gone need not know.
fn tell(gone: &mpsc::Sender<(ProcessId, JobId)>, process: ProcessId, job: JobId) {
    let _ = gone.try_send((process, job));
}
