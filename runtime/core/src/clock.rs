//! Time and entropy come in from outside: the process gives real ones, tests and the simulator
//! give their own.

/// A source of time.
pub trait Clock: Send + Sync {
    /// Milliseconds since the Unix epoch.
    fn now_ms(&self) -> u64;
}

/// A source of randomness.
pub trait Entropy: Send {
    /// 64 random bits.
    fn next_u64(&mut self) -> u64;
}
