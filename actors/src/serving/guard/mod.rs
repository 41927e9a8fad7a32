//! What keeps an endpoint whole when replicas fail or callers ask too much. The rules are pure: time comes
//! in.
//!
//! * [`outlier`]: a replica that fails again and again gets no requests for a while.
//! * [`budget`]: second tries are a share of the requests, so that failures do not multiply them.
//! * [`rate`]: an endpoint takes so many requests a second.
//! * [`lag`]: how long what is ready waits for a thread.
//! * [`traffic`]: what all versions of one endpoint share of these, and counts of what was refused.

pub mod budget;
pub mod lag;
pub mod outlier;
pub mod rate;
pub mod traffic;
