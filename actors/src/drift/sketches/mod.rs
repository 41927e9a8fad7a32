//! Mergeable sketches: what a stream of numbers looks like, in bounded memory.
//!
//! * [`ddsketch`] keeps *values* within a share of their distance from a centre, [`kll`] keeps *ranks* within a share of the count.
//!   A distance between distributions wants the first, shares of bins the second.
//! * [`population`] has both for each feature of a training set that is too large to be kept.
//!
//! 1. Memory is bounded by constants, whatever comes and in whatever order.
//! 2. A merged sketch keeps the guarantee of one that saw everything, however its parts were grouped.
//! 3. NaN and infinities are counted apart and touch nothing else.
//! 4. Everything is a function of the arguments: [`kll`]'s coins are drawn by position from a keyed stream, and logarithms have the
//!    same bits on every machine, because the bytes of a version's file name it.
//!
//! They are written here because the published ones cannot do this: `datasketches` draws its coins from the thread's clock, and
//! `sketches-ddsketch` neither shows its bins, without which no distance can be computed, nor says that it has collapsed some.

pub mod ddsketch;
pub mod kll;
pub mod population;

pub use ddsketch::DdSketch;
pub use kll::Kll;
pub use population::{FeaturePopulation, Population};

#[cfg(test)]
#[path = "sketches_tests.rs"]
mod tests;
