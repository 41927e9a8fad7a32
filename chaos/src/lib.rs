//! Faults and checkers: hurt a real cluster in a way that can be repeated, and find out whether it
//! kept its promises.
//!
//! A run has three parts. A [`schedule::Schedule`] is drawn from a seed and says which fault comes
//! after how much progress. [`faults`] puts the faults onto processes. Clients write what they
//! asked and what they were told into a [`history::History`]; afterwards the [`checker`]s look for
//! an order of events, or a set of jobs, that explains everything the clients saw.
//!
//! ```
//! use mobula_chaos::schedule::{Plan, Schedule};
//!
//! let plan = Plan { kills: 3, pauses: 1, progress: 4..50, targets: vec!["head-1".into()] };
//! let schedule = Schedule::draw(17, &plan).unwrap();
//! println!("{schedule}"); // the seed, and each fault with its moment
//! assert_eq!(schedule, Schedule::draw(17, &plan).unwrap());
//! ```
//!
//! Invariants:
//! 1. The same seed draws the same faults at the same progress, on every machine. How the
//!    processes interleave between them is up to the machine.
//! 2. A fault never reaches a process other than the one that was named: not even one that got its
//!    process id later.
//! 3. Checkers are functions of what was recorded. They say "kept", "broken" with the evidence, or
//!    "too hard to say"; never "kept" for want of looking.

pub mod checker;
pub mod faults;
pub mod history;
pub mod real;
pub mod schedule;
pub mod sim;
pub mod tally;
