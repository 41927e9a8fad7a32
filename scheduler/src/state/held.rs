//! How many bytes jobs and actors hold in the tables.
//!
//! Rows are bounded one by one, and in number. Both bounds together let in many times what a snapshot may
//! have, after which no head that fell behind could be brought up to date. So their sum has a bound as well.
//!
//! Invariants:
//! 1. [`Counter::LivingBytes`] is the sum over the jobs that are not over and the actors that have not
//!    ended, [`Counter::EndedJobBytes`] and [`Counter::EndedActorBytes`] are those over the others. A driver
//!    counts with its job.
//! 2. What would live is refused where it would be too much. What has ended gives way, the oldest first.
//! 3. Nothing else is refused here: what ends, restarts or moves something makes the sums no larger.

use mobula_core::control::Reader;
use mobula_core::spec::{ActorSpec, JobSpec};
use mobula_core::{ErrorCode, Rejection, codec};

use super::job;
use crate::row::Counter;

/// What an actor of this specification holds. All but the constructor's argument is in three rows: the
/// specification's, the actor's own, and that of its lease.
pub(crate) fn actor_bytes(spec: &ActorSpec) -> u64 {
    let init = spec.init.len();
    let rest = codec::encode_plain(spec).len() - init;
    (init + 3 * rest) as u64
}

/// What a job of this specification holds with its result, and with its driver.
pub(crate) fn job_bytes(spec: &JobSpec, result_json: Option<&str>) -> u64 {
    let own = codec::encode_plain(spec).len() + result_json.map_or(0, str::len);
    own as u64 + actor_bytes(&job::driver_spec(spec))
}

/// Refuses `what`, which adds so many bytes, where all that lives would then have more than `limit_bytes`.
pub(crate) fn check_living(
    reader: &dyn Reader,
    what: &str,
    added_bytes: u64,
    limit_bytes: u64,
) -> Result<(), Rejection> {
    let held_bytes = Counter::LivingBytes.value(reader);
    if added_bytes == 0 || held_bytes + added_bytes <= limit_bytes {
        return Ok(());
    }
    Err(Rejection::new(
        ErrorCode::Overloaded,
        format!(
            "{what} would add {added_bytes} bytes to the {held_bytes} that living jobs and actors hold in \
             the head's tables, and the limit is {limit_bytes}: pass large values as objects, checkpoints \
             or files, or try again when some of them have ended"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scheduler;
    use crate::command::{Command, Response};
    use crate::limits::{LIVING_BYTES_MAX, RESULTS_HEADROOM_BYTES};
    use crate::memory_txn::MemoryTables;
    use mobula_core::control::ApplyContext;
    use mobula_core::spec::{PlacementPolicy, Program, RestartPolicy};
    use mobula_core::{JobId, Resources};

    fn apply(tables: &mut MemoryTables, command: &Command) -> Result<Response, Rejection> {
        let context = ApplyContext {
            index: 1,
            term: 1,
            now_ms: 1_000,
        };
        let applied = tables.apply(&Scheduler, &context, &command.encode())?;
        Ok(Response::decode(&applied.response).unwrap())
    }

    fn submit(key: &str) -> Command {
        Command::SubmitJob {
            spec: JobSpec {
                name: "job".to_owned(),
                program: Program::Builtin,
                args: Vec::new(),
                env: Default::default(),
                resources: Resources::default(),
                placement: PlacementPolicy::default(),
                restart: RestartPolicy::NEVER,
                idempotency_key: Some(key.to_owned()),
                files: Vec::new(),
                retry_errors: false,
                secrets: Default::default(),
                namespace: None,
            },
        }
    }

    fn create(name: &str) -> Command {
        let spec = ActorSpec {
            name: Some(name.to_owned()),
            init: vec![7; 1000],
            ..ActorSpec::of_type("test")
        };
        Command::CreateActors {
            job: JobId::SYSTEM,
            actors: vec![spec],
            gang: false,
            get_or_create: true,
            creator: None,
        }
    }

    #[test]
    fn what_would_be_too_much_is_refused_and_what_is_there_still_answers() {
        let mut tables = MemoryTables::default();
        let actor = apply(&mut tables, &create("first")).unwrap();
        apply(&mut tables, &submit("first")).unwrap();
        let held_bytes = Counter::LivingBytes.value(&tables);
        // As if there were so many others that one byte less than another actor needs is left.
        let Command::CreateActors { actors, .. } = create("other") else {
            unreachable!("that is what was asked for")
        };
        let needed_bytes = actor_bytes(&actors[0]);
        Counter::LivingBytes.set(&mut tables, LIVING_BYTES_MAX - needed_bytes + 1);
        let refused = apply(&mut tables, &create("other")).unwrap_err();
        assert_eq!(refused.code, ErrorCode::Overloaded);
        assert!(
            refused.message.starts_with("1 new actors of job-0"),
            "{refused}"
        );
        Counter::LivingBytes.set(&mut tables, LIVING_BYTES_MAX);
        let refused = apply(&mut tables, &submit("other")).unwrap_err();
        assert_eq!(refused.code, ErrorCode::Overloaded);

        // Repetitions of what was let in, and all that ends something.
        assert_eq!(apply(&mut tables, &create("first")), Ok(actor.clone()));
        let again = apply(&mut tables, &submit("first")).unwrap();
        let Response::JobSubmitted { job, created, .. } = again else {
            panic!("unexpected {again:?}")
        };
        assert!(!created);
        apply(&mut tables, &Command::StopJob { job }).unwrap();
        let Response::ActorsCreated { actors } = actor else {
            panic!("unexpected {actor:?}")
        };
        let stop = Command::StopActor {
            job: None,
            actor: actors[0],
            grace_ms: 0,
        };
        apply(&mut tables, &stop).unwrap();
        // All that those two held is free again, and their like is let in.
        let left_bytes = Counter::LivingBytes.value(&tables);
        assert_eq!(left_bytes, LIVING_BYTES_MAX - held_bytes);
        apply(&mut tables, &create("other")).unwrap();
        apply(&mut tables, &submit("other")).unwrap();
    }

    #[test]
    fn results_have_room_where_actors_have_none() {
        let mut tables = MemoryTables::default();
        Counter::LivingBytes.set(&mut tables, LIVING_BYTES_MAX);
        let limit_bytes = LIVING_BYTES_MAX + RESULTS_HEADROOM_BYTES;
        assert!(check_living(&tables, "this job", 1, LIVING_BYTES_MAX).is_err());
        assert!(check_living(&tables, "this result", RESULTS_HEADROOM_BYTES, limit_bytes).is_ok());
        // One that is as long as the one before needs none.
        Counter::LivingBytes.set(&mut tables, limit_bytes);
        assert!(check_living(&tables, "this result", 0, limit_bytes).is_ok());
        assert!(check_living(&tables, "this result", 1, limit_bytes).is_err());
    }
}
