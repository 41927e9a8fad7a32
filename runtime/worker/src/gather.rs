//! Answers that must be gathered from the hosts first.
//!
//! Invariants:
//! 1. A question is answered once: when every host that was asked has answered or is gone, or when
//!    its time is over, with what is there by then.
//! 2. At most [`GATHERS_MAX`] questions are open; a further one is answered without the hosts.

use std::collections::{BTreeMap, BTreeSet};

use mobula_core::id::HostId;
use mobula_wire::host::HostAnswer;
use mobula_wire::session::Question;

/// Questions that wait for hosts: each is a person or a scraper, of which there are few.
const GATHERS_MAX: usize = 64;

/// A question of the leader, and what hosts have said to it.
#[derive(Debug)]
pub(crate) struct Gather {
    /// The session in which it was asked, and its number there.
    pub(crate) asked: (u64, u64),
    pub(crate) question: Question,
    pub(crate) answers: BTreeMap<HostId, HostAnswer>,
    waiting: BTreeSet<HostId>,
}

/// The questions that are open.
#[derive(Debug, Default)]
pub(crate) struct Gathers {
    open: BTreeMap<u64, Gather>,
    last: u64,
}

impl Gathers {
    /// Opens a question to `hosts`; its number. Where none is to be waited for it is complete.
    pub(crate) fn open(
        &mut self,
        asked: (u64, u64),
        question: Question,
        hosts: impl IntoIterator<Item = HostId>,
    ) -> (u64, Option<Gather>) {
        self.last += 1;
        let waiting: BTreeSet<HostId> = match self.open.len() {
            GATHERS_MAX.. => BTreeSet::new(),
            _ => hosts.into_iter().collect(),
        };
        let gather = Gather {
            asked,
            question,
            answers: BTreeMap::new(),
            waiting,
        };
        if gather.waiting.is_empty() {
            return (self.last, Some(gather));
        }
        self.open.insert(self.last, gather);
        (self.last, None)
    }

    /// A host said something; the question, if that completes it.
    pub(crate) fn answer(
        &mut self,
        number: u64,
        host: HostId,
        answer: HostAnswer,
    ) -> Option<Gather> {
        let gather = self.open.get_mut(&number)?;
        if gather.waiting.remove(&host) {
            gather.answers.insert(host, answer);
        }
        self.take_if_complete(number)
    }

    /// A host is gone; the questions that this completes.
    pub(crate) fn lost(&mut self, host: HostId) -> Vec<Gather> {
        let numbers: Vec<u64> = self.open.keys().copied().collect();
        numbers
            .into_iter()
            .filter_map(|number| {
                self.open.get_mut(&number)?.waiting.remove(&host);
                self.take_if_complete(number)
            })
            .collect()
    }

    /// A question's time is over; the question, if it is still open.
    pub(crate) fn expire(&mut self, number: u64) -> Option<Gather> {
        self.open.remove(&number)
    }

    fn take_if_complete(&mut self, number: u64) -> Option<Gather> {
        if self.open.get(&number)?.waiting.is_empty() {
            self.open.remove(&number)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: HostAnswer = HostAnswer::Spans(Vec::new());

    #[test]
    fn a_question_ends_when_the_last_host_answered_or_is_gone() {
        let mut gathers = Gathers::default();
        let (first, none) = gathers.open((1, 7), Question::Metrics, [HostId(1), HostId(2)]);
        assert!(none.is_none());
        assert!(gathers.answer(first, HostId(1), NOTHING).is_none());
        // Said twice, and by one who was not asked.
        assert!(gathers.answer(first, HostId(1), NOTHING).is_none());
        assert!(gathers.answer(first, HostId(3), NOTHING).is_none());
        let done = gathers.lost(HostId(2));
        assert_eq!(done.len(), 1);
        assert_eq!(done[0].asked, (1, 7));
        assert_eq!(done[0].answers.keys().collect::<Vec<_>>(), [&HostId(1)]);
        assert!(gathers.expire(first).is_none(), "answered once");
        let (_, at_once) = gathers.open((1, 8), Question::Metrics, []);
        assert!(at_once.is_some());
    }

    #[test]
    fn too_many_questions_are_answered_without_the_hosts() {
        let mut gathers = Gathers::default();
        for number in 0..GATHERS_MAX as u64 {
            assert!(
                gathers
                    .open((1, number), Question::Metrics, [HostId(1)])
                    .1
                    .is_none()
            );
        }
        assert!(
            gathers
                .open((1, 99), Question::Metrics, [HostId(1)])
                .1
                .is_some()
        );
        assert_eq!(gathers.lost(HostId(1)).len(), GATHERS_MAX);
    }
}
