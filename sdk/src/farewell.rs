//! What a client of the control API does when it goes: it closes its sessions.
//!
//! The head would keep them for an hour, and count them against the client's principal, which a program that
//! is run again and again would feel.
//!
//! Invariants:
//! 1. Nobody waits for it but who asks to ([`sessions_closed`]), and for no longer than [`CLOSE_TIMEOUT`].
//! 2. What cannot be closed is left to the head, which forgets it by itself.

use std::sync::LazyLock;
use std::time::Duration;

use mobula_wire::control as api;
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::control::ApiClient;

/// A head that answers at all answers sooner: each session costs one small entry of the log.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// How many clients of this process are closing their sessions.
static CLOSING: LazyLock<watch::Sender<usize>> = LazyLock::new(|| watch::Sender::new(0));

/// Counts a client for as long as it lives.
struct Closing;

impl Closing {
    fn begin() -> Self {
        CLOSING.send_modify(|clients| *clients += 1);
        Closing
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        CLOSING.send_modify(|clients| *clients -= 1);
    }
}

/// Begins to close `sessions` over the connection that there was, if there is a runtime to do it.
pub(crate) fn close(mut client: ApiClient, sessions: Vec<u64>) {
    let Ok(runtime) = Handle::try_current() else {
        return;
    };
    let closing = Closing::begin();
    runtime.spawn(async move {
        let _closing = closing;
        let all = async {
            for session in sessions {
                let request = api::CloseSessionRequest { session };
                // One that is not closed is forgotten by the head, and says nothing of the others.
                let _ = client.close_session(request).await;
            }
        };
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, all).await;
    });
}

/// Waits until the clients that this process has dropped have closed their sessions, a second at the most:
/// for a program that is about to end.
pub async fn sessions_closed() {
    let mut closing = CLOSING.subscribe();
    let none = closing.wait_for(|clients| *clients == 0);
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, none).await;
}
