//! Where the values of a process's objects are: in its own memory, or in the node's.
//!
//! Invariants:
//! 1. A value that is put is copied once: where it is small into this process's memory, and else
//!    straight into the node's.
//! 2. What was written and is not wanted after all is freed with the handle that it was written
//!    under.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::stream::{Stream, TryStreamExt};
use mobula_core::codec;
use mobula_core::id::NodeId;
use mobula_core::object::ObjectError;
use mobula_wire::object::{ANSWER_BYTES_MAX, Format, INLINE_BYTES_MAX};
use serde::Serialize;

use super::cell::{Cell, Value};
use super::completer::ObjectValue;
use super::handle::{Object, Side, capture_contained};
use super::owner::Entry;
use super::payload::Payload;
use super::store::StoreClient;
use super::table::ObjectTable;

/// What a process without access to shared memory keeps itself of one value: as much as travels to
/// its holders in one answer. What is larger could be read nowhere else, so it is refused when it is
/// put.
const KEPT_BYTES_MAX: usize = ANSWER_BYTES_MAX;

/// How long opening a value may take whose owner has ended: longer than the node's own agent takes
/// to show a copy that it has. Another node may have ended together with the owner, without a word.
const ORPHAN_OPEN_MAX: Duration = Duration::from_secs(1);

/// How often a value is looked for again when its bytes turn out to be lost; each time its owner
/// has said that they are somewhere.
const READ_ATTEMPTS_MAX: usize = 5;

/// Why a value is not put.
#[derive(Debug, thiserror::Error)]
pub enum PutError {
    /// It cannot be encoded.
    #[error(transparent)]
    Encode(#[from] codec::EncodeError),
    /// There is no room for it.
    #[error(transparent)]
    Store(#[from] ObjectError),
}

impl ObjectTable {
    /// Connects to the node's object store: from then on large values go there.
    pub async fn connect_store(
        self: &Arc<Self>,
        socket: &Path,
        key: &str,
        node: NodeId,
    ) -> io::Result<()> {
        let (store, link) =
            StoreClient::connect(socket, key.to_owned(), self.process(), node).await?;
        if self.store.set(Arc::clone(&store)).is_ok() {
            let table = Arc::downgrade(self);
            self.spawn(link.run(store, move |process| {
                if let Some(table) = table.upgrade() {
                    table.process_gone(process);
                }
            }));
        }
        Ok(())
    }

    /// Puts a value: small ones into this process's memory, large ones into the node's.
    pub async fn put_value<T: Serialize + ?Sized>(
        self: &Arc<Self>,
        value: &T,
    ) -> Result<Object, PutError> {
        let (payload, contains) = capture_contained(|| Payload::encoded(value));
        let payload = payload?;
        let object = match self.store_for(payload.bytes.len())? {
            None => self.create_entry(Cell::settled(Ok(Value::Inline(payload)))),
            Some(store) => self.write(store, payload.format, &payload.bytes).await?,
        };
        let (object, entry) = object;
        if !contains.is_empty() {
            *entry.contains.lock() = contains;
        }
        Ok(object)
    }

    /// Puts bytes that are to be read as `format`; they are copied once.
    pub async fn put_slice(
        self: &Arc<Self>,
        format: Format,
        bytes: &[u8],
    ) -> Result<Object, ObjectError> {
        match self.store_for(bytes.len())? {
            None => Ok(self.put_bytes(format, Bytes::copy_from_slice(bytes))),
            Some(store) => Ok(self.write(store, format, bytes).await?.0),
        }
    }

    /// Puts a value of `size_bytes` that comes in `parts`, in order; each is copied once, to where the
    /// value will be read.
    pub(crate) async fn put_parts<E: From<ObjectError>>(
        self: &Arc<Self>,
        format: Format,
        size_bytes: u64,
        mut parts: impl Stream<Item = Result<Bytes, E>> + Unpin,
    ) -> Result<Object, E> {
        // More than memory addresses has no store room for, which says so.
        let size = usize::try_from(size_bytes).unwrap_or(usize::MAX);
        let Some(store) = self.store_for(size)? else {
            let mut joined = BytesMut::with_capacity(size);
            while let Some(part) = parts.try_next().await? {
                joined.extend_from_slice(&part);
            }
            return Ok(self.put_bytes(format, joined.freeze()));
        };
        let (object, entry) = self.create_entry(Cell::default());
        let mut block = store.begin(size_bytes).await?;
        while let Some(part) = parts.try_next().await? {
            block.write(&part);
        }
        let stored = block.publish(object.id(), format, true);
        entry.cell.settle(Ok(Value::Stored(stored)));
        Ok(object)
    }

    /// Where the agent of this node answers others, if the process is connected to its store.
    pub(crate) fn agent_address(&self) -> &str {
        self.store.get().map_or("", |store| store.agent())
    }

    /// Into which shared memory a value of this size goes, if into any.
    fn store_for(&self, size_bytes: usize) -> Result<Option<&Arc<StoreClient>>, ObjectError> {
        match self.store.get() {
            _ if size_bytes <= INLINE_BYTES_MAX => Ok(None),
            Some(store) => Ok(Some(store)),
            None if size_bytes <= KEPT_BYTES_MAX => Ok(None),
            None => Err(ObjectError::Unavailable {
                reason: format!(
                    "this process has no access to its node's shared memory, and a value of \
                     {size_bytes} bytes is more than it keeps itself, {KEPT_BYTES_MAX}; the log of \
                     this process says why at its start"
                ),
            }),
        }
    }

    async fn write(
        self: &Arc<Self>,
        store: &StoreClient,
        format: Format,
        bytes: &[u8],
    ) -> Result<(Object, Arc<Entry>), ObjectError> {
        // Under the object's handle: when this is given up, dropping it frees what is written.
        let (object, entry) = self.create_entry(Cell::default());
        let stored = store.write(object.id(), format, bytes, true).await?;
        entry.cell.settle(Ok(Value::Stored(stored)));
        Ok((object, entry))
    }

    /// The bytes of a settled value: in place, where they are in shared memory. They may be
    /// [missing](ObjectTable::report_missing) there.
    pub async fn open(&self, value: &Value) -> Result<Payload, ObjectError> {
        match value {
            Value::Inline(payload) => Ok(payload.clone()),
            Value::Stored(stored) => {
                let store = self.store.get().ok_or_else(|| ObjectError::Unavailable {
                    reason: "this process has no access to a node's shared memory".to_owned(),
                })?;
                Ok(Payload {
                    format: stored.format,
                    bytes: store.open(stored).await?,
                })
            }
        }
    }

    /// As [`open`](ObjectTable::open), not waiting for a node to send what its owner, which has
    /// ended, can tell of no other place.
    async fn open_of(&self, object: &Object, value: &Value) -> Result<Payload, ObjectError> {
        let Side::Borrowed { link, .. } = object.side() else {
            return self.open(value).await;
        };
        let out_of_reach = async {
            let error = link.ended(object.id().sequence).await;
            tokio::time::sleep(ORPHAN_OPEN_MAX).await;
            error
        };
        tokio::select! {
            biased;
            opened = self.open(value) => opened,
            error = out_of_reach => Err(error),
        }
    }

    /// Waits for an object and opens its value. Where the bytes are gone its owner is told, and
    /// the value that it then produces, if it can, is waited for.
    pub async fn read(self: &Arc<Self>, object: &Object) -> Result<Payload, ObjectError> {
        for _ in 0..READ_ATTEMPTS_MAX {
            let outcome = match object.outcome() {
                Some(outcome) => outcome,
                None => object.wait().await,
            };
            let value = outcome.clone()?;
            match self.open_of(object, &value).await {
                Err(ObjectError::Lost { reason, .. }) => {
                    self.report_missing(object, &outcome, &reason);
                }
                opened => return opened,
            }
        }
        Err(ObjectError::Lost {
            object: object.id(),
            reason: format!("it was lost {READ_ATTEMPTS_MAX} times while it was read"),
        })
    }

    /// Puts an encoded value into this process's memory, whatever its size.
    pub fn put<T: Serialize + ?Sized>(
        self: &Arc<Self>,
        value: &T,
    ) -> Result<Object, codec::EncodeError> {
        let (payload, contains) = capture_contained(|| Payload::encoded(value));
        let (object, entry) = self.create_entry(Cell::settled(Ok(Value::Inline(payload?))));
        if !contains.is_empty() {
            *entry.contains.lock() = contains;
        }
        Ok(object)
    }

    /// Puts bytes that are to be read as `format`.
    pub fn put_bytes(self: &Arc<Self>, format: Format, bytes: Bytes) -> Object {
        self.create(Cell::settled(Ok(Value::Inline(Payload { format, bytes }))))
    }

    /// Prepares a small value that another process will own, which travels in the answer.
    pub fn encode_result<T: Serialize + ?Sized>(
        self: &Arc<Self>,
        value: &T,
    ) -> Result<ObjectValue, codec::EncodeError> {
        let (payload, contains) = capture_contained(|| Payload::encoded(value));
        Ok(ObjectValue::inline(&payload?, &contains))
    }

    /// Prepares a value that another process will own, a task's result: a large one goes into this
    /// node's shared memory, where it outlives this process.
    pub async fn store_result<T: Serialize + ?Sized>(
        self: &Arc<Self>,
        value: &T,
    ) -> Result<ObjectValue, PutError> {
        let (payload, contains) = capture_contained(|| Payload::encoded(value));
        let Payload { format, bytes } = payload?;
        Ok(self.store_bytes(format, &bytes, &contains).await?)
    }

    /// The same for a value's bytes, which refer to the objects in `contains`.
    pub(crate) async fn store_bytes(
        &self,
        format: Format,
        bytes: &[u8],
        contains: &[Object],
    ) -> Result<ObjectValue, ObjectError> {
        match self.store_for(bytes.len())? {
            None => {
                let bytes = Bytes::copy_from_slice(bytes);
                Ok(ObjectValue::inline(&Payload { format, bytes }, contains))
            }
            Some(store) => {
                let stored = store.write(self.next_id(), format, bytes, false).await?;
                Ok(ObjectValue::stored(stored, contains))
            }
        }
    }

    /// Nobody refers to an object any more: what it takes in shared memory is free.
    pub(crate) fn free_bytes(&self, entry: &Entry) {
        if let (Some(store), Some(Ok(Value::Stored(stored)))) =
            (self.store.get(), entry.cell.outcome())
        {
            store.free(&stored);
        }
    }
}
