//! The cluster as actors and tasks reach it.

use futures::future::BoxFuture;
use mobula_host::{ActorContext, TaskContext};

use super::Cluster;
use crate::error::Result;

/// What the SDK adds to an actor's context.
pub trait ContextExt {
    /// The cluster, in the actor's own job.
    fn cluster(&self) -> Cluster;

    /// Leaves a node that was given notice or is draining: the head starts the actor elsewhere.
    fn yield_now(&self) -> BoxFuture<'_, Result<()>>;
}

impl ContextExt for ActorContext {
    fn cluster(&self) -> Cluster {
        let cluster = Cluster::of_runtime(self.runtime())
            .expect("a host process checks its access to the cluster before it takes actors");
        Cluster {
            holder: Some((self.actor(), self.incarnation())),
            ..cluster
        }
    }

    fn yield_now(&self) -> BoxFuture<'_, Result<()>> {
        Box::pin(async move {
            self.cluster()
                .yield_actor(self.actor(), self.incarnation())
                .await
        })
    }
}

/// What the SDK adds to a task's context.
pub trait TaskContextExt {
    /// The cluster, in the task's own job: what the task submits and creates is fenced by its slot.
    fn cluster(&self) -> Cluster;
}

impl TaskContextExt for TaskContext {
    fn cluster(&self) -> Cluster {
        self.slot().cluster()
    }
}
