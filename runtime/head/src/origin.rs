//! Whose call is being served: what a command that comes of it carries into the log, for the audit
//! log.
//!
//! It goes with the task that serves the call, like the span of a trace, and not through the arguments
//! of everything in between: only the API, where calls come in, and the way into the log know of it.
//!
//! Invariant: a command that is proposed while no call is served, such as a leader's own decision,
//! carries none.

use mobula_core::control::Origin;

tokio::task_local! {
    static ORIGIN: Origin;
}

/// Serves a call: what is proposed meanwhile comes of it.
pub(crate) async fn serving<F: Future>(origin: Origin, call: F) -> F::Output {
    ORIGIN.scope(origin, call).await
}

/// Whose call is being served.
pub(crate) fn current() -> Option<Origin> {
    ORIGIN.try_with(Clone::clone).ok()
}
