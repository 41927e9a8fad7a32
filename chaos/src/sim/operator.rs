//! Whoever runs the heads: brings up as many as there should be, replaces those whose disk is lost,
//! and in some runs exchanges healthy ones. It talks to the leader directly; what it asks for goes
//! the whole way through the log.

use mobula_core::id::SessionId;
use mobula_head::raft::Member;
use mobula_head::simulation::{Change, CoreFault, allocate_id, id_in};
use mobula_storage::raft_log::LogView;
use rand::Rng;

use super::asked::{Asked, For, Polled, Waiting};
use super::head::{HeadInput, leader_of};
use super::options::{MILLISECOND, Micros, SECOND};
use super::violation::Violation;
use super::world::{Event, Phase, World};

const TICK: Micros = 60 * MILLISECOND;

/// How long one task may go without an answer before it is begun again.
const TASK_MAX: Micros = 3 * SECOND;

/// What the operator asks a leader.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum OperatorTask {
    Allocate,
    Add(u64),
    Promote(u64),
    Remove(u64),
    Transfer(Option<u64>),
    /// A change that changes nothing, to be pending when the next one comes.
    Distract,
}

#[derive(Debug)]
pub(crate) struct Operator {
    wanted: usize,
    voters: usize,
    task: Option<(OperatorTask, Micros)>,
    /// A head that has its id and is not a voter yet.
    joining: Option<u64>,
    /// A head that must go: its disk is lost, or its turn has come.
    pub(crate) leaving: Option<u64>,
    /// The one that was removed last, to be added again by mistake.
    removed: Option<u64>,
}

impl Operator {
    pub(crate) fn new(wanted: usize) -> Self {
        Operator {
            wanted,
            voters: 0,
            task: None,
            joining: None,
            leaving: None,
            removed: None,
        }
    }

    /// Whether there are as many voters as there should be.
    pub(crate) fn is_content(&self) -> bool {
        self.voters == self.wanted && self.joining.is_none() && self.leaving.is_none()
    }
}

fn member(raft_id: u64) -> Member {
    Member {
        raft_id,
        name: format!("head-{raft_id}"),
        api_address: format!("127.0.0.1:{raft_id}"),
        cluster_address: format!("127.0.0.1:{raft_id}"),
    }
}

impl World {
    pub(crate) fn operator_ticks(&mut self) -> Result<(), Violation> {
        self.after(TICK, Event::OperatorTick);
        let now = self.now;
        let voters = self.checker.reference().members().voters.clone();
        self.operator.voters = voters.len();
        if let Some((_, since)) = &self.operator.task {
            if now - since < TASK_MAX {
                return Ok(());
            }
            self.operator.task = None;
        }
        if let Some(gone) = self.operator.leaving
            && !voters.contains(&gone)
        {
            self.retire(gone);
        }
        let Some(leader) = leader_of(&self.heads) else {
            return Ok(());
        };
        let Some(task) = self.next_task(leader, &voters) else {
            return Ok(());
        };
        self.operator.task = Some((task.clone(), now));
        self.say(|| format!("the operator asks head {leader}: {task:?}"));
        if self.phase == Phase::Safety && self.rng.random_bool(0.3) {
            self.give_head(leader, HeadInput::Operator(OperatorTask::Distract, now));
        }
        self.give_head(leader, HeadInput::Operator(task, now));
        Ok(())
    }

    /// A removed head's process ends for good.
    fn retire(&mut self, raft_id: u64) {
        self.operator.leaving = None;
        self.operator.removed = Some(raft_id);
        self.checker.removed(raft_id);
        self.crash_head(raft_id, "it was removed");
        if let Some(head) = self.heads.get_mut(&raft_id) {
            head.is_retired = true;
        }
    }

    fn next_task(&mut self, leader: u64, voters: &[u64]) -> Option<OperatorTask> {
        if let Some(leaving) = self.operator.leaving {
            return Some(if leaving == leader {
                OperatorTask::Transfer(None)
            } else {
                OperatorTask::Remove(leaving)
            });
        }
        if let Some(joining) = self.operator.joining {
            let learners = &self.checker.reference().members().learners;
            // One that votes already is promoted again until that is answered: only then it is known to
            // enough heads that the group may do without any one of them.
            return Some(
                if learners.contains(&joining) || voters.contains(&joining) {
                    OperatorTask::Promote(joining)
                } else {
                    OperatorTask::Add(joining)
                },
            );
        }
        if voters.len() < self.operator.wanted {
            return Some(OperatorTask::Allocate);
        }
        if self.phase != Phase::Safety {
            return None;
        }
        if let Some(removed) = self.operator.removed.take()
            && self.rng.random_bool(0.5)
        {
            return Some(OperatorTask::Add(removed));
        }
        if self.swarm.churn && self.rng.random_bool(0.04) {
            let leaving = voters[self.rng.random_range(0..voters.len())];
            self.operator.leaving = Some(leaving);
            return None;
        }
        if self.swarm.transfers && self.rng.random_bool(0.1) {
            return Some(OperatorTask::Transfer(None));
        }
        None
    }

    pub(crate) fn ask_for_operator(
        &mut self,
        raft_id: u64,
        task: OperatorTask,
        since: Micros,
    ) -> Result<(), CoreFault> {
        let (now, deadline) = (self.instant(), self.now + TASK_MAX);
        let change = match &task {
            OperatorTask::Allocate => {
                let (module, payload) = allocate_id();
                let session = SessionId::INTERNAL;
                let whose = For::Operator(task, since);
                return self.propose(raft_id, whose, session, 0, module, payload);
            }
            OperatorTask::Transfer(_) => None,
            OperatorTask::Distract => Some(Change::Promote(raft_id)),
            OperatorTask::Add(id) => Some(Change::AddLearner(member(*id))),
            OperatorTask::Promote(id) => Some(Change::Promote(*id)),
            OperatorTask::Remove(id) => Some(Change::Remove(*id)),
        };
        let Some(head) = self.heads.get_mut(&raft_id) else {
            return Ok(());
        };
        let Some(core) = head.core.as_mut() else {
            return Ok(());
        };
        let whose = match &task {
            OperatorTask::Distract => For::Nobody,
            _ => For::Operator(task.clone(), since),
        };
        let waiting = match (change, task) {
            (Some(change), _) => Waiting::Change(core.change(change, now)?),
            (None, OperatorTask::Transfer(to)) => Waiting::Transfer(core.transfer(to, now)?),
            (None, _) => return Ok(()),
        };
        head.asked.push(Asked {
            waiting,
            whose,
            deadline,
        });
        Ok(())
    }

    /// The leader has answered. What it calls done must be done.
    pub(crate) fn operator_hears(
        &mut self,
        raft_id: u64,
        asked: (OperatorTask, Micros),
        outcome: Polled,
    ) -> Result<(), Violation> {
        if self.operator.task.as_ref() != Some(&asked) {
            return Ok(());
        }
        let (task, _) = asked;
        let fits = matches!(
            (&task, &outcome),
            (OperatorTask::Allocate, Polled::Proposal(_))
                | (OperatorTask::Transfer(_), Polled::Transfer)
                | (
                    OperatorTask::Add(_) | OperatorTask::Promote(_) | OperatorTask::Remove(_),
                    Polled::Change(_)
                )
        );
        if !fits {
            return Ok(());
        }
        self.operator.task = None;
        match (task, outcome) {
            (OperatorTask::Allocate, Polled::Proposal(Ok(outcome))) => {
                let id = outcome.result.ok().and_then(|bytes| id_in(&bytes));
                if let Some(id) = id {
                    self.add_head(id, false);
                    self.operator.joining = Some(id);
                    self.after(0, Event::HeadStart(id));
                }
                Ok(())
            }
            (task, Polled::Change(Ok(()))) => {
                if let OperatorTask::Promote(id) = task
                    && self.operator.joining == Some(id)
                {
                    self.operator.joining = None;
                }
                self.check_change(raft_id, &task)
            }
            (OperatorTask::Transfer(_), _) => {
                self.counts.transfers += 1;
                Ok(())
            }
            (task, Polled::Change(Err(error))) => {
                self.say(|| format!("head {raft_id} refuses {task:?}: {error}"));
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn check_change(&self, raft_id: u64, task: &OperatorTask) -> Result<(), Violation> {
        let members = self.checker.reference().members();
        let votes = |id: &u64| members.voters.contains(id);
        let learns = |id: &u64| members.learners.contains(id);
        let is_done = match task {
            OperatorTask::Add(id) => votes(id) || learns(id),
            OperatorTask::Promote(id) => votes(id),
            OperatorTask::Remove(id) => !votes(id) && !learns(id),
            OperatorTask::Allocate | OperatorTask::Transfer(_) | OperatorTask::Distract => true,
        };
        if let OperatorTask::Promote(id) = task
            && let Some(head) = self.heads.get(id)
            && LogView::new(head.engine.durable())
                .applied()
                .is_ok_and(|applied| applied.index == 0)
        {
            return Err(Violation::new(
                "who begins to vote holds what the group has (I2)",
                format!("head {raft_id} has made head {id} a voter, which has applied nothing"),
            ));
        }
        if is_done {
            return Ok(());
        }
        Err(Violation::new(
            "a change of the group that is answered is made",
            format!("head {raft_id} calls {task:?} done, and the members are {members:?}"),
        ))
    }
}
