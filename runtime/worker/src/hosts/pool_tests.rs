//! Sequences of inputs, and what must come out.

use super::SHARED_ACTORS_MAX;
use super::*;
use mobula_core::exit::AGENT_LOST_EXIT_CODE;
use mobula_core::spec::{ActorKind, ActorSpec};
use mobula_wire::host::HostMessage;

fn pool() -> Pool {
    Pool::new(Devices::new(vec!["gpu-a".into()]))
}

fn start_of(actor: u64, incarnation: u64) -> StartActor {
    StartActor {
        actor: ActorId(actor),
        incarnation: Incarnation(incarnation),
        job: JobId(1),
        program: Program::Builtin,
        spec: ActorSpec::of_type("t"),
        args: Vec::new(),
        env: BTreeMap::new(),
        files: Vec::new(),
        secrets: Default::default(),
    }
}

fn driver(actor: u64, incarnation: u64) -> StartActor {
    let mut start = start_of(actor, incarnation);
    start.spec.kind = ActorKind::Driver;
    start
}

fn gpu(actor: u64, milli: u64) -> StartActor {
    let mut start = start_of(actor, 1);
    start.spec.resources.gpu_milli = milli;
    start
}

fn launches(actions: &[Action]) -> Vec<HostId> {
    let launch = |action: &Action| match action {
        Action::Launch(launch) => Some(launch.host),
        _ => None,
    };
    actions.iter().filter_map(launch).collect()
}

fn reports(actions: &[Action]) -> Vec<String> {
    let report = |action: &Action| match action {
        Action::Report(WorkerEvent::ActorStarted {
            actor, incarnation, ..
        }) => Some(format!("{actor}{incarnation} started")),
        Action::Report(WorkerEvent::ActorExited {
            actor,
            incarnation,
            reason,
        }) => Some(format!("{actor}{incarnation} {reason}")),
        _ => None,
    };
    actions.iter().filter_map(report).collect()
}

fn kills(actions: &[Action]) -> Vec<HostId> {
    let kill = |action: &Action| match action {
        Action::Kill(host) => Some(*host),
        _ => None,
    };
    actions.iter().filter_map(kill).collect()
}

/// Starts an actor and brings it to life; the host is the last that was launched.
fn run(pool: &mut Pool, start: StartActor) -> HostId {
    let (actor, incarnation) = (start.actor, start.incarnation);
    pool.start(Box::new(start));
    for host in launches(&pool.take_actions()) {
        pool.launched(host, 100 + host.0 as u32);
        pool.connected(host, format!("127.0.0.1:{}", host.0));
    }
    let host = pool.actors[&(actor, incarnation)].host.unwrap();
    pool.message(host, HostMessage::Started { actor, incarnation });
    assert_eq!(reports(&pool.take_actions()).len(), 1);
    host
}

fn exit(pool: &mut Pool, host: HostId, actor: u64, reason: ExitReason) {
    let (actor, incarnation) = (ActorId(actor), Incarnation(1));
    pool.message(
        host,
        HostMessage::Exited {
            actor,
            incarnation,
            reason,
        },
    );
}

#[test]
fn actors_of_a_job_share_a_host_and_the_last_one_closes_it() {
    let mut pool = pool();
    let host = run(&mut pool, start_of(1, 1));
    assert_eq!(run(&mut pool, start_of(2, 1)), host);
    exit(&mut pool, host, 1, ExitReason::Completed);
    let actions = pool.take_actions();
    assert_eq!(reports(&actions), ["actor-1#1 completed"]);
    assert_eq!(actions.len(), 1, "the host goes on: {actions:?}");
    exit(&mut pool, host, 2, ExitReason::Completed);
    let actions = pool.take_actions();
    assert!(
        matches!(actions[1], Action::Send(_, AgentMessage::Shutdown { .. })),
        "{actions:?}"
    );
    // A new actor finds a new host, not the one that is closing.
    assert_ne!(run(&mut pool, start_of(3, 1)), host);
    pool.alarm(Alarm::Shutdown(host));
    assert_eq!(kills(&pool.take_actions()), [host]);
}

#[test]
fn a_shared_host_that_is_full_is_followed_by_another() {
    let mut pool = pool();
    let first = run(&mut pool, start_of(1, 1));
    for actor in 2..=SHARED_ACTORS_MAX as u64 {
        assert_eq!(run(&mut pool, start_of(actor, 1)), first);
    }
    let next = SHARED_ACTORS_MAX as u64 + 1;
    let second = run(&mut pool, start_of(next, 1));
    assert_ne!(second, first);
    // It stays the one that takes actors, though the first has room again.
    exit(&mut pool, first, 1, ExitReason::Completed);
    pool.take_actions();
    assert_eq!(run(&mut pool, start_of(next + 1, 1)), second);
}

#[test]
fn slots_for_tasks_share_a_host_without_actors() {
    let mut pool = pool();
    let actors = run(&mut pool, start_of(1, 1));
    let slot = |actor| {
        let mut start = start_of(actor, 1);
        start.spec.kind = ActorKind::Actor {
            type_name: mobula_core::spec::TASK_SLOT_TYPE.to_owned(),
        };
        start
    };
    let tasks = run(&mut pool, slot(2));
    assert_ne!(tasks, actors);
    assert_eq!(run(&mut pool, slot(3)), tasks);
    assert_eq!(run(&mut pool, start_of(4, 1)), actors);
    // A task ends its process: the actors stay, and the next slot finds another host.
    pool.disconnected(tasks);
    pool.died(tasks, ProcessEnd::Exited(3), String::new());
    let ended = reports(&pool.take_actions());
    assert_eq!(ended.len(), 2, "{ended:?}");
    assert_ne!(run(&mut pool, slot(5)), tasks);
    assert_eq!(run(&mut pool, start_of(6, 1)), actors);
}

#[test]
fn drivers_and_isolated_actors_have_hosts_of_their_own() {
    let mut pool = pool();
    let shared = run(&mut pool, start_of(1, 1));
    let mut isolated = start_of(2, 1);
    isolated.spec.isolated = true;
    let own = run(&mut pool, isolated);
    pool.start(Box::new(driver(3, 1)));
    let driver = launches(&pool.take_actions())[0];
    assert!(shared != own && own != driver && shared != driver);
}

#[test]
fn a_repeated_start_is_answered_and_starts_nothing() {
    let mut pool = pool();
    pool.start(Box::new(start_of(1, 1)));
    assert_eq!(launches(&pool.take_actions()).len(), 1);
    pool.start(Box::new(start_of(1, 1)));
    assert_eq!(pool.take_actions(), [], "it is being started");
    pool.launched(HostId(1), 7);
    pool.connected(HostId(1), "127.0.0.1:1".into());
    let started = HostMessage::Started {
        actor: ActorId(1),
        incarnation: Incarnation(1),
    };
    pool.message(HostId(1), started);
    pool.take_actions();
    pool.start(Box::new(start_of(1, 1)));
    assert_eq!(reports(&pool.take_actions()), ["actor-1#1 started"]);
    exit(&mut pool, HostId(1), 1, ExitReason::Completed);
    pool.take_actions();
    pool.start(Box::new(start_of(1, 1)));
    let actions = pool.take_actions();
    assert_eq!(reports(&actions), ["actor-1#1 completed"]);
    assert_eq!(launches(&actions), []);
}

#[test]
fn a_newer_incarnation_ends_the_older_and_an_older_is_answered_with_its_end() {
    let mut pool = pool();
    let host = run(&mut pool, start_of(1, 5));
    pool.start(Box::new(start_of(1, 9)));
    let actions = pool.take_actions();
    let stop = AgentMessage::Stop {
        actor: ActorId(1),
        incarnation: Incarnation(5),
        grace_ms: 0,
    };
    assert!(actions.contains(&Action::Send(host, stop)), "{actions:?}");
    // Heads that were restored from a backup may not know of the newer one, and wait for the older.
    pool.start(Box::new(start_of(1, 7)));
    let actions = pool.take_actions();
    assert_eq!(reports(&actions), ["actor-1#7 node lost"]);
    assert_eq!(actions.len(), 1, "nothing is started: {actions:?}");
}

#[test]
fn a_host_that_dies_takes_its_actors_along_and_tells_why() {
    let mut pool = pool();
    let host = run(&mut pool, start_of(1, 1));
    run(&mut pool, start_of(2, 1));
    pool.stop(ActorId(2), Incarnation(1), 1_000);
    pool.take_actions();
    pool.died(host, ProcessEnd::Signaled(9), String::new());
    assert_eq!(
        reports(&pool.take_actions()),
        [""; 0],
        "its last words are not read yet"
    );
    pool.disconnected(host);
    let expected = [
        "actor-1#1 host process was ended by signal 9",
        "actor-2#1 stopped on request",
    ];
    assert_eq!(reports(&pool.take_actions()), expected);
    assert!(!pool.has_host(host));
}

#[test]
fn last_words_come_before_the_exit_code() {
    let mut pool = pool();
    pool.start(Box::new(driver(1, 1)));
    pool.launched(HostId(1), 7);
    pool.connected(HostId(1), "127.0.0.1:1".into());
    assert_eq!(
        reports(&pool.take_actions()),
        ["actor-1#1 started"],
        "the process is the driver"
    );
    pool.died(HostId(1), ProcessEnd::Exited(1), "panicked".into());
    exit(
        &mut pool,
        HostId(1),
        1,
        ExitReason::Failed("no data".into()),
    );
    pool.disconnected(HostId(1));
    assert_eq!(reports(&pool.take_actions()), ["actor-1#1 failed: no data"]);
}

#[test]
fn what_a_driver_leaves_unsaid_its_exit_code_says() {
    let cases = [
        (ProcessEnd::Exited(0), "", "completed"),
        // It thinks that we are gone, and has neither succeeded nor failed.
        (
            ProcessEnd::Exited(AGENT_LOST_EXIT_CODE),
            "",
            "host process exited with code 113",
        ),
        (
            ProcessEnd::Exited(2),
            "",
            "failed: driver exited with code 2, with no output",
        ),
        (
            ProcessEnd::Exited(2),
            "no such file",
            "failed: driver exited with code 2; its last output: no such file",
        ),
        (
            ProcessEnd::Signaled(11),
            "",
            "host process was ended by signal 11",
        ),
    ];
    for (end, output, expected) in cases {
        let mut pool = pool();
        pool.start(Box::new(driver(1, 1)));
        pool.launched(HostId(1), 7);
        pool.take_actions();
        pool.died(HostId(1), end, output.into());
        pool.alarm(Alarm::LastWords(HostId(1)));
        assert_eq!(
            reports(&pool.take_actions()),
            [format!("actor-1#1 {expected}")]
        );
    }
}

#[test]
fn a_silent_host_is_killed_and_its_actors_could_not_be_started() {
    let mut pool = pool();
    pool.start(Box::new(start_of(1, 1)));
    pool.launched(HostId(1), 7);
    pool.take_actions();
    pool.alarm(Alarm::Hello(HostId(1)));
    assert_eq!(kills(&pool.take_actions()), [HostId(1)]);
    pool.died(HostId(1), ProcessEnd::Signaled(9), "loading".into());
    pool.alarm(Alarm::LastWords(HostId(1)));
    let text = reports(&pool.take_actions()).join("");
    assert!(
        text.contains("said nothing within 30000 ms; its last output: loading"),
        "{text}"
    );
}

#[test]
fn a_host_that_somebody_stopped_is_killed_and_its_actors_say_so() {
    let mut pool = pool();
    let host = run(&mut pool, start_of(1, 1));
    run(&mut pool, start_of(2, 1));
    pool.stop(ActorId(2), Incarnation(1), 1_000);
    pool.take_actions();
    let killed = pool.kill_stopped(host, "was stopped".into());
    let living = [1, 2].map(|actor| (ActorId(actor), Incarnation(1)));
    assert_eq!(killed, Some((JobId(1), living.to_vec())));
    assert_eq!(pool.take_actions(), [Action::Kill(host)]);
    // Whoever comes does not wait for it.
    assert_ne!(run(&mut pool, start_of(3, 1)), host);
    pool.disconnected(host);
    pool.died(host, ProcessEnd::Signaled(9), "working".into());
    let expected = [
        "actor-1#1 could not go on: was stopped",
        "actor-2#1 stopped on request",
    ];
    assert_eq!(reports(&pool.take_actions()), expected);
    assert_eq!(pool.kill_stopped(host, "again".into()), None);
    assert_eq!(pool.take_actions(), []);
}

#[test]
fn one_that_went_on_before_the_kill_and_ended_is_believed() {
    let mut pool = pool();
    pool.start(Box::new(driver(1, 1)));
    pool.launched(HostId(1), 7);
    pool.connected(HostId(1), "127.0.0.1:1".into());
    pool.take_actions();
    assert!(pool.kill_stopped(HostId(1), "was stopped".into()).is_some());
    pool.disconnected(HostId(1));
    pool.died(HostId(1), ProcessEnd::Exited(0), String::new());
    let reported = reports(&pool.take_actions());
    assert_eq!(reported, ["actor-1#1 completed"]);
}

#[test]
fn a_launch_that_fails_or_comes_too_late_leaves_nothing() {
    let mut pool = pool();
    pool.start(Box::new(start_of(1, 1)));
    pool.launch_failed(HostId(1), "no such file");
    let actions = pool.take_actions();
    assert_eq!(
        reports(&actions),
        ["actor-1#1 could not be started: no such file"]
    );
    pool.start(Box::new(start_of(2, 1)));
    pool.stop(ActorId(2), Incarnation(1), 1_000);
    assert_eq!(
        reports(&pool.take_actions()),
        ["actor-2#1 stopped on request"]
    );
    pool.launched(HostId(2), 7);
    assert_eq!(kills(&pool.take_actions()), [HostId(2)]);
    pool.died(HostId(2), ProcessEnd::Signaled(9), String::new());
    pool.alarm(Alarm::LastWords(HostId(2)));
    assert!(pool.hosts.is_empty());
}

#[test]
fn a_stop_that_is_overdue_kills_only_a_host_without_others() {
    let mut pool = pool();
    let host = run(&mut pool, start_of(1, 1));
    run(&mut pool, start_of(2, 1));
    pool.stop(ActorId(1), Incarnation(1), 0);
    pool.alarm(Alarm::Stop((ActorId(1), Incarnation(1))));
    assert_eq!(kills(&pool.take_actions()), []);
    exit(&mut pool, host, 2, ExitReason::Completed);
    assert_eq!(kills(&pool.take_actions()), [host]);
}

#[test]
fn a_stop_of_what_never_came_is_answered_and_remembered() {
    let mut pool = pool();
    pool.stop(ActorId(1), Incarnation(4), 0);
    assert_eq!(
        reports(&pool.take_actions()),
        ["actor-1#4 stopped on request"]
    );
    pool.start(Box::new(start_of(1, 4)));
    let actions = pool.take_actions();
    assert_eq!(reports(&actions), ["actor-1#4 stopped on request"]);
    assert_eq!(launches(&actions), []);
}

#[test]
fn only_what_stands_is_kept() {
    let mut pool = pool();
    let host = run(&mut pool, start_of(1, 1));
    run(&mut pool, start_of(2, 1));
    pool.keep_only(&[(ActorId(2), Incarnation(1))]);
    let stop = AgentMessage::Stop {
        actor: ActorId(1),
        incarnation: Incarnation(1),
        grace_ms: 0,
    };
    assert_eq!(pool.take_actions()[0], Action::Send(host, stop));
}

#[test]
fn a_gpu_actor_has_ended_only_when_its_process_has() {
    let mut pool = pool();
    let host = run(&mut pool, gpu(1, 1000));
    pool.start(Box::new(gpu(2, 500)));
    assert_eq!(launches(&pool.take_actions()), [], "the device is taken");
    exit(&mut pool, host, 1, ExitReason::Completed);
    assert_eq!(reports(&pool.take_actions()), [""; 0]);
    pool.disconnected(host);
    pool.died(host, ProcessEnd::Exited(0), String::new());
    let actions = pool.take_actions();
    assert_eq!(reports(&actions), ["actor-1#1 completed"]);
    assert_eq!(launches(&actions).len(), 1, "and now the other one has it");
    pool.start(Box::new(gpu(3, 2000)));
    let text = reports(&pool.take_actions()).join("");
    assert!(text.contains("this worker has fewer"), "{text}");
}

/// A host comes for an actor of its own.
fn another_comes(pool: &mut Pool) -> HostId {
    let mut isolated = start_of(2, 1);
    isolated.spec.isolated = true;
    pool.start(Box::new(isolated));
    pool.launched(HostId(2), 8);
    pool.connected(HostId(2), "127.0.0.1:2".into());
    HostId(2)
}

#[test]
fn notices_reach_the_hosts_that_are_there_and_those_that_come() {
    let mut pool = pool();
    let host = run(&mut pool, start_of(1, 1));
    pool.notice(Some(77));
    let notice = AgentMessage::Notice { deadline_ms: 77 };
    assert_eq!(pool.take_actions(), [Action::Send(host, notice.clone())]);
    let another = another_comes(&mut pool);
    assert!(pool.take_actions().contains(&Action::Send(another, notice)));
    pool.notice(None);
    assert_eq!(pool.take_actions().len(), 2);
}

#[test]
fn advice_reaches_the_hosts_that_are_there_and_those_that_come() {
    let mut pool = pool();
    let host = run(&mut pool, start_of(1, 1));
    pool.advice(true);
    let advice = AgentMessage::Advice { stands: true };
    assert_eq!(pool.take_actions(), [Action::Send(host, advice.clone())]);
    pool.advice(true);
    assert_eq!(pool.take_actions(), [], "said twice");
    let another = another_comes(&mut pool);
    assert!(pool.take_actions().contains(&Action::Send(another, advice)));
    pool.advice(false);
    assert_eq!(pool.take_actions().len(), 2);
}

#[test]
fn ending_all_gives_devices_back_and_starts_nothing_again() {
    let mut pool = pool();
    let host = run(&mut pool, gpu(1, 1000));
    assert_eq!(pool.end_all(&ExitReason::NodeLost), [host]);
    pool.take_actions();
    assert_eq!(pool.actor_count(), 0);
    pool.died(host, ProcessEnd::Signaled(9), String::new());
    pool.start(Box::new(gpu(1, 1000)));
    assert_eq!(launches(&pool.take_actions()), []);
    assert_ne!(run(&mut pool, gpu(2, 1000)), host);
}
