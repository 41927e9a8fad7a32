//! The model registry: immutable versions, each named by the digest of its file, where each came from, and
//! who decided what becomes of it.
//!
//! * [`version_file`]: what a version consists of, as one verified file in the object store; [`imported_file`]: the
//!   same for one that other tools made; [`artifact`]: either.
//! * [`state`]: the replicated module (pure): its commands and questions. What they do is in [`versions`],
//!   [`stages`], [`aliases`], [`keys`] and [`search`]; [`provenance`] says what production needs.
//! * [`statement`], [`envelope`], [`signer`]: what is signed, how it is checked, and who has private keys
//!   ([`key_holder`] is an actor that has them for jobs);
//!   [`decide`]: a change on its way to be signed; [`bundle`]: the files of a version, signed for other tools.
//! * [`policy`]: gates in front of training, promotion and deployment.
//! * [`events`]: the log of all changes, over the hash trees of [`merkle`]; [`audit_file`]: the same as a file.
//! * [`client`]: what jobs and the command line ask it, and how a job publishes a version.

pub mod aliases;
pub mod artifact;
pub mod audit_file;
pub mod bundle;
pub mod client;
pub mod decide;
pub mod envelope;
pub mod events;
pub mod imported_file;
pub mod key_holder;
pub mod keys;
pub mod merkle;
pub mod policy;
pub mod provenance;
pub mod search;
pub mod signer;
pub mod stages;
pub mod state;
pub mod statement;
pub mod version_file;
pub mod versions;

mod hex;
mod tables;

pub use state::Registry;
pub use version_file::{VersionFile, VersionFileError};
pub use versions::{ModelVersion, NewVersion};
