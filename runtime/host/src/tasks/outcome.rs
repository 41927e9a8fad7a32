//! A task's value on its way from the slot to the owner of its object.
//!
//! Most values are small and contain no references; those travel as they are encoded, with one
//! byte behind them. It stands at the end because nothing must be moved for it there.

use std::sync::Arc;

use bytes::Bytes;
use mobula_core::codec;
use mobula_wire::object::INLINE_BYTES_MAX;
use serde::Serialize;

use crate::actor::MethodError;
use crate::objects::{Completer, Lineage, ObjectValue, capture};
use crate::tasks::context::TaskContext;

/// The encoded value itself.
const PLAIN: u8 = 0;
/// An encoded [`ObjectValue`].
const OBJECT: u8 = 1;

/// Encodes the value of the task `context`.
pub fn encode_outcome<T: Serialize>(
    context: &TaskContext,
    value: &T,
) -> Result<Vec<u8>, MethodError> {
    let lost = |reason: &dyn std::fmt::Display| {
        MethodError::ResultLost(format!("value of task `{}`: {reason}", context.name()))
    };
    let (encoded, references) = capture(|| codec::encode(value));
    let mut bytes = encoded.map_err(|error| lost(&error))?;
    if references.is_empty() && bytes.len() <= INLINE_BYTES_MAX {
        bytes.push(PLAIN);
        return Ok(bytes);
    }
    let objects = context
        .slot()
        .runtime()
        .objects()
        .ok_or_else(|| lost(&"its process has no objects"))?;
    let value = objects.encode_result(value).map_err(|error| lost(&error))?;
    let mut bytes = codec::encode_plain(&value);
    bytes.push(OBJECT);
    Ok(bytes)
}

/// Completes an object with what a slot answered. `lineage` is asked for where the value's bytes
/// can be lost.
pub fn complete_with_outcome(
    completer: Completer,
    mut outcome: Bytes,
    lineage: impl FnOnce() -> Option<Arc<dyn Lineage>>,
) -> Result<(), (Completer, String)> {
    let kind = match outcome.last() {
        Some(kind) => *kind,
        None => return Err((completer, "it is empty".to_owned())),
    };
    outcome.truncate(outcome.len() - 1);
    match kind {
        PLAIN => completer.complete_encoded(outcome),
        OBJECT => match codec::decode::<ObjectValue>(&outcome, outcome.len()) {
            Ok(value) => match lineage() {
                Some(lineage) if value.is_stored() => {
                    completer.complete_recreatable(value, lineage);
                }
                _ => completer.complete(value),
            },
            Err(error) => return Err((completer, error.to_string())),
        },
        kind => return Err((completer, format!("its kind {kind} is unknown here"))),
    }
    Ok(())
}
