//! What experiments may come to, written apart from their table, and judged in the order of the log.
//!
//! Worst first: an experiment is decided once · what was counted of it grows, from router to router, and one count more
//! begins with nothing where that is lost · nothing of a treatment runs when its clean-up is over, and the control is the endpoint's version all the while ·
//! a plan is written once · there is one experiment at a time, and none beside a rollout · an experiment goes with its
//! endpoint. And of each command about one: whether it had to be heard, and whether it did what it says.

use std::collections::BTreeMap;

use mobula_actors::serving::controller::replica_name;
use mobula_actors::serving::experiment::command::{Command, Proposed};
use mobula_actors::serving::experiment::findings::{Decision, Findings};
use mobula_actors::serving::experiment::plan::Ending;
use mobula_actors::serving::experiment::state::{history, newest};
use mobula_actors::serving::experiment::{Experiment, Plan};
use mobula_actors::serving::rollout::plan::Cleanup;
use mobula_actors::serving::rollout::state::newest as newest_rollout;
use mobula_actors::serving::state as serving;
use mobula_core::control::Reader;
use mobula_core::error::Rejection;
use mobula_core::id::{Incarnation, JobId};
use mobula_scheduler::{ActorTarget, Query, QueryResponse, Resolution, answer};

use super::domain_model::decode;
use super::violation::Violation;

const DECIDED: &str = "an experiment is decided once, and what is over stays";
const COUNTED: &str =
    "what an experiment counted grows from router to router, and what is lost is one count more";
const ARMS: &str =
    "nothing of a treatment runs after its end, and the control serves all the while";
const PLAN: &str = "the plan of an experiment is written once";
const ALONE: &str =
    "an experiment goes on by entries of its own, one at a time and beside no rollout";
const GONE: &str = "an experiment goes with its endpoint";
const HEARD: &str =
    "an experiment hears people and its endpoint's newest router, and nobody else (I4)";

/// What is known of an endpoint, as far as experiments go by it.
#[derive(Debug)]
pub(crate) struct Standing {
    /// The newest router that it heard of.
    pub(crate) router: Incarnation,
    pub(crate) is_deleting: bool,
    pub(crate) model: String,
    /// How many versions the model has.
    pub(crate) versions: u64,
    /// The version that it serves.
    pub(crate) active: u64,
    /// Whether a rollout is under way, or something of the last one runs still.
    pub(crate) is_rolling: bool,
}

/// An entry by which an experiment began or ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    Begun,
    Ended(Ending),
}

/// What the log so far has led to.
#[derive(Debug, Default)]
pub(crate) struct ExperimentModel {
    /// The experiments of each endpoint that there ever was, oldest first.
    endpoints: BTreeMap<String, Vec<Experiment>>,
    /// In the order of the log.
    turns: Vec<Turn>,
    /// Starts that were refused because a plan was followed already.
    pub(crate) plans_refused: u64,
}

fn broken(rule: &'static str, index: u64, detail: impl std::fmt::Display) -> Violation {
    Violation::new(rule, format!("entry {index}: {detail}"))
}

/// The endpoint that a command is about.
pub(crate) fn endpoint_of(command: &Command) -> &str {
    match command {
        Command::Start(proposed) => &proposed.endpoint,
        Command::Stop { endpoint }
        | Command::Count { endpoint, .. }
        | Command::Report { endpoint, .. }
        | Command::Conclude { endpoint, .. }
        | Command::CountAnew { endpoint, .. }
        | Command::Drained { endpoint, .. }
        | Command::Retired { endpoint, .. } => endpoint,
    }
}

impl ExperimentModel {
    /// The experiments of an endpoint, oldest first.
    pub(crate) fn of(&self, endpoint: &str) -> &[Experiment] {
        self.endpoints.get(endpoint).map_or(&[], Vec::as_slice)
    }

    /// What began and ended so far.
    pub(crate) fn turns(&self) -> &[Turn] {
        &self.turns
    }

    /// Compares what is after an entry with what was before, and its answer with what it must be. `standing` is that
    /// of the endpoint which a command about an experiment names.
    pub(crate) fn observe(
        &mut self,
        index: u64,
        command: &serving::Command,
        result: &Result<Vec<u8>, Rejection>,
        standing: Option<&Standing>,
        tables: &dyn Reader,
    ) -> Result<(), Violation> {
        let said = match command {
            serving::Command::Experiment(said) => Some(said),
            _ => None,
        };
        let is_heard = said.is_some_and(|said| self.hears(said, standing));
        let was_open = said.is_some_and(|said| {
            let last = self.of(endpoint_of(said)).last();
            last.is_some_and(Experiment::is_open)
        });
        let rows = serving::endpoints(tables);
        for endpoint in &rows {
            let name = &endpoint.name;
            let speaks = said.is_some_and(|said| result.is_ok() && endpoint_of(said) == name);
            let after = history(tables, name);
            let before = self.endpoints.entry(name.clone()).or_default();
            let turn = goes_on_as(before, &after, speaks);
            let turn = turn.and_then(|turn| {
                check_arms(before, &after, endpoint, tables)?;
                Ok(turn)
            });
            let turn = turn.map_err(|why| {
                broken(
                    why.rule(),
                    index,
                    format!("{name}: {why}; after {command:?}"),
                )
            })?;
            self.turns.extend(turn);
            *before = after;
        }
        let gone = |name: &String| !rows.iter().any(|row| row.name == *name);
        for (name, known) in self.endpoints.iter_mut().filter(|(name, _)| gone(name)) {
            known.clear();
            if newest(tables, name).is_some() || !history(tables, name).is_empty() {
                let detail = format!("{name} is gone, and an experiment of it is there");
                return Err(broken(GONE, index, detail));
            }
        }
        let Some(said) = said else { return Ok(()) };
        if result.is_ok() != is_heard {
            let detail = format!("{said:?} was answered {result:?}, and known is {standing:?}");
            return Err(broken(HEARD, index, detail));
        }
        let is_refused_plan = matches!(said, Command::Start(_)) && was_open && !is_heard;
        self.plans_refused += u64::from(is_refused_plan);
        let Ok(bytes) = result else { return Ok(()) };
        let given: Experiment = decode(index, bytes)?;
        let is_there = self.of(endpoint_of(said)).last() == Some(&given);
        if is_there && is_done(said, &given, index, standing) {
            return Ok(());
        }
        let detail = format!("{said:?} led to {given:?}");
        Err(broken(HEARD, index, detail))
    }

    /// Whether a command must be accepted.
    fn hears(&self, said: &Command, standing: Option<&Standing>) -> bool {
        let standing = standing.filter(|standing| !standing.is_deleting);
        let last = self.of(endpoint_of(said)).last();
        let at = |number: u64, revision: u64| {
            last.is_some_and(|last| (last.number, last.revision) == (number, revision))
        };
        let is_newest = |router: Incarnation| standing.is_some_and(|known| known.router == router);
        let open = |number: u64| last.filter(|last| last.number == number && last.is_open());
        let counted = |number: u64, router: Incarnation| {
            open(number).filter(|last| is_newest(router) && last.counting == Some(router))
        };
        match said {
            Command::Start(proposed) => standing.is_some_and(|standing| {
                let version = proposed.version.unwrap_or(standing.versions);
                let is_another =
                    (1..=standing.versions).contains(&version) && version != standing.active;
                let is_free = last.is_none_or(|last| last.cleanup == Cleanup::Done);
                is_another && is_free && !standing.is_rolling && proposed.model == standing.model
            }),
            Command::Stop { .. } => standing.is_some() && last.is_some_and(Experiment::is_open),
            Command::Count {
                experiment, router, ..
            } => is_newest(*router) && open(*experiment).is_some(),
            Command::CountAnew {
                experiment,
                count,
                router,
                ..
            } => counted(*experiment, *router).is_some_and(|last| last.counts == *count),
            Command::Report {
                experiment,
                router,
                findings,
                ..
            } => counted(*experiment, *router)
                .is_some_and(|last| keys(Some(findings)) >= keys(last.findings.as_ref())),
            Command::Conclude {
                experiment,
                router,
                ending,
                findings,
                ..
            } => {
                let is_found = match ending {
                    Ending::Decided => findings.decision != Decision::Undecided,
                    Ending::Stopped => false,
                    Ending::Exhausted | Ending::Guardrail | Ending::Unfit | Ending::Sentinel => {
                        true
                    }
                };
                is_found && counted(*experiment, *router).is_some()
            }
            Command::Drained {
                experiment,
                revision,
                router,
                ..
            } => is_newest(*router) && at(*experiment, *revision),
            // What is being taken down is cleaned up still.
            Command::Retired {
                experiment,
                revision,
                ..
            } => at(*experiment, *revision),
        }
    }
}

/// How many keys numbers are about: the simulated routers count nothing else.
fn keys(findings: Option<&Findings>) -> u64 {
    let ratios = findings.into_iter().flat_map(|findings| &findings.ratios);
    ratios.map(|ratio| ratio.control + ratio.treatment).sum()
}

/// Whether an accepted command did what it says.
fn is_done(said: &Command, given: &Experiment, index: u64, standing: Option<&Standing>) -> bool {
    match said {
        Command::Start(proposed) => {
            let active = standing.map(|standing| standing.active);
            given.revision == index
                && given.is_open()
                && (given.counts, given.counting, &given.findings) == (0, None, &None)
                && active == Some(given.plan.control.version)
                && is_as_proposed(&given.plan, proposed)
        }
        Command::Stop { .. } => (given.ending, given.revision) == (Some(Ending::Stopped), index),
        Command::Count { router, .. } => given.counting == Some(*router),
        Command::CountAnew { count, .. } => given.counts == count + 1,
        Command::Report {
            findings, stored, ..
        } => (given.findings.as_ref(), given.stored) == (Some(findings), Some(*stored)),
        Command::Conclude {
            ending, findings, ..
        } => {
            (given.ending, given.revision) == (Some(*ending), index)
                && given.findings.as_ref() == Some(findings)
        }
        Command::Drained { .. } => given.cleanup != Cleanup::Draining,
        Command::Retired { .. } => given.cleanup != Cleanup::Ending,
    }
}

fn is_as_proposed(plan: &Plan, proposed: &Proposed) -> bool {
    let version = proposed.version.unwrap_or(plan.treatment.version);
    let seed = proposed.seed.as_ref().unwrap_or(&plan.seed);
    (&plan.endpoint, &plan.model) == (&proposed.endpoint, &proposed.model)
        && (plan.treatment.version, &plan.seed) == (version, seed)
        && plan.control_share_bp == proposed.control_share_bp
        && plan.treatment_share_bp == proposed.treatment_share_bp
        && (&plan.primary, plan.effect_min) == (&proposed.primary, proposed.effect_min)
        && plan.guardrails == proposed.guardrails
        && (plan.alpha_bp, plan.samples_max) == (proposed.alpha_bp, proposed.samples_max)
}

/// What is wrong with a change.
#[derive(Debug, thiserror::Error)]
enum Wrong {
    #[error("experiment {0} was over, and its end is another one now")]
    DecidedAgain(u64),
    #[error(
        "experiment {number} had {before} counts and has {after}, the last one by {counting:?}"
    )]
    Counts {
        number: u64,
        before: u32,
        after: u32,
        counting: Option<Incarnation>,
    },
    #[error("experiment {0} has counted fewer keys than before, or does not know where they are")]
    Fewer(u64),
    #[error("the clean-up of experiment {0} went from {1:?} to {2:?}")]
    Skipped(u64, Cleanup, Cleanup),
    #[error("{1} lives, and of experiment {0} nothing should run any more")]
    ArmRuns(u64, String),
    #[error("experiment {0} compares with version {1}, and the endpoint serves {2}")]
    NotControl(u64, u64, u64),
    #[error("experiment {0} follows another plan than before")]
    Plan(u64),
    #[error("rollout {1} is under way beside experiment {0}")]
    Beside(u64, u64),
    #[error("an experiment changed by an entry that says nothing of it")]
    Unasked,
    #[error("an older experiment changed or the newest one went, or one began where it could not")]
    Several,
}

impl Wrong {
    fn rule(&self) -> &'static str {
        match self {
            Wrong::DecidedAgain(_) => DECIDED,
            Wrong::Counts { .. } | Wrong::Fewer(_) => COUNTED,
            Wrong::Skipped(..) | Wrong::ArmRuns(..) | Wrong::NotControl(..) => ARMS,
            Wrong::Plan(_) => PLAN,
            Wrong::Beside(..) | Wrong::Unasked | Wrong::Several => ALONE,
        }
    }
}

/// Whether `after` may follow `before` by one entry, which `speaks` of one of these experiments or does not; what
/// began or ended by it.
fn goes_on_as(
    before: &[Experiment],
    after: &[Experiment],
    speaks: bool,
) -> Result<Option<Turn>, Wrong> {
    for row in after {
        let known = before.iter().find(|known| known.number == row.number);
        if let Some(known) = known {
            check_step(known, row)?;
        }
    }
    if before == after {
        return Ok(None);
    }
    if !speaks {
        return Err(Wrong::Unasked);
    }
    let Some((newest, older)) = after.split_last() else {
        return Err(Wrong::Several);
    };
    // The oldest ones are forgotten when there are many.
    if !older.iter().all(|row| before.contains(row)) {
        return Err(Wrong::Several);
    }
    let last = before.last();
    if last.is_some_and(|last| last.number == newest.number) {
        let is_end = last.is_some_and(Experiment::is_open);
        return Ok(newest.ending.filter(|_| is_end).map(Turn::Ended));
    }
    let is_next = last.map_or(1, |last| last.number + 1) == newest.number;
    let is_free = last.is_none_or(|last| last.cleanup == Cleanup::Done);
    if is_next && is_free && older.last() == last && newest.is_open() {
        return Ok(Some(Turn::Begun));
    }
    Err(Wrong::Several)
}

/// Whether an experiment may become `row` by one entry.
fn check_step(known: &Experiment, row: &Experiment) -> Result<(), Wrong> {
    let number = row.number;
    let end = |of: &Experiment| (of.ending, of.ended_ms, of.revision);
    if !known.is_open() && (end(known), &known.findings) != (end(row), &row.findings) {
        return Err(Wrong::DecidedAgain(number));
    }
    let is_new_count = row.counts == known.counts + 1;
    // One of the router that counts first, or of one that counted already when it lost what was stored.
    let may_begin = (known.counts == 0) != (known.counting == row.counting);
    let is_empty = row.findings.is_none() && row.stored.is_none();
    let is_counted = (row.counts == 0) == row.counting.is_none();
    let is_same = row.counts == known.counts;
    if !is_counted || !(is_same || (is_new_count && may_begin && is_empty)) {
        return Err(Wrong::Counts {
            number,
            before: known.counts,
            after: row.counts,
            counting: row.counting,
        });
    }
    // The last numbers may be a reason alone.
    let goes_on = row.is_open() && is_same;
    let is_kept = keys(row.findings.as_ref()) >= keys(known.findings.as_ref())
        && (row.stored.is_some() || known.stored.is_none());
    if goes_on && !is_kept {
        return Err(Wrong::Fewer(number));
    }
    let is_step = match (known.cleanup, row.cleanup) {
        (Cleanup::Waiting, Cleanup::Waiting) => row.is_open(),
        (Cleanup::Waiting, Cleanup::Draining) => !row.is_open(),
        (Cleanup::Draining, Cleanup::Ending) | (Cleanup::Ending, Cleanup::Done) => true,
        (before, after) => before == after,
    };
    if !is_step {
        return Err(Wrong::Skipped(number, known.cleanup, row.cleanup));
    }
    if (&known.plan, known.started_ms) != (&row.plan, row.started_ms) {
        return Err(Wrong::Plan(number));
    }
    Ok(())
}

/// Whether the endpoint serves the control as long as something of the newest experiment runs, and nothing of it runs
/// when it should not any more.
fn check_arms(
    before: &[Experiment],
    after: &[Experiment],
    endpoint: &serving::Endpoint,
    tables: &dyn Reader,
) -> Result<(), Wrong> {
    let Some(newest) = after.last() else {
        return Ok(());
    };
    let (control, treatment) = (newest.plan.control.version, newest.plan.treatment.version);
    if newest.cleanup != Cleanup::Done {
        if endpoint.version != control {
            return Err(Wrong::NotControl(newest.number, control, endpoint.version));
        }
        let rollout = newest_rollout(tables, &endpoint.name);
        return match rollout.filter(|rollout| rollout.phase.is_open()) {
            Some(open) => Err(Wrong::Beside(newest.number, open.number)),
            None => Ok(()),
        };
    }
    // Later on a rollout may start the same version.
    let is_known =
        |last: &Experiment| (last.number, last.cleanup) == (newest.number, Cleanup::Done);
    if before.last().is_some_and(is_known) {
        return Ok(());
    }
    let mut replicas =
        (1..=endpoint.replicas).map(|number| replica_name(&endpoint.name, treatment, number));
    match replicas.find(|name| lives(tables, name)) {
        Some(name) => Err(Wrong::ArmRuns(newest.number, name)),
        None => Ok(()),
    }
}

/// Whether an actor of the platform with this name runs, or will.
fn lives(tables: &dyn Reader, name: &str) -> bool {
    let query = Query::ResolveActor {
        job: JobId::SYSTEM,
        target: ActorTarget::Name(name.to_owned()),
    };
    matches!(
        answer(tables, 0, query),
        Ok(QueryResponse::Resolved(
            Resolution::Address(_) | Resolution::NotRunning { .. }
        ))
    )
}

#[cfg(test)]
#[path = "experiment_model_tests.rs"]
mod tests;
