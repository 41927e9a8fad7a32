use std::collections::BTreeMap;

use mobula_core::codec;
use mobula_core::control::{ApplyContext, Caller, StateModule};
use mobula_core::id::{JobId, NodeId};
use mobula_scheduler::memory_txn::MemoryTables;

use super::*;
use crate::drift::state::{Command, Drift};
use crate::registry::NewVersion;
use crate::registry::state::{Command as RegistryCommand, Registry};
use crate::serving::state::{Command as ServingCommand, Serving};

fn apply<C: Serialize>(
    tables: &mut MemoryTables,
    module: &dyn StateModule,
    now_ms: u64,
    command: &C,
) -> Result<(), Rejection> {
    let context = ApplyContext {
        index: now_ms,
        term: 1,
        now_ms,
    };
    tables
        .apply(module, &context, &codec::encode_plain(command))
        .map(drop)
}

fn deploy(tables: &mut MemoryTables, endpoint: &str, now_ms: u64) {
    let command = ServingCommand::Deploy {
        endpoint: endpoint.into(),
        model: "digits".into(),
        version: None,
        replicas: 1,
        settings: Default::default(),
        token_hash: [1; 32],
    };
    apply(tables, &Serving, now_ms, &command).unwrap();
}

fn take_down(tables: &mut MemoryTables, endpoint: &str) {
    let endpoint = endpoint.to_owned();
    let deleted = ServingCommand::Delete {
        endpoint: endpoint.clone(),
    };
    apply(tables, &Serving, 1, &deleted).unwrap();
    apply(tables, &Serving, 1, &ServingCommand::Gone { endpoint }).unwrap();
}

fn tables() -> MemoryTables {
    let mut tables = MemoryTables::default();
    let new = NewVersion {
        model: "digits".into(),
        digest: "1".repeat(64),
        size_bytes: 10,
        weights_blake3: "a".repeat(64),
        dataset_blake3: "b".repeat(64),
        job: 3,
        metrics: BTreeMap::new(),
        training_json: "{}".into(),
    };
    apply(&mut tables, &Registry, 1, &RegistryCommand::Register(new)).unwrap();
    deploy(&mut tables, "digits", 5);
    tables
}

fn policy() -> LogPolicy {
    LogPolicy {
        sample_per_million: 1,
        features: LoggedFeatures::Named(vec!["age".to_owned()]),
        hashed_features: Vec::new(),
        plain_ids: false,
        key: [0; 32],
        roll_rows: 1,
        roll_bytes: 1,
        roll_ms: 1_000,
        keep_ms: 0,
    }
}

fn set_log(
    tables: &mut MemoryTables,
    endpoint: &str,
    policy: Option<LogPolicy>,
) -> Result<(), Rejection> {
    let command = Command::SetLog {
        endpoint: endpoint.into(),
        policy: policy.map(Box::new),
    };
    apply(tables, &Drift, 9, &command)
}

#[test]
fn a_policy_ends_with_the_deployment_that_it_is_about() {
    let mut tables = tables();
    assert_eq!(find(&tables, "digits"), Ok(None));
    set_log(&mut tables, "digits", Some(policy())).unwrap();
    assert_eq!(find(&tables, "digits"), Ok(Some(policy())));
    take_down(&mut tables, "digits");
    assert!(find(&tables, "digits").is_err());
    deploy(&mut tables, "digits", 6);
    assert_eq!(find(&tables, "digits"), Ok(None));
    let error = set_log(&mut tables, "digits", None).unwrap_err();
    assert_eq!(error.code, ErrorCode::NotFound);
}

#[test]
fn policies_of_endpoints_that_are_gone_are_forgotten() {
    let mut tables = tables();
    deploy(&mut tables, "faces", 7);
    set_log(&mut tables, "digits", Some(policy())).unwrap();
    take_down(&mut tables, "digits");
    set_log(&mut tables, "faces", Some(policy())).unwrap();
    let rows = row::all::<LogPolicyRow>(&tables, LOGS, &[]);
    assert_eq!(rows.len(), 1);
    set_log(&mut tables, "faces", None).unwrap();
    assert_eq!(find(&tables, "faces"), Ok(None));
}

#[test]
fn what_cannot_be_a_policy_is_refused_in_words() {
    let mut tables = tables();
    let many = |count: usize| LoggedFeatures::Named(vec!["f".to_owned(); count]);
    type Change = Box<dyn Fn(&mut LogPolicy)>;
    let cases: [(&str, Change); 9] = [
        (
            "give a share (`--sample`) of 0.000001 to 1",
            Box::new(|policy| policy.sample_per_million = 0),
        ),
        (
            "give a share (`--sample`) of 0.000001 to 1",
            Box::new(|policy| policy.sample_per_million = MILLION + 1),
        ),
        (
            "1001 features",
            Box::new(move |policy| policy.features = many(FEATURES_MAX + 1)),
        ),
        (
            "names of 65537 bytes",
            Box::new(|policy| policy.hashed_features = vec!["x".repeat(65_534)]),
        ),
        (
            "choose one",
            Box::new(|policy| policy.hashed_features = vec!["age".to_owned()]),
        ),
        (
            "0 rows (`--roll-rows`) and",
            Box::new(|policy| policy.roll_rows = 0),
        ),
        (
            "1 to 67108864 bytes",
            Box::new(|policy| policy.roll_bytes = ROLL_BYTES_MAX + 1),
        ),
        ("keep 50000", Box::new(|policy| policy.keep_ms = u64::MAX)),
        (
            "a file each 500ms (`--roll-every`), kept for 1h (`--keep`): write one at most each 1s",
            Box::new(|policy| (policy.roll_ms, policy.keep_ms) = (500, 3_600_000)),
        ),
    ];
    for (why, change) in cases {
        let mut wrong = policy();
        change(&mut wrong);
        let error = set_log(&mut tables, "digits", Some(wrong)).unwrap_err();
        assert!(error.message.contains(why), "{error:?}");
    }
    assert_eq!(find(&tables, "digits"), Ok(None));
    assert!(set_log(&mut tables, "nobody", Some(policy())).is_err());
}

#[test]
fn only_clients_decide_what_is_logged() {
    let command = Command::SetLog {
        endpoint: "digits".into(),
        policy: Some(Box::new(policy())),
    };
    let payload = codec::encode_plain(&command);
    assert!(Drift.authorize(&Caller::Client, &payload).is_ok());
    let host = Caller::Host {
        job: JobId::SYSTEM,
        node: NodeId(1),
    };
    assert!(Drift.authorize(&host, &payload).is_err());
}
