//! Who may ask an endpoint, and where their requests go before weights are looked at.
//!
//! * [`state`]: tokens and rules of each endpoint, replicated (pure).
//! * [`rules`]: headers and parameters that send a request to a version (pure).
//! * [`keyring`]: the tokens as a door checks them.
//! * [`follow`]: keeps a router up to date, so that a revocation needs no restart.
//! * [`rates`]: so many requests a second with each token.

pub mod follow;
pub mod keyring;
pub mod rates;
pub mod rules;
pub mod state;
