//! Which checkpoints must stay in the object store: what the table names, and what a running driver
//! may still commit.
//!
//! Invariants:
//! 1. A checkpoint that is not visible and may not be committed at some time is never visible
//!    again: incarnations and visible steps only grow while a driver saves, and a job that has ended
//!    has no driver.
//! 2. The newest checkpoint of a job is kept as long as the job is known.

use mobula_core::control::{ModuleId, Proposal, Reader, Retention, StoredCheckpoint};
use mobula_core::{Incarnation, JobId};
use mobula_scheduler::{Query, QueryResponse};

use super::rows::{all_known, known};
use super::state::CheckpointCommand;

/// What is kept of a job that has ended: the last one, and one to fall back to.
const KEPT_OF_ENDED: u32 = 2;

/// Jobs that one round trims; the next goes on.
const TRIMS_PER_ROUND: usize = 64;

/// Says what the table of checkpoints keeps.
#[derive(Debug, Clone, Copy, Default)]
pub struct CheckpointRetention;

impl Retention for CheckpointRetention {
    fn tidy(&self, reader: &dyn Reader, _now_ms: u64) -> Vec<Proposal> {
        all_known(reader)
            .filter(|(_, known)| known.has_more_than(KEPT_OF_ENDED))
            .filter(|(job, _)| has_ended(reader, *job))
            .take(TRIMS_PER_ROUND)
            .map(|(job, _)| Proposal {
                module: ModuleId::CHECKPOINT,
                payload: CheckpointCommand::Trim {
                    job,
                    keep: KEPT_OF_ENDED,
                }
                .encode(),
            })
            .collect()
    }

    fn committed(&self, reader: &dyn Reader) -> Vec<StoredCheckpoint> {
        all_known(reader)
            .flat_map(|(_, known)| known.checkpoints)
            .map(|committed| StoredCheckpoint {
                manifest_path: committed.checkpoint.manifest_path,
                manifest_digest: committed.checkpoint.manifest_digest,
            })
            .collect()
    }

    fn may_be_committed(
        &self,
        reader: &dyn Reader,
        job: JobId,
        step: u64,
        incarnation: Incarnation,
    ) -> bool {
        if has_ended(reader, job) {
            return false;
        }
        let Some(known) = known(reader, job) else {
            return true;
        };
        let newest = known.checkpoints.first();
        incarnation >= known.incarnation
            && newest.is_none_or(|newest| step > newest.checkpoint.step)
    }
}

/// Whether a job is over, or so long ago that nobody knows it.
fn has_ended(reader: &dyn Reader, job: JobId) -> bool {
    match mobula_scheduler::answer(reader, 0, Query::Job { job }) {
        Ok(QueryResponse::Job(view)) => view.ended_ms.is_some(),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::CheckpointModule;
    use crate::checkpoint::state::CheckpointRef;
    use mobula_core::control::{ApplyContext, StateModule};
    use mobula_core::resource::Resources;
    use mobula_core::spec::{JobSpec, PlacementPolicy, Program, RestartPolicy};
    use mobula_scheduler::memory_txn::MemoryTables;
    use mobula_scheduler::{Command, Response, Scheduler};

    struct World {
        tables: MemoryTables,
        index: u64,
    }

    impl World {
        fn apply(&mut self, module: &dyn StateModule, payload: &[u8]) -> Vec<u8> {
            self.index += 1;
            let context = ApplyContext {
                index: self.index,
                term: 1,
                now_ms: self.index,
            };
            let applied = module.apply(&context, &mut self.tables, payload);
            applied.unwrap().response
        }

        fn submit(&mut self) -> JobId {
            let command = Command::SubmitJob {
                spec: JobSpec {
                    name: "a".into(),
                    program: Program::Builtin,
                    args: Vec::new(),
                    env: Default::default(),
                    resources: Resources::default(),
                    placement: PlacementPolicy::default(),
                    restart: RestartPolicy::NEVER,
                    idempotency_key: None,
                    files: Vec::new(),
                    retry_errors: false,
                    secrets: Default::default(),
                    namespace: None,
                },
            };
            let answer = self.apply(&Scheduler, &command.encode());
            match Response::decode(&answer).unwrap() {
                Response::JobSubmitted { job, .. } => job,
                other => panic!("{other:?}"),
            }
        }

        fn commit(&mut self, job: JobId, step: u64, incarnation: u64) {
            let checkpoint = CheckpointRef {
                step,
                incarnation: Incarnation(incarnation),
                manifest_path: format!("manifest/{job}/{step}-{incarnation}.json"),
                manifest_digest: format!("{step}"),
                size_bytes: 1,
                weights_blake3: None,
                metric: None,
            };
            let command = CheckpointCommand::Committed { job, checkpoint };
            self.apply(&CheckpointModule, &command.encode());
        }

        fn steps(&self) -> Vec<String> {
            CheckpointRetention
                .committed(&self.tables)
                .into_iter()
                .map(|stored| stored.manifest_digest)
                .collect()
        }

        fn may(&self, job: JobId, step: u64, incarnation: u64) -> bool {
            CheckpointRetention.may_be_committed(&self.tables, job, step, Incarnation(incarnation))
        }
    }

    #[test]
    fn only_what_a_running_driver_may_commit_is_spared() {
        let mut world = World {
            tables: MemoryTables::default(),
            index: 0,
        };
        let job = world.submit();
        assert!(world.may(job, 5, 1), "its driver has not said a word yet");
        for step in [10, 20, 30] {
            world.commit(job, step, 2);
        }
        assert_eq!(world.steps(), ["30", "20", "10"]);
        assert!(world.may(job, 40, 2));
        assert!(world.may(job, 40, 3));
        assert!(!world.may(job, 40, 1), "an older start");
        assert!(!world.may(job, 30, 2), "not newer than what is visible");
        assert!(!world.may(JobId(77), 40, 2), "nobody knows that job");
        // While it runs, all that the table names stays.
        assert_eq!(CheckpointRetention.tidy(&world.tables, 0), []);

        let pin = |step, is_pinned| CheckpointCommand::Pin {
            job,
            step,
            is_pinned,
        };
        world.apply(&CheckpointModule, &pin(10, true).encode());
        let stop = Command::StopJob { job };
        world.apply(&Scheduler, &stop.encode());
        assert!(!world.may(job, 40, 2), "an ended job");
        for proposal in CheckpointRetention.tidy(&world.tables, 0) {
            assert_eq!(proposal.module, ModuleId::CHECKPOINT);
            world.apply(&CheckpointModule, &proposal.payload);
        }
        assert_eq!(
            CheckpointRetention.tidy(&world.tables, 0),
            [],
            "10 is pinned"
        );
        assert_eq!(world.steps(), ["30", "20", "10"]);
        world.apply(&CheckpointModule, &pin(10, false).encode());
        for proposal in CheckpointRetention.tidy(&world.tables, 0) {
            world.apply(&CheckpointModule, &proposal.payload);
        }
        assert_eq!(world.steps(), ["30", "20"]);
        assert_eq!(CheckpointRetention.tidy(&world.tables, 0), []);
    }
}
