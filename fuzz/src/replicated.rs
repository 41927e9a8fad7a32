//! Commands and questions of the replicated modules, one after the other, on tables in memory.
//!
//! What must hold, whatever the bytes are:
//! 1. `apply` changes the tables or refuses; it never panics, for that would stop every head at the same
//!    entry.
//! 2. Two replicas that apply the same end up with the same tables and answers.
//! 3. A refused command leaves the tables as they were.

#![allow(
    unreachable_pub,
    reason = "a test of the workspace includes this file as a private module"
)]

use std::sync::Arc;

use mobula_actors::registry::envelope::Envelope;
use mobula_actors::registry::keys::{PublicKey, Role};
use mobula_actors::registry::policy::data::{DataSet, LabelChange};
use mobula_actors::registry::stages::{Stage, StageChange};
use mobula_actors::registry::state::{Command as RegistryCommand, Query as RegistryQuery};
use mobula_core::codec;
use mobula_core::control::{ApplyContext, Caller, StateModule};
use mobula_core::id::{Incarnation, JobId, NodeId};
use mobula_core::kept::{KeptCommand, KeptNames, KeptQuery, KeptValue};
use mobula_core::object::Format;
use mobula_core::resource::Resources;
use mobula_scheduler::memory_txn::MemoryTables;
use mobula_scheduler::{KeptObjects, Scheduler};

fn modules() -> Vec<Arc<dyn StateModule>> {
    let mut modules = mobula_actors::modules();
    modules.push(Arc::new(Scheduler));
    modules.push(Arc::new(KeptObjects));
    modules
}

fn callers() -> [Caller; 4] {
    let (job, node) = (JobId(1), NodeId(1));
    [
        Caller::Client,
        Caller::Head,
        Caller::Node(node),
        Caller::Host { job, node },
    ]
}

/// Steps of one input: module, what to do with the payload, its length in two bytes, the payload.
pub(crate) fn run(bytes: &[u8]) {
    let modules = modules();
    let (mut tables, mut twin) = (MemoryTables::default(), MemoryTables::default());
    let mut rest = bytes;
    let mut index = 0;
    while let [module, what, low, high, more @ ..] = rest {
        let length = usize::from(u16::from_le_bytes([*low, *high]));
        let (payload, after) = more.split_at(length.min(more.len()));
        rest = after;
        index += 1;
        let module = modules[usize::from(*module) % modules.len()].as_ref();
        let context = ApplyContext {
            index,
            term: 1,
            now_ms: 1_000 * index,
        };
        match what % 3 {
            0 => {
                let before = tables.clone();
                let applied = tables.apply(module, &context, payload);
                assert_eq!(applied, twin.apply(module, &context, payload));
                assert_eq!(tables, twin);
                if applied.is_err() {
                    assert_eq!(tables, before, "a refused command changed something");
                }
            }
            1 => {
                let _ = module.query(&tables, context.now_ms, payload);
            }
            _ => {
                for caller in callers() {
                    let _ = module.authorize(&caller, payload);
                    let _ = module.authorize_query(&caller, payload);
                }
            }
        }
    }
}

fn step(module: &str, what: u8, payload: &[u8]) -> Vec<u8> {
    let number = modules()
        .iter()
        .position(|known| known.name() == module)
        .expect("a module of this name");
    let number = u8::try_from(number).expect("a few modules");
    let length = u16::try_from(payload.len()).expect("a short payload");
    [&[number, what], &length.to_le_bytes()[..], payload].concat()
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let (job, incarnation) = (JobId(1), Incarnation(1));
    let register = mobula_scheduler::Command::RegisterNode {
        name: "worker-1".into(),
        boot_id: "b".into(),
        capacity: Resources::default(),
        labels: Default::default(),
        version: "0".into(),
    };
    let stop = mobula_scheduler::Command::StopJob { job };
    let list = mobula_scheduler::Query::ListJobs {
        after: None,
        limit: 4,
    };
    let version = mobula_actors::registry::state::NewVersion {
        model: "digits".into(),
        digest: "d".repeat(64),
        size_bytes: 9,
        weights_blake3: "a".repeat(64),
        dataset_blake3: "b".repeat(64),
        job: 1,
        metrics: [("accuracy".into(), 0.5)].into(),
        training_json: "{}".into(),
    };
    let run = RegistryCommand::RegisterRun {
        version: version.clone(),
        provenance: Default::default(),
    };
    let version = RegistryCommand::Register(version);
    let alias = RegistryCommand::Alias {
        model: "digits".into(),
        alias: "champion".into(),
        version: Some(1),
        expected_revision: 0,
    };
    let tag = RegistryCommand::Tag {
        model: "digits".into(),
        version: 1,
        tag: "team".into(),
        value: Some("vision".into()),
    };
    let stage = RegistryCommand::Stage(StageChange {
        model: "digits".into(),
        version: 1,
        to: Stage::Staging,
        expected_revision: 1,
        reason: String::new(),
        promotion: Envelope {
            payload: b"{}".to_vec(),
            signatures: Vec::new(),
        },
        provenance: None,
    });
    let key = include_str!("../../actors/src/registry/testdata/p256.pub");
    let key = PublicKey::from_pem(key).expect("a test of the registry reads it");
    let key = RegistryCommand::AddKey {
        spki: key.spki().to_vec(),
        roles: [Role::Release].into(),
        owner: "ann".into(),
    };
    let policies = RegistryCommand::SetPolicyFile {
        text: r#"@id("a") forbid (principal, action, resource) when { context.approvals < 1 };"#
            .into(),
        expected_revision: 0,
        envelope: None,
    };
    let label = RegistryCommand::LabelData(LabelChange {
        data: "b".repeat(64),
        name: "faces".into(),
        labels: ["pii".into()].into(),
        expected_revision: 0,
        envelope: None,
    });
    let train = RegistryCommand::Train {
        job: 1,
        data: DataSet {
            digest: "b".repeat(64),
            files: vec!["c".repeat(64)],
        },
        parent: None,
    };
    let search = RegistryQuery::Search {
        filter: Default::default(),
        after: None,
    };
    let deploy = mobula_actors::serving::state::Command::Deploy {
        endpoint: "e".into(),
        model: "digits".into(),
        version: None,
        replicas: 1,
        settings: Default::default(),
        token_hash: [7; 32],
    };
    let fence = mobula_actors::checkpoint::state::CheckpointCommand::Fence { job, incarnation };
    let keep = KeptCommand::Keep {
        job: JobId::SYSTEM,
        holder: None,
        name: "kept".into(),
        value: KeptValue {
            format: Format::Encoded,
            size_bytes: 9,
            chunks: vec![[7; 32]],
        },
    };
    let kept = KeptQuery {
        job: JobId::SYSTEM,
        which: KeptNames::After(String::new()),
    };
    let steps = [
        step("scheduler", 0, &register.encode()),
        step("scheduler", 0, &stop.encode()),
        step("scheduler", 1, &list.encode()),
        step("registry", 0, &codec::encode_plain(&version)),
        step("registry", 0, &codec::encode_plain(&run)),
        step("registry", 0, &codec::encode_plain(&alias)),
        step("registry", 0, &codec::encode_plain(&tag)),
        step("registry", 0, &codec::encode_plain(&key)),
        step("registry", 0, &codec::encode_plain(&stage)),
        step("registry", 0, &codec::encode_plain(&policies)),
        step("registry", 0, &codec::encode_plain(&label)),
        step("registry", 0, &codec::encode_plain(&train)),
        step("registry", 1, &codec::encode_plain(&search)),
        step("serving", 0, &codec::encode_plain(&deploy)),
        step("checkpoint", 0, &codec::encode_plain(&fence)),
        step("kept", 0, &keep.encode()),
        step("kept", 1, &kept.encode()),
    ];
    let mut seeds = vec![steps.concat()];
    seeds.extend(steps);
    seeds
}
