//! Kept objects: values that a job owns by name, through the head, whoever put them and however that
//! process ended.
//!
//! The tables hold what such a value is and the digests of its chunks; the bytes are in the object
//! store. These are the words that the head and whoever asks it have in common.
//!
//! Invariant: variants are append-only: their position is their tag, in the log and on the wire.

use serde::{Deserialize, Serialize};

use crate::codec::{self, DecodeError};
use crate::error::Rejection;
use crate::id::{ActorId, Incarnation, JobId};
use crate::object::{Format, ObjectError};

/// The largest kept object: its chunks are 4 KiB of digests in a row of the tables.
pub const KEPT_BYTES_MAX: u64 = 1 << 30;

/// How a value is cut for the object store; the last chunk is what is left over. A request of this
/// size gets through on a slow line.
pub const KEPT_CHUNK_BYTES: u64 = 8 << 20;

/// Kept objects in one answer of the head: half a megabyte of digests at the most.
pub const KEPT_PAGE_ROWS: usize = 100;

/// The largest command or question: a name, and the digests of the largest value.
const PAYLOAD_BYTES_MAX: usize = 64 * 1024;

/// The largest answer: a page.
const ANSWER_BYTES_MAX: usize = 1024 * 1024;

/// Who keeps or drops something: an actor, and which start of it.
pub type Holder = (ActorId, Incarnation);

/// A value, without its bytes. Equal ones have equal bytes, and are read in the same way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptValue {
    /// How to read it.
    pub format: Format,
    /// Its size.
    pub size_bytes: u64,
    /// BLAKE3 of each chunk, in order.
    pub chunks: Vec<[u8; 32]>,
}

impl KeptValue {
    /// The digest and the length of each chunk, in order.
    pub fn chunks(&self) -> impl Iterator<Item = ([u8; 32], u64)> + '_ {
        let lengths = (0..self.size_bytes.div_ceil(KEPT_CHUNK_BYTES)).map(|index| {
            let left = self.size_bytes - index * KEPT_CHUNK_BYTES;
            left.min(KEPT_CHUNK_BYTES)
        });
        self.chunks.iter().copied().zip(lengths)
    }

    /// Refuses what is too large, or has more or fewer chunks than its size says.
    pub fn check(&self) -> Result<(), String> {
        if self.size_bytes > KEPT_BYTES_MAX {
            return Err(format!(
                "it has {} bytes, the limit is {KEPT_BYTES_MAX}: keep it in parts",
                self.size_bytes
            ));
        }
        let expected = self.size_bytes.div_ceil(KEPT_CHUNK_BYTES);
        if self.chunks.len() as u64 != expected {
            return Err(format!(
                "it has {} bytes and {} chunks, which should be {expected}",
                self.size_bytes,
                self.chunks.len()
            ));
        }
        Ok(())
    }
}

/// A kept object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptObject {
    /// Its name within its job.
    pub name: String,
    /// What it is.
    pub value: KeptValue,
    /// Since when, in milliseconds since the Unix epoch.
    pub kept_ms: u64,
}

/// A change of what a job keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeptCommand {
    /// Keeps a value whose chunks are all in the object store, each written less than an hour ago.
    /// Answer: nothing.
    Keep {
        /// Whose it is.
        job: JobId,
        /// Who keeps it, refused when it is stale; a host has to say.
        holder: Option<Holder>,
        /// Its name within the job.
        name: String,
        /// The value.
        value: KeptValue,
    },
    /// Keeps it no longer. Answer: whether there was one, as [`KeptCommand::was_there`] reads it.
    Drop {
        /// Whose it is.
        job: JobId,
        /// Who drops it, refused when it is stale; a host has to say.
        holder: Option<Holder>,
        /// Its name within the job.
        name: String,
    },
}

impl KeptCommand {
    /// The command as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        codec::encode_plain(self)
    }

    /// The command that `payload` spells.
    pub fn decode(payload: &[u8]) -> Result<Self, Rejection> {
        codec::decode(payload, PAYLOAD_BYTES_MAX)
            .map_err(|error| Rejection::invalid(format!("command about kept objects: {error}")))
    }

    /// Reads the answer to [`KeptCommand::Drop`].
    pub fn was_there(answer: &[u8]) -> Result<bool, DecodeError> {
        codec::decode(answer, ANSWER_BYTES_MAX)
    }

    /// Whose objects it is about, in whose name, and which of them.
    #[must_use]
    pub fn about(&self) -> (JobId, Option<Holder>, &str) {
        match self {
            KeptCommand::Keep {
                job, holder, name, ..
            }
            | KeptCommand::Drop { job, holder, name } => (*job, *holder, name),
        }
    }
}

/// A question about what a job keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptQuery {
    /// Whose.
    pub job: JobId,
    /// Which.
    pub which: KeptNames,
}

/// Which kept objects somebody asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeptNames {
    /// The one of this name, if there is one.
    One(String),
    /// Those whose name follows this one, [`KEPT_PAGE_ROWS`] at most; empty for the first.
    After(String),
}

impl KeptQuery {
    /// The question as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        codec::encode_plain(self)
    }

    /// The question that `payload` spells.
    pub fn decode(payload: &[u8]) -> Result<Self, Rejection> {
        codec::decode(payload, PAYLOAD_BYTES_MAX)
            .map_err(|error| Rejection::invalid(format!("question about kept objects: {error}")))
    }

    /// Reads the answer: those that there are, by name.
    pub fn answer(bytes: &[u8]) -> Result<Vec<KeptObject>, DecodeError> {
        codec::decode(bytes, ANSWER_BYTES_MAX)
    }
}

/// Why a value was not kept, or what was kept is not read. Nothing took effect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum KeptError {
    /// There is no value here to keep, or no room for the one that was kept.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// It is too large.
    #[error(
        "`{name}` has {size_bytes} bytes, the limit of a kept object is {limit_bytes}: keep it in \
         parts, each under its name"
    )]
    TooLarge {
        /// The name that it was to have.
        name: String,
        /// Its size.
        size_bytes: u64,
        /// The limit.
        limit_bytes: u64,
    },
    /// There are references to objects in it.
    #[error(
        "`{name}` is not kept: there are references in it to objects that would be lost with their \
         owners; keep those objects, and their names in its place"
    )]
    HoldsReferences {
        /// The name that it was to have.
        name: String,
    },
    /// The object store did not take it.
    #[error("`{name}` is not kept, the object store did not take it: {reason}")]
    NotStored {
        /// The name that it was to have.
        name: String,
        /// What the store said.
        reason: String,
    },
    /// Its bytes are gone from the object store, or are others.
    #[error("the kept object `{name}` is lost: {reason}; drop it and keep it again")]
    Lost {
        /// Its name.
        name: String,
        /// What is missing or damaged.
        reason: String,
    },
    /// The object store does not answer.
    #[error("the kept object `{name}` cannot be read now: {reason}; ask for it again")]
    OutOfReach {
        /// Its name.
        name: String,
        /// What the store said.
        reason: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::Element;

    #[test]
    fn tags_are_where_they_were_and_values_survive() {
        let (job, name) = (JobId(3), "weights".to_owned());
        let holder = Some((ActorId(4), Incarnation(5)));
        let value = KeptValue {
            format: Format::Plain(Element::F32),
            size_bytes: 12,
            chunks: vec![[7; 32]],
        };
        let keep = KeptCommand::Keep {
            job,
            holder,
            name: name.clone(),
            value,
        };
        let drop = KeptCommand::Drop { job, holder, name };
        for (tag, command) in [(0u32, keep), (1, drop)] {
            let bytes = command.encode();
            assert_eq!(bytes[..4], tag.to_le_bytes());
            assert_eq!(KeptCommand::decode(&bytes).unwrap(), command);
            assert_eq!(command.about(), (job, holder, "weights"));
        }
        let query = KeptQuery {
            job,
            which: KeptNames::After("a".into()),
        };
        assert_eq!(KeptQuery::decode(&query.encode()).unwrap(), query);
        assert!(KeptQuery::decode(b"no question").is_err());
    }

    #[test]
    fn a_value_has_the_chunks_that_its_size_says() {
        let value = |size_bytes, chunks| KeptValue {
            format: Format::Encoded,
            size_bytes,
            chunks: vec![[1; 32]; chunks],
        };
        for (size_bytes, lengths) in [
            (0, vec![]),
            (1, vec![1]),
            (KEPT_CHUNK_BYTES, vec![KEPT_CHUNK_BYTES]),
            (KEPT_CHUNK_BYTES + 5, vec![KEPT_CHUNK_BYTES, 5]),
        ] {
            let right = value(size_bytes, lengths.len());
            right.check().unwrap();
            let found: Vec<u64> = right.chunks().map(|(_, length)| length).collect();
            assert_eq!(found, lengths);
            assert!(value(size_bytes, lengths.len() + 1).check().is_err());
        }
        let too_large = value(KEPT_BYTES_MAX + 1, 129);
        assert!(too_large.check().unwrap_err().contains("the limit is"));
    }
}
