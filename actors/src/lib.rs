//! mobula-actors
pub mod training;
