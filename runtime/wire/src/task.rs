//! A task on its way into a slot: a call whose method is the task's name, and whose arguments have
//! this head in front.
//!
//! ```text
//! offset 0            2           6
//!        +------------+-----------+------------------
//!        | version(1) | attempt   | encoded arguments
//!        | u16 LE     | u32 LE    |
//!        +------------+-----------+------------------
//! ```

use bytes::{Buf, BufMut, Bytes};

/// The layout above.
const VERSION: u16 = 1;

/// Size of the head, in bytes.
pub const TASK_HEAD_BYTES: usize = 6;

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
    /// A task's arguments with this head in front.
    #[must_use]
    pub fn join(self, arguments: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(TASK_HEAD_BYTES + arguments.len());
        bytes.put_u16_le(VERSION);
        bytes.put_u32_le(self.attempt);
        bytes.extend_from_slice(arguments);
        bytes
    }

    /// The head and what follows it, which shares the memory of `bytes`.
    pub fn split(mut bytes: Bytes) -> Result<(Self, Bytes), TaskHeadError> {
        if bytes.len() < TASK_HEAD_BYTES {
            let size_bytes = bytes.len();
            return Err(TaskHeadError::TooShort { size_bytes });
        }
        match bytes.get_u16_le() {
            VERSION => {}
            version => return Err(TaskHeadError::UnknownVersion { version }),
        }
        let attempt = bytes.get_u32_le();
        Ok((TaskHead { attempt }, bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_head_survives_the_wire(attempt: u32, arguments in proptest::collection::vec(any::<u8>(), 0..64)) {
            let head = TaskHead { attempt };
            let (read, rest) = TaskHead::split(head.join(&arguments).into()).unwrap();
            prop_assert_eq!(read, head);
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
            }
        }
    }
}
