//! Batch inference: a file of requests is answered into a file of answers, at low priority.
//!
//! * [`input`]: rows of JSON lines or CSV as requests, within bounds.
//! * [`output`]: where answers go, in the order of the rows, so that a run that was killed goes on where it was.
//! * [`pace`]: how many requests are under way: fewer when the endpoint has no room, more again when it has.
//! * [`run`]: sends them.

pub mod input;
pub mod output;
pub mod pace;
pub mod run;
