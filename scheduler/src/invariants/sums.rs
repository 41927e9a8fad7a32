//! Sums that are kept beside the rows that they are of.

use std::collections::BTreeMap;

use mobula_core::control::Reader;
use mobula_core::kept::KeptObject;
use mobula_core::{ActorId, JobId, SessionId};

use super::{Violation, ensure};
use crate::limits::{
    ENDED_ACTORS_BYTES_MAX, ENDED_JOBS_BYTES_MAX, LIVING_BYTES_MAX, RESULTS_HEADROOM_BYTES,
    SESSIONS_OF_HOLDER_MAX,
};
use crate::row::{self, Counter, JOBS, SESSION_HOLDERS, SESSION_RESPONSES, SESSIONS};
use crate::state::actor::{self, ActorRow};
use crate::state::held;
use crate::state::job::{self, JobRow, JobState};
use crate::state::kept::{ALL_JOBS, KEPT, KEPT_TOTALS, Totals};
use crate::state::session::SessionRow;

/// What is kept is kept for a job that is not over, and counted.
pub(super) fn kept_objects_match_jobs(reader: &dyn Reader) -> Result<(), Violation> {
    const RULE: &str = "kept objects match jobs";
    let mut expected: BTreeMap<Vec<u8>, Totals> = BTreeMap::new();
    for (key, object) in row::all::<KeptObject>(reader, KEPT, &[]) {
        let job = JobId(row::number_at(&key, 0));
        let state = job::load(reader, job).map(|row| row.state);
        let is_over = state.is_none_or(|state| matches!(state, JobState::Over(_)));
        ensure(!is_over, RULE, || {
            format!("`{}` is kept for {job}, which is {state:?}", object.name)
        })?;
        for whose in [&job.to_key()[..], ALL_JOBS] {
            expected
                .entry(whose.to_vec())
                .or_default()
                .add(&object.value);
        }
    }
    let counted: BTreeMap<_, Totals> = row::all(reader, KEPT_TOTALS, &[]).into_iter().collect();
    ensure(counted == expected, RULE, || {
        format!("{counted:?} are counted, there are {expected:?}")
    })
}

/// What jobs and actors hold is counted, and within its bounds (I13).
pub(super) fn bytes_match_rows(
    reader: &dyn Reader,
    actors: &BTreeMap<ActorId, ActorRow>,
) -> Result<(), Violation> {
    const RULE: &str = "bytes match rows";
    let (mut living, mut ended_jobs, mut ended_actors) = (0, 0, 0);
    for (_, job) in row::all::<JobRow>(reader, JOBS, &[]) {
        let of = match job.state {
            _ if job.id == JobId::SYSTEM => continue,
            JobState::Over(_) => &mut ended_jobs,
            _ => &mut living,
        };
        *of += held::job_bytes(&job::load_spec(reader, job.id), job.result_json.as_deref());
    }
    for actor in actors.values().filter(|actor| !actor.driver) {
        let of = match actor.state.is_ended() {
            true => &mut ended_actors,
            false => &mut living,
        };
        *of += held::actor_bytes(&actor::load_spec(reader, actor.id));
    }
    let living_max = LIVING_BYTES_MAX + RESULTS_HEADROOM_BYTES;
    let cases = [
        ("the living", Counter::LivingBytes, living, living_max),
        (
            "ended jobs",
            Counter::EndedJobBytes,
            ended_jobs,
            ENDED_JOBS_BYTES_MAX,
        ),
        (
            "ended actors",
            Counter::EndedActorBytes,
            ended_actors,
            ENDED_ACTORS_BYTES_MAX,
        ),
    ];
    for (whose, counter, bytes, limit) in cases {
        let counted = counter.value(reader);
        ensure(counted == bytes, RULE, || {
            format!("{counted} bytes of {whose} counted, there are {bytes}")
        })?;
        ensure(bytes <= limit, RULE, || {
            format!("{bytes} bytes of {whose}, the limit is {limit}")
        })?;
    }
    Ok(())
}

/// In each name as many sessions are open as are counted, and no more than may be.
pub(super) fn sessions_match_holders(reader: &dyn Reader) -> Result<(), Violation> {
    const RULE: &str = "sessions match holders";
    let mut expected: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
    for (_, session) in row::all::<SessionRow>(reader, SESSIONS, &[]) {
        *expected.entry(session.holder.into_bytes()).or_default() += 1;
    }
    let counted: BTreeMap<_, u64> = row::all(reader, SESSION_HOLDERS, &[]).into_iter().collect();
    ensure(counted == expected, RULE, || {
        format!("{counted:?} are counted, there are {expected:?}")
    })?;
    let most = expected.values().max().copied().unwrap_or(0);
    ensure(most <= SESSIONS_OF_HOLDER_MAX, RULE, || {
        format!("{most} sessions in one name, the limit is {SESSIONS_OF_HOLDER_MAX}")
    })
}

/// What the responses of each session have together is counted (I13).
pub(super) fn responses_match_sessions(reader: &dyn Reader) -> Result<(), Violation> {
    const RULE: &str = "responses match sessions";
    let mut expected: BTreeMap<SessionId, u64> = BTreeMap::new();
    for (key, response) in row::scan(reader, SESSION_RESPONSES, &[]) {
        let session = SessionId(row::number_at(&key, 0));
        *expected.entry(session).or_default() += response.len() as u64;
    }
    for (key, row) in row::all::<SessionRow>(reader, SESSIONS, &[]) {
        let session = SessionId(row::number_at(&key, 0));
        let bytes = expected.get(&session).copied().unwrap_or(0);
        ensure(row.kept_bytes == bytes, RULE, || {
            format!(
                "{} bytes of responses of {session} counted, there are {bytes}",
                row.kept_bytes
            )
        })?;
    }
    Ok(())
}
