//! A task's value on its way from the slot to the owner of its object.
//!
//! Most values are small and contain no references; those travel as they are encoded, with one
//! byte behind them. It stands at the end because nothing must be moved for it there. Large ones
//! stay in the shared memory of the node where they were made, and outlive the slot's process there:
//! until their owner frees them, or the slot that learns that there will be none.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;
use mobula_core::codec;
use mobula_core::object::ObjectError;
use mobula_wire::object::{Element, Format, INLINE_BYTES_MAX};
use serde::Serialize;

use crate::actor::MethodError;
use crate::objects::handle::capture_contained;
use crate::objects::{Completer, Lineage, Object, ObjectTable, ObjectValue};
use crate::tasks::context::{TaskContext, while_blocked};

/// The encoded value itself.
const PLAIN: u8 = 0;
/// An encoded [`ObjectValue`].
const OBJECT: u8 = 1;

/// A task's value, encoded.
pub struct EncodedValue<'a> {
    format: Format,
    bytes: Cow<'a, [u8]>,
    /// What it refers to.
    contains: Vec<Object>,
}

impl<'a> EncodedValue<'a> {
    /// Encodes the value of the task `context`.
    pub fn of<T: Serialize>(context: &TaskContext, value: &T) -> Result<Self, MethodError> {
        let (encoded, contains) = capture_contained(|| codec::encode(value));
        Ok(EncodedValue {
            format: Format::Encoded,
            bytes: Cow::Owned(encoded.map_err(|error| lost(context, &error))?),
            contains,
        })
    }

    /// A value that is in memory as it is read.
    #[must_use]
    pub fn plain(element: Element, bytes: &'a [u8]) -> Self {
        EncodedValue {
            format: Format::Plain(element),
            bytes: Cow::Borrowed(bytes),
            contains: Vec::new(),
        }
    }

    /// What the slot answers for the task `context`. A large value is put into shared memory first,
    /// which may mean waiting for room there.
    pub async fn into_outcome(self, context: &TaskContext) -> Result<Vec<u8>, MethodError> {
        let EncodedValue {
            format,
            bytes,
            contains,
        } = self;
        let is_small = bytes.len() <= INLINE_BYTES_MAX;
        if is_small && format == Format::Encoded && contains.is_empty() {
            let mut bytes = bytes.into_owned();
            bytes.push(PLAIN);
            return Ok(bytes);
        }
        let objects = context
            .slot()
            .runtime()
            .objects()
            .ok_or_else(|| lost(context, &"its process has no objects"))?;
        let stored = while_blocked(objects.store_bytes(format, &bytes, &contains)).await;
        let value = stored.map_err(|error| match error {
            ObjectError::StoreFull { .. } | ObjectError::DiskFull { .. } => {
                MethodError::OutOfMemory {
                    what: format!("task `{}`", context.name()),
                    reason: error.to_string(),
                }
            }
            error => lost(context, &error),
        })?;
        let mut bytes = codec::encode_plain(&value);
        bytes.push(OBJECT);
        Ok(bytes)
    }
}

fn lost(context: &TaskContext, reason: &dyn std::fmt::Display) -> MethodError {
    MethodError::ResultLost(format!("value of task `{}`: {reason}", context.name()))
}

/// Completes an object with what a slot answered. `lineage` is asked for where the value's bytes
/// can be lost.
pub fn complete_with_outcome(
    completer: Completer,
    mut outcome: Bytes,
    lineage: impl FnOnce() -> Arc<dyn Lineage>,
) -> Result<(), (Completer, String)> {
    let kind = match outcome.last() {
        Some(kind) => *kind,
        None => return Err((completer, "it is empty".to_owned())),
    };
    outcome.truncate(outcome.len() - 1);
    match kind {
        PLAIN => completer.complete_encoded(outcome),
        OBJECT => match codec::decode::<ObjectValue>(&outcome, outcome.len()) {
            Ok(value) if value.is_stored() => completer.complete_recreatable(value, lineage()),
            Ok(value) => completer.complete(value),
            Err(error) => return Err((completer, error.to_string())),
        },
        kind => return Err((completer, format!("its kind {kind} is unknown here"))),
    }
    Ok(())
}

/// Lets go of what a task brought when it is certain that nobody will ask for it.
pub(crate) fn discard(objects: Option<&Arc<ObjectTable>>, outcome: &[u8]) {
    if let Some((&OBJECT, value)) = outcome.split_last()
        && let Some(objects) = objects
        && let Ok(value) = codec::decode::<ObjectValue>(value, value.len())
    {
        value.discard(objects);
    }
}
