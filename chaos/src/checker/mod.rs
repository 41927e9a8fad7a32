//! Whether what clients saw can be explained by a system that keeps its promises.
//!
//! * [`linearizable`]: is there an order of all operations, each at one moment between its begin
//!   and its end, that a sequential model allows (I1, I2, I3)?
//! * [`model`]: such models.
//! * [`jobs`]: is every acknowledged job there exactly once, with one end (I2, I3, I5)?

pub mod jobs;
pub mod linearizable;
pub mod model;
