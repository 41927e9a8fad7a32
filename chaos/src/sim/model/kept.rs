//! Kept objects in the model: a name of a job has one value until it is dropped or the job is over, and no longer; an
//! incarnation that is over keeps and drops nothing; and what a sweep of the object store leaves is what is kept.

use std::collections::{BTreeMap, BTreeSet};

use mobula_core::control::{Reader, StateModule};
use mobula_core::id::{ActorId, Incarnation, JobId};
use mobula_core::kept::{KeptCommand, KeptNames, KeptQuery, KeptValue};
use mobula_scheduler::{JobView, KeptObjects, Query, QueryResponse, answer, kept_chunks};

use super::{Answer, FENCED, Model, broken};
use crate::sim::violation::Violation;

const KEPT: &str = "what a job keeps stays until it is dropped or the job is over, and no longer";

impl Model {
    /// What jobs keep, as far as it was heard of: the job may be over.
    pub(crate) fn kept_names(&self) -> impl Iterator<Item = (JobId, &str)> {
        let jobs = self.kept.iter();
        jobs.flat_map(|(job, kept)| kept.keys().map(move |name| (*job, name.as_str())))
    }

    /// Takes in one command about kept objects and its answer.
    pub(super) fn keeps(
        &mut self,
        index: u64,
        payload: &[u8],
        result: &Answer,
        tables: &dyn Reader,
    ) -> Result<(), Violation> {
        let unread = |error: &dyn std::fmt::Display| {
            Violation::new("answers can be read", format!("entry {index}: {error}"))
        };
        let command = KeptCommand::decode(payload).map_err(|error| unread(&error))?;
        let (job, holder, name) = command.about();
        let view = self.forget_kept_if_over(index, job, tables)?;
        let is_living = holder.is_none_or(|(actor, incarnation)| self.lives(actor, incarnation));
        let known = self.kept.entry(job).or_default();
        let is_possible = match &command {
            KeptCommand::Keep { value, .. } => {
                let is_open = matches!(view.state.as_str(), "pending" | "running");
                is_open && known.get(name).is_none_or(|known| known == value)
            }
            KeptCommand::Drop { .. } => true,
        };
        if result.is_ok() != (is_living && is_possible) {
            let rule = if is_living { KEPT } else { FENCED };
            let detail = format!(
                "{command:?} was answered {result:?}, the job is {} and known are {known:?}",
                view.state
            );
            return broken(rule, index, detail);
        }
        self.fenced += u64::from(!is_living);
        let Ok(bytes) = result else { return Ok(()) };
        match &command {
            KeptCommand::Keep { value, .. } => {
                let is_new = known.insert(name.to_owned(), value.clone()).is_none();
                self.kept_count += u64::from(is_new);
            }
            KeptCommand::Drop { .. } => {
                let was_there = known.remove(name).is_some();
                let answered = KeptCommand::was_there(bytes).map_err(|error| unread(&error))?;
                if answered != was_there {
                    let detail = format!("{command:?} found {answered}, and should {was_there}");
                    return broken(KEPT, index, detail);
                }
                self.dropped_count += u64::from(was_there);
            }
        }
        self.compare_kept(index, job, tables)
    }

    /// Looks at all that is kept, and at what a sweep would leave.
    pub(super) fn check_kept(&mut self, tables: &dyn Reader) -> Result<(), Violation> {
        let jobs: Vec<JobId> = self.kept.keys().copied().collect();
        for job in jobs {
            self.forget_kept_if_over(0, job, tables)?;
            self.compare_kept(0, job, tables)?;
        }
        let values = self.kept.values().flat_map(BTreeMap::values);
        let known: BTreeSet<[u8; 32]> = values
            .flat_map(|value| value.chunks.iter().copied())
            .collect();
        let found: BTreeSet<[u8; 32]> = kept_chunks(tables).collect();
        if known == found {
            return Ok(());
        }
        let detail = format!(
            "a sweep leaves {} chunks, and {} are kept",
            found.len(),
            known.len()
        );
        broken(KEPT, 0, detail)
    }

    fn forget_kept_if_over(
        &mut self,
        index: u64,
        job: JobId,
        tables: &dyn Reader,
    ) -> Result<JobView, Violation> {
        match answer(tables, 0, Query::Job { job }) {
            Ok(QueryResponse::Job(view)) => {
                if view.finished {
                    self.kept.remove(&job);
                }
                Ok(view)
            }
            other => broken(
                KEPT,
                index,
                format!("{job} kept something and is {other:?}"),
            ),
        }
    }

    fn compare_kept(&self, index: u64, job: JobId, tables: &dyn Reader) -> Result<(), Violation> {
        let query = KeptQuery {
            job,
            which: KeptNames::After(String::new()),
        };
        let answered = KeptObjects.query(tables, 0, &query.encode());
        let listed = answered
            .ok()
            .and_then(|bytes| KeptQuery::answer(&bytes).ok());
        let objects = listed.into_iter().flatten();
        let found: BTreeMap<String, KeptValue> =
            objects.map(|object| (object.name, object.value)).collect();
        let nothing = BTreeMap::new();
        let known = self.kept.get(&job).unwrap_or(&nothing);
        if *known == found {
            return Ok(());
        }
        broken(
            KEPT,
            index,
            format!("{job} shows {found:?}, and {known:?} are kept"),
        )
    }

    /// Whether this is the living incarnation of an actor.
    fn lives(&self, actor: ActorId, incarnation: Incarnation) -> bool {
        let known = self.actors.get(&actor);
        known.is_some_and(|known| known.incarnation == incarnation && known.on.is_some())
    }
}

#[cfg(test)]
mod tests {
    use mobula_core::control::ApplyContext;
    use mobula_core::error::Rejection;
    use mobula_core::id::NodeId;
    use mobula_core::object::Format;
    use mobula_scheduler::memory_txn::MemoryTables;

    use super::super::Actor;
    use super::*;

    /// The platform's own job is open all the time, and nobody has to submit it.
    const JOB: JobId = JobId::SYSTEM;

    fn keep(incarnation: u64, number: u8) -> KeptCommand {
        KeptCommand::Keep {
            job: JOB,
            holder: Some((ActorId(7), Incarnation(incarnation))),
            name: "a".to_owned(),
            value: KeptValue {
                format: Format::Encoded,
                size_bytes: 1,
                chunks: vec![[number; 32]],
            },
        }
    }

    fn drop_it() -> KeptCommand {
        KeptCommand::Drop {
            job: JOB,
            holder: None,
            name: "a".to_owned(),
        }
    }

    /// Applies a command in nobody's name, so that the tables take it.
    fn apply(tables: &mut MemoryTables, command: &KeptCommand) -> Answer {
        let mut command = command.clone();
        let (KeptCommand::Keep { holder, .. } | KeptCommand::Drop { holder, .. }) = &mut command;
        *holder = None;
        let context = ApplyContext {
            index: 1,
            term: 1,
            now_ms: 1,
        };
        let applied = tables.apply(&KeptObjects, &context, &command.encode())?;
        Ok(applied.response)
    }

    /// A model in which actor 7 lives as 5, and keeps value 1 as the tables do.
    fn kept() -> (Model, MemoryTables) {
        let (mut model, mut tables) = (Model::default(), MemoryTables::default());
        let actor = Actor {
            incarnation: Incarnation(5),
            on: Some(NodeId(1)),
            ..Actor::default()
        };
        model.actors.insert(ActorId(7), actor);
        let command = keep(5, 1);
        let answer = apply(&mut tables, &command);
        let kept = model.keeps(1, &command.encode(), &answer, &tables);
        kept.expect("nothing is wrong with it");
        (model, tables)
    }

    #[test]
    fn answers_that_are_not_those_of_the_log_are_found() {
        let done: Answer = Ok(Vec::new());
        let refused: Answer = Err(Rejection::invalid("no"));
        for (command, answer, expected) in [
            (keep(5, 1), &done, Ok(())),
            (keep(5, 2), &refused, Ok(())),
            (keep(4, 1), &refused, Ok(())),
            (keep(5, 2), &done, Err(KEPT)),
            (keep(5, 1), &refused, Err(KEPT)),
            (keep(4, 1), &done, Err(FENCED)),
            // The tables keep it still, whatever was answered.
            (drop_it(), &Ok(vec![1]), Err(KEPT)),
            (drop_it(), &Ok(vec![0]), Err(KEPT)),
        ] {
            let (mut model, tables) = kept();
            let found = model.keeps(2, &command.encode(), answer, &tables);
            assert_eq!(found.map_err(|why| why.rule), expected, "{command:?}");
        }
        let (mut model, mut tables) = kept();
        let answer = apply(&mut tables, &drop_it());
        let dropped = model.keeps(2, &drop_it().encode(), &answer, &tables);
        assert_eq!(dropped, Ok(()));
        assert_eq!((model.kept_count, model.dropped_count), (1, 1));
        assert_eq!(model.check_kept(&tables), Ok(()));
    }

    #[test]
    fn what_goes_behind_the_logs_back_is_missed() {
        let (mut model, mut tables) = kept();
        assert_eq!(model.check_kept(&tables), Ok(()));
        apply(&mut tables, &drop_it()).expect("it is there");
        let found = model.check_kept(&tables);
        assert_eq!(found.map_err(|why| why.rule), Err(KEPT));
    }
}
