//! Namespaces: where jobs of one owner find each other's named actors, and may call them.
//!
//! Invariants:
//! 1. A name and an incarnation are one life of a namespace: it begins with the first job that enters
//!    it and ends with the last. Who enters later enters another one, so a certificate of an earlier
//!    life opens nothing in it.
//! 2. A name is part of a certificate's name, so it is spelt as those are.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::id::Incarnation;

/// The longest name of a namespace, in bytes: what one part of a certificate's name may have.
pub const NAMESPACE_BYTES_MAX: usize = 63;

/// One life of a namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Namespace {
    /// Its name.
    pub name: String,
    /// Which life of it.
    pub incarnation: Incarnation,
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// A job's wish to be in a namespace, and in whose name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamespaceEntry {
    /// The namespace's name.
    pub name: String,
    /// Who submits the job, as the head knows them: a namespace takes the jobs of one principal.
    pub principal: String,
}

/// Refuses what cannot be the name of a namespace; the error is for people.
pub fn check_namespace(name: &str) -> Result<(), String> {
    let allowed = |byte: u8| {
        byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_' | b'.')
    };
    if (1..=NAMESPACE_BYTES_MAX).contains(&name.len()) && name.bytes().all(allowed) {
        return Ok(());
    }
    let shown: String = name.chars().take(80).collect();
    Err(format!(
        "`{}` cannot be the name of a namespace: use 1 to {NAMESPACE_BYTES_MAX} of a-z, 0-9, `-`, \
         `_` and `.`",
        shown.escape_debug()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_and_plain() {
        let longest = "a".repeat(NAMESPACE_BYTES_MAX);
        for good in ["shop", "a", "team-1_b.c", &longest] {
            assert_eq!(check_namespace(good), Ok(()), "{good}");
        }
        let too_long = "a".repeat(NAMESPACE_BYTES_MAX + 1);
        for bad in ["", "Shop", "a/b", "a b", "ä", "a\n", &too_long] {
            let error = check_namespace(bad).unwrap_err();
            assert!(error.contains("1 to 63"), "{bad:?}: {error}");
        }
    }
}
