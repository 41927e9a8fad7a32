//! The checkpoint table on memory tables, as the head applies commands to it.

use mobula_core::NodeId;
use mobula_scheduler::memory_txn::MemoryTables;

use super::*;
use crate::checkpoint::keep::Metric;
use crate::checkpoint::preemptions::{
    JobPreemptions, PREEMPTION_STEPS_PER_JOB, PreemptionPhase, PreemptionStep, STEPS_PER_COMMAND,
    WHY_BYTES_MAX,
};

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
        metric: None,
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

#[test]
fn what_is_pinned_stays_and_what_the_policy_drops_goes() {
    let mut head = Head::default();
    let pin = |step, is_pinned| CheckpointCommand::Pin {
        job: JobId(1),
        step,
        is_pinned,
    };
    assert_eq!(
        head.apply(&pin(10, true)).unwrap_err().code,
        ErrorCode::NotFound
    );
    let policy = KeepPolicy {
        last: 2,
        every: 4,
        best: 1,
        larger_is_better: false,
    };
    let keep = |incarnation| CheckpointCommand::Keep {
        job: JobId(1),
        incarnation: Incarnation(incarnation),
        policy,
    };
    head.apply(&keep(7)).unwrap();
    for step in 1..=9 {
        let mut checkpoint = checkpoint(7, step * 10);
        let loss = if step == 3 { 0.25 } else { 1.0 };
        checkpoint.metric = Some(Metric::try_from(loss).unwrap());
        head.apply(&CheckpointCommand::Committed {
            job: JobId(1),
            checkpoint,
        })
        .unwrap();
        if step == 5 {
            head.apply(&pin(50, true)).unwrap();
        }
    }
    assert_eq!(head.steps(1), [90, 80, 50, 40, 30]);
    assert_eq!(head.list(1).committed_count, 9);
    assert_eq!(head.list(1).checkpoints[3].number, 4);
    let error = head.apply(&keep(6)).unwrap_err();
    assert_eq!(error.code, ErrorCode::Fenced, "an older driver's wish");
    let error = head.apply(&pin(60, true)).unwrap_err();
    assert!(
        error
            .message
            .contains("there are those of 90, 80, 50, 40, 30"),
        "{error}"
    );

    let prune = CheckpointCommand::Prune {
        job: JobId(1),
        keep: 0,
    };
    head.apply(&prune).unwrap();
    assert_eq!(head.steps(1), [90, 50], "the newest and the pinned");
    head.apply(&pin(50, false)).unwrap();
    head.apply(&prune).unwrap();
    assert_eq!(head.steps(1), [90]);
    let error = head
        .apply(&CheckpointCommand::Prune {
            job: JobId(2),
            keep: 1,
        })
        .unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound);
}

#[test]
fn only_so_many_are_pinned() {
    let mut head = Head::default();
    let pin = |step| CheckpointCommand::Pin {
        job: JobId(1),
        step,
        is_pinned: true,
    };
    for step in 1..=PINNED_MAX as u64 + 1 {
        head.commit(1, 7, step).unwrap();
    }
    for step in 1..=PINNED_MAX as u64 {
        head.apply(&pin(step)).unwrap();
        head.apply(&pin(step)).unwrap();
    }
    let error = head.apply(&pin(PINNED_MAX as u64 + 1)).unwrap_err();
    assert!(error.message.contains("unpin one first"), "{error}");
}

#[test]
fn jobs_are_listed_in_pages_for_those_who_may_see_all() {
    let mut head = Head::default();
    let jobs = JOBS_PER_PAGE as u64 + 3;
    for job in 1..=jobs {
        head.commit(job, 1, 10).unwrap();
    }
    head.commit(2, 1, 20).unwrap();
    let page = |after: Option<u64>| {
        let query = CheckpointQuery::Jobs {
            after: after.map(JobId),
        };
        let answer = CheckpointModule
            .query(&head.tables, 0, &query.encode())
            .unwrap();
        codec::decode::<Vec<JobSummary>>(&answer, PAYLOAD_BYTES_MAX).unwrap()
    };
    let first = page(None);
    assert_eq!(first.len(), JOBS_PER_PAGE);
    assert_eq!((first[1].job, first[1].visible), (JobId(2), 2));
    assert_eq!(first[1].size_bytes, 20);
    assert_eq!(first[1].newest.as_ref().unwrap().checkpoint.step, 20);
    let rest = page(Some(JOBS_PER_PAGE as u64));
    assert_eq!(rest.len(), 3);
    assert_eq!(rest[2].job, JobId(jobs));
    let query = CheckpointQuery::Jobs { after: None }.encode();
    let host = Caller::Host {
        job: JobId(3),
        node: NodeId(1),
    };
    assert!(CheckpointModule.authorize_query(&host, &query).is_err());
    assert!(
        CheckpointModule
            .authorize_query(&Caller::Client, &query)
            .is_ok()
    );
}

fn preemption(incarnation: u64, number: u32, to: PreemptionPhase) -> PreemptionStep {
    PreemptionStep {
        incarnation: Incarnation(incarnation),
        number,
        node: "worker-1".to_owned(),
        from: PreemptionPhase::Running,
        to,
        deadline_ms: Some(99),
        trained_steps: 7,
        needed_ms: None,
        usable_ms: None,
        why: "the machine goes in 90 ms".to_owned(),
        said_ms: 9,
    }
}

impl Head {
    fn preempted(&mut self, by: u64, steps: Vec<PreemptionStep>) -> Result<(), Rejection> {
        self.apply(&CheckpointCommand::Preempted {
            job: JobId(1),
            incarnation: Incarnation(by),
            steps,
        })
    }

    fn preemptions(&self) -> JobPreemptions {
        let query = CheckpointQuery::Preemptions { job: JobId(1) }.encode();
        let answer = CheckpointModule.query(&self.tables, 0, &query).unwrap();
        codec::decode(&answer, PAYLOAD_BYTES_MAX).unwrap()
    }
}

#[test]
fn what_a_driver_did_about_a_notice_is_kept_once_and_outlives_it() {
    let mut head = Head::default();
    assert_eq!(head.preemptions(), JobPreemptions::default());
    let noticed = preemption(3, 1, PreemptionPhase::Noticed);
    let handoff = preemption(3, 2, PreemptionPhase::Handoff);
    head.preempted(3, vec![noticed.clone()]).unwrap();
    // The answer was lost: all of it is said again, with what came since.
    head.preempted(3, vec![noticed.clone(), handoff.clone()])
        .unwrap();
    let known = head.preemptions();
    assert_eq!(known.steps, [noticed.clone(), handoff.clone()]);
    assert_eq!(known.unfinished_before(Incarnation(3)), None, "its own");
    assert_eq!(known.unfinished_before(Incarnation(5)), Some(&handoff));

    let gone = preemption(3, 3, PreemptionPhase::Gone);
    head.preempted(5, vec![gone.clone()]).unwrap();
    let late = head.preempted(3, vec![preemption(3, 4, PreemptionPhase::Running)]);
    assert_eq!(late.unwrap_err().code, ErrorCode::Fenced);
    let known = head.preemptions();
    assert_eq!(known.steps, [noticed, handoff, gone]);
    assert_eq!(known.unfinished_before(Incarnation(5)), None);

    head.apply(&CheckpointCommand::Forget { job: JobId(1) })
        .unwrap();
    assert_eq!(head.preemptions(), JobPreemptions::default());
}

#[test]
fn a_job_keeps_its_newest_preemptions_and_none_that_is_too_long() {
    let mut head = Head::default();
    for number in 1..=100 {
        let step = preemption(3, number, PreemptionPhase::Noticed);
        head.preempted(3, vec![step]).unwrap();
    }
    let known = head.preemptions().steps;
    assert_eq!(known.len(), PREEMPTION_STEPS_PER_JOB);
    assert_eq!(known.last().map(|step| step.number), Some(100));
    let mut long = preemption(3, 101, PreemptionPhase::Gone);
    long.why = "x".repeat(WHY_BYTES_MAX + 1);
    let refused = head.preempted(3, vec![long]).unwrap_err();
    assert!(refused.message.contains("the limit is 512"), "{refused}");
    let many = vec![preemption(3, 102, PreemptionPhase::Gone); STEPS_PER_COMMAND + 1];
    assert!(head.preempted(3, many).is_err());
    assert_eq!(head.preemptions().steps, known, "nothing of it is kept");
}
