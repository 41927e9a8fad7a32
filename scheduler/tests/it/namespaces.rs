//! Namespaces, and actors that outlive the job that made them.

use mobula_core::namespace::NamespaceEntry;
use mobula_core::order::Order;
use mobula_core::secret::Secret;
use mobula_core::spec::{ActorSpec, JobSpec};
use mobula_core::{ActorId, ErrorCode, ExitReason, JobId, NodeId, Rejection};
use mobula_scheduler::limits::{DETACHED_JOBS_MAX, NAMESPACES_MAX};
use mobula_scheduler::{
    ActorIncarnation, Command, Query, QueryResponse, Response, explain_actor, explain_job,
    orders_for_node,
};

use crate::cluster::{Cluster, actor_spec, job_spec};

/// A job of `principal` in `namespace`.
fn job_in(namespace: &str, principal: &str) -> JobSpec {
    let mut spec = job_spec("visitor", 2);
    spec.namespace = Some(NamespaceEntry {
        name: namespace.to_owned(),
        principal: principal.to_owned(),
    });
    spec
}

fn detached(name: &str) -> ActorSpec {
    let mut spec = actor_spec(Some(name), 1);
    spec.detached = true;
    spec
}

fn creation(job: JobId, actors: Vec<ActorSpec>, get_or_create: bool) -> Command {
    Command::CreateActors {
        job,
        actors,
        gang: false,
        get_or_create,
        creator: None,
    }
}

fn refusal(cluster: &mut Cluster, command: &Command) -> Rejection {
    cluster.apply(command).expect_err("it is not allowed")
}

/// A cluster with one large node and a running job of `ann` in `shop`.
fn open_shop() -> (Cluster, JobId, ActorId) {
    let mut cluster = Cluster::new();
    cluster.register("a", "boot-1", 64);
    let (job, driver) = submit(&mut cluster, job_in("shop", "ann"));
    (cluster, job, driver)
}

/// Submits a job, whose driver runs then.
fn submit(cluster: &mut Cluster, spec: JobSpec) -> (JobId, ActorId) {
    let (job, driver) = cluster.submit(spec);
    cluster.place();
    cluster.start(driver);
    (job, driver)
}

/// Creates a detached actor, which runs then; the actor and the job that keeps it.
fn keep(cluster: &mut Cluster, creator: JobId, name: &str) -> (ActorId, JobId) {
    let actor = cluster.create(creator, vec![detached(name)], false)[0];
    cluster.place();
    cluster.start(actor);
    (actor, cluster.actor(actor).job)
}

#[test]
fn a_detached_actor_outlives_its_job_and_is_found_by_the_next() {
    let (mut cluster, job, driver) = open_shop();
    let (till, home) = keep(&mut cluster, job, "till");
    assert_ne!(home, job);
    let view = cluster.job(home);
    assert_eq!(
        (view.state.as_str(), view.driver, view.detached_actors),
        ("running", None, Some(1))
    );
    assert_eq!(view.name, "detached-shop");
    cluster.exit(driver, ExitReason::Completed);
    assert_eq!(cluster.job(job).state, "succeeded");
    assert_eq!(cluster.actor(till).state, "running");
    assert!(cluster.actor(till).detached);

    // Another job of the namespace takes it, and is refused to make it anew.
    let (second, _) = submit(&mut cluster, job_in("shop", "ann"));
    let found = cluster.ok(creation(second, vec![detached("till")], true));
    assert_eq!(found, Response::ActorsCreated { actors: vec![till] });
    let refused = cluster.refused(creation(second, vec![detached("till")], false));
    assert!(
        refused.contains("namespace `shop` has a living actor called `till` (actor-2)"),
        "{refused}"
    );
    // Also one that is not detached is unique in the namespace.
    let plain = actor_spec(Some("till"), 1);
    let refused = cluster.refused(creation(second, vec![plain], false));
    assert!(refused.contains("use get-or-create"), "{refused}");
    let query = Query::ActorInNamespace {
        namespace: "shop".into(),
        name: "till".into(),
    };
    let QueryResponse::Actor(found) = cluster.query(query) else {
        panic!("not an actor");
    };
    assert_eq!(found.actor, till);

    // Nothing of a job in no namespace, or in another one, is seen or shared.
    let (other, _) = submit(&mut cluster, job_in("farm", "ann"));
    let (alone, _) = submit(&mut cluster, job_spec("alone", 0));
    for stranger in [other, alone] {
        cluster.create(stranger, vec![actor_spec(Some("till"), 1)], false);
        for (one, two) in [(home, stranger), (stranger, home), (alone, alone)] {
            let query = Query::SharesNamespace {
                job: one,
                other: two,
            };
            assert_eq!(cluster.query(query), QueryResponse::IsShared(false));
        }
    }
    let query = Query::SharesNamespace {
        job: second,
        other: home,
    };
    assert_eq!(cluster.query(query), QueryResponse::IsShared(true));
}

#[test]
fn its_job_ends_with_its_last_actor_and_with_what_those_made() {
    let (mut cluster, job, driver) = open_shop();
    let (till, home) = keep(&mut cluster, job, "till");
    let (ledger, same) = keep(&mut cluster, job, "ledger");
    assert_eq!(same, home);
    // What a detached actor makes belongs to its job; one that is detached too is one more to keep.
    let creator = ActorIncarnation {
        actor: till,
        incarnation: cluster.actor(till).incarnation,
    };
    let made = cluster.ok(Command::CreateActors {
        job: home,
        actors: vec![actor_spec(None, 1)],
        gang: false,
        get_or_create: false,
        creator: Some(creator),
    });
    let Response::ActorsCreated { actors } = made else {
        panic!("{made:?}");
    };
    let helper = actors[0];
    cluster.place();
    cluster.start(helper);
    assert_eq!(cluster.actor(helper).job, home);
    let (sign, same) = keep(&mut cluster, home, "sign");
    assert_eq!(same, home);
    cluster.exit(driver, ExitReason::Completed);

    let stop = |actor| Command::StopActor {
        job: None,
        actor,
        grace_ms: 10,
    };
    for (actor, left) in [(ledger, 2), (sign, 1)] {
        cluster.ok(stop(actor));
        cluster.exit(actor, ExitReason::Stopped);
        let view = cluster.job(home);
        assert_eq!(
            (view.state.as_str(), view.detached_actors),
            ("running", Some(left))
        );
    }
    // The last one runs out of restarts: so the job has failed, and its helper is stopped.
    for restart in 0..3 {
        cluster.exit(till, ExitReason::Panicked("no more".into()));
        cluster.now_ms += 10_000;
        cluster.place();
        if restart < 2 {
            cluster.start(till);
        }
    }
    assert_eq!(cluster.job(home).state, "stopping");
    assert_eq!(cluster.actor(helper).state, "stopping");
    cluster.exit(helper, ExitReason::Stopped);
    let view = cluster.job(home);
    assert_eq!(
        (view.state.as_str(), view.exit_reason.as_deref()),
        ("failed", Some("panicked: no more"))
    );
    // So nobody is in the namespace, and it is anybody's.
    let (_, driver) = submit(&mut cluster, job_in("shop", "bob"));
    cluster.exit(driver, ExitReason::Completed);
}

#[test]
fn a_namespace_is_its_first_principals_as_long_as_a_job_lives_in_it() {
    let (mut cluster, job, driver) = open_shop();
    let intruder = Command::SubmitJob {
        spec: job_in("shop", "bob"),
    };
    let refused = refusal(&mut cluster, &intruder);
    assert_eq!(refused.code, ErrorCode::PermissionDenied);
    assert!(
        refused.message.contains("belongs to `ann`") && refused.message.contains("from `bob`"),
        "{refused}"
    );
    // A detached actor keeps it for its owner.
    let (till, home) = keep(&mut cluster, job, "till");
    cluster.exit(driver, ExitReason::Completed);
    refusal(&mut cluster, &intruder);
    cluster.ok(Command::StopJob { job: home });
    refusal(&mut cluster, &intruder);
    cluster.exit(till, ExitReason::Stopped);
    assert_eq!(cluster.job(home).state, "stopped");

    // The name begins another life, which the old one's certificates are not of.
    let before = cluster.job(job).namespace.unwrap();
    let (next, _) = submit(&mut cluster, job_in("shop", "bob"));
    let after = cluster.job(next).namespace.unwrap();
    assert_eq!(before.name, after.name);
    assert!(before.incarnation < after.incarnation);
    let query = Query::SharesNamespace { job, other: next };
    assert_eq!(cluster.query(query), QueryResponse::IsShared(false));
}

#[test]
fn stopping_the_creator_leaves_it_and_stopping_its_job_ends_it() {
    let (mut cluster, job, driver) = open_shop();
    let (till, home) = keep(&mut cluster, job, "till");
    cluster.ok(Command::StopJob { job });
    cluster.exit(driver, ExitReason::Stopped);
    assert_eq!(cluster.job(job).state, "stopped");
    assert_eq!(cluster.actor(till).state, "running");
    // Its node is lost: it starts elsewhere, though its creator is long gone.
    let (node, incarnation) = (NodeId(1), cluster.node(NodeId(1)).incarnation);
    cluster.ok(Command::NodeLost { node, incarnation });
    cluster.register("b", "boot-1", 64);
    cluster.place();
    cluster.start(till);
    assert_eq!(cluster.actor(till).node, Some(NodeId(2)));

    cluster.ok(Command::StopJob { job: home });
    cluster.exit(till, ExitReason::Stopped);
    let view = cluster.job(home);
    assert_eq!((view.state.as_str(), view.finished), ("stopped", true));
}

#[test]
fn jobs_of_a_namespace_may_stop_each_others_actors_but_not_drivers() {
    let (mut cluster, job, driver) = open_shop();
    let (till, _) = keep(&mut cluster, job, "till");
    let (second, _) = submit(&mut cluster, job_in("shop", "ann"));
    let (alone, _) = submit(&mut cluster, job_spec("alone", 0));
    let stop = |job, actor| Command::StopActor {
        job: Some(job),
        actor,
        grace_ms: 10,
    };
    let refused = refusal(&mut cluster, &stop(alone, till));
    assert_eq!(refused.code, ErrorCode::PermissionDenied);
    let refused = refusal(&mut cluster, &stop(second, driver));
    assert_eq!(refused.code, ErrorCode::PermissionDenied);
    cluster.ok(stop(second, till));
    assert_eq!(cluster.actor(till).state, "stopping");
}

#[test]
fn what_cannot_be_detached_is_refused_with_what_is_missing() {
    let (mut cluster, job, _) = open_shop();
    let (alone, _) = submit(&mut cluster, job_spec("alone", 0));
    let mut nameless = detached("x");
    nameless.name = None;
    let cases = [
        (alone, vec![detached("x")], "`mobula submit --namespace`"),
        (JobId::SYSTEM, vec![detached("x")], "is in no namespace"),
        (job, vec![nameless], "has no name"),
        (
            job,
            vec![detached("x"), actor_spec(None, 1)],
            "1 of these 2 actors are detached",
        ),
    ];
    for (job, actors, expected) in cases {
        let refused = cluster.refused(creation(job, actors, true));
        assert!(refused.contains(expected), "{expected}: {refused}");
    }
    // What ends with its job is not taken for what does not.
    let plain = cluster.create(job, vec![actor_spec(Some("plain"), 1)], false)[0];
    let refused = cluster.refused(creation(job, vec![detached("plain")], true));
    assert!(refused.contains("ends with job-1"), "{refused}");
    let (till, _) = keep(&mut cluster, job, "till");
    let taken = cluster.ok(creation(job, vec![actor_spec(Some("till"), 1)], true));
    assert_eq!(taken, Response::ActorsCreated { actors: vec![till] });
    assert_eq!(cluster.actor(plain).job, job);
    for name in ["", "Shop", "a/b", &"a".repeat(64)] {
        let spec = job_in(name, "ann");
        let refused = cluster.refused(Command::SubmitJob { spec });
        assert!(refused.contains("1 to 63"), "{name}: {refused}");
    }
}

#[test]
fn it_sees_what_its_creators_job_saw() {
    let (mut cluster, job, driver) = open_shop();
    let (till, home) = keep(&mut cluster, job, "till");
    // The arguments are the driver's; the environment is everybody's.
    let starts = |cluster: &Cluster, actor: ActorId| {
        let orders = orders_for_node(&cluster.tables, NodeId(1));
        orders
            .into_iter()
            .find_map(|order| match order {
                Order::Start(start) if start.actor == actor => Some(*start),
                _ => None,
            })
            .expect("it runs there")
    };
    let start = starts(&cluster, till);
    assert_eq!((start.job, start.args), (home, vec![]));
    assert_eq!(start.env.get("KEY").map(String::as_str), Some("value"));

    // The same program with the same environment: the same job, whatever else differs.
    let mut same = job_in("shop", "ann");
    same.name = "another".into();
    same.args = vec!["else".into()];
    same.idempotency_key = Some("k".into());
    let (same, _) = submit(&mut cluster, same);
    assert_eq!(keep(&mut cluster, same, "second").1, home);

    // Another environment, or secrets of another submission: another job.
    let mut other_env = job_in("shop", "ann");
    other_env.env.insert("MORE".into(), "1".into());
    let (other_env, _) = submit(&mut cluster, other_env);
    let (_, second_home) = keep(&mut cluster, other_env, "third");
    assert_ne!(second_home, home);
    let sealed = |bytes: &[u8]| {
        let mut spec = job_in("shop", "ann");
        let secret = Secret::new(bytes.to_vec());
        spec.secrets = [("TOKEN".to_owned(), secret)].into();
        spec
    };
    let (first, first_driver) = submit(&mut cluster, sealed(b"one"));
    let (second, _) = submit(&mut cluster, sealed(b"two"));
    let (fourth, third_home) = keep(&mut cluster, first, "fourth");
    let (_, fourth_home) = keep(&mut cluster, second, "fifth");
    assert_ne!(third_home, fourth_home);
    // Its creator's secrets are its own: they stay when the creator's are forgotten.
    cluster.exit(first_driver, ExitReason::Completed);
    assert!(cluster.job(first).finished);
    let kept = starts(&cluster, fourth).secrets;
    assert_eq!(kept["TOKEN"].reveal(), b"one");
    cluster.exit(driver, ExitReason::Completed);
}

#[test]
fn the_bounds_hold() {
    let (mut cluster, _, driver) = open_shop();
    for number in 0..=DETACHED_JOBS_MAX {
        let mut spec = job_in("shop", "ann");
        spec.env.insert("NUMBER".into(), number.to_string());
        let (job, _) = cluster.submit(spec);
        let name = format!("actor-{number}");
        let command = creation(job, vec![detached(&name)], false);
        if number < DETACHED_JOBS_MAX {
            cluster.ok(command);
        } else {
            let refused = refusal(&mut cluster, &command);
            assert_eq!(refused.code, ErrorCode::Overloaded);
            assert!(refused.message.contains("the limit is 64"), "{refused}");
            // What is there already is still found.
            cluster.ok(creation(job, vec![detached("actor-0")], true));
        }
    }
    cluster.exit(driver, ExitReason::Completed);
}

#[test]
fn namespaces_are_bounded_and_what_is_over_counts_no_more() {
    let mut cluster = Cluster::new();
    for number in 0..NAMESPACES_MAX {
        let spec = job_in(&format!("n{number}"), "ann");
        // Without the checks after each: there are thousands.
        cluster.quietly(&Command::SubmitJob { spec }).unwrap();
    }
    let one_more = Command::SubmitJob {
        spec: job_in("more", "ann"),
    };
    let refused = cluster.quietly(&one_more).unwrap_err();
    assert_eq!(refused.code, ErrorCode::Overloaded);
    cluster.ok(Command::StopJob { job: JobId(1) });
    cluster.ok(one_more);
}

#[test]
fn an_explanation_says_what_keeps_it() {
    let (mut cluster, job, _) = open_shop();
    let (till, home) = keep(&mut cluster, job, "till");
    let why = explain_actor(&cluster.tables, till, cluster.now_ms).unwrap();
    assert!(
        why.verdict
            .contains("detached: it lives in namespace `shop`"),
        "{}",
        why.verdict
    );
    let why = explain_job(&cluster.tables, home, cluster.now_ms).unwrap();
    assert!(
        why.verdict
            .contains("lives with its detached actors in namespace `shop`, of which there is 1"),
        "{}",
        why.verdict
    );
    let why = explain_job(&cluster.tables, job, cluster.now_ms).unwrap();
    assert_eq!(why.verdict, "all 1 living actors run");
}
