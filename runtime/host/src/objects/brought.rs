//! Values that travel with the references to them, so that whoever takes them in need not ask their
//! owner.
//!
//! Invariants:
//! 1. A value that was brought is what the owner would have answered: it settles the object early,
//!    and changes nothing about who holds it.
//! 2. What is not brought is asked for as ever.

use std::cell::RefCell;

use mobula_core::codec;
use mobula_core::object::ObjectId;
use mobula_wire::object::WireValue;
use mobula_wire::task::BroughtValues;

use super::cell::Value;
use super::handle::Object;

/// The settled values of `objects`, encoded, as far as they are small or in shared memory: small
/// ones up to `limit_bytes` together. Empty if there are none.
#[must_use]
pub fn bring(objects: &[Object], limit_bytes: usize) -> Vec<u8> {
    let mut left_bytes = limit_bytes;
    let mut values = BroughtValues::new();
    for object in objects {
        let Some(Ok(value)) = object.outcome() else {
            continue;
        };
        if let Value::Inline(payload) = &value {
            match left_bytes.checked_sub(payload.bytes.len()) {
                Some(left) => left_bytes = left,
                None => continue,
            }
        }
        values.push((object.id(), value.into()));
    }
    match values.is_empty() {
        true => Vec::new(),
        false => codec::encode_plain(&values),
    }
}

thread_local! {
    static BROUGHT: RefCell<BroughtValues> = const { RefCell::new(Vec::new()) };
}

/// Runs `decode`, during which references are taken in whose values are in `values`, as [`bring`]
/// made them.
pub fn brought<R>(values: &[u8], decode: impl FnOnce() -> R) -> R {
    struct Restore(BroughtValues);
    impl Drop for Restore {
        fn drop(&mut self) {
            BROUGHT.set(std::mem::take(&mut self.0));
        }
    }
    if values.is_empty() {
        return decode();
    }
    // What cannot be read is not brought, and asked for.
    let values = codec::decode(values, values.len()).unwrap_or_default();
    let _restore = Restore(BROUGHT.replace(values));
    decode()
}

/// The value of an object that is being taken in, if it was brought.
pub(crate) fn value_of(object: ObjectId) -> Option<Value> {
    BROUGHT.with_borrow(|values| {
        let found = values.iter().find(|(id, _)| *id == object);
        found.map(|(_, value)| Value::from(WireValue::clone(value)))
    })
}
