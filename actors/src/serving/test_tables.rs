//! The tables of a head with versions of a model, and commands applied to them one after the other.

use std::collections::BTreeMap;

use mobula_core::codec;
use mobula_core::control::{ApplyContext, StateModule};
use mobula_core::error::Rejection;
use mobula_core::id::Incarnation;
use mobula_scheduler::memory_txn::MemoryTables;

use super::state::{Command, Serving};
use crate::registry::NewVersion;
use crate::registry::state::{Command as RegistryCommand, Registry};
use crate::registry::versions::IMPORTED;

/// Tables, and the index of the last command, which also is the time.
#[derive(Default)]
pub(super) struct TestTables {
    pub(super) tables: MemoryTables,
    pub(super) index: u64,
}

/// A version of `digits` whose digest is `digit`, over and over.
fn version(digit: impl Into<String>) -> NewVersion {
    NewVersion {
        model: "digits".into(),
        digest: digit.into().repeat(64),
        size_bytes: 10,
        weights_blake3: "a".repeat(64),
        dataset_blake3: "b".repeat(64),
        job: 3,
        metrics: BTreeMap::new(),
        training_json: "{}".into(),
    }
}

/// What is said until the first version of `digits` is served by two replicas, behind a router of this incarnation.
pub(crate) fn served(endpoint: &str, router: Incarnation) -> [Command; 2] {
    let deploy = Command::Deploy {
        endpoint: endpoint.into(),
        model: "digits".into(),
        version: Some(1),
        replicas: 2,
        settings: Default::default(),
        token_hash: [7; 32],
    };
    let ready = Command::RouterReady {
        endpoint: endpoint.into(),
        incarnation: router,
        http_address: "127.0.0.1:1".into(),
    };
    [deploy, ready]
}

impl TestTables {
    /// With so many versions of `digits`; the digest of version 1 is `111…`.
    pub(super) fn with_versions(count: u64) -> Self {
        let mut tables = TestTables::default();
        for version in 1..=count {
            let new = NewVersion {
                size_bytes: 10 + version,
                ..self::version(version.to_string())
            };
            let payload = codec::encode_plain(&RegistryCommand::Register(new));
            tables.apply(&Registry, &payload).unwrap();
        }
        tables
    }

    /// Serves the first version of `digits` by two replicas, behind a router of this incarnation.
    pub(super) fn serve(&mut self, endpoint: &str, router: Incarnation) {
        for command in served(endpoint, router) {
            self.serving(&command).unwrap();
        }
    }

    /// Registers another version of `digits`, made elsewhere.
    pub(super) fn import(&mut self) {
        let new = NewVersion {
            job: IMPORTED,
            ..version('f')
        };
        let payload = codec::encode_plain(&RegistryCommand::Register(new));
        self.apply(&Registry, &payload).unwrap();
    }

    /// Applies the next command; its answer.
    pub(super) fn apply(
        &mut self,
        module: &dyn StateModule,
        payload: &[u8],
    ) -> Result<Vec<u8>, Rejection> {
        self.index += 1;
        let context = ApplyContext {
            index: self.index,
            term: 1,
            now_ms: self.index,
        };
        self.tables
            .apply(module, &context, payload)
            .map(|applied| applied.response)
    }

    /// The same for a command of serving.
    pub(super) fn serving(&mut self, command: &Command) -> Result<Vec<u8>, Rejection> {
        self.apply(&Serving, &codec::encode_plain(command))
    }
}
