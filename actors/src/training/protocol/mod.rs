//! The elastic protocol as pure state machines: who computes and adds what, and what each member
//! does about it. No calls, no clock, no randomness: a shell carries the messages.
//!
//! ```text
//!            plan (epoch, shards, owners), only when it changes
//!   leader ────────────────────────────────────────────────────► members
//!
//!   member ── sums of its subtrees, bucket by bucket ──► the bucket's owner   (reduce-scatter)
//!   member ◄───────── the sum over all shards ────────── the bucket's owner   (all-gather)
//! ```
//!
//! Everything that is sent is a function of (job, step, state before the step): the sums of a subtree
//! have the same bits whoever computed them, in whatever epoch. So members need not agree on who did
//! what, only that somebody does:
//!
//! 1. What is sent carries the step and the digest of the state it was computed from. It counts if both
//!    are the receiver's; a late or repeated one changes nothing.
//! 2. Who lacks something asks for it until it has it. Who has finished a step keeps its sums for those
//!    who are a little behind.
//! 3. A member takes the next step once it has the sums of all buckets. No message of the leader is
//!    needed for that; it must only not pass the plan's gate.
//! 4. A lost member's shards and buckets go to others by a plan of a higher epoch; nobody else's change.
//!    The members send the new owner what they had sent to the lost one.
//! 5. A slow member's shards are computed by others too, in the steps that the plan names and after their own: what came
//!    twice counts once, and nobody waits for it.
//!
//! In reading order: [`buckets`] cuts the gradient, [`gather`] adds one bucket's sums, [`plan`] is what
//! the leader publishes, [`leader`] makes plans, [`exchange`] is what members say, [`member`] follows plans.

pub mod buckets;
mod calls;
pub mod exchange;
pub mod gather;
pub mod leader;
pub mod member;
mod next;
pub mod plan;

#[cfg(test)]
mod simulation;
