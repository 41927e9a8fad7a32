//! Tokens, and who may send what.

use mobula_core::control::{Caller, StateModule};
use mobula_core::order::WorkerEvent;
use mobula_core::{ActorId, Incarnation, JobId, NodeId};
use mobula_scheduler::{
    ActorIncarnation, Command, Query, QueryResponse, Response, Role, Scheduler, check_token,
    namespace_owner,
};

use crate::cluster::Cluster;

fn create(id: &str, hash: u8, expires_at_ms: u64, uses: Option<u32>) -> Command {
    let secret_hash = [hash; 32];
    Command::CreateToken {
        id: id.into(),
        secret_hash,
        role: Role::Worker,
        expires_at_ms,
        uses,
        ends_with: "abcd".into(),
        principal: None,
    }
}

#[test]
fn tokens_of_one_principal_enter_the_same_namespaces() {
    let mut cluster = Cluster::new();
    let token = |id: &str, hash, role, principal: Option<&str>| Command::CreateToken {
        id: id.into(),
        secret_hash: [hash; 32],
        role,
        expires_at_ms: 5_000,
        uses: None,
        ends_with: String::new(),
        principal: principal.map(str::to_owned),
    };
    cluster.ok(token("client-1", 1, Role::Client, Some("ann")));
    cluster.ok(token("client-2", 2, Role::Client, Some("ann")));
    cluster.ok(token("client-3", 3, Role::Client, None));
    let owner = |hash| namespace_owner(&cluster.tables, &[hash; 32], 2_000);
    assert_eq!(owner(1), owner(2));
    assert_eq!(owner(1).as_deref(), Ok("ann"));
    assert_eq!(owner(3).as_deref(), Ok("client-3"));
    assert!(owner(4).is_err());
    let refused = cluster.refused(token("worker-1", 5, Role::Worker, Some("ann")));
    assert!(
        refused.contains("only a client's has a principal"),
        "{refused}"
    );
    let refused = cluster.refused(token("client-5", 5, Role::Client, Some("")));
    assert!(refused.contains("is empty"), "{refused}");
}

#[test]
fn each_way_a_token_is_useless_has_its_own_message() {
    let mut cluster = Cluster::new();
    cluster.ok(create("join", 1, 5_000, Some(2)));
    let consume = || Command::UseToken {
        secret_hash: [1; 32],
    };
    let accepted = Response::TokenAccepted {
        id: "join".into(),
        role: Role::Worker,
    };
    assert_eq!(cluster.ok(consume()), accepted);
    assert_eq!(
        check_token(&cluster.tables, &[1; 32], cluster.now_ms),
        Ok(Role::Worker)
    );
    assert_eq!(cluster.ok(consume()), accepted);
    assert!(
        cluster
            .refused(consume())
            .contains("used as often as it may be")
    );
    cluster.ok(create("other", 2, 5_000, None));
    cluster.now_ms = 8_000;
    let expired = cluster.refused(Command::UseToken {
        secret_hash: [2; 32],
    });
    assert!(expired.contains("expired 3 s ago"), "{expired}");
    cluster.ok(Command::RevokeToken { id: "other".into() });
    let unknown = cluster.refused(Command::UseToken {
        secret_hash: [2; 32],
    });
    assert!(
        unknown.contains("unknown to this cluster, or was revoked"),
        "{unknown}"
    );
}

#[test]
fn a_list_shows_no_more_of_a_token_than_its_end() {
    let mut cluster = Cluster::new();
    cluster.ok(create("join", 1, 5_000, Some(2)));
    let question = Query::ListTokens {
        after: None,
        limit: 0,
    };
    let answered = mobula_scheduler::answer(&cluster.tables, 1_000, question).unwrap();
    let QueryResponse::Tokens(tokens) = answered else {
        panic!("tokens are answered with tokens");
    };
    assert_eq!(tokens.len(), 1);
    assert_eq!(
        (tokens[0].token.as_str(), tokens[0].ends_with.as_str()),
        ("join", "abcd")
    );
    let mut telling = create("telling", 2, 5_000, None);
    if let Command::CreateToken { ends_with, .. } = &mut telling {
        *ends_with = "abcde".into();
    }
    assert!(cluster.refused(telling).contains("at most 4"));
    cluster.ok(Command::RevokeToken { id: "join".into() });
    let gone = cluster.refused(Command::RevokeToken { id: "join".into() });
    assert!(gone.contains("there is no token `join`"), "{gone}");
}

#[test]
fn a_token_is_created_once() {
    let mut cluster = Cluster::new();
    cluster.ok(create("join", 1, 5_000, None));
    assert_eq!(cluster.ok(create("join", 1, 5_000, None)), Response::Done);
    assert!(
        cluster
            .refused(create("join", 2, 5_000, None))
            .contains("another token")
    );
    assert!(
        cluster
            .refused(create("late", 3, 1_000, None))
            .contains("expired from the start")
    );
}

#[test]
fn a_client_token_does_not_pretend_to_count_its_uses() {
    let mut cluster = Cluster::new();
    let client = |uses| {
        let mut command = create("c", 4, 5_000, uses);
        if let Command::CreateToken { role, .. } = &mut command {
            *role = Role::Client;
        }
        command
    };
    let refused = cluster.refused(client(Some(1)));
    assert!(refused.contains("goes with every call"), "{refused}");
    cluster.ok(client(None));
}

#[test]
fn callers_send_only_what_is_theirs() {
    let (job, node, actor, incarnation) = (JobId(1), NodeId(1), ActorId(1), Incarnation(1));
    let creator = Some(ActorIncarnation { actor, incarnation });
    let create = |job, creator| Command::CreateActors {
        job,
        actors: vec![],
        gang: false,
        get_or_create: false,
        creator,
    };
    let event = |node| {
        let event = WorkerEvent::NoticeWithdrawn;
        Command::NodeEvent {
            node,
            incarnation,
            event,
        }
    };
    let stop = |job| Command::StopActor {
        job,
        actor,
        grace_ms: 0,
    };
    let (client, worker) = (Caller::Client, Caller::Node(node));
    let host = Caller::Host { job, node };
    let cases = [
        (&client, Command::StopJob { job }, true),
        (&client, stop(None), true),
        (&client, Command::NodeLost { node, incarnation }, false),
        (
            &client,
            Command::UseToken {
                secret_hash: [0; 32],
            },
            false,
        ),
        (&client, event(node), false),
        (&worker, event(node), true),
        (&worker, event(NodeId(2)), false),
        (&worker, Command::StopJob { job }, false),
        (&host, create(job, creator), true),
        (&host, create(job, None), false),
        (&host, create(JobId(2), creator), false),
        (&host, stop(Some(job)), true),
        (&host, stop(None), false),
        (&host, stop(Some(JobId(2))), false),
        (&host, Command::StopJob { job }, false),
        (
            &host,
            Command::Assign {
                assignments: vec![],
            },
            false,
        ),
        (
            &Caller::Head,
            Command::Assign {
                assignments: vec![],
            },
            true,
        ),
    ];
    for (caller, command, allowed) in cases {
        let outcome = Scheduler.authorize(caller, &command.encode());
        assert_eq!(
            outcome.is_ok(),
            allowed,
            "{caller:?} {command:?}: {outcome:?}"
        );
    }
}
