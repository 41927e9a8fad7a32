//! Sequential models: what one object does when operations come one after the other.

use std::fmt::Debug;
use std::hash::Hash;

/// A sequential object.
pub trait Model {
    /// What it remembers.
    type State: Clone + Eq + Hash + Debug;
    /// What it is asked.
    type Input;
    /// What it answers.
    type Output;

    /// Before the first operation.
    fn initial(&self) -> Self::State;

    /// The state after `input` was answered with `output`, where `None` stands for any answer;
    /// `None` if the object does not answer so in this state.
    fn step(
        &self,
        state: &Self::State,
        input: &Self::Input,
        output: Option<&Self::Output>,
    ) -> Option<Self::State>;
}

/// A register of one value.
#[derive(Debug, Clone, Copy)]
pub struct Register;

/// What a register is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RegisterInput {
    /// What is its value? Answered with the value.
    Read,
    /// Take this value. Answered with the value.
    Write(u64),
}

impl Model for Register {
    type State = u64;
    type Input = RegisterInput;
    type Output = u64;

    fn initial(&self) -> u64 {
        0
    }

    fn step(&self, state: &u64, input: &RegisterInput, output: Option<&u64>) -> Option<u64> {
        let next = match input {
            RegisterInput::Read => *state,
            RegisterInput::Write(value) => *value,
        };
        output.is_none_or(|told| *told == next).then_some(next)
    }
}

/// A register that counts how often it was written: every write is answered with its number, so that
/// one that took effect twice, or not at all, shows in the next answer.
#[derive(Debug, Clone, Copy)]
pub struct CountingRegister;

impl Model for CountingRegister {
    /// How many writes, and the last one's value.
    type State = (u64, u64);
    type Input = RegisterInput;
    type Output = (u64, u64);

    fn initial(&self) -> (u64, u64) {
        (0, 0)
    }

    fn step(
        &self,
        (writes, value): &(u64, u64),
        input: &RegisterInput,
        output: Option<&(u64, u64)>,
    ) -> Option<(u64, u64)> {
        let next = match input {
            RegisterInput::Read => (*writes, *value),
            RegisterInput::Write(value) => (writes + 1, *value),
        };
        output.is_none_or(|told| *told == next).then_some(next)
    }
}

/// A thing that is made at most once, by whoever is first to ask for it under its key; it gets an
/// id that the system chooses. A submission under an idempotency key is one.
#[derive(Debug, Clone, Copy)]
pub struct MadeOnce;

/// What is asked about a thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MadeOnceInput {
    /// Make it, unless it is there. Answered with its id.
    Make,
    /// Is it there? Answered with its id, or with nothing.
    Look,
}

/// What is known of a thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Thing {
    /// It was not made yet.
    Absent,
    /// It was made, and nobody was told its id.
    Unnamed,
    /// It has this id.
    Named(u64),
}

impl Model for MadeOnce {
    type State = Thing;
    type Input = MadeOnceInput;
    type Output = Option<u64>;

    fn initial(&self) -> Thing {
        Thing::Absent
    }

    fn step(
        &self,
        state: &Thing,
        input: &MadeOnceInput,
        output: Option<&Option<u64>>,
    ) -> Option<Thing> {
        let there = match (input, state) {
            (MadeOnceInput::Make, Thing::Absent) => Thing::Unnamed,
            _ => *state,
        };
        match (there, output) {
            (_, None) => Some(there),
            (Thing::Absent, Some(None)) => Some(Thing::Absent),
            (Thing::Unnamed, Some(Some(id))) => Some(Thing::Named(*id)),
            (Thing::Named(known), Some(Some(id))) if known == *id => Some(there),
            _ => None,
        }
    }
}
