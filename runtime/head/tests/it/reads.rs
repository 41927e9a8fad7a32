//! What a job's processes may read at the head: their own job (I14).

use mobula_core::id::JobId;
use mobula_wire::control as api;
use mobula_wire::control::explain_request::Subject;

use crate::one_head::{Api, OneHead, code, job, open_session, submit};

/// Asks everything that is about a job or an actor; the codes of the answers.
async fn ask(api: &mut Api, job: u64, actor: u64) -> Vec<String> {
    let explain = |subject| api::ExplainRequest {
        subject: Some(subject),
    };
    let named = api::NamedActor {
        job,
        name: "x".into(),
        namespace: None,
    };
    let resolve = |target| api::ResolveActorRequest {
        target: Some(target),
        after_incarnation: 0,
        or_over: false,
        timeout_ms: 0,
    };
    use api::resolve_actor_request::Target;
    let wait = api::WaitJobRequest { job, timeout_ms: 0 };
    let logs = api::JobLogsRequest {
        job,
        ..Default::default()
    };
    let actors = api::ListActorsRequest {
        job: Some(job),
        ..Default::default()
    };
    let answers = [
        api.get_job(api::GetJobRequest { job }).await.err(),
        api.wait_job(wait).await.err(),
        api.job_logs(logs).await.err(),
        api.list_actors(actors).await.err(),
        api.get_actor(api::GetActorRequest { actor }).await.err(),
        api.resolve_actor(resolve(Target::Actor(actor))).await.err(),
        api.resolve_actor(resolve(Target::Named(named))).await.err(),
        api.explain(explain(Subject::Job(job))).await.err(),
        api.explain(explain(Subject::Actor(actor))).await.err(),
    ];
    answers
        .iter()
        .map(|refusal| refusal.as_ref().map_or("ok", code).to_owned())
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_reads_its_own_job_only() {
    let head = OneHead::start().await;
    let mut client = head.client().await;
    let session = open_session(&mut client).await;
    let own = submit(&mut client, session, 1, job("own", 100))
        .await
        .unwrap();
    let mut worker = head.worker("w-1").await;
    assert_eq!(worker.start_order().await.job.0, own.job);
    let other = submit(&mut client, session, 2, job("other", 100))
        .await
        .unwrap();
    let credentials = worker.sign_host(JobId(own.job)).await.unwrap();
    let mut host = head.with_certificate(credentials).await;

    let mut expected = vec!["ok"; 9];
    // Nothing is called `x`, which is told to whoever may know.
    expected[6] = "not_found";
    assert_eq!(ask(&mut host, own.job, own.driver).await, expected);
    assert_eq!(ask(&mut client, other.job, other.driver).await, expected);
    let refused = ["permission_denied"; 9];
    assert_eq!(ask(&mut host, other.job, other.driver).await, refused);
    assert_eq!(ask(&mut host, JobId::SYSTEM.0, other.driver).await, refused);

    // Lists show what belongs to it.
    let jobs = host
        .list_jobs(api::ListJobsRequest::default())
        .await
        .unwrap();
    let ids = jobs
        .into_inner()
        .jobs
        .iter()
        .map(|job| job.id)
        .collect::<Vec<_>>();
    assert_eq!(ids, [own.job]);
    let all = api::ListActorsRequest::default();
    let actors = host.list_actors(all).await.unwrap().into_inner().actors;
    assert!(
        actors.iter().all(|actor| actor.job == own.job),
        "{actors:?}"
    );
    assert_eq!(actors.len(), 1);
    head.stop().await;
}
