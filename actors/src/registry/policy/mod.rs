//! Gates in front of training, promotion and deployment: policies that people write, in Cedar
//! (cedarpolicy.com), and approvals that they sign.
//!
//! * [`engine`]: policies as text, checked and evaluated. `schema.cedarschema` says what they can speak of,
//!   `base.cedar` is what is always there.
//! * [`file`](mod@file): the policies of the cluster, as replicated state.
//! * [`data`]: labels of data, and which data a job and a version come from.
//! * [`approvals`]: who approved what.
//! * [`gate`]: puts the three together where something is about to happen.
//! * [`client`]: what jobs and the command line ask.
//!
//! Invariants:
//! 1. A gate is evaluated within the command that it guards, on every head, with the tables as they are at that
//!    entry of the log: nobody can pass it with an answer of before.
//! 2. What a shipped policy forbids no other policy permits.
//! 3. Nobody approves what they ask for themselves.

pub mod approvals;
pub mod client;
pub mod data;
pub mod engine;
pub mod file;
pub mod gate;
