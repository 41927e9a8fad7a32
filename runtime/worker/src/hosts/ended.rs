//! Memory of what has ended here, so that a start that is repeated late starts nothing twice.

use std::collections::BTreeMap;

use mobula_core::exit::ExitReason;
use mobula_core::id::{ActorId, Incarnation};

/// How many ends are remembered. A repeated order is one that the leader sent before it heard of
/// the end, so only the newest ends matter.
const ENDED_MAX: usize = 1 << 16;

/// The newest ended incarnation of each actor, the latest of them.
#[derive(Debug, Default)]
pub(crate) struct Ended {
    actors: BTreeMap<ActorId, (u64, Incarnation, ExitReason)>,
    order: BTreeMap<u64, ActorId>,
    next: u64,
}

impl Ended {
    /// Remembers an end; an older incarnation does not replace a newer one.
    pub(crate) fn insert(&mut self, actor: ActorId, incarnation: Incarnation, reason: ExitReason) {
        if self
            .actors
            .get(&actor)
            .is_some_and(|(_, known, _)| *known > incarnation)
        {
            return;
        }
        self.next += 1;
        self.order.insert(self.next, actor);
        if let Some((old, ..)) = self.actors.insert(actor, (self.next, incarnation, reason)) {
            self.order.remove(&old);
        }
        if self.order.len() > ENDED_MAX
            && let Some((_, oldest)) = self.order.pop_first()
        {
            self.actors.remove(&oldest);
        }
    }

    /// The newest incarnation of `actor` that ended here, and why.
    pub(crate) fn newest(&self, actor: ActorId) -> Option<(Incarnation, &ExitReason)> {
        self.actors
            .get(&actor)
            .map(|(_, incarnation, reason)| (*incarnation, reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_incarnation_is_kept_and_the_memory_is_bounded() {
        let mut ended = Ended::default();
        ended.insert(ActorId(1), Incarnation(5), ExitReason::Completed);
        ended.insert(ActorId(1), Incarnation(3), ExitReason::Stopped);
        assert_eq!(
            ended.newest(ActorId(1)),
            Some((Incarnation(5), &ExitReason::Completed))
        );
        for actor in 2..(ENDED_MAX as u64 + 2) {
            ended.insert(ActorId(actor), Incarnation(1), ExitReason::Stopped);
        }
        assert_eq!(ended.newest(ActorId(1)), None);
        assert_eq!(ended.order.len(), ENDED_MAX);
        assert_eq!(ended.actors.len(), ENDED_MAX);
    }
}
