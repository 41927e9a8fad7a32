//! Watches of modules (I17): each client follows one module all the time, behind the last revision that
//! it was told of, at whichever head answers.
//!
//! What is checked: the revision that a head would tell is, after every step, exactly the newest change
//! that it has applied, neither an older one (a gap: somebody would wait in vain) nor one that nobody
//! made · who watches is told of revisions that grow, each of them a change · after healing everybody
//! knows the last one.

use mobula_core::control::ModuleId;

use super::asked::{Asked, For, Waiting};
use super::domain::WATCHED;
use super::options::{MILLISECOND, Micros};
use super::packet::Ask;
use super::violation::Violation;
use super::world::World;

/// How long a head lets a client wait; shorter than a client's patience.
const WAIT_MAX: Micros = 300 * MILLISECOND;

const WATCHES: &str = "watches: in order, no gap, no duplicate (I17)";

/// A client's standing watch.
#[derive(Debug)]
pub(crate) struct Watcher {
    module: ModuleId,
    seen: u64,
    operation: Option<u64>,
}

impl Watcher {
    pub(crate) fn new(client: usize) -> Self {
        Watcher {
            module: WATCHED[client % WATCHED.len()],
            seen: 0,
            operation: None,
        }
    }

    /// Whether an operation is the watch.
    pub(crate) fn is(&self, operation: u64) -> bool {
        self.operation == Some(operation)
    }
}

impl World {
    /// Asks again, behind what was seen.
    pub(crate) fn keep_watching(&mut self, index: usize) {
        let watcher = &self.clients[index].watcher;
        if watcher.operation.is_some() {
            return;
        }
        let (module, seen) = (watcher.module, watcher.seen);
        let number = self.clients[index].next_operation();
        self.clients[index].watcher.operation = Some(number);
        self.begin(index, Ask::Watch { module, seen });
    }

    /// A head takes a watch in; whoever it is may answer.
    pub(crate) fn watch(&mut self, raft_id: u64, whose: For, module: ModuleId, seen: u64) {
        let deadline = self.now + WAIT_MAX;
        if let Some(head) = self.heads.get_mut(&raft_id) {
            head.asked.push(Asked {
                waiting: Waiting::Watch { module, seen },
                whose,
                deadline,
            });
        }
    }

    /// A client is told the revision of what it watches.
    pub(crate) fn watcher_hears(&mut self, index: usize, revision: u64) {
        let watcher = &mut self.clients[index].watcher;
        watcher.operation = None;
        if revision <= watcher.seen {
            // Nothing in time, or from a head that is behind.
            return;
        }
        watcher.seen = revision;
        let module = watcher.module;
        self.counts.watched += 1;
        self.trace.note(revision);
        if self.checker.last_change(module, revision) != revision {
            self.complain(Violation::new(
                WATCHES,
                format!(
                    "client {index} is told of change {revision} of module {}, and that entry did not \
                     change it",
                    module.0
                ),
            ));
        }
    }

    /// What a head would tell must be what it has applied.
    pub(crate) fn check_revisions(&self, raft_id: u64) -> Result<(), Violation> {
        let Some(core) = self.heads.get(&raft_id).and_then(|head| head.core.as_ref()) else {
            return Ok(());
        };
        let applied = core.status().applied;
        for module in WATCHED {
            let (told, made) = (
                core.module_revision(module),
                self.checker.last_change(module, applied),
            );
            if told != made {
                return Err(Violation::new(
                    WATCHES,
                    format!(
                        "head {raft_id}, which has applied {applied}, tells change {told} of module {}, \
                         and the last one was {made}",
                        module.0
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Whether everybody was told of the last change.
    pub(crate) fn watchers_know_all(&self) -> bool {
        let last = self.checker.last();
        self.clients.iter().all(|client| {
            let watcher = &client.watcher;
            watcher.seen == self.checker.last_change(watcher.module, last)
        })
    }
}
