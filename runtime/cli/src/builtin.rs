//! The jobs that this binary drives itself: those of the actors, and those of scenarios.

use mobula::Cluster;
use mobula::process::{MainEnd, MainOutcome};
use mobula_chaos::real::job as chaos_job;

/// How a built-in job ended, whichever it was.
pub(crate) struct BuiltinEnd(MainEnd);

impl MainOutcome for BuiltinEnd {
    fn into_outcome(self) -> MainEnd {
        self.0
    }
}

/// Drives the job that the first argument names.
pub(crate) async fn main(cluster: Cluster, arguments: Vec<String>) -> BuiltinEnd {
    let is_chaos = arguments
        .first()
        .is_some_and(|kind| kind == chaos_job::KIND);
    BuiltinEnd(if is_chaos {
        chaos_job::main(cluster, arguments).await.into_outcome()
    } else {
        match Box::pin(mobula_actors::builtin::main(cluster, arguments)).await {
            // A built-in job is deterministic in its results, not in what may get into its way.
            Err(error) if !error.is_final() => MainEnd::Unavailable(error.to_string()),
            end => end.into_outcome(),
        }
    })
}
