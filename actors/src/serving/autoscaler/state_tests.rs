use mobula_core::codec;
use mobula_core::control::{Controller, StateModule};
use mobula_scheduler::{Query as SchedulerQuery, QueryResponse, Scheduler};

use super::super::decision::{Cause, Figures};
use super::*;
use crate::serving::controller::{ServingController, replica_name};
use crate::serving::rollout::command::Command as RolloutCommand;
use crate::serving::rollout::{Guardrails, Strategy};
use crate::serving::state::{Command as ServingCommand, Serving, find as find_endpoint};
use crate::serving::test_tables::TestTables;

/// An endpoint `digits` of version 1 with a router.
struct Head {
    applied: TestTables,
    router: Incarnation,
}

impl Head {
    fn with_endpoint(replicas: u32) -> Self {
        let mut applied = TestTables::with_versions(2);
        let deploy = ServingCommand::Deploy {
            endpoint: "digits".into(),
            model: "digits".into(),
            version: Some(1),
            replicas,
            settings: Default::default(),
            token_hash: [7; 32],
        };
        applied.serving(&deploy).unwrap();
        let router = Incarnation(applied.index);
        applied
            .serving(&ServingCommand::RouterReady {
                endpoint: "digits".into(),
                incarnation: router,
                http_address: "127.0.0.1:9".into(),
            })
            .unwrap();
        Head { applied, router }
    }

    fn give(&mut self, command: Command) -> Result<Scaling, Rejection> {
        let answer = self.applied.serving(&ServingCommand::Scaling(command))?;
        Ok(codec::decode(&answer, 64 * 1024).unwrap())
    }

    fn set(&mut self, policy: Policy) -> Result<Scaling, Rejection> {
        self.give(Command::SetPolicy {
            endpoint: "digits".into(),
            policy,
        })
    }

    fn scaling(&self) -> Scaling {
        find(&self.applied.tables, &self.endpoint())
    }

    fn endpoint(&self) -> Endpoint {
        find_endpoint(&self.applied.tables, "digits").unwrap()
    }

    fn decide(&mut self, to: u32) -> Result<Scaling, Rejection> {
        let revision = self.scaling().revision;
        self.give(Command::Decide {
            endpoint: "digits".into(),
            router: self.router,
            revision,
            choice: choice(to),
        })
    }

    fn drained(&mut self) -> Result<Scaling, Rejection> {
        let revision = self.scaling().revision;
        self.give(Command::Drained {
            endpoint: "digits".into(),
            router: self.router,
            revision,
        })
    }

    /// The replicas that live once the controller has nothing more to do.
    fn replicas(&mut self) -> Vec<String> {
        loop {
            let proposals = ServingController.reconcile(&self.applied.tables, 0);
            if proposals.is_empty() {
                break;
            }
            for proposal in &proposals {
                let module: &dyn StateModule = match proposal.module {
                    ModuleId::SCHEDULER => &Scheduler,
                    _ => &Serving,
                };
                self.applied.apply(module, &proposal.payload).unwrap();
            }
        }
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
        let mut names: Vec<String> = living
            .filter_map(|actor| actor.name)
            .filter(|name| name.contains("/replica-"))
            .collect();
        names.sort();
        names
    }
}

fn choice(to: u32) -> Choice {
    Choice {
        to,
        cause: Cause::InFlight,
        figures: Figures::default(),
    }
}

fn names(replicas: u32) -> Vec<String> {
    (1..=replicas)
        .map(|number| replica_name("digits", 1, number))
        .collect()
}

/// A policy whose limits on speed are a second long; commands of these tests are a millisecond apart.
fn quick(low: u32, high: u32) -> Policy {
    Policy {
        up_window_ms: 1_000,
        down_window_ms: 1_000,
        ..Policy::between(low, high)
    }
}

#[test]
fn an_endpoint_without_a_policy_keeps_its_number() {
    let mut head = Head::with_endpoint(2);
    let policy = head.scaling().policy;
    assert_eq!((policy.replicas_min, policy.replicas_max), (2, 2));
    let error = head.decide(3).unwrap_err();
    assert!(
        error.message.contains("may have 2 to 2 now, not 3"),
        "{error}"
    );
    assert_eq!(head.replicas(), names(2));
}

#[test]
fn replicas_are_added_at_once_and_ended_when_the_router_has_drained_them() {
    let mut head = Head::with_endpoint(1);
    head.set(quick(0, 4)).unwrap();
    let error = head.decide(3).unwrap_err();
    assert!(error.message.contains("may have 0 to 2 now"), "{error}");
    head.decide(2).unwrap();
    assert_eq!(head.replicas(), names(2));

    head.applied.index += 1_000;
    let scaling = head.decide(1).unwrap();
    assert_eq!((scaling.surplus, scaling.is_drained), (2, false));
    assert_eq!(head.replicas(), names(2));
    head.drained().unwrap();
    assert_eq!(head.replicas(), names(1));
    assert_eq!(head.scaling().surplus, 0);

    head.applied.index += 1_000;
    head.decide(0).unwrap();
    head.drained().unwrap();
    assert_eq!(head.replicas(), names(0));
    head.decide(1).unwrap();
    assert_eq!(head.replicas(), names(1));
    let changes: Vec<(u32, u32)> = head
        .scaling()
        .changes
        .iter()
        .map(|change| (change.from, change.to))
        .collect();
    assert_eq!(changes, [(1, 2), (2, 1), (1, 0), (0, 1)]);
}

#[test]
fn what_is_decided_on_old_figures_or_by_an_old_router_changes_nothing() {
    let mut head = Head::with_endpoint(1);
    let before = head.set(quick(0, 4)).unwrap().revision;
    head.decide(2).unwrap();
    assert_eq!(head.replicas(), names(2));
    let late = |router, revision| Command::Decide {
        endpoint: "digits".into(),
        router,
        revision,
        choice: choice(1),
    };
    let router = head.router;
    let error = head.give(late(router, before)).unwrap_err();
    assert_eq!(error.code, ErrorCode::Fenced);
    let revision = head.scaling().revision;
    let older = Incarnation(router.0 - 1);
    let error = head.give(late(older, revision)).unwrap_err();
    assert_eq!(error.code, ErrorCode::Fenced);
    // A word about replicas that were too many before is none about those that are now.
    head.applied.index += 1_000;
    head.decide(1).unwrap();
    let drained = Command::Drained {
        endpoint: "digits".into(),
        router,
        revision,
    };
    assert_eq!(head.give(drained).unwrap_err().code, ErrorCode::Fenced);
    assert_eq!(head.replicas(), names(2));
}

#[test]
fn a_rollout_wakes_an_endpoint_and_keeps_what_there_is() {
    let mut head = Head::with_endpoint(1);
    head.set(quick(0, 4)).unwrap();
    head.decide(0).unwrap();
    head.drained().unwrap();
    assert_eq!(head.replicas(), names(0));
    let start = RolloutCommand::Start {
        endpoint: "digits".into(),
        model: "digits".into(),
        version: Some(2),
        strategy: Strategy::Canary,
        steps: Vec::new(),
        guardrails: Guardrails::STANDARD,
        min_samples: 10,
    };
    head.applied
        .serving(&ServingCommand::Rollout(start))
        .unwrap();
    let both = [replica_name("digits", 1, 1), replica_name("digits", 2, 1)];
    assert_eq!(head.replicas(), both);
    head.applied.index += 1_000;
    assert!(head.decide(0).is_err());
    head.decide(2).unwrap();
    assert_eq!(head.replicas().len(), 4);
}

#[test]
fn the_history_is_bounded_and_goes_with_the_endpoint() {
    let mut head = Head::with_endpoint(1);
    head.set(quick(1, 2)).unwrap();
    for round in 0..CHANGES_MAX as u32 + 5 {
        head.applied.index += 1_000;
        head.decide(2 - round % 2).unwrap();
    }
    assert_eq!(head.scaling().changes.len(), CHANGES_MAX);
    head.applied
        .serving(&ServingCommand::Delete {
            endpoint: "digits".into(),
        })
        .unwrap();
    let error = head.set(quick(1, 2)).unwrap_err();
    assert!(error.message.contains("being taken down"), "{error}");
    assert_eq!(head.replicas(), Vec::<String>::new());
    let rows = row::all::<Scaling>(&head.applied.tables, SCALING, &[]);
    assert_eq!(rows, []);
}

#[test]
fn clients_set_policies_and_routers_decide() {
    let set = Command::SetPolicy {
        endpoint: "digits".into(),
        policy: Policy::between(1, 2),
    };
    let decide = Command::Decide {
        endpoint: "digits".into(),
        router: Incarnation(1),
        revision: 1,
        choice: choice(2),
    };
    let ended = Command::Ended {
        endpoint: "digits".into(),
        revision: 1,
    };
    let host = |job| Caller::Host {
        job: JobId(job),
        node: mobula_core::id::NodeId(1),
    };
    let may = |caller: &Caller| [&set, &decide, &ended].map(|command| is_allowed(caller, command));
    assert_eq!(may(&Caller::Head), [true, true, true]);
    assert_eq!(may(&Caller::Client), [true, false, false]);
    assert_eq!(may(&host(0)), [false, true, false]);
    assert_eq!(may(&host(4)), [false, false, false]);
}
