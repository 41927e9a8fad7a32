//! How much a caller still wants of a call, as the method sees it.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::CallControl;

/// How much the caller wants a call to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum CancelLevel {
    /// Not at all.
    None = 0,
    /// The method is told, and ends when it sees fit.
    Requested = 1,
    /// The method is dropped at its next await.
    Forced = 2,
}

/// What a call's caller says about ending it early. Clones watch the same call.
#[derive(Clone)]
pub struct Cancellation(pub(super) Arc<CallControl>);

impl Cancellation {
    /// What it wants now.
    #[must_use]
    pub fn level(&self) -> CancelLevel {
        self.0.level()
    }

    /// Waits until the caller wants at least `level`. Cheap to make and to drop.
    pub async fn reached(&self, level: CancelLevel) {
        loop {
            let change = self.0.cancelled.notified();
            tokio::pin!(change);
            // Registered before the look, so that no change is missed in between.
            change.as_mut().enable();
            if self.0.level() >= level {
                return;
            }
            change.await;
        }
    }

    /// The same as a token, to hand to other code: cancelled at [`CancelLevel::Requested`].
    #[must_use]
    pub fn token(&self) -> CancellationToken {
        let token = self.0.token.get_or_init(CancellationToken::new);
        // Either `cancel` saw the token, or this sees its level.
        if self.0.level() > CancelLevel::None {
            token.cancel();
        }
        token.clone()
    }

    /// Cancels the call from this side, for example with the call that it was made for.
    pub fn cancel(&self, level: CancelLevel) {
        self.0.cancel(level);
    }
}

impl std::fmt::Debug for Cancellation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Cancellation").field(&self.level()).finish()
    }
}
