//! Answers that are given again: [`setting`] says for which endpoints (replicated), [`responses`] keeps them.

mod asking;
pub mod responses;
pub mod setting;

pub(super) use asking::ask;
pub use setting::CacheSetting;
