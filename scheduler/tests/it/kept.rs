//! What jobs keep: by whom, how much, and until when.

use mobula_core::control::{ApplyContext, Caller, StateModule};
use mobula_core::kept::{
    Holder, KEPT_BYTES_MAX, KEPT_CHUNK_BYTES, KeptCommand, KeptNames, KeptObject, KeptQuery,
    KeptValue,
};
use mobula_core::object::Format;
use mobula_core::{ActorId, ErrorCode, ExitReason, Incarnation, JobId, NodeId, Rejection};
use mobula_scheduler::limits::{KEPT_JOB_BYTES_MAX, KEPT_JOB_MAX};
use mobula_scheduler::{Command, KeptObjects, invariants, kept_chunks};

use crate::cluster::{Cluster, actor_spec, job_spec};

/// A value of so many bytes whose chunks are all the same.
pub(crate) fn value(chunk: u8, size_bytes: u64) -> KeptValue {
    let count = size_bytes.div_ceil(KEPT_CHUNK_BYTES);
    KeptValue {
        format: Format::Encoded,
        size_bytes,
        chunks: (0..count).map(|_| [chunk; 32]).collect(),
    }
}

fn apply(cluster: &mut Cluster, command: &KeptCommand) -> Result<Vec<u8>, Rejection> {
    let context = ApplyContext {
        index: 1,
        term: 1,
        now_ms: cluster.now_ms,
    };
    let applied = cluster
        .tables
        .apply(&KeptObjects, &context, &command.encode())?;
    Ok(applied.response)
}

fn keep(
    cluster: &mut Cluster,
    (job, holder): (JobId, Option<Holder>),
    name: &str,
    value: KeptValue,
) -> Result<(), Rejection> {
    let command = KeptCommand::Keep {
        job,
        holder,
        name: name.to_owned(),
        value,
    };
    apply(cluster, &command).map(drop)
}

fn drop_named(
    cluster: &mut Cluster,
    (job, holder): (JobId, Option<Holder>),
    name: &str,
) -> Result<bool, Rejection> {
    let name = name.to_owned();
    let answer = apply(cluster, &KeptCommand::Drop { job, holder, name })?;
    Ok(KeptCommand::was_there(&answer).unwrap())
}

fn ask(cluster: &Cluster, job: JobId, which: KeptNames) -> Vec<KeptObject> {
    let query = KeptQuery { job, which };
    let answer = KeptObjects.query(&cluster.tables, 0, &query.encode());
    KeptQuery::answer(&answer.unwrap()).unwrap()
}

fn names(cluster: &Cluster, job: JobId) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    loop {
        let after = names.last().cloned().unwrap_or_default();
        let page = ask(cluster, job, KeptNames::After(after));
        if page.is_empty() {
            return names;
        }
        names.extend(page.into_iter().map(|object| object.name));
    }
}

/// A cluster with one node and a running job: its driver, and in whose name that keeps.
fn running() -> (Cluster, ActorId, (JobId, Option<Holder>)) {
    let mut cluster = Cluster::new();
    cluster.register("a", "boot-1", 64);
    let (job, driver) = submit(&mut cluster);
    let incarnation = cluster.actor(driver).incarnation;
    (cluster, driver, (job, Some((driver, incarnation))))
}

fn submit(cluster: &mut Cluster) -> (JobId, ActorId) {
    let (job, driver) = cluster.submit(job_spec("keeper", 2));
    cluster.place();
    cluster.start(driver);
    (job, driver)
}

#[test]
fn a_name_has_one_value_until_it_is_dropped() {
    let (mut cluster, _, us) = running();
    let (first, other) = (value(1, 5), value(2, KEPT_CHUNK_BYTES + 5));
    keep(&mut cluster, us, "weights", first.clone()).unwrap();
    cluster.now_ms += 1;
    keep(&mut cluster, us, "weights", first.clone()).expect("the same once more");
    let refused = keep(&mut cluster, us, "weights", other.clone()).unwrap_err();
    assert_eq!(refused.code, ErrorCode::AlreadyExists, "{refused}");
    let found = ask(&cluster, us.0, KeptNames::One("weights".into()));
    let expected = KeptObject {
        name: "weights".into(),
        value: first,
        kept_ms: cluster.now_ms - 1,
    };
    assert_eq!(found, [expected]);
    assert_eq!(ask(&cluster, us.0, KeptNames::One("weight".into())), []);
    let query = KeptQuery {
        job: JobId(77),
        which: KeptNames::One("weights".into()),
    };
    let unknown = KeptObjects.query(&cluster.tables, 0, &query.encode());
    assert_eq!(unknown.unwrap_err().code, ErrorCode::NotFound);

    assert!(drop_named(&mut cluster, us, "weights").unwrap());
    assert!(!drop_named(&mut cluster, us, "weights").unwrap());
    keep(&mut cluster, us, "weights", other).unwrap();
    invariants::check(&cluster.tables).unwrap();
    let chunks: Vec<[u8; 32]> = kept_chunks(&cluster.tables).collect();
    assert_eq!(chunks, [[2; 32]; 2]);
}

#[test]
fn who_is_over_or_of_another_job_changes_nothing() {
    let (mut cluster, driver, us) = running();
    let (other_job, _) = submit(&mut cluster);
    keep(&mut cluster, us, "mine", value(1, 5)).unwrap();
    let mixed = (other_job, us.1);
    let refused = keep(&mut cluster, mixed, "stolen", value(1, 5)).unwrap_err();
    assert_eq!(refused.code, ErrorCode::PermissionDenied, "{refused}");

    cluster.exit(driver, ExitReason::HostSignaled(9));
    for command in ["while it waits", "when it runs again"] {
        let refused = keep(&mut cluster, us, command, value(1, 5)).unwrap_err();
        assert_eq!(refused.code, ErrorCode::Fenced, "{refused}");
        let refused = drop_named(&mut cluster, us, "mine").unwrap_err();
        assert_eq!(refused.code, ErrorCode::Fenced, "{refused}");
        cluster.now_ms += 100_000;
        cluster.place();
    }
    assert_eq!(names(&cluster, us.0), ["mine"], "it survives who kept it");
    let now = (us.0, Some((driver, cluster.start(driver))));
    assert!(drop_named(&mut cluster, now, "mine").unwrap());
}

#[test]
fn all_of_it_goes_with_the_job_and_nothing_of_another() {
    let (mut cluster, driver, us) = running();
    let actor = cluster.create(us.0, vec![actor_spec(None, 1)], false)[0];
    cluster.place();
    cluster.start(actor);
    let (other_job, other_driver) = submit(&mut cluster);
    let incarnation = cluster.actor(other_driver).incarnation;
    let others = (other_job, Some((other_driver, incarnation)));
    for name in ["a", "b"] {
        keep(&mut cluster, us, name, value(1, 5)).unwrap();
        keep(&mut cluster, others, name, value(2, 5)).unwrap();
    }
    cluster.exit(driver, ExitReason::Completed);
    // The outcome is known, and the actor still runs.
    let refused = keep(&mut cluster, (us.0, None), "late", value(1, 5)).unwrap_err();
    assert_eq!(refused.code, ErrorCode::FailedPrecondition, "{refused}");
    assert_eq!(names(&cluster, us.0), ["a", "b"], "it may read them");
    cluster.exit(actor, ExitReason::Completed);
    assert!(cluster.job(us.0).ended_ms.is_some());
    assert_eq!(names(&cluster, us.0), [""; 0]);
    assert_eq!(names(&cluster, other_job), ["a", "b"]);
    let chunks: Vec<[u8; 32]> = kept_chunks(&cluster.tables).collect();
    assert_eq!(chunks, [[2; 32]; 2]);
    cluster.ok(Command::StopJob { job: other_job });
    cluster.exit(other_driver, ExitReason::Stopped);
    assert_eq!(kept_chunks(&cluster.tables).count(), 0);
}

#[test]
fn what_a_job_keeps_is_bounded() {
    let (mut cluster, _, us) = running();
    for (name, bad) in [
        ("", value(1, 5)),
        ("larger than any", value(1, KEPT_BYTES_MAX + 1)),
        (
            "without its chunks",
            KeptValue {
                chunks: vec![],
                ..value(1, 5)
            },
        ),
    ] {
        let refused = keep(&mut cluster, us, name, bad).unwrap_err();
        assert_eq!(refused.code, ErrorCode::InvalidArgument, "{refused}");
    }
    let largest = KEPT_JOB_BYTES_MAX / KEPT_BYTES_MAX;
    for number in 0..largest {
        let name = format!("large-{number}");
        keep(&mut cluster, us, &name, value(1, KEPT_BYTES_MAX)).unwrap();
    }
    let refused = keep(&mut cluster, us, "more", value(1, 1)).unwrap_err();
    assert_eq!(refused.code, ErrorCode::Overloaded, "{refused}");
    assert!(refused.message.contains("drop what is needed no more"));
    for number in 0..largest {
        assert!(drop_named(&mut cluster, us, &format!("large-{number}")).unwrap());
    }
    for number in 0..KEPT_JOB_MAX {
        keep(&mut cluster, us, &format!("small-{number:04}"), value(1, 0)).unwrap();
    }
    let refused = keep(&mut cluster, us, "more", value(1, 0)).unwrap_err();
    assert_eq!(refused.code, ErrorCode::Overloaded, "{refused}");
    assert_eq!(names(&cluster, us.0).len() as u64, KEPT_JOB_MAX);
    invariants::check(&cluster.tables).unwrap();
}

#[test]
fn a_host_speaks_for_its_own_job_and_says_who_it_is() {
    let host = |job| Caller::Host {
        job,
        node: NodeId(1),
    };
    let (job, name) = (JobId(3), "weights".to_owned());
    let command = |is_kept, holder| match is_kept {
        true => KeptCommand::Keep {
            job,
            holder,
            name: name.clone(),
            value: value(1, 5),
        },
        false => KeptCommand::Drop {
            job,
            holder,
            name: name.clone(),
        },
    };
    let somebody = Some((ActorId(1), Incarnation(1)));
    for (caller, holder, may_keep, may_drop, may_read) in [
        (host(job), somebody, true, true, true),
        (host(job), None, false, false, true),
        (host(JobId(4)), somebody, false, false, false),
        (host(JobId::SYSTEM), somebody, false, false, false),
        (Caller::Client, None, false, true, true),
        (Caller::Head, None, true, true, true),
        (Caller::Node(NodeId(1)), None, false, false, true),
    ] {
        for (is_kept, expected) in [(true, may_keep), (false, may_drop)] {
            let payload = command(is_kept, holder).encode();
            let found = KeptObjects.authorize(&caller, &payload);
            assert_eq!(found.is_ok(), expected, "{caller:?}: {found:?}");
        }
        let which = KeptNames::One(name.clone());
        let found = KeptObjects.authorize_query(&caller, &KeptQuery { job, which }.encode());
        assert_eq!(found.is_ok(), may_read, "{caller:?}: {found:?}");
    }
    let subject = KeptObjects.subject(&command(true, None).encode(), None);
    assert_eq!(subject, "`weights` of job-3");
}
