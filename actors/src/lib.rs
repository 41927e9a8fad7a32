//! mobula-actors
pub mod training;
pub mod drift;
pub mod serving;
