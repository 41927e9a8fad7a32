//! The life of jobs and actors.

use mobula_core::control::Effect;
use mobula_core::order::WorkerEvent;
use mobula_core::spec::JobSpec;
use mobula_core::{ErrorCode, ExitReason, Incarnation, JobId};
use mobula_scheduler::{
    ActorIncarnation, ActorTarget, Command, Query, QueryResponse, Resolution, Response,
    next_wakeup_ms,
};

use crate::cluster::{Cluster, actor_spec, job_spec};

/// A cluster with one node and one job whose driver runs.
fn running() -> (Cluster, JobId, ActorIncarnation) {
    let mut cluster = Cluster::new();
    cluster.register("a", "boot-1", 8);
    let (job, driver) = cluster.submit(job_spec("train", 2));
    cluster.place();
    let incarnation = cluster.start(driver);
    (
        cluster,
        job,
        ActorIncarnation {
            actor: driver,
            incarnation,
        },
    )
}

#[test]
fn a_job_whose_driver_completes_succeeds_with_its_result() {
    let (mut cluster, job, driver) = running();
    assert_eq!(cluster.job(job).state, "running");
    let worker = cluster.create(job, vec![actor_spec(Some("worker"), 1)], false)[0];
    cluster.place();
    cluster.start(worker);
    let ActorIncarnation { actor, incarnation } = driver;
    let result_json = "{\"accuracy\":0.97}".to_owned();
    cluster.ok(Command::SetJobResult {
        job,
        actor,
        incarnation,
        result_json,
    });
    cluster.exit(driver.actor, ExitReason::Completed);
    // Its last actor is told to stop, and only then is the job over.
    assert_eq!(cluster.job(job).state, "stopping");
    assert_eq!(cluster.orders(), ["node-1 stop actor-2#6 in 10000 ms"]);
    cluster.exit(worker, ExitReason::HostSignaled(9));
    let view = cluster.job(job);
    assert_eq!((view.state.as_str(), view.finished), ("succeeded", true));
    assert_eq!(view.result.as_deref(), Some("{\"accuracy\":0.97}"));
    assert_eq!(cluster.actor(worker).exit_code.as_deref(), Some("stopped"));
}

/// How long what is to be started waits; what waits for nothing has no time.
fn due_in_ms(cluster: &Cluster) -> u64 {
    let due_ms = next_wakeup_ms(&cluster.tables, cluster.now_ms);
    due_ms.map_or(0, |due_ms| due_ms - cluster.now_ms)
}

#[test]
fn a_driver_is_started_again_within_its_policy_and_then_the_job_fails() {
    let (mut cluster, job, driver) = running();
    for (restart, backoff_ms) in [(1, 0), (2, 100)] {
        cluster.exit(driver.actor, ExitReason::Panicked("boom".into()));
        assert_eq!(due_in_ms(&cluster), backoff_ms);
        if backoff_ms > 0 {
            cluster.place();
            assert_eq!(cluster.actor(driver.actor).state, "pending");
        }
        cluster.now_ms += backoff_ms;
        cluster.place();
        cluster.start(driver.actor);
        assert_eq!(cluster.job(job).restarts, restart);
    }
    cluster.exit(driver.actor, ExitReason::Panicked("boom".into()));
    let view = cluster.job(job);
    assert_eq!(
        (view.state.as_str(), view.exit_reason.as_deref()),
        ("failed", Some("panicked: boom"))
    );
}

#[test]
fn delays_begin_anew_behind_a_start_that_ran_for_long() {
    let mut cluster = Cluster::new();
    cluster.register("a", "boot-1", 8);
    let (_, driver) = cluster.submit(job_spec("train", 9));
    let runs_and_delays_ms = [(0, 0), (4_999, 100), (0, 200), (5_000, 0), (0, 0), (0, 100)];
    for (ran_ms, delay_ms) in runs_and_delays_ms {
        cluster.place();
        cluster.start(driver);
        cluster.now_ms += ran_ms;
        cluster.exit(driver, ExitReason::Panicked("boom".into()));
        assert_eq!(due_in_ms(&cluster), delay_ms, "ran for {ran_ms} ms");
        cluster.now_ms += delay_ms;
    }
}

#[test]
fn a_stopped_job_ends_once_its_actors_have() {
    let (mut cluster, job, driver) = running();
    let waiting = cluster.create(job, vec![actor_spec(None, 99)], false)[0];
    cluster.ok(Command::StopJob { job });
    assert_eq!(cluster.actor(waiting).state, "ended");
    assert_eq!(cluster.job(job).state, "stopping");
    let refused = cluster.refused(Command::CreateActors {
        job,
        actors: vec![actor_spec(None, 1)],
        gang: false,
        get_or_create: false,
        creator: None,
    });
    assert!(refused.contains("submit a new job"), "{refused}");
    cluster.exit(driver.actor, ExitReason::HostExited(1));
    assert_eq!(cluster.job(job).state, "stopped");
    assert_eq!(cluster.ok(Command::StopJob { job }), Response::Done);
    assert!(
        cluster
            .refused(Command::StopJob { job: JobId::SYSTEM })
            .contains("platform")
    );
}

#[test]
fn an_idempotency_key_returns_the_same_job_or_names_the_difference() {
    let mut cluster = Cluster::new();
    let mut spec = job_spec("once", 0);
    spec.idempotency_key = Some("key".into());
    let (job, driver) = cluster.submit(spec.clone());
    let again = cluster.ok(Command::SubmitJob { spec: spec.clone() });
    assert_eq!(
        again,
        Response::JobSubmitted {
            job,
            driver,
            created: false
        }
    );
    spec.args.push("more".into());
    let rejection = cluster.apply(&Command::SubmitJob { spec }).unwrap_err();
    assert_eq!(rejection.code, ErrorCode::AlreadyExists);
}

#[test]
fn a_stale_driver_neither_sets_a_result_nor_creates_actors() {
    let (mut cluster, job, old) = running();
    cluster.exit(old.actor, ExitReason::HostExited(1));
    cluster.now_ms += 100;
    cluster.place();
    cluster.start(old.actor);
    let ActorIncarnation { actor, incarnation } = old;
    let result_json = "1".to_owned();
    let set = Command::SetJobResult {
        job,
        actor,
        incarnation,
        result_json,
    };
    let create = Command::CreateActors {
        job,
        actors: vec![actor_spec(None, 1)],
        gang: false,
        get_or_create: false,
        creator: Some(old),
    };
    for command in [
        set,
        create,
        Command::YieldActor {
            job,
            actor,
            incarnation,
        },
    ] {
        assert_eq!(
            cluster.apply(&command).unwrap_err().code,
            ErrorCode::Fenced,
            "{command:?}"
        );
    }
}

#[test]
fn names_are_unique_while_their_actor_lives() {
    let (mut cluster, job, _) = running();
    let first = cluster.create(job, vec![actor_spec(Some("n"), 1)], false)[0];
    let mut create = |get_or_create, gang, specs| {
        let actors = specs;
        cluster.apply(&Command::CreateActors {
            job,
            actors,
            gang,
            get_or_create,
            creator: None,
        })
    };
    let same = vec![actor_spec(Some("n"), 1)];
    assert_eq!(
        create(false, false, same.clone()).unwrap_err().code,
        ErrorCode::AlreadyExists
    );
    let taken = create(true, false, same.clone()).unwrap();
    assert_eq!(
        taken,
        Response::ActorsCreated {
            actors: vec![first]
        }
    );
    let mut other = actor_spec(Some("n"), 1);
    other.kind = mobula_core::spec::ActorKind::Actor {
        type_name: "other".into(),
    };
    let refused = create(true, false, vec![other]).unwrap_err();
    assert_eq!(refused.code, ErrorCode::AlreadyExists);
    assert!(
        refused.message.contains("a living `test`, and a `other`"),
        "{refused}"
    );
    let part = vec![actor_spec(Some("n"), 1), actor_spec(Some("m"), 1)];
    assert!(
        create(true, true, part)
            .unwrap_err()
            .message
            .contains("created as a whole")
    );
    cluster.ok(Command::StopActor {
        job: Some(job),
        actor: first,
        grace_ms: 0,
    });
    let second = cluster.create(job, same, false)[0];
    assert_ne!(first, second);
}

#[test]
fn an_actor_is_resolved_by_name_and_by_id_only_in_its_job() {
    let (mut cluster, job, _) = running();
    let actor = cluster.create(job, vec![actor_spec(Some("n"), 1)], false)[0];
    let by_name = Query::ResolveActor {
        job,
        target: ActorTarget::Name("n".into()),
    };
    let resolved = |cluster: &Cluster| match cluster.query(by_name.clone()) {
        QueryResponse::Resolved(resolution) => resolution,
        other => panic!("unexpected {other:?}"),
    };
    let pending = Resolution::NotRunning {
        actor,
        state: "pending".into(),
        last_exit: None,
    };
    assert_eq!(resolved(&cluster), pending);
    cluster.place();
    let incarnation = cluster.start(actor);
    match resolved(&cluster) {
        Resolution::Address(address) => {
            assert_eq!((address.actor, address.incarnation), (actor, incarnation));
        }
        other => panic!("unexpected {other:?}"),
    }
    let ended = |cluster: &Cluster, incarnation| match cluster
        .query(Query::EndedActor { actor, incarnation })
    {
        QueryResponse::Ended { ended, reason } => (ended, reason),
        other => panic!("unexpected {other:?}"),
    };
    assert_eq!(ended(&cluster, incarnation), (false, None));
    cluster.exit(actor, ExitReason::HostExited(3));
    assert_eq!(
        ended(&cluster, incarnation),
        (true, Some(ExitReason::HostExited(3)))
    );
}

#[test]
fn events_take_effect_once_and_ghosts_are_ended() {
    let (mut cluster, _, driver) = running();
    let node = cluster.actor(driver.actor).node.unwrap();
    let exited = WorkerEvent::ActorExited {
        actor: driver.actor,
        incarnation: driver.incarnation,
        reason: ExitReason::HostExited(1),
    };
    cluster.event(node, exited.clone());
    let tables = cluster.tables.clone();
    cluster.event(node, exited);
    assert_eq!(cluster.tables, tables);
    assert_eq!(cluster.effects, []);
    cluster.event(
        node,
        WorkerEvent::ActorStarted {
            actor: driver.actor,
            incarnation: Incarnation(3),
            host: mobula_core::HostId(9),
            call_address: "127.0.0.1:1".into(),
            pid: 1,
        },
    );
    assert_eq!(cluster.orders(), ["node-1 stop actor-1#3 in 0 ms"]);
    assert_eq!(cluster.tables, tables);
}

#[test]
fn a_late_end_of_an_old_incarnation_leaves_the_new_one_alone() {
    let (mut cluster, _, old) = running();
    let node = cluster.actor(old.actor).node.unwrap();
    let reason = ExitReason::HostExited(1);
    let exited = WorkerEvent::ActorExited {
        actor: old.actor,
        incarnation: old.incarnation,
        reason,
    };
    cluster.event(node, exited.clone());
    cluster.now_ms += 100;
    cluster.place();
    let newer = cluster.start(old.actor);
    let tables = cluster.tables.clone();
    let outcome = cluster.event(node, exited);
    assert_eq!(
        outcome,
        Response::Event(mobula_scheduler::EventOutcome::AlreadyKnown)
    );
    assert_eq!(cluster.tables, tables);
    let view = cluster.actor(old.actor);
    assert_eq!(
        (view.state.as_str(), view.incarnation, view.node),
        ("running", newer, Some(node))
    );
}

#[test]
fn what_ends_frees_its_resources_and_asks_for_a_pass() {
    let (mut cluster, _, driver) = running();
    let node = cluster.actor(driver.actor).node.unwrap();
    assert_eq!(cluster.node(node).free.cpu_milli, 7000);
    cluster.exit(driver.actor, ExitReason::Completed);
    assert!(cluster.effects.contains(&Effect::Place));
    assert_eq!(cluster.node(node).free.cpu_milli, 8000);
}

#[test]
fn an_assignment_is_checked_again_when_it_is_applied() {
    let mut cluster = Cluster::new();
    let (node, node_incarnation) = cluster.register("a", "boot-1", 1);
    let actors = cluster.create(JobId::SYSTEM, vec![actor_spec(None, 1); 2], false);
    let gang = cluster.create(JobId::SYSTEM, vec![actor_spec(None, 0); 2], true);
    let to = |actor, node_incarnation| mobula_scheduler::Assignment {
        actor,
        node,
        node_incarnation,
    };
    let response = cluster.ok(Command::Assign {
        assignments: vec![
            to(actors[0], Incarnation(77)),
            to(actors[1], node_incarnation),
            to(actors[0], node_incarnation),
            to(gang[0], node_incarnation),
        ],
    });
    let Response::Assigned { assigned, skipped } = response else {
        panic!("{response:?}")
    };
    assert_eq!(
        assigned.iter().map(|a| a.actor).collect::<Vec<_>>(),
        [actors[1]]
    );
    let reasons: Vec<&str> = skipped.iter().map(|s| s.reason.as_str()).collect();
    assert_eq!(
        reasons,
        [
            "node-1 was started again since",
            "gang: 1 of 2 pending members have a node"
        ]
    );
    let response = cluster.ok(Command::Assign {
        assignments: vec![to(actors[0], node_incarnation)],
    });
    let Response::Assigned { skipped, .. } = response else {
        panic!("{response:?}")
    };
    assert_eq!(
        skipped[0].reason,
        "node-1: not enough free: cpu: asks 1, 0 free"
    );
}

#[test]
fn bad_requests_are_refused_with_the_limit() {
    let (mut cluster, job, driver) = running();
    let mut create = |change: fn(&mut mobula_core::spec::ActorSpec)| {
        let mut spec = actor_spec(None, 1);
        change(&mut spec);
        cluster.refused(Command::CreateActors {
            job,
            actors: vec![spec],
            gang: false,
            get_or_create: false,
            creator: None,
        })
    };
    assert!(create(|s| s.resources.gpu_milli = 1500).contains("1500 thousandths of a GPU"));
    assert!(create(|s| s.init = vec![0; 300_000]).contains("262144"));
    assert!(create(|s| s.mailbox_capacity = 0).contains("capacity of at least 1"));
    assert!(create(|s| s.mailbox_capacity = u32::MAX).contains("the limit is 1048576"));
    assert!(create(|s| s.restart.backoff_max_ms = u64::MAX).contains("lower backoff_max_ms"));
    assert!(create(|s| s.name = Some("x".repeat(200))).contains("limit is 128"));
    assert!(create(|s| s.resources.custom.extend([("x".to_owned(), 0)])).contains("leave it out"));
    let ActorIncarnation { actor, incarnation } = driver;
    let result_json = "x".repeat(70_000);
    let refused = cluster.refused(Command::SetJobResult {
        job,
        actor,
        incarnation,
        result_json,
    });
    assert!(refused.contains("limit is 65536"), "{refused}");
}

#[test]
fn a_job_that_no_worker_could_start_is_refused_at_once() {
    let mut cluster = Cluster::new();
    let mut refused = |change: fn(&mut JobSpec)| {
        let mut spec = job_spec("train", 1);
        change(&mut spec);
        cluster.refused(Command::SubmitJob { spec })
    };
    assert!(refused(|s| s.args.push("a\0b".into())).contains("contains NUL"));
    assert!(refused(|s| drop(s.env.insert("K".into(), "\0".into()))).contains("contains NUL"));
    for name in ["", "A=B", "A\0"] {
        let mut spec = job_spec("train", 1);
        spec.env.insert(name.into(), "v".into());
        let refused = cluster.refused(Command::SubmitJob { spec });
        assert!(
            refused.contains("cannot name an environment variable"),
            "{refused}"
        );
    }
    for blake3 in [String::new(), "../x".into(), "x".repeat(2 << 20)] {
        let mut spec = job_spec("train", 1);
        spec.files.push(mobula_core::spec::JobFile {
            name: "a".into(),
            blake3,
            size_bytes: 1,
        });
        let refused = cluster.refused(Command::SubmitJob { spec });
        assert!(refused.contains("the hash of file `a` is"), "{refused}");
        assert!(refused.len() < 300, "{refused}");
    }
}

#[test]
fn an_error_of_main_is_final_unless_the_job_asks_for_another_try() {
    let error = || ExitReason::Failed("no such column".into());
    let absent = || ExitReason::Unavailable("no leader".into());
    let killed = || ExitReason::OutOfMemory {
        limit_bytes: 64,
        used_bytes: 64,
    };
    for (retry_errors, reason, goes_on) in [
        (false, error(), false),
        (true, error(), true),
        (false, absent(), true),
        (false, killed(), true),
    ] {
        let mut cluster = Cluster::new();
        cluster.register("a", "boot-1", 8);
        let spec = JobSpec {
            retry_errors,
            ..job_spec("train", 2)
        };
        let (job, driver) = cluster.submit(spec);
        cluster.place();
        cluster.start(driver);
        cluster.exit(driver, reason.clone());
        let view = cluster.job(job);
        let expected = if goes_on { "running" } else { "failed" };
        assert_eq!(view.state, expected, "{retry_errors} {reason}");
        assert_eq!(view.restarts, u32::from(goes_on), "{retry_errors} {reason}");
    }
    // An actor's own errors are its policy's business.
    let (mut cluster, job, _) = running();
    let worker = cluster.create(job, vec![actor_spec(None, 1)], false)[0];
    cluster.place();
    cluster.start(worker);
    let before = cluster.actor(worker).restarts;
    cluster.exit(worker, error());
    assert_eq!(cluster.actor(worker).restarts, before + 1);
}
