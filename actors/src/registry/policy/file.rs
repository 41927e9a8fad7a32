//! The policies of a cluster: one file of them, as replicated state.
//!
//! Invariants:
//! 1. What is stored was checked on every head: it parses, fits the schema, and names each policy.
//! 2. It changes only for who has seen what it changes: each change names the revision before.
//! 3. Once a key has the role `admin`, such a key signs each change.

use mobula_core::control::{ApplyContext, Reader, Txn};
use mobula_core::error::Rejection;
use mobula_core::row;
use serde::{Deserialize, Serialize};

use super::engine;
use crate::registry::envelope::Envelope;
use crate::registry::events::{self, Event};
use crate::registry::tables::{POLICY_FILE, POLICY_FILE_KEY};
use crate::registry::{keys, statement};

/// The policies that were set.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PolicyFile {
    /// How often they were set; 0: never.
    pub revision: u64,
    /// Their text; empty: only the shipped ones count.
    pub text: String,
    /// Since when, in milliseconds since the Unix epoch.
    pub since_ms: u64,
}

/// The policies that are in force beside the shipped ones.
pub fn current(reader: &dyn Reader) -> PolicyFile {
    row::get(reader, POLICY_FILE, POLICY_FILE_KEY).unwrap_or_default()
}

/// Puts `text` in the place of the policies.
pub(in crate::registry) fn set(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    text: String,
    expected_revision: u64,
    envelope: Option<&Envelope>,
) -> Result<PolicyFile, Rejection> {
    let before = current(txn);
    if before.revision != expected_revision {
        return Err(Rejection::fenced(format!(
            "the policies are at revision {}, and this was decided on revision {expected_revision}: \
             somebody set others since; look again with `mobula policy show`",
            before.revision
        )));
    }
    let ids = engine::check(&text).map_err(|error| Rejection::invalid(error.to_string()))?;
    let signed = statement::policy_file(&text, expected_revision);
    let signers = keys::check_admin(txn, "policy file", &signed, envelope)?;
    let file = PolicyFile {
        revision: expected_revision + 1,
        text,
        since_ms: context.now_ms,
    };
    row::put(txn, POLICY_FILE, POLICY_FILE_KEY, &file);
    let event = Event::PolicyFileSet {
        revision: file.revision,
        policies: &ids,
        text: &file.text,
        signers: &signers,
        envelopes: envelope.map(Envelope::to_json).into_iter().collect(),
    };
    events::append(txn, context, &event);
    Ok(file)
}
