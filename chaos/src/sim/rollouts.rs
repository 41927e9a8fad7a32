//! Rollouts in a simulated cluster: what people and routers say of them, the leader that ends as they are decided, and
//! what the log may have made of all that.
//!
//! Above all, after each entry of the log an endpoint has one active version, which exists; and it has another one than
//! before only by an entry that a rollout has recorded as its promotion, or as the way back.

use std::collections::BTreeMap;

use mobula_actors::serving::rollout::command::{Command, Verdict};
use mobula_actors::serving::rollout::plan::Action;
use mobula_actors::serving::rollout::state::history;
use mobula_actors::serving::rollout::trial::Evidence;
use mobula_actors::serving::rollout::{Guardrails, Phase, Rollout, Strategy};
use mobula_actors::serving::state as serving;
use mobula_core::control::Reader;
use mobula_core::id::Incarnation;
use rand::Rng;

use super::coverage::Counts;
use super::head::leader_of;
use super::violation::Violation;
use super::world::{Phase as RunPhase, World};

const ACTIVE: &str = "an endpoint has one active version, and another one by a rollout alone";
const HISTORY: &str = "a rollout goes on by entries of its own, and what is over stays";

/// How often the leader ends at the very moment at which a decision about a rollout or an experiment is committed.
const KILLED_AT_DECISION: f64 = 0.7;

/// What was last seen of an endpoint.
#[derive(Debug)]
struct Seen {
    model: String,
    active: u64,
    rollouts: Vec<Rollout>,
}

/// What the log so far has led to.
#[derive(Debug, Default)]
pub(crate) struct RolloutModel {
    endpoints: BTreeMap<String, Seen>,
    /// Decisions of all rollouts, in the order of the log.
    decided: Vec<Action>,
}

fn broken(rule: &'static str, index: u64, detail: String) -> Violation {
    Violation::new(rule, format!("entry {index}: {detail}"))
}

impl RolloutModel {
    /// How many decisions there were.
    pub(crate) fn decided(&self) -> usize {
        self.decided.len()
    }

    /// The model that an endpoint serves, and its active version.
    pub(crate) fn serves(&self, endpoint: &str) -> Option<(&str, u64)> {
        let seen = self.endpoints.get(endpoint)?;
        Some((&seen.model, seen.active))
    }

    /// The rollouts of an endpoint, oldest first.
    pub(crate) fn of(&self, endpoint: &str) -> &[Rollout] {
        self.endpoints
            .get(endpoint)
            .map_or(&[], |seen| seen.rollouts.as_slice())
    }

    /// Compares what is after an entry with what was before. `versions` says how many a model has.
    pub(crate) fn observe(
        &mut self,
        index: u64,
        command: &serving::Command,
        is_done: bool,
        tables: &dyn Reader,
        versions: impl Fn(&str) -> u64,
    ) -> Result<(), Violation> {
        let rows = serving::endpoints(tables);
        self.endpoints
            .retain(|name, _| rows.iter().any(|row| row.name == *name));
        let mut found = BTreeMap::new();
        for row in rows {
            if !(1..=versions(&row.model)).contains(&row.version) {
                let detail = format!("{} serves a version that nobody registered", row.name);
                return Err(broken(ACTIVE, index, detail));
            }
            let seen = Seen {
                model: row.model,
                active: row.version,
                rollouts: history(tables, &row.name),
            };
            let before = self.endpoints.remove(&row.name);
            if let Some(before) = before {
                let speaks = is_done && matches!(command, serving::Command::Rollout(_));
                let action = before.goes_on_as(&seen, index, speaks).map_err(|why| {
                    let detail = format!("{}: {why}; after {command:?}", row.name);
                    broken(why.rule(), index, detail)
                })?;
                self.decided.extend(action);
            }
            if found.insert(row.name.clone(), seen).is_some() {
                let detail = format!("{} is there twice", row.name);
                return Err(broken(ACTIVE, index, detail));
            }
        }
        self.endpoints = found;
        Ok(())
    }
}

/// What is wrong with a change.
#[derive(Debug, thiserror::Error)]
enum Wrong {
    #[error("version {0} became {1}, which no rollout says")]
    Active(u64, u64),
    #[error("a rollout changed by an entry that says nothing of it")]
    Unasked,
    #[error("a rollout that is over changed, or two are open")]
    Older,
    #[error("a rollout took more than one step, or one without a decision")]
    Decisions,
}

impl Wrong {
    fn rule(&self) -> &'static str {
        match self {
            Wrong::Active(..) => ACTIVE,
            Wrong::Unasked | Wrong::Older | Wrong::Decisions => HISTORY,
        }
    }
}

impl Seen {
    /// Whether `after` may follow; what was decided by it.
    fn goes_on_as(&self, after: &Seen, index: u64, speaks: bool) -> Result<Option<Action>, Wrong> {
        if after.rollouts == self.rollouts {
            return match after.active == self.active {
                true => Ok(None),
                false => Err(Wrong::Active(self.active, after.active)),
            };
        }
        if !speaks {
            return Err(Wrong::Unasked);
        }
        let Some((newest, older)) = after.rollouts.split_last() else {
            return Err(Wrong::Older);
        };
        // The oldest ones are forgotten when there are many.
        let is_kept = older.iter().all(|row| self.rollouts.contains(row));
        if !is_kept || older.iter().any(|row| row.phase.is_open()) {
            return Err(Wrong::Older);
        }
        let known = |row: &&Rollout| row.number == newest.number;
        let before = self.rollouts.iter().find(known);
        let decided = before.map_or(0, |row| row.decisions.len());
        let action = match newest.decisions.len().checked_sub(decided) {
            // Its clean-up went on.
            Some(0) => None,
            Some(1) => newest.decisions.last().map(|last| last.action),
            _ => return Err(Wrong::Decisions),
        };
        if action.is_some() && newest.revision != index {
            return Err(Wrong::Decisions);
        }
        let expected = match action {
            Some(Action::Promote) => newest.candidate.version,
            Some(Action::RollBack) => newest.stable.version,
            _ => self.active,
        };
        let says_so = match newest.phase {
            Phase::Promoted => newest.candidate.version == after.active,
            _ => newest.stable.version == after.active,
        };
        if after.active != expected || !says_so {
            return Err(Wrong::Active(self.active, after.active));
        }
        Ok(action)
    }
}

impl World {
    /// Something that a client may want of the rollouts of an endpoint that it has seen; nothing where there is none.
    pub(crate) fn rollout_change(&mut self) -> Option<Command> {
        let domain = &self.checker.model.domain;
        let known = &domain.rollouts.endpoints;
        let pick = self.rng.random_range(0..known.len().max(1));
        let (endpoint, seen) = known.iter().nth(pick)?;
        let (endpoint, model) = (endpoint.clone(), seen.model.clone());
        let versions = domain.versions(&model);
        let phase = seen.rollouts.last().map(|newest| newest.phase);
        // Now and then one that does not exist.
        let version = self.rng.random_range(1..=versions + 1);
        let begin = Command::Start {
            endpoint: endpoint.clone(),
            model,
            version: self.rng.random_bool(0.8).then_some(version),
            strategy: Strategy::Canary,
            steps: vec![1, 2, 5, 10, 20, 50, 100],
            guardrails: Guardrails::STANDARD,
            min_samples: 10,
        };
        let what = self.rng.random_range(0..10);
        Some(match (phase, what) {
            (Some(Phase::Paused), 0..6) => Command::Resume { endpoint },
            (Some(Phase::Running), 0..4) => Command::Pause { endpoint },
            (Some(Phase::Running | Phase::Paused), 6) => Command::Promote { endpoint },
            (Some(Phase::Running | Phase::Paused), 7 | 9) => Command::Abort { endpoint },
            (Some(Phase::Promoted), 0..3) | (_, 8) => Command::RollBack { endpoint },
            _ => begin,
        })
    }

    /// What a router says of its endpoint's rollout, if there is one: it may have heard of it late.
    pub(crate) fn router_says(&mut self, endpoint: &str, router: Incarnation) -> Option<Command> {
        let rollout = self.checker.model.domain.rollouts.of(endpoint).last()?;
        let (number, step, revision) = (rollout.number, rollout.step, rollout.revision);
        let (endpoint, rollout) = (endpoint.to_owned(), number);
        let step = step.saturating_sub(u32::from(self.rng.random_bool(0.1)));
        let evidence = Evidence::default();
        Some(match self.rng.random_range(0..8) {
            0 => Command::Judge {
                endpoint,
                rollout,
                step,
                router,
                verdict: Verdict::RollBack,
                evidence,
            },
            1..6 => Command::Judge {
                endpoint,
                rollout,
                step,
                router,
                verdict: Verdict::Pass,
                evidence,
            },
            6 => Command::Drained {
                endpoint,
                rollout,
                revision,
                router,
            },
            _ => Command::Report {
                endpoint,
                rollout,
                step,
                router,
                evidence,
            },
        })
    }

    /// Ends the leader now and then when a rollout was decided by what just happened; `known` decisions were there
    /// before. Its followers may not know yet that the entry is committed, and nobody has been answered.
    pub(crate) fn endanger_decisions(&mut self, known: usize) {
        let decided = &self.checker.model.domain.rollouts.decided;
        let Some(action) = decided.get(known..).and_then(|new| new.last().copied()) else {
            return;
        };
        self.counts.rollouts_decided += (decided.len() - known) as u64;
        if self.endanger_leader("it is killed as a rollout is decided") {
            *self.counts.killed_at(action) += 1;
        }
    }

    /// Ends the leader now and then, at this very moment; whether it did.
    pub(crate) fn endanger_leader(&mut self, why: &str) -> bool {
        if self.phase != RunPhase::Safety
            || !self.swarm.crashes
            || !self.rng.random_bool(KILLED_AT_DECISION)
        {
            return false;
        }
        let leader = leader_of(&self.heads);
        if let Some(leader) = leader {
            self.crash_and_restart(leader, why);
        }
        leader.is_some()
    }
}

impl Counts {
    fn killed_at(&mut self, action: Action) -> &mut u64 {
        match action {
            Action::Start => &mut self.killed_at_start,
            Action::Pass => &mut self.killed_at_pass,
            Action::Pause => &mut self.killed_at_pause,
            Action::Resume => &mut self.killed_at_resume,
            Action::Promote => &mut self.killed_at_promotion,
            Action::Abort => &mut self.killed_at_abort,
            Action::RollBack => &mut self.killed_at_rollback,
        }
    }
}
