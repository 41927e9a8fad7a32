//! Identities. Each is a number that the replicated state allocates and never reuses; people see
//! it with its kind in front (`job-12`), and both forms parse.

use std::fmt;
use std::num::ParseIntError;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is not an identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no {kind} id: expected `{kind}-<number>` or a number")]
pub struct ParseIdError {
    kind: &'static str,
    text: String,
    source: ParseIntError,
}

macro_rules! identity {
    ($(#[$doc:meta])* $name:ident, $prefix:literal) => {
        $(#[$doc])*
        #[derive(
            Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "-{}"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let digits = text.strip_prefix(concat!($prefix, "-")).unwrap_or(text);
                digits.parse().map($name).map_err(|source| ParseIdError {
                    kind: $prefix,
                    text: text.to_owned(),
                    source,
                })
            }
        }

        impl $name {
            /// The id as a key that sorts by number.
            #[must_use]
            pub fn to_key(self) -> [u8; 8] {
                self.0.to_be_bytes()
            }
        }
    };
}

identity!(
    /// A worker machine, over all its incarnations.
    NodeId, "node"
);
identity!(
    /// A job: a driver and everything that it started.
    JobId, "job"
);
identity!(
    /// An actor, over all its incarnations. A job's driver is one too.
    ActorId, "actor"
);
identity!(
    /// A group of actors that is placed all or nothing.
    GroupId, "group"
);
identity!(
    /// A host process on a worker; allocated by its agent, unique within one node incarnation.
    HostId, "host"
);
identity!(
    /// A client's exactly-once context.
    SessionId, "session"
);

impl SessionId {
    /// The head's own commands: level-triggered and idempotent, so they carry no session.
    pub const INTERNAL: SessionId = SessionId(0);
}

impl JobId {
    /// Owner of what the platform itself starts (routers, replicas, monitors).
    pub const SYSTEM: JobId = JobId(0);
}

/// Grows each time a node or an actor is started again: the fencing token of side effects. It is
/// the Raft index of the command that granted it, hence unique in the whole cluster.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default,
)]
#[serde(transparent)]
pub struct Incarnation(pub u64);

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "#{}", self.0)
    }
}

/// A Raft term: fences what a leader sends to workers.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, Default,
)]
#[serde(transparent)]
pub struct Term(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_parse_what_they_print() {
        assert_eq!("job-12".parse::<JobId>().unwrap(), JobId(12));
        assert_eq!("12".parse::<JobId>().unwrap(), JobId(12));
        assert_eq!(
            ActorId(7).to_string().parse::<ActorId>().unwrap(),
            ActorId(7)
        );
        let error = "node-12".parse::<JobId>().unwrap_err();
        assert_eq!(
            error.to_string(),
            "`node-12` is no job id: expected `job-<number>` or a number"
        );
    }

    #[test]
    fn keys_sort_by_number() {
        assert!(JobId(255).to_key() < JobId(256).to_key());
    }
}
