//! What each worker should be doing, read from the tables: the dispatcher sends all of it to a
//! worker that (re)connects, and single orders as effects in between.
//!
//! Invariant: the list is complete. A worker that runs an incarnation which is not in it ends it.

use mobula_core::NodeId;
use mobula_core::control::Reader;
use mobula_core::mutant::{Mutant, is_planted};
use mobula_core::order::{Order, StartActor};

use crate::row::{self, PENDING};
use crate::state::actor::{self, ActorRow, ActorState};
use crate::state::job;
use crate::state::lease;
use crate::state::node;

/// Everything that `node` should be running or ending, in order of the actors' ids, after the
/// notice if there is one. Empty for a node that is lost or not known.
#[must_use]
pub fn orders_for_node(reader: &dyn Reader, node: NodeId) -> Vec<Order> {
    let Some(row) = node::load(reader, node).filter(|row| row.lost_ms.is_none()) else {
        return Vec::new();
    };
    let notice = row.notice.map(|notice| Order::Notice {
        deadline_ms: notice.deadline_ms,
    });
    if is_planted(Mutant::OrdersForgotten) {
        return notice.into_iter().collect();
    }
    let actors = lease::of_node(reader, node).map(|(id, _)| {
        let actor = actor::load(reader, id).expect("a lease names an actor that exists");
        match actor.state {
            ActorState::Stopping { grace_ms, .. } => Order::Stop {
                actor: id,
                incarnation: actor.incarnation,
                grace_ms,
            },
            _ => start(reader, &actor),
        }
    });
    notice.into_iter().chain(actors).collect()
}

/// The order that starts the current incarnation of `actor`. Which devices it gets is the agent's
/// choice: only that knows when a process has let go of one.
pub(crate) fn start(reader: &dyn Reader, actor: &ActorRow) -> Order {
    let job = job::load_spec(reader, actor.job);
    Order::Start(Box::new(StartActor {
        actor: actor.id,
        incarnation: actor.incarnation,
        job: actor.job,
        program: job.program,
        spec: actor::load_spec(reader, actor.id),
        args: if actor.driver { job.args } else { Vec::new() },
        env: job.env,
        files: job.files,
        secrets: job.secrets,
    }))
}

/// When the next back-off after `now_ms` is over, so that a placement pass should run. `None` when
/// nothing waits for time.
#[must_use]
pub fn next_wakeup_ms(reader: &dyn Reader, now_ms: u64) -> Option<u64> {
    let after = row::pair(now_ms, u64::MAX);
    let next = reader.scan(PENDING, &[], Some(&after), 1);
    next.first().map(|(key, _)| row::number_at(key, 0))
}
