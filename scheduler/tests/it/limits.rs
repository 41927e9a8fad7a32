//! Tables stay within their bounds however much has happened.

use mobula_core::control::{ApplyContext, StateModule};
use mobula_core::label::Requirement;
use mobula_core::{ActorId, JobId};
use mobula_scheduler::limits::{
    ENDED_ACTORS_BYTES_MAX, ENDED_JOBS_BYTES_MAX, FINISHED_ACTORS_KEPT, FINISHED_JOBS_KEPT,
};
use mobula_scheduler::memory_txn::MemoryTables;
use mobula_scheduler::{Command, Query, QueryResponse, Response, Scheduler, invariants};

use crate::cluster::{Cluster, actor_spec, job_spec};

/// Tables to which many commands are applied without a copy before each.
#[derive(Default)]
struct Log {
    tables: MemoryTables,
    index: u64,
}

impl Log {
    fn apply(&mut self, command: &Command) -> Response {
        self.index += 1;
        let context = ApplyContext {
            index: self.index,
            term: 1,
            now_ms: 1_000,
        };
        let applied = Scheduler
            .apply(&context, &mut self.tables, &command.encode())
            .unwrap();
        Response::decode(&applied.response).unwrap()
    }

    fn finds(&self, query: &Query) -> bool {
        Scheduler
            .query(&self.tables, 1_000, &query.encode())
            .is_ok()
    }

    fn jobs_finished(&self) -> u64 {
        let bytes = Scheduler
            .query(&self.tables, 1_000, &Query::Status.encode())
            .unwrap();
        match QueryResponse::decode(&bytes).unwrap() {
            QueryResponse::Status(status) => status.jobs_finished,
            other => panic!("unexpected {other:?}"),
        }
    }
}

#[test]
fn the_oldest_ended_job_goes_with_its_actors_and_its_key() {
    let mut log = Log::default();
    let mut spec = job_spec("job", 0);
    for number in 0..=FINISHED_JOBS_KEPT {
        spec.idempotency_key = Some(number.to_string());
        let response = log.apply(&Command::SubmitJob { spec: spec.clone() });
        let Response::JobSubmitted { job, .. } = response else {
            panic!("{response:?}")
        };
        log.apply(&Command::StopJob { job });
    }
    assert_eq!(log.jobs_finished(), FINISHED_JOBS_KEPT);
    assert!(!log.finds(&Query::Job { job: JobId(1) }));
    assert!(!log.finds(&Query::Actor { actor: ActorId(1) }));
    assert!(log.finds(&Query::Job { job: JobId(2) }));
    spec.idempotency_key = Some("0".to_owned());
    let response = log.apply(&Command::SubmitJob { spec });
    assert!(
        matches!(response, Response::JobSubmitted { created: true, .. }),
        "{response:?}"
    );
    invariants::check(&log.tables).unwrap();
}

#[test]
fn the_oldest_ended_actors_go_even_in_a_job_that_never_ends() {
    let mut log = Log::default();
    let mut created = 0;
    while created <= FINISHED_ACTORS_KEPT {
        let command = Command::CreateActors {
            job: JobId::SYSTEM,
            actors: vec![actor_spec(None, 1); 1000],
            gang: false,
            get_or_create: false,
            creator: None,
        };
        let Response::ActorsCreated { actors } = log.apply(&command) else {
            panic!()
        };
        created += actors.len() as u64;
        for actor in actors {
            log.apply(&Command::StopActor {
                job: None,
                actor,
                grace_ms: 0,
            });
        }
    }
    let forgotten = created - FINISHED_ACTORS_KEPT;
    assert!(!log.finds(&Query::Actor {
        actor: ActorId(forgotten)
    }));
    assert!(log.finds(&Query::Actor {
        actor: ActorId(forgotten + 1)
    }));
    invariants::check(&log.tables).unwrap();
}

/// Few large ones go as many small ones do.
#[test]
fn the_oldest_that_ended_go_also_by_their_bytes() {
    let mut log = Log::default();
    let mut spec = job_spec("job", 0);
    spec.args = vec!["x".repeat(60 << 10)];
    let jobs = ENDED_JOBS_BYTES_MAX / (60 << 10) + 1;
    for _ in 0..jobs {
        let response = log.apply(&Command::SubmitJob { spec: spec.clone() });
        let Response::JobSubmitted { job, .. } = response else {
            panic!("{response:?}")
        };
        log.apply(&Command::StopJob { job });
    }
    assert!(log.jobs_finished() < jobs);
    assert!(!log.finds(&Query::Job { job: JobId(1) }));
    assert!(log.finds(&Query::Job { job: JobId(jobs) }));

    let mut spec = actor_spec(None, 1);
    let values = (0..200).map(|number| format!("{number:0>100}")).collect();
    spec.placement.selector = vec![Requirement::In("zone".into(), values)];
    // Each row has the names: 20 KB in each of three.
    let actors = ENDED_ACTORS_BYTES_MAX / 60_000 + 1;
    let mut made = Vec::new();
    for _ in 0..actors {
        let command = Command::CreateActors {
            job: JobId::SYSTEM,
            actors: vec![spec.clone()],
            gang: false,
            get_or_create: false,
            creator: None,
        };
        let Response::ActorsCreated { actors } = log.apply(&command) else {
            panic!()
        };
        let actor = actors[0];
        log.apply(&Command::StopActor {
            job: None,
            actor,
            grace_ms: 0,
        });
        made.push(actor);
    }
    assert!(!log.finds(&Query::Actor { actor: made[0] }));
    let newest = made[made.len() - 1];
    assert!(log.finds(&Query::Actor { actor: newest }));
    invariants::check(&log.tables).unwrap();
}

/// A row that is larger than what is read back would stop every head at once.
#[test]
fn nothing_of_a_request_is_unbounded() {
    let mut cluster = Cluster::new();
    let long = "x".repeat(2 << 20);
    let select = |requirement| {
        let mut spec = job_spec("job", 0);
        spec.placement.selector = vec![requirement];
        spec
    };
    let with = |change: fn(&mut mobula_core::spec::JobSpec)| {
        let mut spec = job_spec("job", 0);
        change(&mut spec);
        spec
    };
    let mut custom = job_spec("job", 0);
    custom.resources.custom.insert(long.clone(), 1);
    let many = vec![String::new(); 200_000];
    let cases = [
        (
            with(|spec| spec.args = vec![String::new(); 200_000]),
            "has 200000 arguments",
        ),
        (
            with(|spec| spec.env = (0..5_000).map(|n| (n.to_string(), String::new())).collect()),
            "has 5000 arguments or environment variables",
        ),
        (custom, "a custom resource's name has"),
        (
            select(Requirement::Exists(long.clone())),
            "a selector's label has",
        ),
        (
            select(Requirement::In("zone".into(), vec![long])),
            "a value for the selector's label `zone` has",
        ),
        (
            select(Requirement::NotIn("zone".into(), many)),
            "names 200001 labels, values and custom resources",
        ),
    ];
    for (spec, expected) in cases {
        let actor = mobula_core::spec::ActorSpec {
            placement: spec.placement.clone(),
            resources: spec.resources.clone(),
            ..actor_spec(None, 1)
        };
        let refused = cluster.refused(Command::SubmitJob { spec });
        assert!(refused.contains(expected), "{refused}");
        if !expected.contains("arguments") {
            let refused = cluster.refused(Command::CreateActors {
                job: JobId::SYSTEM,
                actors: vec![actor],
                gang: false,
                get_or_create: false,
                creator: None,
            });
            assert!(refused.contains(expected), "{refused}");
        }
    }
}

#[test]
fn thousands_that_want_the_same_in_vain_hide_nobody() {
    let mut cluster = Cluster::new();
    let (node, _) = cluster.register("a", "boot-1", 4);
    for _ in 0..3 {
        cluster.create(JobId::SYSTEM, vec![actor_spec(None, 99); 1000], false);
        cluster.create(JobId::SYSTEM, vec![actor_spec(None, 99); 100], true);
    }
    for number in 0..20 {
        let mut spec = job_spec(&number.to_string(), 0);
        spec.resources.cpu_milli = 99_000;
        cluster.submit(spec);
    }
    let modest = cluster.create(JobId::SYSTEM, vec![actor_spec(None, 1)], false)[0];
    cluster.place();
    assert_eq!(cluster.actor(modest).node, Some(node));
}

#[test]
fn an_ended_actor_keeps_no_constructor_argument() {
    let mut cluster = Cluster::new();
    let mut spec = actor_spec(None, 1);
    spec.init = vec![7; 200 << 10];
    let actor = cluster.create(JobId::SYSTEM, vec![spec], false)[0];
    let living = cluster.tables.value_bytes();
    cluster.ok(Command::StopActor {
        job: None,
        actor,
        grace_ms: 0,
    });
    assert_eq!(cluster.actor(actor).type_name, "test");
    let ended = cluster.tables.value_bytes();
    assert!(living - ended > 199 << 10, "{living} bytes, then {ended}");
}
