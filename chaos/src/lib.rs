//! mobula-chaos
