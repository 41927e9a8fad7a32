//! Whether an endpoint's router keeps answers, replicated. Nobody's does unless it was asked to: a model may draw numbers, and
//! kept answers are memory.

use mobula_core::control::{Caller, ModuleId, Reader, Table, Txn};
use mobula_core::error::Rejection;
use mobula_core::row;
use serde::{Deserialize, Serialize};

use crate::serving::rollout::state::standing;
use crate::units;

/// Endpoint name → [`CacheSetting`]; no row: nothing is kept.
const CACHES: Table = Table {
    module: ModuleId::SERVING,
    tag: 8,
};

/// Memory that a router may be told to use for each version that it answers with.
pub const CACHE_BYTES_MAX: u64 = 16 << 30;

/// The smallest cache: below it hardly an answer finds room.
pub const CACHE_BYTES_MIN: u64 = 64 << 10;

/// The longest time that an answer is kept: thirty days.
pub const TTL_MS_MAX: u64 = 30 * 24 * 3_600_000;

/// How answers are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheSetting {
    /// What the kept answers of one version may take.
    pub bytes: u64,
    /// How long one is given again.
    pub ttl_ms: u64,
}

/// A change. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Keeps answers like this, or none. Answer: nothing.
    Set {
        /// The endpoint.
        endpoint: String,
        /// How.
        setting: Option<CacheSetting>,
    },
}

impl CacheSetting {
    /// Refuses what no router can do.
    pub fn check(&self) -> Result<(), Rejection> {
        if !(CACHE_BYTES_MIN..=CACHE_BYTES_MAX).contains(&self.bytes) {
            return Err(Rejection::invalid(format!(
                "a cache of {} (`--mib`) is not possible: ask for {} to {}",
                units::memory(self.bytes),
                units::memory(CACHE_BYTES_MIN),
                units::memory(CACHE_BYTES_MAX)
            )));
        }
        if !(1..=TTL_MS_MAX).contains(&self.ttl_ms) {
            return Err(Rejection::invalid(format!(
                "answers cannot be kept for {} (`--ttl`): ask for 1ms to {}",
                units::millis(self.ttl_ms),
                units::millis(TTL_MS_MAX)
            )));
        }
        Ok(())
    }
}

/// How the answers of an endpoint are kept.
pub fn find(reader: &dyn Reader, endpoint: &str) -> Option<CacheSetting> {
    row::get(reader, CACHES, endpoint.as_bytes())
}

/// Forgets how the answers of an endpoint that is gone were kept.
pub(in crate::serving) fn forget(txn: &mut dyn Txn, endpoint: &str) {
    txn.delete(CACHES, endpoint.as_bytes());
}

/// Applies a command.
pub(in crate::serving) fn apply(txn: &mut dyn Txn, command: Command) -> Result<(), Rejection> {
    let Command::Set { endpoint, setting } = command;
    let endpoint = standing(txn, &endpoint)?;
    match setting {
        None => forget(txn, &endpoint.name),
        Some(setting) => {
            setting.check()?;
            row::put(txn, CACHES, endpoint.name.as_bytes(), &setting);
        }
    }
    Ok(())
}

/// Whether `caller` may give this command.
pub(in crate::serving) fn is_allowed(caller: &Caller) -> bool {
    matches!(caller, Caller::Head | Caller::Client)
}

#[cfg(test)]
mod tests {
    use mobula_core::error::ErrorCode;
    use mobula_core::id::{JobId, NodeId};

    use super::*;
    use crate::serving::state::{Command as ServingCommand, Serving};
    use crate::serving::test_tables::TestTables;

    fn set(tables: &mut TestTables, setting: Option<CacheSetting>) -> Result<(), Rejection> {
        let command = Command::Set {
            endpoint: "digits".into(),
            setting,
        };
        tables.serving(&ServingCommand::Cache(command)).map(drop)
    }

    #[test]
    fn it_is_kept_as_long_as_the_endpoint_and_within_bounds() {
        let mut tables = TestTables::with_versions(1);
        let good = CacheSetting {
            bytes: 1 << 20,
            ttl_ms: 1_000,
        };
        let error = set(&mut tables, Some(good)).unwrap_err();
        assert_eq!(error.code, ErrorCode::NotFound);
        let deploy = ServingCommand::Deploy {
            endpoint: "digits".into(),
            model: "digits".into(),
            version: None,
            replicas: 1,
            settings: Default::default(),
            token_hash: [7; 32],
        };
        tables.serving(&deploy).unwrap();
        assert_eq!(find(&tables.tables, "digits"), None);
        set(&mut tables, Some(good)).unwrap();
        assert_eq!(find(&tables.tables, "digits"), Some(good));
        for (bad, expected) in [
            (CacheSetting { bytes: 7, ..good }, "a cache of 7 bytes"),
            (
                CacheSetting {
                    bytes: (16 << 30) + (1 << 20),
                    ..good
                },
                "a cache of 16385 MiB (`--mib`) is not possible: ask for 64 KiB to 16384 MiB",
            ),
            (CacheSetting { ttl_ms: 0, ..good }, "kept for 0ms (`--ttl`)"),
            (
                CacheSetting {
                    ttl_ms: u64::MAX,
                    ..good
                },
                "ask for 1ms to 720h",
            ),
        ] {
            let error = set(&mut tables, Some(bad)).unwrap_err();
            assert!(error.message.contains(expected), "{error}");
        }
        assert_eq!(find(&tables.tables, "digits"), Some(good));
        set(&mut tables, None).unwrap();
        assert_eq!(find(&tables.tables, "digits"), None);
        set(&mut tables, Some(good)).unwrap();
        let endpoint = "digits".to_owned();
        tables
            .serving(&ServingCommand::Delete {
                endpoint: endpoint.clone(),
            })
            .unwrap();
        tables.serving(&ServingCommand::Gone { endpoint }).unwrap();
        assert_eq!(find(&tables.tables, "digits"), None);
    }

    #[test]
    fn only_clients_say_so() {
        use mobula_core::codec;
        use mobula_core::control::StateModule;
        let command = ServingCommand::Cache(Command::Set {
            endpoint: "digits".into(),
            setting: None,
        });
        let payload = codec::encode_plain(&command);
        Serving.authorize(&Caller::Client, &payload).unwrap();
        let host = Caller::Host {
            job: JobId(3),
            node: NodeId(1),
        };
        let error = Serving.authorize(&host, &payload).unwrap_err();
        assert_eq!(error.code, ErrorCode::PermissionDenied);
    }
}
