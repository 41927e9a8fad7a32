//! What is compared when a head answers, and when a run ends.

use mobula_core::control::Command as LogCommand;
use mobula_core::error::Rejection;
use mobula_core::resource::Resources;
use mobula_head::raft::Outcome;
use mobula_head::simulation::{View, rows_sum};
use mobula_scheduler::{Query, QueryResponse, answer};

use super::asked::applied_in;
use super::head::leader_of;
use super::model::shown;
use super::packet::Ask;
use super::violation::Violation;
use super::world::World;

/// How many events lie between two looks at whether all is done.
const LOOK_EVERY: u64 = 64;

impl World {
    /// Keeps a violation until the present event is over.
    pub(crate) fn complain(&mut self, violation: Violation) {
        self.complaint.get_or_insert(violation);
    }

    pub(crate) fn take_complaints(&mut self) -> Result<(), Violation> {
        self.complaint.take().map_or(Ok(()), Err)
    }

    /// A head says what became of a command: it must be what the log says (I1, I2).
    pub(crate) fn check_outcome(&self, raft_id: u64, outcome: &Outcome) -> Result<(), Violation> {
        const RULE: &str = "an answer is that of its entry (I1, I2)";
        let Some(committed) = self.checker.at(outcome.index) else {
            let detail = format!(
                "head {raft_id} answers with entry {}, and {} are committed",
                outcome.index,
                self.checker.last()
            );
            return Err(Violation::new(RULE, detail));
        };
        if committed.result.as_ref() == Some(&outcome.result) {
            return Ok(());
        }
        Err(Violation::new(
            RULE,
            format!(
                "head {raft_id} answers entry {} with {}, and applied one by one it comes to {}",
                outcome.index,
                shown(&outcome.result),
                committed
                    .result
                    .as_ref()
                    .map_or_else(|| "nothing".to_owned(), shown)
            ),
        ))
    }

    /// A head shows its tables: they must be those of an entry, and hold all that was acknowledged
    /// to anybody when they were asked for (I1).
    pub(crate) fn check_view(
        &self,
        raft_id: u64,
        view: &View,
        floor: u64,
    ) -> Result<(), Violation> {
        let applied = applied_in(view);
        if applied < floor {
            return Err(Violation::new(
                "a read sees what was acknowledged (I1)",
                format!("head {raft_id} shows entry {applied}, after {floor} was acknowledged"),
            ));
        }
        let found = rows_sum(view.base());
        self.checker
            .check_rows(applied, found, || format!("a view of head {raft_id}"))
    }

    /// A client was told that its command was applied: it must be the one in the log.
    pub(crate) fn check_applied(
        &mut self,
        ask: &Ask,
        index: u64,
        result: &Result<Vec<u8>, Rejection>,
    ) {
        let is_its = |command: &LogCommand| match ask {
            Ask::Change {
                session,
                seq,
                module,
                payload,
            } => {
                (command.session, command.seq, command.module) == (*session, *seq, *module)
                    && command.payload == *payload
            }
            Ask::Look(_) | Ask::Watch { .. } => false,
        };
        let committed = self
            .checker
            .at(index)
            .and_then(|entry| entry.command.as_ref());
        if !committed.is_some_and(is_its) {
            self.complain(Violation::new(
                "no acknowledged command is lost (I2)",
                format!(
                    "a client was told {} of {ask:?} at entry {index}, which holds {committed:?}",
                    shown(result)
                ),
            ));
        }
    }

    fn is_settled(&self) -> bool {
        let last = self.checker.last();
        let voters = &self.checker.reference().members().voters;
        let agrees = |id: &u64| {
            self.asleep.contains(id)
                || self
                    .heads
                    .get(id)
                    .and_then(|head| head.core.as_ref())
                    .is_some_and(|core| core.status().applied == last)
        };
        leader_of(&self.heads).is_some() && voters.iter().all(agrees)
    }

    fn live_jobs(&self) -> u64 {
        match answer(&self.checker.reference().reader(), 0, Query::Status) {
            Ok(QueryResponse::Status(status)) => status.jobs_live,
            _ => u64::MAX,
        }
    }

    /// Whether everything is answered, done and agreed on.
    pub(crate) fn is_quiet(&self) -> bool {
        self.counts.events.is_multiple_of(LOOK_EVERY)
            && self.is_undrained
            && self.clients.iter().all(super::client::Client::is_done)
            && self.is_operator_done()
            && self.workers_are_idle()
            && self.is_settled()
            && self.live_jobs() == 0
            && self.checker.model.domain.endpoints().next().is_none()
            && self.watchers_know_all()
    }

    /// With heads that sleep on, nobody is replaced.
    fn is_operator_done(&self) -> bool {
        !self.asleep.is_empty() || self.operator.is_content()
    }

    /// What stands in the way of quiet, for people.
    pub(crate) fn what_is_missing(&self) -> String {
        let mut missing = Vec::new();
        if leader_of(&self.heads).is_none() {
            missing.push("nobody leads".to_owned());
        }
        if !self.is_operator_done() {
            missing.push(format!("the group is not whole: {:?}", self.operator));
        }
        for client in self.clients.iter().filter(|client| !client.is_done()) {
            missing.push(format!("a client waits for {}", client.waiting()));
        }
        if !self.workers_are_idle() {
            missing.push("a worker runs something or has something to report".to_owned());
        }
        if !self.is_settled() {
            let applied: Vec<String> = self
                .heads
                .iter()
                .map(|(id, head)| match &head.core {
                    Some(core) => format!("head {id}: {:?}", core.status()),
                    None => format!("head {id}: down"),
                })
                .collect();
            missing.push(format!(
                "not everybody has applied {}: {}",
                self.checker.last(),
                applied.join(", ")
            ));
        }
        let jobs = self.live_jobs();
        if jobs > 0 {
            missing.push(format!(
                "{jobs} jobs have not ended: {}; at log time {} on {}",
                self.live_actors(),
                self.checker.model.log_time_ms(),
                self.nodes()
            ));
        }
        let endpoints: Vec<&String> = self.checker.model.domain.endpoints().collect();
        if !endpoints.is_empty() {
            missing.push(format!(
                "endpoints that were deleted are there: {endpoints:?}"
            ));
        }
        if !self.watchers_know_all() {
            missing.push("somebody who watches a module does not know its last change".to_owned());
        }
        format!("60 s after it was healed: {}", missing.join("; "))
    }

    fn live_actors(&self) -> String {
        let query = Query::ListActors {
            job: None,
            after: None,
            limit: 0,
        };
        let Ok(QueryResponse::Actors(actors)) =
            answer(&self.checker.reference().reader(), 0, query)
        else {
            return String::new();
        };
        let lines = actors.iter().filter(|actor| actor.state != "ended");
        let lines = lines.map(|actor| {
            format!(
                "{} of {} is {} as {} on {:?} with {} restarts, not before {:?}",
                actor.actor,
                actor.job,
                actor.state,
                actor.incarnation,
                actor.node,
                actor.restarts,
                actor.not_before_ms
            )
        });
        lines.collect::<Vec<_>>().join(", ")
    }

    /// Every node as the tables know it, and what its worker knows.
    fn nodes(&self) -> String {
        let tables = self.checker.reference().reader();
        let Ok(QueryResponse::Nodes(nodes)) = answer(&tables, 0, Query::ListNodes) else {
            return String::new();
        };
        let nodes = nodes.iter().map(|node| {
            format!(
                "{} ({}) {} as {} with {} mCPU free",
                node.node, node.name, node.state, node.incarnation, node.free.cpu_milli
            )
        });
        let workers = self.workers.iter().map(|worker| worker.to_string());
        nodes.chain(workers).collect::<Vec<_>>().join(", ")
    }

    /// Checks what must hold when nothing is left to do.
    pub(crate) fn check_end(&mut self) -> Result<(), Violation> {
        let tables = self.checker.reference().reader();
        self.checker.model.check_tables(&tables)?;
        let Ok(QueryResponse::Status(status)) = answer(&tables, 0, Query::Status) else {
            return Err(Violation::new("the tables answer", "no status"));
        };
        if status.leased != Resources::default() || status.actors_live != 0 {
            return Err(Violation::new(
                "after quiesce nothing is leased (I10)",
                format!("{:?} for {} actors", status.leased, status.actors_live),
            ));
        }
        Ok(())
    }
}
