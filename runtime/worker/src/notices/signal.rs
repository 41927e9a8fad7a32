//! A notice by SIGTERM: what service managers and machines that shut down send.

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::{NoticeChange, NoticeSource, now_ms};
use crate::agent::Input;

/// Takes over SIGTERM of this process; only then does [`watch_sigterm`] see it.
pub(crate) fn sigterm() -> std::io::Result<Signal> {
    signal(SignalKind::terminate())
}

/// Turns the first SIGTERM into a notice; later ones change nothing, for the deadline stands.
pub(crate) async fn watch_sigterm(
    mut signals: Signal,
    default_grace_ms: u64,
    inputs: mpsc::Sender<Input>,
) {
    if signals.recv().await.is_some() {
        let deadline_ms = Some(now_ms().saturating_add(default_grace_ms));
        let change = NoticeChange {
            source: NoticeSource::Sigterm,
            deadline_ms,
        };
        // The agent is ending anyway when nobody receives.
        let _ = inputs.send(Input::Notice(change)).await;
    }
}
