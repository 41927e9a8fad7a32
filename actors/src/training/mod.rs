//! Training: data-parallel, with the same bits whatever happens.
//!
//! The final weights and optimizer state of a job depend only on (program, data, seed, step): never on how
//! many workers ran it, which of them died, or how often it was preempted. The numeric part is pure: no
//! actors, no clock, no threads, no iteration over hash maps. In reading order:
//!
//! * [`spec`] says what a job is, [`validation`] what it may be; [`data`] loads and splits its samples.
//! * [`random`] and [`permutation`] give initial values and data order as functions of a position.
//! * [`trainable`] is what a model is to everything else, and how users bring their own; [`parameters`] and
//!   [`layout`] hold its parameters; [`models`] are those that come along; [`model`] is for inference.
//! * [`workload`] is a job's model on its data: it computes one virtual shard at a time, on a [`device`].
//! * [`reduction`] adds shards in a tree that does not know about workers.
//! * [`schedule`] gives the learning rate, [`optimizer`] makes the update; [`evaluation`] decides when to stop; [`state`] is what is carried on, saved and hashed: [`flat_vector`]s that
//!   a [`snapshot`] can hold while they change.
//! * [`mod@reference`] is what a trained version keeps for drift detection.
//! * [`local`] runs a job in one process: the oracle for the distributed ones.
//!
//! The arithmetic is in [`crate::kernels`].
//!
//! Around it, the distributed part:
//!
//! * [`job`] is the driver of a training job, from its TOML to its result; [`start_from`] begins with another
//!   job's weights; [`resume`] finds where a driver that was started again goes on; [`checkpointing`] says
//!   when to save and [`saving`] does it, with the trainers as `helpers`; `departure` leaves a node that was
//!   given notice, as [`preemption`] chooses, and `chronicle` records that; `finishing` ends the job, and [`publish`] stores the model.
//! * [`protocol`] is what the members of a job do, as pure state machines; [`collective`] carries sums
//!   between them and runs a member; [`shape`] has the sizes.
//! * [`coordinator`] says who takes part and follows the steps; [`crew`] knows who is there.
//! * [`trainer`] is the actor; [`replica`] is its copy of the model; [`messages`] is what coordinator and
//!   trainers say; [`link`] is the way between them, and [`parts`] is how trainers take a state from each other.
//! * [`record`] is what a run was and [`trace`] how its states went; [`replay`] makes it once more and
//!   compares.
//! * [`job_log`], [`progress`] and [`first_step`] tell people; [`named_actor`] finds actors by name.

use crate::kernels::{loss, math, product};

pub mod data;
pub mod device;
pub mod evaluation;
pub mod flat_vector;
pub mod layout;
pub mod local;
pub mod model;
pub mod models;
pub mod numerics;
pub mod optimizer;
pub mod parameters;
pub mod permutation;
pub mod random;
pub mod reduction;
pub mod reference;
pub mod schedule;
pub mod snapshot;
pub mod spec;
pub mod state;
pub mod trainable;
pub mod validation;
pub mod value_bytes;
pub mod workload;

mod chronicle;
mod departure;
mod finishing;
mod helpers;
mod kept;
mod meters;

pub mod checkpointing;
pub mod collective;
pub mod comparison;
pub mod coordinator;
pub mod crew;
pub mod first_step;
pub mod job;
pub mod job_log;
pub mod link;
pub mod messages;
pub mod named_actor;
pub mod parts;
pub mod pauses;
mod permission;
pub mod preemption;
pub mod progress;
pub mod protocol;
pub mod publish;
pub mod record;
pub mod replay;
pub mod replica;
pub mod result;
pub mod resume;
pub mod save_schedule;
pub mod saving;
pub mod shape;
pub mod start_from;
pub mod trace;
pub mod trainer;
