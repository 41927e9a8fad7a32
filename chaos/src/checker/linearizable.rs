//! Linearizability (Herlihy and Wing, 1990), by the search of Wing and Gong (1993) with the memory
//! of Lowe (2017): a set of operations that are done, together with the model's state that they
//! lead to, is looked at once.
//!
//! The search is exponential in how many operations overlap, so histories of many keys are checked
//! a key at a time ([`check_by_key`]), which is exact: objects are linearizable one by one
//! (Herlihy and Wing, theorem 1).

use std::collections::{BTreeMap, HashSet};
use std::fmt::Debug;

use super::model::Model;
use crate::history::{Ended, Operation};

/// How many configurations are looked at before giving up: at some hundred bytes each, under a
/// GiB.
pub const CONFIGURATIONS_MAX: usize = 2_000_000;

/// Why a history is not shown to be linearizable.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotShown {
    /// No order of the operations explains the answers.
    #[error(
        "not linearizable{}: {explained} of {answered} answers can be explained; next would be one \
         of:\n  {}",
        of_key(key), stuck.join("\n  ")
    )]
    Violation {
        /// The key, where there are several.
        key: Option<String>,
        /// How many answers the longest explanation covers.
        explained: usize,
        /// How many answers there are.
        answered: usize,
        /// The operations at which that explanation ends.
        stuck: Vec<String>,
    },
    /// The search was given up.
    #[error(
        "undecided{}: {CONFIGURATIONS_MAX} configurations were looked at; record fewer operations \
         that overlap",
        of_key(key)
    )]
    TooHard {
        /// The key, where there are several.
        key: Option<String>,
    },
}

fn of_key(key: &Option<String>) -> String {
    key.as_ref()
        .map_or_else(String::new, |key| format!(" at {key}"))
}

/// Which operations have been given a place in the order.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Done(Vec<u64>);

impl Done {
    fn has(&self, index: usize) -> bool {
        self.0[index / 64] & (1 << (index % 64)) != 0
    }

    fn with(&self, index: usize) -> Done {
        let mut next = self.clone();
        next.0[index / 64] |= 1 << (index % 64);
        next
    }
}

/// Looks for an order that explains `operations`.
pub fn check<M: Model>(
    model: &M,
    operations: &[Operation<M::Input, M::Output>],
) -> Result<(), NotShown>
where
    M::Input: Debug,
    M::Output: Debug,
{
    let end_of = |index: usize| match &operations[index].ended {
        Ended::Returned { at, .. } => *at,
        Ended::Unknown => u64::MAX,
    };
    let answered = (0..operations.len())
        .filter(|index| end_of(*index) != u64::MAX)
        .count();
    let first = (
        Done(vec![0; operations.len().div_ceil(64)]),
        model.initial(),
    );
    let mut seen = HashSet::from([first.clone()]);
    let mut open = vec![(first, 0)];
    let mut best: (usize, Vec<String>) = (0, Vec::new());
    while let Some(((done, state), explained)) = open.pop() {
        if explained == answered {
            return Ok(());
        }
        let left = || (0..operations.len()).filter(|index| !done.has(*index));
        // What ends first must come before everything that begins after its end.
        let first_end = left().map(end_of).min().unwrap_or(u64::MAX);
        let candidates = || left().filter(|index| operations[*index].began < first_end);
        if best.1.is_empty() || explained > best.0 {
            let stuck = candidates().map(|index| format!("{:?}", operations[index]));
            best = (explained, stuck.collect());
        }
        for index in candidates() {
            let operation = &operations[index];
            let (output, gain) = match &operation.ended {
                Ended::Returned { output, .. } => (Some(output), 1),
                Ended::Unknown => (None, 0),
            };
            let Some(next) = model.step(&state, &operation.input, output) else {
                continue;
            };
            let configuration = (done.with(index), next);
            if seen.insert(configuration.clone()) {
                open.push((configuration, explained + gain));
            }
        }
        if seen.len() > CONFIGURATIONS_MAX {
            return Err(NotShown::TooHard { key: None });
        }
    }
    Err(NotShown::Violation {
        key: None,
        explained: best.0,
        answered,
        stuck: best.1,
    })
}

/// Checks each key's operations against a model of its own.
pub fn check_by_key<M, K>(
    model: &M,
    operations: impl IntoIterator<Item = (K, Operation<M::Input, M::Output>)>,
) -> Result<(), NotShown>
where
    M: Model,
    M::Input: Debug,
    M::Output: Debug,
    K: Ord + Debug,
{
    let mut keys: BTreeMap<K, Vec<_>> = BTreeMap::new();
    for (key, operation) in operations {
        keys.entry(key).or_default().push(operation);
    }
    for (name, operations) in keys {
        let name = Some(format!("{name:?}"));
        check(model, &operations).map_err(|error| match error {
            NotShown::Violation {
                explained,
                answered,
                stuck,
                ..
            } => NotShown::Violation {
                key: name,
                explained,
                answered,
                stuck,
            },
            NotShown::TooHard { .. } => NotShown::TooHard { key: name },
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checker::model::{MadeOnce, MadeOnceInput, Register, RegisterInput};
    use proptest::prelude::*;

    fn operation<I, O>(input: I, began: u64, ended: Option<(u64, O)>) -> Operation<I, O> {
        let ended = ended.map_or(Ended::Unknown, |(at, output)| Ended::Returned {
            at,
            output,
        });
        Operation {
            client: 0,
            input,
            began,
            ended,
        }
    }

    fn write(value: u64, began: u64, end: u64) -> Operation<RegisterInput, u64> {
        operation(RegisterInput::Write(value), began, Some((end, value)))
    }

    fn lost_write(value: u64, began: u64) -> Operation<RegisterInput, u64> {
        operation(RegisterInput::Write(value), began, None)
    }

    fn read(told: u64, began: u64, end: u64) -> Operation<RegisterInput, u64> {
        operation(RegisterInput::Read, began, Some((end, told)))
    }

    #[test]
    fn histories_of_a_register() {
        let good = [
            vec![],
            vec![write(1, 1, 2), read(1, 3, 4)],
            // A read beside a write may see it or not, and two reads in its order.
            vec![write(1, 1, 6), read(0, 2, 3), read(1, 4, 5)],
            // A write of unknown outcome took effect, late.
            vec![
                lost_write(2, 1),
                write(1, 2, 3),
                read(1, 4, 5),
                read(2, 6, 7),
            ],
            // Or it never did.
            vec![lost_write(2, 1), write(1, 2, 3), read(1, 4, 5)],
        ];
        for history in good {
            assert_eq!(check(&Register, &history), Ok(()), "{history:?}");
        }
        let bad = [
            // An acknowledged write is lost.
            vec![write(1, 1, 2), read(0, 3, 4)],
            // Values go back.
            vec![write(1, 1, 6), read(1, 2, 3), read(0, 4, 5)],
            // A write is seen before it was asked for.
            vec![read(1, 1, 2), write(1, 3, 4)],
            // One write of unknown outcome takes effect twice.
            vec![
                lost_write(2, 1),
                read(2, 2, 3),
                write(1, 4, 5),
                read(2, 6, 7),
            ],
        ];
        for history in bad {
            let error = check(&Register, &history).unwrap_err();
            assert!(
                matches!(error, NotShown::Violation { .. }),
                "{history:?} {error}"
            );
        }
    }

    #[test]
    fn a_thing_that_is_made_once() {
        use MadeOnceInput::{Look, Make};
        let retried = vec![
            operation(Make, 1, None),
            operation(Make, 2, Some((5, Some(9)))),
            operation(Look, 3, Some((4, None))),
            operation(Make, 6, Some((7, Some(9)))),
            operation(Look, 8, Some((9, Some(9)))),
        ];
        assert_eq!(check(&MadeOnce, &retried), Ok(()));
        let twice = vec![
            operation(Make, 1, Some((2, Some(9)))),
            operation(Make, 3, Some((4, Some(10)))),
        ];
        let lost = vec![
            operation(Make, 1, Some((2, Some(9)))),
            operation(Look, 3, Some((4, None))),
        ];
        for history in [twice, lost] {
            let keyed = history.into_iter().map(|operation| ("job-a", operation));
            let error = check_by_key(&MadeOnce, keyed).unwrap_err().to_string();
            assert!(
                error.starts_with("not linearizable at \"job-a\": 1 of 2"),
                "{error}"
            );
        }
    }

    proptest! {
        /// Operations that really took effect one by one are linearizable however their begins and
        /// ends are stretched around that moment; and not any more when one answer is changed to a
        /// value that nobody wrote.
        #[test]
        fn true_histories_pass_and_forged_answers_do_not(
            plan in prop::collection::vec((any::<bool>(), 0u64..4, 0u64..4, prop::bool::weighted(0.9)), 1..25),
            forged in any::<prop::sample::Index>(),
        ) {
            let mut value = 0;
            let mut history = Vec::new();
            for (index, (is_write, before, after, is_answered)) in plan.into_iter().enumerate() {
                let moment = 100 + index as u64 * 10;
                let input = if is_write {
                    value = index as u64 + 1;
                    RegisterInput::Write(value)
                } else {
                    RegisterInput::Read
                };
                let told = is_answered.then_some((moment + 1 + after * 11, value));
                history.push(operation(input, moment - before * 11, told));
            }
            prop_assert_eq!(check(&Register, &history), Ok(()));
            let forged = forged.index(history.len());
            if let Ended::Returned { output, .. } = &mut history[forged].ended {
                *output = 1_000;
                prop_assert!(check(&Register, &history).is_err());
            }
        }
    }
}
