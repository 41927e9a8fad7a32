//! What a durable actor keeps beyond its own life: named values, restored before its constructor
//! runs again, on whatever worker that is.
//!
//! A method changes values with [`ActorState::save`]; what it changed is committed, as one, when
//! it returns and before its caller is answered. So an answer that was given is never taken back,
//! and a method that did not return left nothing. The commits are the numbered blobs of
//! [`mobula_storage::state_log`]: a start of the actor that was replaced cannot commit any more.
//!
//! Invariants:
//! 1. What [`ActorState::load`] answers at a start is what the last commit of any earlier start had.
//! 2. An answer to an `exactly_once` call is committed with what the call changed.
//! 3. After a commit that failed nothing more is committed, and the actor ends: what it has in
//!    memory may be ahead of what is kept.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use mobula_core::codec;
use mobula_core::id::{ActorId, Incarnation};
use mobula_storage::blob::BlobStore;
use mobula_storage::state_log::{STATE_BYTES_MAX, StateLog, StateLogError};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::answers::{ANSWERS_BYTES_MAX, Answer, Answers, Key, Known};

/// The longest name of a value.
pub const KEY_BYTES_MAX: usize = 256;

/// All values of one actor together, encoded, with their names: each commit writes all of them.
pub const VALUES_BYTES_MAX: usize = 1 << 20;

/// What every state starts with: how the rest is encoded.
const FORMAT: u8 = 1;

// Both bounds must fit, with what the encoding adds.
const _: () = assert!(VALUES_BYTES_MAX + 2 * ANSWERS_BYTES_MAX < STATE_BYTES_MAX);

/// Why a value was not read, changed or committed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum StateError {
    /// The actor's type keeps nothing.
    #[error("this actor keeps no state: declare its type with #[mobula::actor(durable)]")]
    NotDurable,
    /// The name is too long.
    #[error("a value's name has {length_bytes} bytes, the limit is {KEY_BYTES_MAX}")]
    KeyTooLong {
        /// Its length, in bytes.
        length_bytes: usize,
    },
    /// All values together are too large.
    #[error(
        "the actor's values would have {size_bytes} bytes, the limit is {VALUES_BYTES_MAX}: keep \
         what is large in the object store, and here where it is"
    )]
    TooLarge {
        /// Their size with the change, in bytes.
        size_bytes: usize,
    },
    /// A value cannot be encoded, or is not of the type that was asked for.
    #[error("the value `{key}`: {reason}")]
    Encoding {
        /// Its name.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// An `exactly_once` call is committed with its answer, not before.
    #[error("an exactly_once call is committed as a whole when it returns: leave `commit` out")]
    InsideExactlyOnce,
    /// The commit failed; whether it took place is not known. The actor ends after this method.
    #[error("the actor's state was not committed: {0}")]
    NotCommitted(String),
    /// The state cannot be restored.
    #[error("the actor's state cannot be restored: {0}")]
    NotRestored(String),
}

#[derive(Default, Serialize, Deserialize)]
struct Stored {
    values: BTreeMap<String, Vec<u8>>,
    answers: Answers,
}

#[derive(Default)]
struct Present {
    stored: Stored,
    values_bytes: usize,
    /// What the values that were changed since the last commit were before.
    undo: BTreeMap<String, Option<Vec<u8>>>,
    /// Whether an `exactly_once` call runs.
    exactly_once: bool,
    failed: Option<String>,
}

struct Inner {
    present: Mutex<Present>,
    log: tokio::sync::Mutex<StateLog>,
}

/// An actor's durable values. Clones are the same.
#[derive(Clone, Default)]
pub struct ActorState(Option<Arc<Inner>>);

impl ActorState {
    /// Takes over the state of an actor for its start `incarnation`, and restores it.
    pub async fn open(
        store: BlobStore,
        cluster_id: &str,
        actor: ActorId,
        incarnation: Incarnation,
    ) -> Result<Self, StateError> {
        let not_restored = |reason: String| StateError::NotRestored(reason);
        let prefix = format!("state/{cluster_id}/{actor}");
        let (log, state) = StateLog::open(store, prefix, incarnation.0)
            .await
            .map_err(|error| not_restored(error.to_string()))?;
        let stored = match state {
            None => Stored::default(),
            Some(bytes) => decode(&bytes).map_err(not_restored)?,
        };
        let size = |(key, value): (&String, &Vec<u8>)| key.len() + value.len();
        let present = Present {
            values_bytes: stored.values.iter().map(size).sum(),
            stored,
            ..Present::default()
        };
        Ok(ActorState(Some(Arc::new(Inner {
            present: Mutex::new(present),
            log: tokio::sync::Mutex::new(log),
        }))))
    }

    /// Whether the actor keeps anything.
    #[must_use]
    pub fn is_durable(&self) -> bool {
        self.0.is_some()
    }

    fn inner(&self) -> Result<&Arc<Inner>, StateError> {
        self.0.as_ref().ok_or(StateError::NotDurable)
    }

    /// The value under `key`; `None` if there is none.
    pub fn load<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, StateError> {
        let present = self.inner()?.present.lock();
        let Some(bytes) = present.stored.values.get(key) else {
            return Ok(None);
        };
        codec::decode(bytes, bytes.len())
            .map(Some)
            .map_err(|error| encoding(key, &error))
    }

    /// Sets the value under `key`. It is committed with all other changes when the method returns.
    pub fn save<T: Serialize + ?Sized>(&self, key: &str, value: &T) -> Result<(), StateError> {
        let inner = self.inner()?;
        if key.len() > KEY_BYTES_MAX {
            return Err(StateError::KeyTooLong {
                length_bytes: key.len(),
            });
        }
        let bytes = codec::encode(value).map_err(|error| encoding(key, &error))?;
        inner.present.lock().set(key, Some(bytes))
    }

    /// Removes the value under `key`, if there is one; committed as by [`ActorState::save`].
    pub fn remove(&self, key: &str) -> Result<(), StateError> {
        self.inner()?.present.lock().set(key, None)
    }

    /// The names of all values, in order.
    pub fn keys(&self) -> Result<Vec<String>, StateError> {
        let present = self.inner()?.present.lock();
        Ok(present.stored.values.keys().cloned().collect())
    }

    /// Commits what was changed so far, before the method returns: for a method that then does
    /// something outside which must not come first.
    pub async fn commit(&self) -> Result<(), StateError> {
        let inner = Arc::clone(self.inner()?);
        if inner.present.lock().exactly_once {
            return Err(StateError::InsideExactlyOnce);
        }
        // In a task of its own, so that it is completed if the method is dropped meanwhile.
        let committing = tokio::spawn(async move { inner.commit().await });
        committing
            .await
            .unwrap_or_else(|error| Err(StateError::NotCommitted(error.to_string())))
    }

    /// What is known about an `exactly_once` call that is about to begin.
    pub(crate) fn begin_exactly_once(&self, key: Key) -> Result<Known, StateError> {
        let mut present = self.inner()?.present.lock();
        let known = present.stored.answers.look_up(key);
        present.exactly_once = known == Known::New;
        Ok(known)
    }

    /// Commits what a method changed, with its answer if it was called `exactly_once`.
    pub(crate) async fn method_returned(
        &self,
        key: Option<Key>,
        answer: &Answer,
    ) -> Result<(), StateError> {
        let Some(inner) = &self.0 else {
            return Ok(());
        };
        {
            let mut present = inner.present.lock();
            present.exactly_once = false;
            match key {
                Some(key) => present.stored.answers.record(key, answer),
                None if present.undo.is_empty() && present.failed.is_none() => return Ok(()),
                None => {}
            }
        }
        inner.commit().await
    }

    /// Takes back what a method changed that was dropped before it returned.
    pub(crate) fn method_dropped(&self) {
        if let Some(inner) = &self.0 {
            let mut present = inner.present.lock();
            present.exactly_once = false;
            for (key, value) in std::mem::take(&mut present.undo) {
                present.replace(&key, value);
            }
        }
    }
}

impl std::fmt::Debug for ActorState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ActorState")
            .field("is_durable", &self.is_durable())
            .finish_non_exhaustive()
    }
}

impl Present {
    fn set(&mut self, key: &str, value: Option<Vec<u8>>) -> Result<(), StateError> {
        let old = self.stored.values.get(key);
        let size = |value: Option<&Vec<u8>>| value.map_or(0, |value| key.len() + value.len());
        let size_bytes = self.values_bytes - size(old) + size(value.as_ref());
        if size_bytes > VALUES_BYTES_MAX {
            return Err(StateError::TooLarge { size_bytes });
        }
        let old = self.replace(key, value);
        self.undo.entry(key.to_owned()).or_insert(old);
        Ok(())
    }

    fn replace(&mut self, key: &str, value: Option<Vec<u8>>) -> Option<Vec<u8>> {
        let size = |value: &Vec<u8>| key.len() + value.len();
        self.values_bytes += value.as_ref().map_or(0, size);
        let old = match value {
            Some(value) => self.stored.values.insert(key.to_owned(), value),
            None => self.stored.values.remove(key),
        };
        self.values_bytes -= old.as_ref().map_or(0, size);
        old
    }
}

impl Inner {
    async fn commit(&self) -> Result<(), StateError> {
        // Held over the commit, so that states are committed in the order in which they were.
        let mut log = self.log.lock().await;
        let bytes = {
            let mut present = self.present.lock();
            if let Some(reason) = &present.failed {
                return Err(StateError::NotCommitted(reason.clone()));
            }
            present.undo.clear();
            let mut bytes = vec![FORMAT];
            bytes.extend_from_slice(&codec::encode_plain(&present.stored));
            Bytes::from(bytes)
        };
        match log.commit(bytes).await {
            Ok(()) => Ok(()),
            Err(error) => {
                let reason = error.to_string();
                if let StateLogError::Superseded { .. } = error {
                    tracing::warn!(%error, "another start of this actor has taken over");
                }
                self.present.lock().failed = Some(reason.clone());
                Err(StateError::NotCommitted(reason))
            }
        }
    }
}

fn decode(bytes: &[u8]) -> Result<Stored, String> {
    match bytes.split_first() {
        Some((&FORMAT, body)) => {
            codec::decode(body, STATE_BYTES_MAX).map_err(|error| error.to_string())
        }
        Some((format, _)) => Err(format!(
            "it is of format {format}, this program reads {FORMAT}: use the SDK that wrote it, or a \
             newer one"
        )),
        None => Err("it is empty".to_owned()),
    }
}

fn encoding(key: &str, reason: &dyn std::fmt::Display) -> StateError {
    StateError::Encoding {
        key: key.to_owned(),
        reason: reason.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(directory: &tempfile::TempDir) -> BlobStore {
        let url = format!("file://{}", directory.path().display());
        BlobStore::open(&url, &Default::default()).unwrap()
    }

    async fn open(directory: &tempfile::TempDir, incarnation: u64) -> ActorState {
        ActorState::open(store(directory), "c", ActorId(1), Incarnation(incarnation))
            .await
            .unwrap()
    }

    #[tokio::test]
    async fn what_a_method_changed_is_there_at_the_next_start() {
        let directory = tempfile::tempdir().unwrap();
        let state = open(&directory, 1).await;
        assert_eq!(state.load::<u64>("n").unwrap(), None);
        state.save("n", &5_u64).unwrap();
        state.save("gone", "soon").unwrap();
        state.method_returned(None, &Ok(Vec::new())).await.unwrap();
        state.remove("gone").unwrap();
        state.commit().await.unwrap();
        // A method that is dropped leaves nothing.
        state.save("n", &6_u64).unwrap();
        state.method_dropped();
        assert_eq!(state.load::<u64>("n").unwrap(), Some(5));

        let next = open(&directory, 2).await;
        assert_eq!(next.load::<u64>("n").unwrap(), Some(5));
        assert_eq!(next.keys().unwrap(), ["n"]);
        assert!(matches!(
            next.load::<String>("n"),
            Err(StateError::Encoding { .. })
        ));
        // The first one is superseded, and stays so.
        state.save("n", &7_u64).unwrap();
        for _ in 0..2 {
            let error = state.method_returned(None, &Ok(Vec::new())).await;
            assert!(
                matches!(error, Err(StateError::NotCommitted(_))),
                "{error:?}"
            );
        }
        assert_eq!(open(&directory, 3).await.load::<u64>("n").unwrap(), Some(5));
    }

    #[tokio::test]
    async fn an_answer_is_kept_with_what_the_call_changed() {
        let directory = tempfile::tempdir().unwrap();
        let state = open(&directory, 1).await;
        let key = (1, 1);
        assert_eq!(state.begin_exactly_once(key).unwrap(), Known::New);
        state.save("n", &1_u64).unwrap();
        assert_eq!(state.commit().await, Err(StateError::InsideExactlyOnce));
        let answer = Ok(vec![1]);
        state.method_returned(Some(key), &answer).await.unwrap();
        let next = open(&directory, 2).await;
        assert_eq!(
            next.begin_exactly_once(key).unwrap(),
            Known::Answered(answer)
        );
        assert_eq!(next.load::<u64>("n").unwrap(), Some(1));
        next.commit().await.unwrap();
    }

    #[tokio::test]
    async fn bounds_are_told_before_anything_changes() {
        let directory = tempfile::tempdir().unwrap();
        let state = open(&directory, 1).await;
        let large = "x".repeat(VALUES_BYTES_MAX - 100);
        state.save("a", &large).unwrap();
        state.save("a", &large).unwrap();
        assert!(matches!(
            state.save("b", &large),
            Err(StateError::TooLarge { .. })
        ));
        assert!(matches!(
            state.save(&"k".repeat(300), &1),
            Err(StateError::KeyTooLong { length_bytes: 300 })
        ));
        assert_eq!(state.keys().unwrap(), ["a"]);
        state.commit().await.unwrap();
        let none = ActorState::default();
        assert_eq!(none.save("a", &1), Err(StateError::NotDurable));
    }
}
