//! The checkpoint table on memory tables, as the head applies commands to it.

use mobula_core::NodeId;
use mobula_scheduler::memory_txn::MemoryTables;

use super::*;

#[derive(Default)]
struct Head {
    tables: MemoryTables,
    index: u64,
}

impl Head {
    fn apply(&mut self, command: &CheckpointCommand) -> Result<(), Rejection> {
        self.index += 1;
        let context = ApplyContext {
            index: self.index,
            term: 1,
            now_ms: 1_000 + self.index,
        };
        self.tables
            .apply(&CheckpointModule, &context, &command.encode())
            .map(drop)
    }

    fn commit(&mut self, job: u64, incarnation: u64, step: u64) -> Result<(), Rejection> {
        let checkpoint = checkpoint(incarnation, step);
        self.apply(&CheckpointCommand::Committed {
            job: JobId(job),
            checkpoint,
        })
    }

    fn reject(&mut self, job: u64, incarnation: u64, of: &CheckpointRef) -> Result<(), Rejection> {
        self.apply(&CheckpointCommand::Rejected {
            job: JobId(job),
            incarnation: Incarnation(incarnation),
            step: of.step,
            manifest_digest: of.manifest_digest.clone(),
            reason: "chunk 0 has another hash".to_owned(),
        })
    }

    fn list(&self, job: u64) -> JobCheckpoints {
        let query = CheckpointQuery::List { job: JobId(job) }.encode();
        let answer = CheckpointModule.query(&self.tables, 0, &query).unwrap();
        JobCheckpoints::decode(&answer).unwrap()
    }

    fn steps(&self, job: u64) -> Vec<u64> {
        self.list(job)
            .checkpoints
            .iter()
            .map(|kept| kept.checkpoint.step)
            .collect()
    }
}

fn checkpoint(incarnation: u64, step: u64) -> CheckpointRef {
    CheckpointRef {
        step,
        incarnation: Incarnation(incarnation),
        manifest_path: format!("manifest/job-1/{step:012}-{incarnation}.json"),
        manifest_digest: format!("digest-{step}-{incarnation}"),
        size_bytes: 10,
        weights_blake3: Some(format!("weights-{step}")),
    }
}

#[test]
fn the_newest_come_first_and_only_some_are_kept() {
    let mut head = Head::default();
    assert_eq!(head.list(1), JobCheckpoints::default());
    for step in 1..=25 {
        head.commit(1, 7, step * 10).unwrap();
    }
    let steps = head.steps(1);
    assert_eq!(steps.len(), CHECKPOINTS_PER_JOB);
    assert_eq!((steps[0], steps[19]), (250, 60));
    assert_eq!(head.list(1).checkpoints[0].committed_ms, 1_025);
    assert!(head.steps(2).is_empty());
}

#[test]
fn an_older_incarnation_is_fenced() {
    let mut head = Head::default();
    head.commit(1, 7, 10).unwrap();
    head.commit(1, 9, 20).unwrap();
    let before = head.tables.clone();
    let late = head.commit(1, 7, 30).unwrap_err();
    assert_eq!(late.code, ErrorCode::Fenced);
    assert!(
        late.message.contains("incarnation #9 has taken over"),
        "{late}"
    );
    let late = head.reject(1, 8, &checkpoint(9, 20)).unwrap_err();
    assert_eq!(late.code, ErrorCode::Fenced);
    assert_eq!(head.tables, before, "a refusal changes nothing");
    // Another job has its own fence.
    head.commit(2, 1, 5).unwrap();
}

#[test]
fn the_visible_step_goes_back_only_by_a_rejection() {
    let mut head = Head::default();
    head.commit(1, 7, 10).unwrap();
    head.commit(1, 7, 20).unwrap();
    let error = head.commit(1, 8, 15).unwrap_err();
    assert_eq!(error.code, ErrorCode::FailedPrecondition);
    assert!(
        error.message.contains("would hide the one of step 20"),
        "{error}"
    );

    head.reject(1, 8, &checkpoint(7, 20)).unwrap();
    assert_eq!(head.steps(1), [10]);
    assert_eq!(
        head.list(1).rejections[0].reason,
        "chunk 0 has another hash"
    );
    // Told twice is told once.
    head.reject(1, 8, &checkpoint(7, 20)).unwrap();
    assert_eq!(head.list(1).rejections.len(), 1);
    head.commit(1, 8, 15).unwrap();
    head.commit(1, 8, 20).unwrap();
    assert_eq!(head.steps(1), [20, 15, 10]);
    // The damaged one does not come back by a late repetition.
    let error = head.commit(1, 8, 20).map(|()| head.steps(1));
    assert_eq!(error.unwrap(), [20, 15, 10]);
    let mut again = checkpoint(7, 20);
    again.incarnation = Incarnation(8);
    let again = CheckpointCommand::Committed {
        job: JobId(1),
        checkpoint: again,
    };
    assert!(
        head.apply(&again)
            .unwrap_err()
            .message
            .contains("was rejected before")
    );
}

#[test]
fn one_step_has_one_weights_hash() {
    let mut head = Head::default();
    head.commit(1, 7, 10).unwrap();
    head.commit(1, 8, 10).unwrap();
    assert_eq!(head.steps(1), [10]);
    let mut other = checkpoint(8, 10);
    (other.weights_blake3, other.manifest_digest) = (Some("bad".into()), "other".into());
    let command = CheckpointCommand::Committed {
        job: JobId(1),
        checkpoint: other,
    };
    let error = head.apply(&command).unwrap_err();
    assert!(
        error
            .message
            .contains("weights weights-10, and now comes with bad"),
        "{error}"
    );
}

#[test]
fn the_quietest_job_is_forgotten_for_a_new_one() {
    let mut head = Head::default();
    for job in 1..=JOBS_MAX {
        // Straight into the tables: cloning them for each command would take too long.
        let context = ApplyContext {
            index: job,
            term: 1,
            now_ms: 0,
        };
        commit(&context, &mut head.tables, JobId(job), checkpoint(1, 1)).unwrap();
    }
    head.index = JOBS_MAX;
    head.commit(1, 1, 2).unwrap();
    head.commit(JOBS_MAX + 1, 1, 1).unwrap();
    assert!(head.steps(2).is_empty(), "job 2 was quiet for longest");
    assert_eq!((head.steps(1).len(), head.steps(3).len()), (2, 1));
    assert_eq!(head.tables.row_count() as u64, 2 * JOBS_MAX + 1);

    head.apply(&CheckpointCommand::Forget { job: JobId(3) })
        .unwrap();
    assert_eq!(head.tables.row_count() as u64, 2 * JOBS_MAX - 1);
    let error = head
        .apply(&CheckpointCommand::Forget { job: JobId(3) })
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound);
}

#[test]
fn a_host_speaks_for_its_own_job_only() {
    let commit = CheckpointCommand::Committed {
        job: JobId(3),
        checkpoint: checkpoint(1, 1),
    };
    let forget = CheckpointCommand::Forget { job: JobId(3) };
    let host = |job| Caller::Host {
        job: JobId(job),
        node: NodeId(1),
    };
    let may = |caller: &Caller, command: &CheckpointCommand| {
        CheckpointModule
            .authorize(caller, &command.encode())
            .is_ok()
    };
    assert!(may(&host(3), &commit) && may(&Caller::Head, &commit));
    for caller in [host(4), Caller::Client, Caller::Node(NodeId(1))] {
        assert!(!may(&caller, &commit), "{caller:?}");
    }
    assert!(may(&Caller::Client, &forget));
    let error = CheckpointModule
        .authorize(&host(4), &commit.encode())
        .unwrap_err();
    assert!(
        error.message.starts_with("a host of job-4 may not"),
        "{error}"
    );
}

#[test]
fn bad_bytes_and_long_texts_are_refused() {
    let mut tables = MemoryTables::default();
    let context = ApplyContext {
        index: 1,
        term: 1,
        now_ms: 0,
    };
    let error = tables
        .apply(&CheckpointModule, &context, &[9, 9])
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    assert!(CheckpointModule.query(&tables, 0, &[7]).is_err());
    let mut long = checkpoint(1, 1);
    long.manifest_path = "x".repeat(TEXT_BYTES_MAX + 1);
    let command = CheckpointCommand::Committed {
        job: JobId(1),
        checkpoint: long,
    };
    let error = tables
        .apply(&CheckpointModule, &context, &command.encode())
        .unwrap_err();
    assert!(error.message.contains("manifest path"), "{error}");
}

#[test]
fn a_driver_that_was_replaced_commits_nothing_even_before_its_successor_does() {
    let mut head = Head::default();
    head.commit(3, 7, 80).unwrap();
    head.apply(&CheckpointCommand::Fence {
        job: JobId(3),
        incarnation: Incarnation(8),
    })
    .unwrap();
    let error = head.commit(3, 7, 100).unwrap_err();
    assert_eq!(error.code, mobula_core::ErrorCode::Fenced);
    head.commit(3, 8, 90).unwrap();
    assert_eq!(head.steps(3), [90, 80]);
}
