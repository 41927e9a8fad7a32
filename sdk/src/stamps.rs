//! The sessions in which one process's changes take effect once.
//!
//! Invariants:
//! 1. One change of a session is under way at a time: its number can never fall out of the head's
//!    window while it is being sent again.
//! 2. Changes that are under way together have a session each, and the one that was used last is
//!    used next: who makes one change after the other needs one session.

use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// Changes that one process may have under way: they share the head's fsyncs, and a session costs
/// the head a row for an hour.
const TOGETHER_MAX: usize = 32;

/// A session with the head, or one that is still to be opened.
#[derive(Default)]
pub(crate) struct Session {
    pub(crate) id: u64,
    pub(crate) last_sequence: u64,
    /// When the head last answered in it; `None` if it must be opened first.
    pub(crate) used: Option<Instant>,
}

/// The sessions of a process.
pub(crate) struct Sessions {
    idle: Mutex<Vec<Session>>,
    permits: Semaphore,
}

impl Default for Sessions {
    fn default() -> Self {
        Sessions {
            idle: Mutex::default(),
            permits: Semaphore::new(TOGETHER_MAX),
        }
    }
}

impl Sessions {
    /// A session that nobody else uses as long as this is held.
    pub(crate) async fn take(&self) -> HeldSession<'_> {
        let permit = self.permits.acquire().await;
        let session = self.idle.lock().pop().unwrap_or_default();
        HeldSession {
            session,
            sessions: self,
            _permit: permit.expect("nobody closes the semaphore"),
        }
    }

    /// The ids of those that were opened. None of them is used any more.
    pub(crate) fn take_opened(&mut self) -> Vec<u64> {
        let idle = std::mem::take(self.idle.get_mut()).into_iter();
        idle.map(|session| session.id)
            .filter(|id| *id != 0)
            .collect()
    }
}

/// One change's session. It goes back when this is dropped, also when the change was given up.
pub(crate) struct HeldSession<'a> {
    pub(crate) session: Session,
    sessions: &'a Sessions,
    _permit: SemaphorePermit<'a>,
}

impl Drop for HeldSession<'_> {
    fn drop(&mut self) {
        let session = std::mem::take(&mut self.session);
        self.sessions.idle.lock().push(session);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[tokio::test]
    async fn changes_that_overlap_have_a_session_each_and_others_share_one() {
        let sessions = Sessions::default();
        for number in 1..=3 {
            let mut held = sessions.take().await;
            held.session.last_sequence += 1;
            assert_eq!(held.session.last_sequence, number);
        }
        let first = sessions.take().await;
        let second = sessions.take().await;
        assert_eq!(first.session.last_sequence, 3);
        assert_eq!(second.session.last_sequence, 0);
        drop((first, second));
        let held: Vec<_> = (0..TOGETHER_MAX)
            .map(|_| sessions.take().now_or_never().expect("there is room"))
            .collect();
        assert!(sessions.take().now_or_never().is_none());
        drop(held);
        assert!(sessions.take().now_or_never().is_some());
        assert_eq!(sessions.idle.lock().len(), TOGETHER_MAX);
    }
}
