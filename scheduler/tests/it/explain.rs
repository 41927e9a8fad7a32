//! Explanations of jobs, and of actors that wait for time.

use mobula_core::{ExitReason, JobId};
use mobula_scheduler::{Query, QueryResponse, explain_actor, explain_job};

use crate::cluster::{Cluster, actor_spec, job_spec};

#[test]
fn a_job_is_explained_by_what_it_waits_for() {
    let mut cluster = Cluster::new();
    let (job, driver) = cluster.submit(job_spec("train", 1));
    let verdict = |cluster: &Cluster| explain_job(&cluster.tables, job, cluster.now_ms).unwrap();
    let explained = verdict(&cluster);
    assert_eq!(explained.subject, "job-1");
    assert!(
        explained.verdict.contains("no worker has joined"),
        "{explained:?}"
    );
    assert!(
        explained.next_step.contains("mobula worker"),
        "{explained:?}"
    );
    cluster.register("a", "boot-1", 1);
    cluster.place();
    cluster.start(driver);
    assert_eq!(verdict(&cluster).verdict, "all 1 living actors run");
    cluster.create(job, vec![actor_spec(None, 1)], false);
    let explained = verdict(&cluster);
    assert!(
        explained
            .verdict
            .starts_with("1 of 2 living actors are pending"),
        "{explained:?}"
    );
    assert_eq!(
        explained.nodes[0].reason,
        "not enough free: cpu: asks 1, 0 free"
    );
    cluster.exit(driver, ExitReason::Completed);
    assert_eq!(verdict(&cluster).verdict, "the job is over: completed");
}

#[test]
fn a_back_off_is_named_with_what_is_left_of_it() {
    let mut cluster = Cluster::new();
    cluster.register("a", "boot-1", 1);
    let (_, driver) = cluster.submit(job_spec("train", 3));
    cluster.place();
    cluster.start(driver);
    // The first restart comes at once.
    cluster.exit(driver, ExitReason::HostExited(2));
    cluster.place();
    cluster.start(driver);
    cluster.exit(driver, ExitReason::HostExited(2));
    cluster.now_ms += 40;
    let explained = explain_actor(&cluster.tables, driver, cluster.now_ms).unwrap();
    assert_eq!(
        explained.verdict,
        "waits another 60 ms before restart 2 of at most 3 (host process exited with code 2)"
    );
}

#[test]
fn the_status_counts_everything() {
    let mut cluster = Cluster::new();
    cluster.register("a", "boot-1", 3);
    let (_, driver) = cluster.submit(job_spec("train", 3));
    cluster.submit(job_spec("more", 3));
    cluster.place();
    cluster.start(driver);
    cluster.submit(job_spec("waits", 3));
    let QueryResponse::Status(status) = cluster.query(Query::Status) else {
        panic!()
    };
    assert_eq!(
        (status.nodes_alive, status.jobs_live, status.actors_pending),
        (1, 3, 1)
    );
    assert_eq!(
        (status.capacity.cpu_milli, status.leased.cpu_milli),
        (3000, 2000)
    );
}

#[test]
fn a_job_without_actors_is_not_said_to_run() {
    let cluster = Cluster::new();
    let explained = explain_job(&cluster.tables, JobId::SYSTEM, cluster.now_ms).unwrap();
    assert_eq!(explained.verdict, "it has no living actor");
}
