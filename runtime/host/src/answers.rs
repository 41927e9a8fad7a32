//! The answers that a durable actor has given to `exactly_once` calls: what a repetition gets
//! instead of a second execution.
//!
//! Kept in the actor's state and committed with what the call changed, so that either both are
//! there or neither.
//!
//! Invariants:
//! 1. A key whose call was recorded is never answered as new, but by its record or as forgotten,
//!    as long as its caller is among the latest [`CALLERS_MAX`].
//! 2. The records have at most [`ANSWERS_PER_CALLER`] answers a caller and [`ANSWERS_BYTES_MAX`]
//!    bytes in all: each commit writes them.

use std::collections::BTreeMap;

use mobula_core::error::CallError;
use serde::{Deserialize, Serialize};

/// Answers kept of one calling process. A caller has fewer `exactly_once` calls under way to one
/// actor, so what it may still repeat is there.
pub const ANSWERS_PER_CALLER: usize = 256;

/// Calling processes that are remembered; of those beyond, the one that was silent longest is
/// forgotten, and a call that it repeats then is taken for new.
pub const CALLERS_MAX: usize = 1024;

/// All answers together.
pub const ANSWERS_BYTES_MAX: usize = 512 * 1024;

/// The longest answer that is kept; of a longer one it is kept that it was given.
pub const ANSWER_BYTES_MAX: usize = 16 * 1024;

/// What an answer costs beside its own bytes.
const OVERHEAD_BYTES: usize = 16;

/// Names a call of a caller.
pub(crate) type Key = (u128, u64);

/// What was answered: the encoded value, or the error.
pub(crate) type Answer = Result<Vec<u8>, CallError>;

/// What is known about a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Known {
    /// It was not executed.
    New,
    /// It was, and brought this.
    Answered(Answer),
    /// It is so old that nothing is known about it.
    Forgotten,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Caller {
    /// When it was heard last, in recorded answers.
    last_used: u64,
    /// The largest sequence number whose answer was dropped.
    forgotten: Option<u64>,
    answers: BTreeMap<u64, Answer>,
}

/// The answers of one actor.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answers {
    callers: BTreeMap<u128, Caller>,
    /// How many were recorded ever.
    recorded: u64,
    size_bytes: usize,
}

impl Answers {
    /// What is known about a call.
    pub(crate) fn look_up(&self, (caller, sequence): Key) -> Known {
        let Some(caller) = self.callers.get(&caller) else {
            return Known::New;
        };
        match caller.answers.get(&sequence) {
            Some(answer) => Known::Answered(answer.clone()),
            None if caller.forgotten >= Some(sequence) => Known::Forgotten,
            None => Known::New,
        }
    }

    /// Keeps what a call brought, and drops what is over the bounds.
    pub(crate) fn record(&mut self, (id, sequence): Key, answer: &Answer) {
        self.recorded += 1;
        let caller = self.callers.entry(id).or_default();
        caller.last_used = self.recorded;
        let kept = bounded(answer);
        self.size_bytes += size_of(&kept);
        if let Some(replaced) = caller.answers.insert(sequence, kept) {
            self.size_bytes -= size_of(&replaced);
        }
        if caller.answers.len() > ANSWERS_PER_CALLER {
            self.forget_first(id);
        }
        while self.size_bytes > ANSWERS_BYTES_MAX {
            let Some(id) = self.least_recent(|caller| !caller.answers.is_empty()) else {
                break;
            };
            self.forget_first(id);
        }
        if self.callers.len() > CALLERS_MAX
            && let Some(id) = self.least_recent(|_| true)
            && let Some(caller) = self.callers.remove(&id)
        {
            self.size_bytes -= caller.answers.values().map(size_of).sum::<usize>();
        }
    }

    fn least_recent(&self, wanted: impl Fn(&Caller) -> bool) -> Option<u128> {
        self.callers
            .iter()
            .filter(|(_, caller)| wanted(caller))
            .min_by_key(|(_, caller)| caller.last_used)
            .map(|(id, _)| *id)
    }

    fn forget_first(&mut self, id: u128) {
        if let Some(caller) = self.callers.get_mut(&id)
            && let Some((sequence, answer)) = caller.answers.pop_first()
        {
            caller.forgotten = caller.forgotten.max(Some(sequence));
            self.size_bytes -= size_of(&answer);
        }
    }
}

fn size_of(answer: &Answer) -> usize {
    OVERHEAD_BYTES + content_bytes(answer)
}

fn content_bytes(answer: &Answer) -> usize {
    match answer {
        Ok(value) => value.len(),
        Err(CallError::User { payload, message }) => payload.len() + message.len(),
        // Texts of our own, shortened where they are made.
        Err(_) => 256,
    }
}

fn bounded(answer: &Answer) -> Answer {
    let size_bytes = content_bytes(answer);
    if size_bytes <= ANSWER_BYTES_MAX {
        return answer.clone();
    }
    Err(CallError::ResultLost(format!(
        "the call was executed before, and its answer of {size_bytes} bytes is over the limit of \
         {ANSWER_BYTES_MAX} for those that are kept: return less, or where it is stored"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(n: u8) -> Answer {
        Ok(vec![n])
    }

    #[test]
    fn a_recorded_call_is_answered_again() {
        let mut answers = Answers::default();
        assert_eq!(answers.look_up((1, 5)), Known::New);
        answers.record((1, 5), &answer(7));
        let error = Err(CallError::User {
            payload: vec![1],
            message: "no".into(),
        });
        answers.record((2, 5), &error);
        assert_eq!(answers.look_up((1, 5)), Known::Answered(answer(7)));
        assert_eq!(answers.look_up((2, 5)), Known::Answered(error));
        assert_eq!(
            answers.look_up((1, 4)),
            Known::New,
            "it came late, but it comes first"
        );
    }

    #[test]
    fn what_is_dropped_is_forgotten_and_not_new() {
        let mut answers = Answers::default();
        let count = ANSWERS_PER_CALLER as u64 + 3;
        for sequence in 0..count {
            answers.record((1, sequence), &answer(1));
        }
        for sequence in 0..3 {
            assert_eq!(answers.look_up((1, sequence)), Known::Forgotten);
        }
        for sequence in 3..count {
            assert_eq!(answers.look_up((1, sequence)), Known::Answered(answer(1)));
        }
        assert_eq!(answers.look_up((1, count)), Known::New);
    }

    #[test]
    fn bytes_and_callers_are_bounded() {
        let mut answers = Answers::default();
        for caller in 0..40 {
            answers.record((caller, 1), &Ok(vec![0; ANSWER_BYTES_MAX]));
        }
        assert!(answers.size_bytes <= ANSWERS_BYTES_MAX);
        assert_eq!(answers.look_up((0, 1)), Known::Forgotten);
        assert!(matches!(answers.look_up((39, 1)), Known::Answered(Ok(_))));

        let mut answers = Answers::default();
        answers.record((5000, 1), &answer(1));
        for caller in 0..CALLERS_MAX as u128 {
            answers.record((caller, 1), &answer(1));
        }
        assert_eq!(answers.callers.len(), CALLERS_MAX);
        assert_eq!(answers.look_up((5000, 1)), Known::New);
        let size_bytes: usize = answers
            .callers
            .values()
            .flat_map(|caller| caller.answers.values().map(size_of))
            .sum();
        assert_eq!(answers.size_bytes, size_bytes);
    }

    #[test]
    fn a_long_answer_is_kept_as_given() {
        let mut answers = Answers::default();
        answers.record((1, 1), &Ok(vec![0; ANSWER_BYTES_MAX + 1]));
        let Known::Answered(Err(CallError::ResultLost(text))) = answers.look_up((1, 1)) else {
            panic!("it is known that it ran");
        };
        assert!(text.contains("executed before"), "{text}");
    }
}
