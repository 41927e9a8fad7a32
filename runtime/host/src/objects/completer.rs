//! Values that come later: the duty to produce one, and what it has come to on its way to its owner.
//!
//! Invariant: a pending object settles. Who has the duty and lets go of it has lost the object.

use std::sync::Arc;

use bytes::Bytes;
use mobula_core::object::{ObjectError, ObjectId};
use mobula_wire::object::{Format, Reference, Stored, WireValue};
use serde::{Deserialize, Serialize};

use super::cell::Value;
use super::handle::Object;
use super::owner::Entry;
use super::payload::Payload;
use super::table::ObjectTable;

/// Creates the value of an object anew when its bytes are lost.
pub trait Lineage: Send + Sync {
    /// Starts to produce the value again, for `completer`, because of `reason`: once for each loss,
    /// however many readers notice it. Dropping the completer says that it cannot be done.
    ///
    /// How often a value may be lost is bounded here or nowhere: what completes the completer gives
    /// the value a lineage again, which has to know of the losses before.
    fn recreate(&self, completer: Completer, reason: &str);
}

/// A finished value on its way from whoever produced it to the object's owner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectValue {
    value: WireValue,
    /// References inside the value, each held for the owner.
    contains: Vec<Reference>,
}

impl ObjectValue {
    pub(crate) fn inline(payload: &Payload, contains: &[Object]) -> Self {
        let value = WireValue::Inline {
            format: payload.format,
            bytes: payload.bytes.to_vec(),
        };
        ObjectValue::new(value, contains)
    }

    pub(crate) fn stored(stored: Stored, contains: &[Object]) -> Self {
        ObjectValue::new(WireValue::Stored(stored), contains)
    }

    fn new(value: WireValue, contains: &[Object]) -> Self {
        ObjectValue {
            value,
            contains: contains.iter().map(Object::export).collect(),
        }
    }

    /// Whether its bytes are in a node's memory, and so can be lost with it.
    #[must_use]
    pub fn is_stored(&self) -> bool {
        matches!(self.value, WireValue::Stored(_))
    }

    /// It will have no owner after all: what it takes in the node's memory is free again, and what it
    /// refers to is let go.
    pub(crate) fn discard(self, table: &Arc<ObjectTable>) {
        for reference in &self.contains {
            // Taken in and dropped it is held no more, as if its receiver had done so.
            drop(table.import(reference));
        }
        if let (Some(store), WireValue::Stored(stored)) = (table.store.get(), &self.value) {
            store.free(stored);
        }
    }
}

/// The duty to bring one pending object to a value or an error. Dropped unfulfilled, the object
/// is lost.
#[must_use = "dropping it loses the object"]
pub struct Completer {
    id: ObjectId,
    table: Arc<ObjectTable>,
    entry: Arc<Entry>,
    is_done: bool,
}

impl Completer {
    pub(crate) fn new(table: &Arc<ObjectTable>, id: ObjectId, entry: &Arc<Entry>) -> Self {
        Completer {
            id,
            table: Arc::clone(table),
            entry: Arc::clone(entry),
            is_done: false,
        }
    }

    /// Which object.
    #[must_use]
    pub fn id(&self) -> ObjectId {
        self.id
    }

    /// Whether anybody still refers to the object, here or elsewhere, or may soon.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.table.is_wanted(&self.entry)
    }

    pub(crate) fn set_lineage(&self, lineage: Arc<dyn Lineage>) {
        *self.entry.lineage.lock() = Some(lineage);
    }

    /// The object has this value.
    pub fn complete(mut self, value: ObjectValue) {
        self.is_done = true;
        let ObjectValue { value, contains } = value;
        let contains: Vec<Object> = contains
            .iter()
            .map(|reference| self.table.import(reference))
            .collect();
        *self.entry.contains.lock() = contains;
        self.table.settle(self.id, &self.entry, Ok(value.into()));
    }

    /// The object has this encoded value, in which there are no references.
    pub fn complete_encoded(mut self, bytes: Bytes) {
        self.is_done = true;
        let format = Format::Encoded;
        let value = Value::Inline(Payload { format, bytes });
        self.table.settle(self.id, &self.entry, Ok(value));
    }

    /// The object has this value; should its bytes be lost, `lineage` produces it again.
    pub fn complete_recreatable(self, value: ObjectValue, lineage: Arc<dyn Lineage>) {
        self.set_lineage(lineage);
        self.complete(value);
    }

    /// The object will never have a value.
    pub fn fail(mut self, error: ObjectError) {
        self.is_done = true;
        self.table.settle(self.id, &self.entry, Err(error));
    }
}

impl Drop for Completer {
    fn drop(&mut self) {
        if !self.is_done {
            let error = ObjectError::Lost {
                object: self.id,
                reason: "whoever was to produce it gave up".to_owned(),
            };
            self.table.settle(self.id, &self.entry, Err(error));
        }
    }
}

impl std::fmt::Debug for Completer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Completer")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}
