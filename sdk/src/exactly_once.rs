//! The keys of `exactly_once` calls: one for each call, the same whenever it is sent again.
//!
//! Invariants:
//! 1. No two calls of a process have the same key, and no two processes the same caller.
//! 2. A call begins only when fewer than [`WINDOW`] keys lie between it and the oldest call of
//!    this process that is not over. An actor keeps as many answers of each caller, so that the
//!    one which is sent again is still there.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use mobula_host::answers::ANSWERS_PER_CALLER;
use mobula_wire::call::{CallKey, CallerId};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// How many keys the calls that are under way may span.
const WINDOW: u64 = ANSWERS_PER_CALLER as u64;

/// The keys that this process gives out.
struct Keys {
    caller: CallerId,
    window: Mutex<Window>,
    /// Told when a call is over.
    moved: Notify,
}

#[derive(Default)]
struct Window {
    next: u64,
    under_way: BTreeSet<u64>,
}

impl Window {
    fn take(&mut self) -> Option<u64> {
        let oldest = self.under_way.first().copied().unwrap_or(self.next);
        if self.next - oldest >= WINDOW {
            return None;
        }
        let sequence = self.next;
        self.next += 1;
        self.under_way.insert(sequence);
        Some(sequence)
    }
}

fn keys() -> &'static Keys {
    static KEYS: OnceLock<Keys> = OnceLock::new();
    KEYS.get_or_init(|| Keys {
        caller: CallerId(rand::random()),
        window: Mutex::default(),
        moved: Notify::new(),
    })
}

/// A key for as long as its call is not over.
pub(crate) struct HeldKey(CallKey);

impl HeldKey {
    /// A new key, once the window has room for it.
    pub(crate) async fn take() -> Self {
        let keys = keys();
        loop {
            let moved = keys.moved.notified();
            tokio::pin!(moved);
            // Registered before the look, so that no change is missed in between.
            moved.as_mut().enable();
            if let Some(sequence) = keys.window.lock().take() {
                let caller = keys.caller;
                return HeldKey(CallKey { caller, sequence });
            }
            moved.await;
        }
    }

    pub(crate) fn key(&self) -> CallKey {
        self.0
    }
}

impl Drop for HeldKey {
    fn drop(&mut self) {
        let keys = keys();
        keys.window.lock().under_way.remove(&self.0.sequence);
        keys.moved.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_call_holds_the_window() {
        let mut window = Window::default();
        let taken: Vec<u64> = std::iter::from_fn(|| window.take()).collect();
        assert_eq!(taken.len() as u64, WINDOW);
        window.under_way.remove(&1);
        assert_eq!(window.take(), None, "call 0 is still under way");
        window.under_way.remove(&0);
        assert_eq!(
            (window.take(), window.take()),
            (Some(WINDOW), Some(WINDOW + 1))
        );
        assert_eq!(window.take(), None, "call 2 is the oldest now");
    }
}
