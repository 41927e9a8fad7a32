//! Tasks that submit tasks: what a task has submitted is cancelled with it, and while it waits for
//! an object its slot is lent to the tasks of its process.
//!
//! Lending keeps tasks that wait for tasks from standing in each other's way: when every slot of
//! the cluster is taken by tasks that wait, what they wait for runs in those very slots. It may
//! take more CPU than its slot has, as that is only slower; of everything else it may need as much
//! as its slot has.
//!
//! Invariants:
//! 1. A slot is lent exactly while a task in it waits; what has begun in it then is finished.
//! 2. A lent slot takes no tasks that asked for certain nodes.

use std::any::Any;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use mobula_core::object::ObjectId;
use mobula_core::order::ActorAddress;
use mobula_core::resource::Resources;
use mobula_host::tasks::{TaskChildren, TaskContext, while_blocked};
use parking_lot::Mutex;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::drive;
use super::pool::{Pool, SlotKind};
use crate::cluster::{Cluster, TaskContextExt};

/// What one task has submitted. Its size is bounded by what the task submits, at 24 bytes each.
#[derive(Default)]
struct Children(Mutex<Vec<(Arc<Pool>, Vec<ObjectId>)>>);

impl TaskChildren for Children {
    fn cancel(&self, forced: bool) {
        let children = std::mem::take(&mut *self.0.lock());
        for (pool, tasks) in children {
            for task in tasks {
                pool.cancel(task, forced);
            }
        }
    }
}

/// The task that runs on this thread, if any, has submitted `task`.
pub(super) fn remember_child(pool: &Arc<Pool>, task: ObjectId) {
    let Some(parent) = TaskContext::current() else {
        return;
    };
    let children: Arc<dyn Any + Send + Sync> =
        Arc::clone(parent.children(|| Arc::new(Children::default()))) as _;
    let Ok(children) = children.downcast::<Children>() else {
        return;
    };
    let mut pools = children.0.lock();
    match pools.iter_mut().find(|(known, _)| Arc::ptr_eq(known, pool)) {
        Some((_, tasks)) => tasks.push(task),
        None => pools.push((Arc::clone(pool), vec![task])),
    }
}

/// Waits for `future`, an object's, and lends the slot of the task that waits.
pub(crate) async fn waiting<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let mut lent = None;
    while_blocked(poll_fn(move |cx| {
        let outcome = future.as_mut().poll(cx);
        match &outcome {
            Poll::Ready(_) => lent = None,
            Poll::Pending if lent.is_none() => {
                lent = TaskContext::current().and_then(|task| lend(&task));
            }
            Poll::Pending => {}
        }
        outcome
    }))
    .await
}

/// Lends the slot of `task` to the pools of its process until the guard is dropped.
fn lend(task: &TaskContext) -> Option<DropGuard> {
    let slot = task.slot();
    let address = ActorAddress {
        actor: slot.actor(),
        incarnation: slot.incarnation(),
        node: slot.node(),
        call_address: slot.runtime().call_address()?.to_string(),
    };
    let cluster = task.cluster();
    let back = CancellationToken::new();
    for pool in cluster.inner.tasks.of_job(task.job()) {
        if fits(&pool.kind, task.resources()) {
            spawn_lent(&pool, &cluster, &address, &back);
        }
    }
    Some(back.drop_guard())
}

fn spawn_lent(
    pool: &Arc<Pool>,
    cluster: &Cluster,
    address: &ActorAddress,
    back: &CancellationToken,
) {
    let (owner, cluster) = (Arc::clone(pool), cluster.clone());
    let (address, back) = (address.clone(), back.clone());
    // Ends when the slot is given back and what has begun in it is finished.
    pool.running.spawn(async move {
        drive::drive_lent(&owner, &cluster, address, back).await;
    });
}

fn fits(kind: &SlotKind, slot: &Resources) -> bool {
    let placement = &kind.placement;
    let is_anywhere = placement.selector.is_empty()
        && placement.affinity_key.is_none()
        && placement.spread_key.is_none();
    let needed = Resources {
        cpu_milli: 0,
        ..kind.resources.clone()
    };
    is_anywhere && slot.fits(&needed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_core::spec::PlacementPolicy;

    #[test]
    fn a_lent_slot_takes_what_it_can_hold_and_what_may_run_anywhere() {
        let slot = Resources {
            memory_bytes: 10,
            ..Resources::cpu_milli(1000)
        };
        let kind = |cpu_milli, memory_bytes, affinity_key: Option<&str>| SlotKind {
            resources: Resources {
                memory_bytes,
                ..Resources::cpu_milli(cpu_milli)
            },
            placement: PlacementPolicy {
                affinity_key: affinity_key.map(ToOwned::to_owned),
                ..PlacementPolicy::default()
            },
        };
        let cases = [
            (kind(1000, 0, None), true),
            (kind(9000, 10, None), true),
            (kind(10, 11, None), false),
            (kind(10, 0, Some("near")), false),
        ];
        for (kind, expected) in cases {
            assert_eq!(fits(&kind, &slot), expected, "{kind:?}");
        }
    }
}
