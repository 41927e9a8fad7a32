//! Credentials that are replaced while they are in use.

use std::sync::Arc;

use parking_lot::RwLock;

use super::Credentials;

/// The credentials of a process whose certificate is renewed while it runs: every clone gives the
/// newest.
#[derive(Debug, Clone)]
pub struct CurrentCredentials(Arc<RwLock<Credentials>>);

impl CurrentCredentials {
    /// Begins with `first`.
    #[must_use]
    pub fn new(first: Credentials) -> Self {
        CurrentCredentials(Arc::new(RwLock::new(first)))
    }

    /// The newest.
    #[must_use]
    pub fn get(&self) -> Credentials {
        self.0.read().clone()
    }

    /// Uses `next` from now on.
    pub fn replace(&self, next: Credentials) {
        *self.0.write() = next;
    }
}
