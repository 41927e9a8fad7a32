//! Workers that join, go, come back, are drained and are given notice.

use mobula_core::order::WorkerEvent;
use mobula_core::{ErrorCode, ExitReason, JobId, NodeId, Resources};
use mobula_scheduler::{Command, EventOutcome, Response, orders_for_node};

use crate::cluster::{Cluster, actor_spec, job_spec, short};

/// Two nodes, and one named actor that runs on the first.
fn two_nodes() -> (Cluster, NodeId, NodeId, mobula_core::ActorId) {
    let mut cluster = Cluster::new();
    let (first, _) = cluster.register("a", "boot-1", 2);
    let (second, _) = cluster.register("b", "boot-1", 4);
    let actor = cluster.create(JobId::SYSTEM, vec![actor_spec(Some("x"), 1)], false)[0];
    cluster.place();
    cluster.start(actor);
    assert_eq!(cluster.actor(actor).node, Some(first));
    (cluster, first, second, actor)
}

#[test]
fn registering_again_changes_nothing_and_a_new_boot_ends_what_ran() {
    let (mut cluster, first, second, actor) = two_nodes();
    let tables = cluster.tables.clone();
    let incarnation = cluster.node(first).incarnation;
    assert_eq!(cluster.register("a", "boot-1", 2), (first, incarnation));
    assert_eq!(cluster.tables, tables);
    let (again, newer) = cluster.register("a", "boot-2", 2);
    assert_eq!(again, first);
    assert!(newer > incarnation);
    let view = cluster.actor(actor);
    assert_eq!(
        (view.state.as_str(), view.exit_code.as_deref()),
        ("pending", Some("node_lost"))
    );
    cluster.place();
    assert!(
        cluster
            .actor(actor)
            .node
            .is_some_and(|node| node == first || node == second)
    );
}

#[test]
fn of_two_workers_of_one_name_the_later_stays() {
    let (mut cluster, first, _, _) = two_nodes();
    let (_, later) = cluster.register("a", "boot-2", 2);
    let earlier = Command::RegisterNode {
        name: "a".into(),
        boot_id: "boot-1".into(),
        capacity: Resources::cpu_milli(2000),
        labels: Default::default(),
        version: "0.1.0".into(),
    };
    let text = cluster.refused(earlier.clone());
    assert!(text.contains("started again somewhere"), "{text}");
    assert_eq!(cluster.node(first).incarnation, later);
    // A restart of either machine is a new start.
    let (_, newest) = cluster.register("a", "boot-3", 2);
    assert!(newest > later);
    // Once the later ones are gone, the earlier one may have its name back.
    cluster.ok(Command::NodeLost {
        node: first,
        incarnation: newest,
    });
    let back = cluster.ok(earlier);
    assert!(matches!(back, Response::Registered { node, .. } if node == first));
}

#[test]
fn a_lost_node_never_comes_back_under_its_incarnation() {
    let (mut cluster, first, second, actor) = two_nodes();
    let incarnation = cluster.node(first).incarnation;
    let lost = Command::NodeLost {
        node: first,
        incarnation,
    };
    assert_eq!(
        cluster.ok(lost.clone()),
        Response::Event(EventOutcome::Applied)
    );
    assert_eq!(
        cluster.ok(lost),
        Response::Event(EventOutcome::AlreadyKnown)
    );
    cluster.place();
    assert_eq!(cluster.actor(actor).node, Some(second));
    // NodeLost does not count against the actor's budget, and is not waited for.
    assert_eq!(cluster.actor(actor).restarts, 1);
    let late = Command::NodeEvent {
        node: first,
        incarnation,
        event: WorkerEvent::ActorExited {
            actor,
            incarnation: cluster.actor(actor).incarnation,
            reason: ExitReason::Completed,
        },
    };
    let fenced = Response::Event(EventOutcome::Fenced {
        current: incarnation,
    });
    assert_eq!(cluster.ok(late), fenced);
    assert_eq!(orders_for_node(&cluster.tables, first), []);
    let (_, newer) = cluster.register("a", "boot-1", 2);
    assert!(newer > incarnation);
    assert_eq!(cluster.node(first).state, "alive");
    let stale = Command::NodeLost {
        node: first,
        incarnation,
    };
    let fenced = Response::Event(EventOutcome::Fenced { current: newer });
    assert_eq!(cluster.ok(stale), fenced);
}

#[test]
fn an_actor_yields_a_noticed_node_and_starts_elsewhere_at_once() {
    let (mut cluster, first, second, actor) = two_nodes();
    let incarnation = cluster.actor(actor).incarnation;
    let yielding = Command::YieldActor {
        job: JobId::SYSTEM,
        actor,
        incarnation,
    };
    assert!(cluster.refused(yielding.clone()).contains("no notice"));
    let deadline_ms = cluster.now_ms + 5_000;
    let noticed = cluster.ok(Command::PreemptNode {
        node: first,
        grace_ms: 5_000,
    });
    assert_eq!(noticed, Response::Noticed { deadline_ms });
    assert_eq!(cluster.orders(), ["node-1 notice 6000"]);
    // A later deadline does not prolong it.
    let noticed = cluster.ok(Command::PreemptNode {
        node: first,
        grace_ms: 9_000,
    });
    assert_eq!(noticed, Response::Noticed { deadline_ms });
    assert_eq!(cluster.node(first).state, "noticed");
    cluster.ok(yielding);
    assert_eq!(
        cluster.orders(),
        [format!("node-1 stop actor-1{incarnation} in 0 ms")]
    );
    cluster.place();
    let view = cluster.actor(actor);
    assert_eq!(
        (view.node, view.exit_code.as_deref()),
        (Some(second), Some("preempted"))
    );
    cluster.event(first, WorkerEvent::NoticeWithdrawn);
    assert_eq!(cluster.node(first).state, "alive");
}

#[test]
fn draining_a_node_fails_no_job_however_few_restarts_its_driver_has() {
    let mut cluster = Cluster::new();
    let (first, _) = cluster.register("a", "boot-1", 2);
    let (job, driver) = cluster.submit(job_spec("once", 0));
    cluster.place();
    cluster.start(driver);
    let (second, _) = cluster.register("b", "boot-1", 2);
    cluster.ok(Command::DrainNode {
        node: first,
        on: true,
    });
    cluster.exit(driver, ExitReason::HostSignaled(9));
    cluster.place();
    assert_eq!(cluster.actor(driver).node, Some(second));
    assert_eq!(cluster.job(job).state, "running");
    cluster.start(driver);
    // What it does itself is another matter.
    cluster.exit(driver, ExitReason::HostSignaled(9));
    assert_eq!(cluster.job(job).state, "failed");
}

#[test]
fn draining_moves_actors_within_their_grace() {
    let (mut cluster, first, second, actor) = two_nodes();
    let incarnation = cluster.actor(actor).incarnation;
    cluster.ok(Command::DrainNode {
        node: first,
        on: true,
    });
    assert_eq!(
        cluster.orders(),
        [format!("node-1 stop actor-1{incarnation} in 30000 ms")]
    );
    assert_eq!(cluster.node(first).state, "draining");
    cluster.exit(actor, ExitReason::HostSignaled(15));
    cluster.place();
    let view = cluster.actor(actor);
    assert_eq!(
        (view.node, view.exit_code.as_deref()),
        (Some(second), Some("preempted"))
    );
    cluster.ok(Command::DrainNode {
        node: first,
        on: false,
    });
    assert_eq!(cluster.node(first).state, "alive");
}

#[test]
fn a_worker_that_reconnects_hears_everything_again() {
    let (mut cluster, first, _, running) = two_nodes();
    let stopping = cluster.create(JobId::SYSTEM, vec![actor_spec(None, 1)], false)[0];
    cluster.place();
    cluster.ok(Command::StopActor {
        job: None,
        actor: stopping,
        grace_ms: 700,
    });
    cluster.ok(Command::PreemptNode {
        node: first,
        grace_ms: 1_000,
    });
    let orders: Vec<String> = orders_for_node(&cluster.tables, first)
        .iter()
        .map(short)
        .collect();
    let (a, b) = (
        cluster.actor(running).incarnation,
        cluster.actor(stopping).incarnation,
    );
    assert_eq!(
        orders,
        [
            "notice 2000".to_owned(),
            format!("start actor-1{a}"),
            format!("stop actor-2{b} in 700 ms")
        ]
    );
}

#[test]
fn a_worker_may_grow_but_not_shrink_below_what_it_gave_away() {
    let (mut cluster, first, _, _) = two_nodes();
    cluster.register("a", "boot-1", 16);
    assert_eq!(cluster.node(first).capacity.cpu_milli, 16_000);
    let rejection = cluster
        .apply(&Command::RegisterNode {
            name: "a".into(),
            boot_id: "boot-1".into(),
            capacity: Resources::cpu_milli(500),
            labels: Default::default(),
            version: "0.1.0".into(),
        })
        .unwrap_err();
    assert_eq!(rejection.code, ErrorCode::FailedPrecondition);
    assert!(
        rejection.message.contains("cpu: asks 1, 0.5 free"),
        "{}",
        rejection.message
    );
}
