//! The actor that holds private keys for jobs: it reads them from files on the node where it runs, and gives
//! signatures and nothing else.
//!
//! Who starts it asks for the node that has the files, and for a process of its own (`isolated`), in whose
//! memory no other actor's code runs.
//!
//! A job starts one for itself, or finds the cluster's, which [`hold`] starts (`mobula keys hold`): a detached actor
//! in the namespace [`NAMESPACE`], which the command line asks too.
//!
//! Invariants:
//! 1. No key leaves the actor: its answers are names and signatures.
//! 2. It signs statements of the registry's own kinds: no other bytes are ever under these keys.

use std::collections::BTreeMap;
use std::path::Path;

use mobula::{ActorRef, Cluster};
use mobula_core::label::Requirement;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::envelope::{PAYLOAD_BYTES_MAX, PAYLOAD_TYPE, Signature, pae};
use super::signer::{KeyFileError, PrivateKey, Signer};
use super::statement::{SIGNED_TYPES, STATEMENT_TYPE};

/// Why something was not signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum RefusedToSign {
    /// It does not hold that key.
    #[error("no key {key} is held here: `keys` says which are")]
    UnknownKey {
        /// The key's name.
        key: String,
    },
    /// It signs no such thing.
    #[error("only statements about models are signed here: {reason}")]
    NoStatement {
        /// What is wrong with it.
        reason: String,
    },
    /// The key failed.
    #[error("{reason}")]
    Failed {
        /// Why.
        reason: String,
    },
}

/// The namespace of the cluster's key holder.
pub const NAMESPACE: &str = "keys";

/// Its name there.
pub const NAME: &str = "key-holder";

/// Its restarts: as often as its files can be read again, within reason.
const RESTARTS_MAX: u32 = 1_000;

/// The longest description of a holder to start.
const ORDER_BYTES_MAX: usize = 64 * 1024;

/// Which keys the cluster's holder shall have, and where.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldOrder {
    /// Their files, on the machine where it runs.
    pub files: Vec<String>,
    /// Labels of that machine, name and value.
    pub labels: Vec<(String, String)>,
}

/// Starts the cluster's holder, as the driver of a job in [`NAMESPACE`]; `text` is a [`HoldOrder`] in JSON. The
/// job's result are the names of the keys.
pub async fn hold(cluster: &Cluster, text: &str) -> mobula::Result<()> {
    if text.len() > ORDER_BYTES_MAX {
        return Err(mobula::Error::User(format!(
            "the order has {} bytes, the limit is {ORDER_BYTES_MAX}: hold fewer keys",
            text.len()
        )));
    }
    let order: HoldOrder = serde_json::from_str(text)?;
    let builder = || {
        let mut holder = cluster
            .actor(KeyHolder::new(order.files.clone()))
            .isolated();
        for (label, value) in &order.labels {
            holder = holder.require(Requirement::In(label.clone(), vec![value.clone()]));
        }
        holder
    };
    // One that is never started again says at once what is wrong with a file, and ends with this job.
    builder().max_restarts(0).spawn().await?.keys().await?;
    let holder = builder().name(NAME).detached().max_restarts(RESTARTS_MAX);
    let keys = holder.spawn().await?.keys().await?;
    cluster.set_result(&keys).await
}

/// The cluster's holder, for whoever is connected.
pub async fn find(cluster: &Cluster) -> mobula::Result<ActorRef<KeyHolder>> {
    match cluster.job() {
        Some(_) => cluster.get_actor(NAME).await,
        None => cluster.get_actor_in(NAMESPACE, NAME).await,
    }
}

/// Holds private keys.
pub struct KeyHolder {
    keys: BTreeMap<String, PrivateKey>,
}

#[mobula::actor(name = "mobula.key-holder")]
impl KeyHolder {
    /// Reads the keys in these files.
    pub fn new(files: Vec<String>) -> Result<Self, KeyFileError> {
        let mut keys = BTreeMap::new();
        for file in files {
            let key = PrivateKey::open(Path::new(&file))?;
            keys.insert(key.public_key().id(), key);
        }
        Ok(KeyHolder { keys })
    }

    /// The names of its keys.
    pub fn keys(&self) -> Vec<String> {
        self.keys.keys().cloned().collect()
    }

    /// Signs a statement with the key of this name.
    pub fn sign(&self, key: String, statement: Vec<u8>) -> Result<Signature, RefusedToSign> {
        let Some(holder) = self.keys.get(&key) else {
            let key = key.chars().take(80).collect();
            return Err(RefusedToSign::UnknownKey { key });
        };
        check(&statement)?;
        let bytes = holder
            .sign(&pae(PAYLOAD_TYPE, &statement))
            .map_err(|error| RefusedToSign::Failed {
                reason: error.to_string(),
            })?;
        Ok(Signature { key, bytes })
    }
}

fn check(statement: &[u8]) -> Result<(), RefusedToSign> {
    let refused = |reason: String| RefusedToSign::NoStatement { reason };
    if statement.len() > PAYLOAD_BYTES_MAX {
        return Err(refused(format!(
            "this has {} bytes, the limit is {PAYLOAD_BYTES_MAX}",
            statement.len()
        )));
    }
    let value: Value =
        serde_json::from_slice(statement).map_err(|error| refused(error.to_string()))?;
    let kind = value["predicateType"].as_str().unwrap_or_default();
    let is_ours = SIGNED_TYPES.contains(&kind);
    if value["_type"] == STATEMENT_TYPE && is_ours {
        return Ok(());
    }
    let shown: String = kind.chars().take(80).collect();
    Err(refused(format!("this is of type `{shown}`")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::signer::tests::key;
    use crate::registry::stages::Policy;
    use crate::registry::statement;

    #[test]
    fn statements_are_signed_and_nothing_else() {
        let one = key();
        let public = one.public_key().clone();
        let holder = KeyHolder {
            keys: [(public.id(), one)].into(),
        };
        assert_eq!(holder.keys(), [public.id()]);
        let statement = statement::policy("digits", &Policy::default(), 3);
        let signature = holder.sign(public.id(), statement.clone()).unwrap();
        assert!(public.verifies(&pae(PAYLOAD_TYPE, &statement), &signature.bytes));
        let unknown = holder.sign("other".to_owned(), statement.clone());
        assert!(matches!(unknown, Err(RefusedToSign::UnknownKey { .. })));
        let text = String::from_utf8(statement).unwrap();
        for other in [
            "hello".to_owned(),
            "{}".to_owned(),
            text.replace("policy/v1", "transfer-of-money/v1"),
            text.replace("in-toto.io", "example.com"),
            format!("{text}{}", " ".repeat(PAYLOAD_BYTES_MAX)),
        ] {
            let refused = holder.sign(public.id(), other.into_bytes());
            assert!(matches!(refused, Err(RefusedToSign::NoStatement { .. })));
        }
    }
}
