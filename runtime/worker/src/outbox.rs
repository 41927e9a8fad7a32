//! Events that the leader has not acknowledged yet.
//!
//! Invariants:
//! 1. An event stays until the leader acknowledges it, over any number of sessions.
//! 2. At most one event per incarnation of an actor is kept: its end replaces its start, because
//!    the leader needs no start of what has ended. So the outbox is bounded by the actors that the
//!    leader placed here and has not heard of; past [`OUTBOX_MAX`] no further start is accepted.
//! 3. Events are sent in the order in which they happened.

use std::collections::BTreeMap;

use mobula_core::id::{ActorId, Incarnation};
use mobula_core::order::WorkerEvent;

use crate::options::ACTORS_MAX;

/// Twice the actors of a worker: every one that runs may end, while as many ends still wait to be
/// acknowledged by a head that is away.
pub(crate) const OUTBOX_MAX: usize = 2 * ACTORS_MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Actor(ActorId, Incarnation),
    Notice,
}

impl Key {
    fn of(event: &WorkerEvent) -> Key {
        match event {
            WorkerEvent::ActorStarted {
                actor, incarnation, ..
            }
            | WorkerEvent::ActorExited {
                actor, incarnation, ..
            } => Key::Actor(*actor, *incarnation),
            WorkerEvent::Notice { .. } | WorkerEvent::NoticeWithdrawn => Key::Notice,
        }
    }
}

/// What waits to be acknowledged.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    last_sequence: u64,
    events: BTreeMap<u64, WorkerEvent>,
    sequences: BTreeMap<Key, u64>,
}

impl Outbox {
    /// Adds an event; it replaces the one before it of the same actor incarnation or notice.
    pub(crate) fn push(&mut self, event: WorkerEvent) {
        let key = Key::of(&event);
        if let Some(replaced) = self.sequences.get(&key)
            && self.events.get(replaced) == Some(&event)
        {
            return;
        }
        self.last_sequence += 1;
        if let Some(replaced) = self.sequences.insert(key, self.last_sequence) {
            self.events.remove(&replaced);
        }
        self.events.insert(self.last_sequence, event);
    }

    /// The leader has applied event `sequence`.
    pub(crate) fn acknowledge(&mut self, sequence: u64) {
        if let Some(event) = self.events.remove(&sequence) {
            self.sequences.remove(&Key::of(&event));
        }
    }

    /// Up to `limit` events after `sequence`, in order.
    pub(crate) fn after(&self, sequence: u64, limit: usize) -> Vec<(u64, WorkerEvent)> {
        self.events
            .range(sequence.saturating_add(1)..)
            .take(limit)
            .map(|(sequence, event)| (*sequence, event.clone()))
            .collect()
    }

    /// Forgets everything about actors: the leader has declared them lost already.
    pub(crate) fn forget_actors(&mut self) {
        self.events
            .retain(|_, event| matches!(Key::of(event), Key::Notice));
        self.sequences.retain(|key, _| matches!(key, Key::Notice));
    }

    /// How many events wait.
    pub(crate) fn len(&self) -> usize {
        self.events.len()
    }

    /// Whether a further actor may be started: its events have room.
    pub(crate) fn has_room(&self, actors: usize) -> bool {
        self.events.len() + actors < OUTBOX_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_core::exit::ExitReason;
    use mobula_core::id::HostId;
    use proptest::prelude::*;

    fn started(actor: u64) -> WorkerEvent {
        WorkerEvent::ActorStarted {
            actor: ActorId(actor),
            incarnation: Incarnation(1),
            host: HostId(1),
            call_address: "127.0.0.1:1".into(),
            pid: 1,
        }
    }

    fn exited(actor: u64) -> WorkerEvent {
        WorkerEvent::ActorExited {
            actor: ActorId(actor),
            incarnation: Incarnation(1),
            reason: ExitReason::Completed,
        }
    }

    #[test]
    fn an_end_replaces_a_start_and_stays_until_it_is_acknowledged() {
        let mut outbox = Outbox::default();
        outbox.push(started(1));
        outbox.push(started(2));
        outbox.push(exited(1));
        assert_eq!(outbox.after(0, 10), [(2, started(2)), (3, exited(1))]);
        outbox.acknowledge(1);
        assert_eq!(
            outbox.len(),
            2,
            "an acknowledgement of what was replaced is nothing"
        );
        outbox.acknowledge(3);
        outbox.acknowledge(3);
        assert_eq!(outbox.after(0, 10), [(2, started(2))]);
        assert_eq!(outbox.after(2, 10), []);
    }

    #[test]
    fn a_repeated_event_that_still_waits_is_not_added_again() {
        let mut outbox = Outbox::default();
        outbox.push(started(1));
        outbox.push(started(1));
        assert_eq!(outbox.after(0, 10), [(1, started(1))]);
        outbox.acknowledge(1);
        outbox.push(started(1));
        assert_eq!(outbox.after(0, 10), [(2, started(1))]);
    }

    proptest! {
        #[test]
        fn it_never_holds_more_than_one_event_an_actor(
            steps in proptest::collection::vec((0..3u8, 0..8u64), 0..200)
        ) {
            let mut outbox = Outbox::default();
            for (kind, number) in steps {
                match kind {
                    0 => outbox.push(started(number)),
                    1 => outbox.push(exited(number)),
                    _ => outbox.acknowledge(number * 7),
                }
                prop_assert!(outbox.len() <= 8);
                prop_assert_eq!(outbox.len(), outbox.sequences.len());
            }
        }
    }
}
