//! Exactly-once sessions belong to whoever opened them.

use mobula_wire::control as api;

use crate::one_head::{OneHead, code, job, open_session, result_of, submit};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_of_another_principal_is_refused() {
    let head = OneHead::start().await;
    let mut client = head.client().await;
    let clients_session = open_session(&mut client).await;
    let submitted = submit(&mut client, clients_session, 1, job("mine", 100))
        .await
        .unwrap();

    // A host of that job, certified the way hosts are.
    let mut worker = head.worker("w-1").await;
    let start = worker.start_order().await;
    assert_eq!(start.job.0, submitted.job);
    let credentials = worker.sign_host(start.job).await.unwrap();
    let mut host = head.with_certificate(credentials).await;
    let hosts_session = open_session(&mut host).await;

    // With the client's session it could make the client's next command look answered.
    let foreign = result_of(&start, start.incarnation, clients_session);
    let refused = host.set_job_result(foreign).await.unwrap_err();
    assert_eq!(code(&refused), "permission_denied", "{refused}");
    assert!(refused.message().contains("opened by someone else"));
    // And the other way round.
    let refused = submit(&mut client, hosts_session, 1, job("another", 100))
        .await
        .unwrap_err();
    assert_eq!(code(&refused), "permission_denied", "{refused}");

    // Nothing of it was applied, and each still works with its own.
    let own = result_of(&start, start.incarnation, hosts_session);
    host.set_job_result(own).await.unwrap();
    let again = submit(&mut client, clients_session, 1, job("mine", 100))
        .await
        .unwrap();
    assert_eq!(again, submitted, "the first answer is still the session's");

    // Nobody closes another's. One's own is gone at once, and was so when that is asked for again.
    let close = |session| api::CloseSessionRequest { session };
    let refused = client.close_session(close(hosts_session)).await;
    assert_eq!(code(&refused.unwrap_err()), "permission_denied");
    client.close_session(close(clients_session)).await.unwrap();
    client.close_session(close(clients_session)).await.unwrap();
    let gone = submit(&mut client, clients_session, 2, job("another", 100)).await;
    assert_eq!(code(&gone.unwrap_err()), "session_expired");
    head.stop().await;
}
