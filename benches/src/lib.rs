//! mobula-benches
