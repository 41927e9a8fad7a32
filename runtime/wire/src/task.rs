//! A task on its way into a slot: a call whose method is the task's name, and whose arguments have
//! this head in front.
//!
//! ```text
//! offset 0            2           6              10
//!        +------------+-----------+--------------+--------+------------------
//!        | version(1) | attempt   | values bytes | values | encoded arguments
//!        | u16 LE     | u32 LE    | u32 LE       |        |
//!        +------------+-----------+--------------+--------+------------------
//! ```
//!
//! The *values* are those of objects that the arguments refer to, as far as they are small: an
//! encoded [`BroughtValues`], or nothing.

use bytes::{Buf, BufMut, Bytes};
use mobula_core::object::ObjectId;

use crate::object::WireValue;

/// The layout above.
const VERSION: u16 = 1;

/// Size of the head, in bytes.
pub const TASK_HEAD_BYTES: usize = 10;

/// Values that travel with a task, so that its slot need not ask their owner for them.
pub type BroughtValues = Vec<(ObjectId, WireValue)>;

/// What a slot must know about a task besides its name and arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TaskHead {
    /// Which execution this is, from 1.
    pub attempt: u32,
}

/// Why bytes are not a task.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TaskHeadError {
    /// They end within the head.
    #[error("a task's arguments have {TASK_HEAD_BYTES} bytes at least, these have {size_bytes}")]
    TooShort {
        /// How many there are.
        size_bytes: usize,
    },
    /// They end within the values.
    #[error("{values_bytes} bytes of values are announced, {size_bytes} bytes are left")]
    ValuesTooShort {
        /// How many bytes the values should have.
        values_bytes: u32,
        /// How many there are.
        size_bytes: usize,
    },
    /// A layout that this build does not know.
    #[error(
        "task layout {version} is not {VERSION}: the caller runs another release; build both with \
         the same SDK"
    )]
    UnknownVersion {
        /// What was sent.
        version: u16,
    },
}

impl TaskHead {
    /// A task's arguments with this head and encoded values in front.
    ///
    /// # Panics
    ///
    /// If there are 4 GiB of values or more: a call takes far less.
    #[must_use]
    pub fn join(self, values: &[u8], arguments: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(TASK_HEAD_BYTES + values.len() + arguments.len());
        bytes.put_u16_le(VERSION);
        bytes.put_u32_le(self.attempt);
        bytes.put_u32_le(u32::try_from(values.len()).expect("a call takes far less"));
        bytes.extend_from_slice(values);
        bytes.extend_from_slice(arguments);
        bytes
    }

    /// The head, the encoded values and the arguments, which share the memory of `bytes`.
    pub fn split(mut bytes: Bytes) -> Result<(Self, Bytes, Bytes), TaskHeadError> {
        if bytes.len() < TASK_HEAD_BYTES {
            let size_bytes = bytes.len();
            return Err(TaskHeadError::TooShort { size_bytes });
        }
        match bytes.get_u16_le() {
            VERSION => {}
            version => return Err(TaskHeadError::UnknownVersion { version }),
        }
        let attempt = bytes.get_u32_le();
        let values_bytes = bytes.get_u32_le();
        if values_bytes as usize > bytes.len() {
            let size_bytes = bytes.len();
            return Err(TaskHeadError::ValuesTooShort {
                values_bytes,
                size_bytes,
            });
        }
        let values = bytes.split_to(values_bytes as usize);
        Ok((TaskHead { attempt }, values, bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_head_survives_the_wire(
            attempt: u32,
            values in proptest::collection::vec(any::<u8>(), 0..64),
            arguments in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            let head = TaskHead { attempt };
            let joined = head.join(&values, &arguments).into();
            let (read, brought, rest) = TaskHead::split(joined).unwrap();
            prop_assert_eq!(read, head);
            prop_assert_eq!(&brought[..], &values[..]);
            prop_assert_eq!(&rest[..], &arguments[..]);
        }

        #[test]
        fn any_bytes_split_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..16)) {
            let split = TaskHead::split(bytes.clone().into());
            if bytes.len() < TASK_HEAD_BYTES {
                prop_assert_eq!(split, Err(TaskHeadError::TooShort { size_bytes: bytes.len() }));
            } else if bytes[..2] != [1, 0] {
                let refused = matches!(split, Err(TaskHeadError::UnknownVersion { .. }));
                prop_assert!(refused);
            } else if let Ok((_, values, arguments)) = split {
                prop_assert_eq!(TASK_HEAD_BYTES + values.len() + arguments.len(), bytes.len());
            } else {
                let refused = matches!(split, Err(TaskHeadError::ValuesTooShort { .. }));
                prop_assert!(refused);
            }
        }
    }
}
