use super::super::controller::{
    ServingController, monitor_name, replica_name, replicas_of, router_name,
};
use super::super::rollout::plan::{Cleanup, Served};
use super::super::rollout::trial::Evidence;
use super::super::rollout::{Guardrails, Rollout, Strategy};
use super::*;
use crate::serving::test_tables::TestTables;
use mobula_core::control::{Controller, Proposal};
use mobula_core::spec::ActorSpec;
use mobula_scheduler::{Query as SchedulerQuery, QueryResponse, Scheduler};

/// Tables, and the loop that the leader runs over them.
struct Head {
    applied: TestTables,
    controller: ServingController,
}

impl Head {
    fn with_model() -> Self {
        Head {
            applied: TestTables::with_versions(2),
            controller: ServingController,
        }
    }

    fn serving(&mut self, command: &Command) -> Result<Vec<u8>, Rejection> {
        self.applied.serving(command)
    }

    /// A router of `digits` says that it answers; its incarnation.
    fn router_ready(&mut self) -> Incarnation {
        let incarnation = Incarnation(self.applied.index);
        self.serving(&Command::RouterReady {
            endpoint: "digits".into(),
            incarnation,
            http_address: "127.0.0.1:9".into(),
        })
        .unwrap();
        incarnation
    }

    fn deploy(
        &mut self,
        name: &str,
        version: Option<u64>,
        replicas: u32,
    ) -> Result<Endpoint, Rejection> {
        self.deploy_with(ReplicaSettings::default(), name, version, replicas)
    }

    fn deploy_with(
        &mut self,
        settings: ReplicaSettings,
        name: &str,
        version: Option<u64>,
        replicas: u32,
    ) -> Result<Endpoint, Rejection> {
        let command = Command::Deploy {
            endpoint: name.into(),
            model: "digits".into(),
            version,
            replicas,
            settings,
            token_hash: [7; 32],
        };
        let answer = self.serving(&command)?;
        Ok(codec::decode(&answer, PAYLOAD_BYTES_MAX).unwrap())
    }

    /// What the controller proposes, applied.
    fn reconcile(&mut self) -> usize {
        let proposals: Vec<Proposal> = self.controller.reconcile(&self.applied.tables, 0);
        for proposal in &proposals {
            let module: &dyn StateModule = match proposal.module {
                ModuleId::SCHEDULER => &Scheduler,
                _ => &Serving,
            };
            self.applied.apply(module, &proposal.payload).unwrap();
        }
        proposals.len()
    }

    /// Names of the platform's actors that have not ended.
    fn living(&self) -> Vec<String> {
        let query = SchedulerQuery::ListActors {
            job: Some(JobId::SYSTEM),
            after: None,
            limit: 0,
        };
        let Ok(QueryResponse::Actors(actors)) =
            mobula_scheduler::answer(&self.applied.tables, 0, query)
        else {
            panic!("a list of actors is one")
        };
        let living = actors.into_iter().filter(|actor| actor.state != "ended");
        living.filter_map(|actor| actor.name).collect()
    }
}

#[test]
fn an_endpoint_gets_its_actors_once_and_a_deleted_one_loses_them() {
    let mut head = Head::with_model();
    let endpoint = head.deploy("digits", None, 2).unwrap();
    assert_eq!(
        (endpoint.version, endpoint.digest.as_str()),
        (2, "2".repeat(64).as_str())
    );
    assert_eq!(head.reconcile(), 1);
    let expected = [
        replica_name("digits", 2, 1),
        replica_name("digits", 2, 2),
        router_name("digits"),
        monitor_name("digits", 2),
    ];
    assert_eq!(head.living(), expected);
    assert_eq!(head.reconcile(), 0);

    // A second endpoint of the same model is its own.
    head.deploy("other", Some(1), 1).unwrap();
    head.reconcile();
    assert_eq!(head.living().len(), 7);

    head.serving(&Command::Delete {
        endpoint: "digits".into(),
    })
    .unwrap();
    // Nothing runs on any node yet, so the actors end at once.
    assert_eq!(head.reconcile(), 4);
    assert_eq!(head.living().len(), 3);
    assert_eq!(head.reconcile(), 1);
    assert_eq!(endpoints(&head.applied.tables).len(), 1);
    assert_eq!(head.reconcile(), 0);
    head.deploy("digits", None, 1).unwrap();
}

#[test]
fn what_each_endpoint_shall_have_is_a_number_for_the_metrics_without_its_router() {
    let mut head = Head::with_model();
    let shown = |head: &Head| -> Vec<(String, u64)> {
        let gauges = Serving.gauges(&head.applied.tables).into_iter();
        gauges
            .map(|gauge| match gauge.label {
                Some((label, endpoint)) => {
                    (format!("{} {label}={endpoint}", gauge.name), gauge.value)
                }
                None => (gauge.name.to_owned(), gauge.value),
            })
            .collect()
    };
    let wanted = |endpoint: &str, replicas| {
        let name = format!("mobula_endpoint_replicas_wanted endpoint={endpoint}");
        (name, replicas)
    };
    let active = |count| ("ml_model_deployments_active".to_owned(), count);
    assert_eq!(shown(&head), [active(0)]);

    // No router has said anything.
    head.deploy("digits", None, 2).unwrap();
    head.deploy("other", Some(1), 1).unwrap();
    let both = [wanted("digits", 2), wanted("other", 1)];
    assert_eq!(shown(&head), [&[active(0)], &both[..]].concat());
    head.router_ready();
    assert_eq!(shown(&head), [&[active(1)], &both[..]].concat());
    head.serving(&Command::Delete {
        endpoint: "digits".into(),
    })
    .unwrap();
    assert_eq!(shown(&head), [active(0), wanted("other", 1)]);
}

#[test]
fn replicas_with_a_limit_of_memory_ask_for_it_and_are_alone_in_their_processes() {
    let mut head = Head::with_model();
    let limited = |memory_bytes| ReplicaSettings {
        memory_bytes,
        ..ReplicaSettings::default()
    };
    let refused = head
        .deploy_with(limited(Some(1 << 20)), "digits", Some(1), 1)
        .unwrap_err();
    assert!(refused.message.contains("1 MiB of memory"), "{refused:?}");
    for (memory_bytes, expected) in [(Some(1 << 30), (1 << 30, true)), (None, (0, false))] {
        let endpoint = head
            .deploy_with(limited(memory_bytes), "digits", Some(1), 2)
            .unwrap();
        let served = Served {
            version: 1,
            digest: "1".repeat(64),
            size_bytes: 11,
        };
        let replicas = replicas_of(&endpoint, &served, 2);
        let given = |spec: &ActorSpec| (spec.resources.memory_bytes, spec.isolated);
        assert!(replicas.iter().all(|spec| given(spec) == expected));
        let deleted = Command::Delete {
            endpoint: endpoint.name,
        };
        head.serving(&deleted).unwrap();
        while head.reconcile() > 0 {}
    }
}

#[test]
fn replicas_of_an_endpoint_on_gpus_have_one_each_and_so_has_a_candidate() {
    let mut head = Head::with_model();
    head.applied.import();
    let cuda = ReplicaSettings {
        device: ComputeDevice::Cuda,
        ..ReplicaSettings::default()
    };
    let refused = head
        .deploy_with(cuda.clone(), "digits", Some(3), 1)
        .unwrap_err();
    assert!(
        refused.message.contains("answer on CPUs only"),
        "{refused:?}"
    );
    let endpoint = head.deploy_with(cuda, "digits", Some(1), 2).unwrap();
    let gpus = |version: u64| {
        let served = Served {
            version,
            digest: version.to_string().repeat(64),
            size_bytes: 11,
        };
        let replicas = replicas_of(&endpoint, &served, 2);
        let gpu = |spec: &ActorSpec| spec.resources.gpu_milli;
        replicas.iter().map(gpu).collect::<Vec<_>>()
    };
    assert_eq!(gpus(2), [1000, 1000]);
    let start = |version| {
        Command::Rollout(command::Command::Start {
            endpoint: "digits".into(),
            model: "digits".into(),
            version: Some(version),
            strategy: Strategy::Canary,
            steps: Vec::new(),
            guardrails: Guardrails::STANDARD,
            min_samples: 10,
        })
    };
    let refused = head.serving(&start(3)).unwrap_err();
    assert!(
        refused.message.contains("answer on CPUs only"),
        "{refused:?}"
    );
    head.serving(&start(2)).unwrap();
}

#[test]
fn a_candidate_gets_its_replicas_and_who_loses_loses_them_when_the_router_has_drained_it() {
    let mut head = Head::with_model();
    head.deploy("digits", Some(1), 1).unwrap();
    head.reconcile();
    let router = head.router_ready();
    let endpoint = || "digits".to_owned();
    let rollout = |head: &mut Head, command| {
        let answer = head.serving(&Command::Rollout(command)).unwrap();
        codec::decode::<Rollout>(&answer, PAYLOAD_BYTES_MAX).unwrap()
    };
    rollout(
        &mut head,
        command::Command::Start {
            endpoint: endpoint(),
            model: "digits".into(),
            version: Some(2),
            strategy: Strategy::Canary,
            steps: Vec::new(),
            guardrails: Guardrails::STANDARD,
            min_samples: 10,
        },
    );
    assert_eq!(head.reconcile(), 1);
    assert_eq!(head.reconcile(), 0);
    let (old, new) = (replica_name("digits", 1, 1), replica_name("digits", 2, 1));
    let old_monitor = monitor_name("digits", 1);
    let router_name = router_name("digits");
    let living = |head: &Head, expected: &[&String]| {
        assert_eq!(head.living().iter().collect::<Vec<_>>(), expected);
    };
    living(&head, &[&old, &router_name, &old_monitor, &new]);

    let promoted = rollout(
        &mut head,
        command::Command::Promote {
            endpoint: endpoint(),
        },
    );
    // The new monitor, and the end of the old one; the old replica may still have requests.
    assert_eq!(head.reconcile(), 2);
    assert_eq!(head.reconcile(), 0);
    let monitor = monitor_name("digits", 2);
    living(&head, &[&old, &router_name, &new, &monitor]);
    rollout(
        &mut head,
        command::Command::Drained {
            endpoint: endpoint(),
            rollout: promoted.number,
            revision: promoted.revision,
            router,
        },
    );
    while head.reconcile() > 0 {}
    living(&head, &[&router_name, &new, &monitor]);
    let known = rollout::newest(&head.applied.tables, "digits").unwrap();
    assert_eq!(known.cleanup, Cleanup::Done);

    // An endpoint that is deleted in the middle of a rollout leaves nothing behind.
    rollout(
        &mut head,
        command::Command::Start {
            endpoint: endpoint(),
            model: "digits".into(),
            version: Some(1),
            strategy: Strategy::BlueGreen,
            steps: Vec::new(),
            guardrails: Guardrails::STANDARD,
            min_samples: 10,
        },
    );
    head.reconcile();
    assert_eq!(head.living().len(), 4);
    head.serving(&Command::Delete {
        endpoint: endpoint(),
    })
    .unwrap();
    while head.reconcile() > 0 {}
    assert_eq!(head.living(), Vec::<String>::new());
}

#[test]
fn a_rolling_update_ends_a_replica_for_each_that_takes_its_place() {
    let mut head = Head::with_model();
    head.deploy("digits", Some(1), 2).unwrap();
    head.reconcile();
    let router = head.router_ready();
    let start = command::Command::Start {
        endpoint: "digits".into(),
        model: "digits".into(),
        version: Some(2),
        strategy: Strategy::Rolling,
        steps: Vec::new(),
        guardrails: Guardrails::STANDARD,
        min_samples: 10,
    };
    head.serving(&Command::Rollout(start)).unwrap();
    let replicas = |head: &mut Head| {
        while head.reconcile() > 0 {}
        let is_replica = |name: &String| name.contains("/replica-");
        let mut living: Vec<String> = head.living().into_iter().filter(is_replica).collect();
        living.sort();
        living
    };
    let name = |version, number| replica_name("digits", version, number);
    let expected = [
        vec![name(1, 1), name(1, 2), name(2, 1)],
        vec![name(1, 1), name(2, 1)],
        vec![name(1, 1), name(2, 1), name(2, 2)],
    ];
    for (step, expected) in (0..).zip(expected) {
        assert_eq!(replicas(&mut head), expected, "{step}");
        let passed = command::Command::Judge {
            endpoint: "digits".into(),
            rollout: 1,
            step,
            router,
            verdict: command::Verdict::Pass,
            evidence: Evidence::default(),
        };
        head.serving(&Command::Rollout(passed)).unwrap();
    }
    assert_eq!(find(&head.applied.tables, "digits").unwrap().version, 2);
}

#[test]
fn only_the_newest_router_says_where_an_endpoint_answers() {
    let mut head = Head::with_model();
    head.deploy("digits", None, 1).unwrap();
    let ready = |incarnation, http_address: &str| Command::RouterReady {
        endpoint: "digits".into(),
        incarnation: Incarnation(incarnation),
        http_address: http_address.into(),
    };
    head.serving(&ready(9, "127.0.0.1:9")).unwrap();
    head.serving(&ready(9, "127.0.0.1:9")).unwrap();
    let error = head.serving(&ready(8, "127.0.0.1:8")).unwrap_err();
    assert_eq!(error.code, ErrorCode::Fenced);
    let address = find(&head.applied.tables, "digits").unwrap().http_address;
    assert_eq!(address.as_deref(), Some("127.0.0.1:9"));
    head.serving(&ready(10, "127.0.0.1:10")).unwrap();
}

#[test]
fn a_router_of_an_earlier_endpoint_of_the_name_says_nothing_about_this_one() {
    let mut head = Head::with_model();
    head.deploy("digits", None, 1).unwrap();
    head.reconcile();
    // What a router that was cut off since then still has to say.
    let late = Command::RouterReady {
        endpoint: "digits".into(),
        incarnation: Incarnation(head.applied.index),
        http_address: "127.0.0.1:9".into(),
    };
    head.serving(&Command::Delete {
        endpoint: "digits".into(),
    })
    .unwrap();
    let error = head.deploy("digits", None, 1).unwrap_err();
    assert!(error.message.contains("being taken down"), "{error}");
    while head.reconcile() > 0 {}
    head.deploy("digits", None, 1).unwrap();
    let error = head.serving(&late).unwrap_err();
    assert_eq!(error.code, ErrorCode::Fenced);
    assert_eq!(
        find(&head.applied.tables, "digits").unwrap().http_address,
        None
    );
}

#[test]
fn what_cannot_be_deployed_is_refused_with_the_reason() {
    let mut head = Head::with_model();
    for (name, version, replicas, expected) in [
        (
            "digits",
            Some(7),
            1,
            "model `digits` has no version 7: it has 1 to 2",
        ),
        ("a/b", None, 1, "cannot name an endpoint"),
        ("digits", None, 0, "0 replicas (`--replicas`) are not"),
        ("digits", None, 65, "ask for 1 to 64"),
    ] {
        let error = head.deploy(name, version, replicas).unwrap_err();
        assert!(error.message.contains(expected), "{error}");
    }
    head.deploy("digits", None, 1).unwrap();
    let error = head.deploy("digits", None, 1).unwrap_err();
    assert_eq!(error.code, ErrorCode::AlreadyExists);
    assert!(
        error.message.contains("mobula serve delete digits"),
        "{error}"
    );
    let error = head
        .serving(&Command::Delete {
            endpoint: "faces".into(),
        })
        .unwrap_err();
    assert!(error.message.contains("mobula serve list"), "{error}");
}

#[test]
fn who_may_do_what() {
    let deploy = Command::Delete {
        endpoint: "digits".into(),
    };
    let ready = Command::RouterReady {
        endpoint: "digits".into(),
        incarnation: Incarnation(1),
        http_address: "127.0.0.1:1".into(),
    };
    let host = |job| Caller::Host {
        job: JobId(job),
        node: mobula_core::id::NodeId(1),
    };
    let may = |caller: &Caller, command: &Command| {
        Serving
            .authorize(caller, &codec::encode_plain(command))
            .is_ok()
    };
    assert!(may(&Caller::Client, &deploy) && may(&Caller::Head, &deploy));
    assert!(!may(&host(4), &deploy) && !may(&Caller::Client, &ready));
    assert!(may(&host(0), &ready) && !may(&host(4), &ready));
}
