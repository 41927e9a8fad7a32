//! A sequential model of the control plane, written apart from it: what each command may answer,
//! given everything before it in the log.
//!
//! It knows less than the tables do, and rests on none of their code: who has a session, which
//! incarnation of a node or an actor is the living one, which job has which key, what was decided
//! for good. That is what I3 to I6 and I10 speak of.

mod kept;
mod placed;

use std::collections::{BTreeMap, BTreeSet};

use mobula_core::codec;
use mobula_core::control::{Command as LogCommand, ModuleId, Reader};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::id::{ActorId, Incarnation, JobId, NodeId, SessionId};
use mobula_core::kept::KeptValue;
use mobula_core::resource::Resources;
use mobula_scheduler::limits::{
    SESSION_ANSWERS_BYTES_MAX, SESSION_IDLE_MS, SESSION_TOUCH_MS, SESSION_WINDOW,
};
use mobula_scheduler::{Command, Query, QueryResponse, Response, answer};

use super::domain_model::DomainModel;
use super::violation::Violation;

/// How many commands lie between two looks at all tables.
const INVARIANTS_EVERY: u64 = 64;

type Answer = Result<Vec<u8>, Rejection>;

#[derive(Debug, Default)]
struct Session {
    answers: BTreeMap<u64, Answer>,
    highest: u64,
    /// Below this number nothing is remembered.
    kept_from: u64,
    /// What is remembered has so many bytes.
    kept_bytes: u64,
    used_ms: u64,
}

impl Session {
    /// Takes in an answer. What then is too much, in number or in bytes, is forgotten, the oldest first; the newest
    /// stays.
    fn remember(&mut self, seq: u64, answer: Answer) {
        self.kept_bytes += size_bytes(&answer);
        self.answers.insert(seq, answer);
        self.highest = self.highest.max(seq);
        let full_from = (self.highest + 1).saturating_sub(SESSION_WINDOW);
        while self.kept_from < full_from
            || (self.kept_bytes > SESSION_ANSWERS_BYTES_MAX && self.kept_from < self.highest)
        {
            let oldest = self.answers.remove(&self.kept_from);
            self.kept_bytes -= oldest.map_or(0, |answer| size_bytes(&answer));
            self.kept_from += 1;
        }
    }
}

/// As the tables hold it.
fn size_bytes(answer: &Answer) -> u64 {
    codec::encode_plain(answer).len() as u64
}

#[derive(Debug)]
struct Node {
    boot: String,
    incarnation: Incarnation,
    is_lost: bool,
    capacity: Resources,
}

#[derive(Debug, Default)]
struct Actor {
    incarnation: Incarnation,
    /// Where it may run now.
    on: Option<NodeId>,
    resources: Resources,
}

/// What the log so far has led to.
#[derive(Debug, Default)]
pub(crate) struct Model {
    log_time_ms: u64,
    sessions: BTreeMap<SessionId, Session>,
    closed: BTreeSet<SessionId>,
    nodes: BTreeMap<NodeId, Node>,
    names: BTreeMap<String, NodeId>,
    actors: BTreeMap<ActorId, Actor>,
    keys: BTreeMap<String, (JobId, ActorId)>,
    newest_job: u64,
    newest_submit_ms: u64,
    outcomes: BTreeMap<JobId, (String, Option<String>)>,
    /// Actors that somebody asked to be ended for good.
    ended: BTreeSet<ActorId>,
    /// What jobs keep, by name.
    kept: BTreeMap<JobId, BTreeMap<String, KeptValue>>,
    /// What the domain modules hold.
    pub(crate) domain: DomainModel,
    /// Commands that were answered from their session's memory.
    pub(crate) repeats: u64,
    /// Nodes that were declared lost.
    pub(crate) nodes_lost: u64,
    /// Events of nodes that came too late to count.
    pub(crate) fenced: u64,
    /// Answers to creations of actors that outlive their job.
    pub(crate) detached: u64,
    /// Values that jobs began to keep.
    pub(crate) kept_count: u64,
    /// Those of them that were dropped.
    pub(crate) dropped_count: u64,
}

fn broken<T>(rule: &'static str, index: u64, detail: String) -> Result<T, Violation> {
    Err(Violation::new(rule, format!("entry {index}: {detail}")))
}

const FENCED: &str = "no effect of a stale incarnation is accepted (I4)";
const ONCE: &str = "each (session, seq) takes effect once (I3)";

impl Model {
    /// Takes in one command and its answer. `tables` are those after it.
    pub(crate) fn observe(
        &mut self,
        index: u64,
        command: &LogCommand,
        result: &Answer,
        tables: &dyn Reader,
    ) -> Result<(), Violation> {
        self.log_time_ms = self.log_time_ms.max(command.now_ms);
        if command.session != SessionId::INTERNAL && !self.admit(index, command, result)? {
            return Ok(());
        }
        if command.module == ModuleId::KEPT {
            self.keeps(index, &command.payload, result, tables)?;
        } else if command.module != ModuleId::SCHEDULER {
            let (module, payload) = (command.module, &command.payload);
            self.domain
                .observe(index, module, payload, result, tables)?;
        } else if let (Ok(inner), Ok(bytes)) = (Command::decode(&command.payload), result) {
            let response = Response::decode(bytes).map_err(|error| {
                Violation::new("answers can be read", format!("entry {index}: {error}"))
            })?;
            self.accept(index, &inner, &response, tables)?;
        }
        if index.is_multiple_of(INVARIANTS_EVERY) {
            self.check_tables(tables)?;
        }
        Ok(())
    }

    /// Whether the command is a new one of its session. Otherwise its answer must be the old one.
    fn admit(
        &mut self,
        index: u64,
        command: &LogCommand,
        result: &Answer,
    ) -> Result<bool, Violation> {
        let is_expired_answer =
            matches!(result, Err(rejection) if rejection.code == ErrorCode::SessionExpired);
        let now_ms = self.log_time_ms;
        let expect_expired = |why: &str| {
            if is_expired_answer {
                return Ok(false);
            }
            broken(
                ONCE,
                index,
                format!(
                    "command {} of {}, {why}, was answered {result:?}",
                    command.seq, command.session
                ),
            )
        };
        let Some(session) = self.sessions.get_mut(&command.session) else {
            let why = if self.closed.contains(&command.session) {
                "which was closed"
            } else {
                "which was never opened"
            };
            return expect_expired(why);
        };
        if now_ms.saturating_sub(session.used_ms) > SESSION_IDLE_MS {
            return expect_expired("which is idle for too long");
        }
        if command.seq < session.kept_from {
            return expect_expired("which has moved on");
        }
        if let Some(known) = session.answers.get(&command.seq) {
            if known == result {
                self.repeats += 1;
                return Ok(false);
            }
            return broken(
                ONCE,
                index,
                format!(
                    "command {} of {} was answered {known:?} before and {result:?} now",
                    command.seq, command.session
                ),
            );
        }
        if is_expired_answer {
            let (seq, session) = (command.seq, command.session);
            return broken(
                ONCE,
                index,
                format!("command {seq} of {session} is new, and was called too old"),
            );
        }
        session.remember(command.seq, result.clone());
        if now_ms.saturating_sub(session.used_ms) >= SESSION_TOUCH_MS {
            session.used_ms = now_ms;
        }
        Ok(true)
    }

    /// A command was applied, and answered with `response`.
    fn accept(
        &mut self,
        index: u64,
        command: &Command,
        response: &Response,
        tables: &dyn Reader,
    ) -> Result<(), Violation> {
        match (command, response) {
            (Command::OpenSession { .. }, Response::SessionOpened { session }) => {
                let opened = Session {
                    used_ms: self.log_time_ms,
                    ..Session::default()
                };
                // Idle ones are swept, and their ids never come back.
                if self.sessions.insert(*session, opened).is_some() || self.closed.contains(session)
                {
                    return broken(ONCE, index, format!("{session} was given out twice"));
                }
            }
            (Command::CloseSession { session, .. }, _) => {
                self.sessions.remove(session);
                self.closed.insert(*session);
            }
            (
                Command::RegisterNode {
                    name,
                    boot_id,
                    capacity,
                    ..
                },
                Response::Registered { node, incarnation },
            ) => self.registered(index, name, boot_id, capacity, *node, *incarnation)?,
            (Command::NodeLost { node, incarnation }, Response::Event(outcome)) => {
                self.lost(index, *node, *incarnation, outcome)?;
            }
            (
                Command::NodeEvent {
                    node,
                    incarnation,
                    event,
                },
                Response::Event(outcome),
            ) => self.event(index, *node, *incarnation, event, outcome)?,
            (
                Command::SubmitJob { spec },
                Response::JobSubmitted {
                    job,
                    driver,
                    created,
                },
            ) => {
                self.submitted(
                    index,
                    spec.idempotency_key.as_deref(),
                    *job,
                    *driver,
                    *created,
                )?;
                self.actors.entry(*driver).or_default().resources = spec.resources.clone();
                self.check_submit_time(index, *job, *created, tables)?;
            }
            (Command::CreateActors { actors: specs, .. }, Response::ActorsCreated { actors }) => {
                for (actor, spec) in actors.iter().zip(specs) {
                    self.detached += u64::from(spec.detached);
                    let known = self.actors.entry(*actor).or_default();
                    if known.on.is_none() {
                        known.resources = spec.resources.clone();
                    }
                }
            }
            (Command::Assign { assignments }, Response::Assigned { assigned, .. }) => {
                for granted in assigned {
                    let assignment = assignments.iter().find(|a| a.actor == granted.actor);
                    let Some(assignment) = assignment else {
                        let actor = granted.actor;
                        return broken(FENCED, index, format!("{actor} was not asked for"));
                    };
                    let to = (assignment.node, assignment.node_incarnation);
                    self.assigned(index, granted.actor, granted.incarnation, to)?;
                }
                self.check_capacity(index)?;
            }
            (
                Command::YieldActor {
                    actor, incarnation, ..
                },
                Response::Done,
            ) => {
                self.check_current(index, *actor, *incarnation)?;
                self.actors.entry(*actor).or_default().on = None;
            }
            (
                Command::SetJobResult {
                    actor, incarnation, ..
                },
                Response::Done,
            ) => self.check_current(index, *actor, *incarnation)?,
            (Command::StopJob { job }, Response::Done) => {
                self.check_outcome(index, *job, tables)?
            }
            (Command::StopActor { actor, .. }, Response::Done) => {
                self.ended.insert(*actor);
            }
            _ => {}
        }
        Ok(())
    }

    fn submitted(
        &mut self,
        index: u64,
        key: Option<&str>,
        job: JobId,
        driver: ActorId,
        created: bool,
    ) -> Result<(), Violation> {
        const RULE: &str = "a key makes one job (I3)";
        let known = key.and_then(|key| self.keys.get(key)).copied();
        match known {
            Some(known) if created || known != (job, driver) => {
                return broken(
                    RULE,
                    index,
                    format!("key {key:?} made {} before and {job} now", known.0),
                );
            }
            None if !created || job.0 <= self.newest_job => {
                return broken(RULE, index, format!("{job} is not new for key {key:?}"));
            }
            _ => {}
        }
        self.newest_job = self.newest_job.max(job.0);
        if let Some(key) = key {
            self.keys.insert(key.to_owned(), (job, driver));
        }
        Ok(())
    }

    /// Time in the log, as far as it can be seen, never goes back.
    fn check_submit_time(
        &mut self,
        index: u64,
        job: JobId,
        created: bool,
        tables: &dyn Reader,
    ) -> Result<(), Violation> {
        if !created {
            return Ok(());
        }
        let Ok(QueryResponse::Job(view)) = answer(tables, 0, Query::Job { job }) else {
            return broken(
                "what is acknowledged is there (I2)",
                index,
                format!("no {job}"),
            );
        };
        if view.submitted_ms < self.newest_submit_ms {
            return broken(
                "log time never goes back",
                index,
                format!(
                    "{job} was submitted at {}, after one of {}",
                    view.submitted_ms, self.newest_submit_ms
                ),
            );
        }
        self.newest_submit_ms = view.submitted_ms;
        Ok(())
    }

    /// A job's end is decided once (I5).
    fn check_outcome(
        &mut self,
        index: u64,
        job: JobId,
        tables: &dyn Reader,
    ) -> Result<(), Violation> {
        let Ok(QueryResponse::Job(view)) = answer(tables, 0, Query::Job { job }) else {
            return Ok(());
        };
        let found = (view.state.clone(), view.exit_code.clone());
        match self.outcomes.get(&job) {
            Some(known) if *known != found => broken(
                "a job's end is decided once (I5)",
                index,
                format!("{job} ended as {known:?} and is {found:?} now"),
            ),
            Some(_) => Ok(()),
            None => {
                if view.finished {
                    self.outcomes.insert(job, found);
                }
                Ok(())
            }
        }
    }

    /// Looks at all tables: they agree with each other, and with the outcomes that were seen.
    pub(crate) fn check_tables(&mut self, tables: &dyn Reader) -> Result<(), Violation> {
        mobula_scheduler::invariants::check(tables).map_err(|violation| {
            Violation::new(
                "the tables agree with each other (I10, I13)",
                violation.to_string(),
            )
        })?;
        self.check_kept(tables)?;
        let listed = Query::ListJobs {
            after: None,
            limit: 0,
        };
        let Ok(QueryResponse::Jobs(jobs)) = answer(tables, 0, listed) else {
            return Ok(());
        };
        for job in jobs.iter().filter(|job| job.finished) {
            self.check_outcome(0, job.job, tables)?;
        }
        for (job, (state, _)) in &self.outcomes {
            if !jobs.iter().any(|view| view.job == *job && view.finished) {
                return broken(
                    "a job's end is decided once (I5)",
                    0,
                    format!("{job} had ended as {state} and has not any more"),
                );
            }
        }
        Ok(())
    }

    /// The jobs that were ever made.
    /// The newest time that a command was stamped with.
    pub(crate) fn log_time_ms(&self) -> u64 {
        self.log_time_ms
    }

    pub(crate) fn job_count(&self) -> usize {
        self.keys.len()
    }
}

/// The answer that a session's table keeps, for messages.
pub(crate) fn shown(answer: &Answer) -> String {
    match answer {
        Ok(bytes) => match Response::decode(bytes) {
            Ok(response) => format!("{response:?}"),
            Err(_) => format!("{} bytes", codec::encode_plain(bytes).len()),
        },
        Err(rejection) => format!("{:?}: {}", rejection.code, rejection.message),
    }
}
