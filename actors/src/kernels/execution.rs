//! Which instructions and how many threads kernels use: never what they compute.
//!
//! Invariants:
//! 1. A kernel's result has the same bits for every [`Execution`]. Tests run each kernel under all of them.
//! 2. An execution belongs to the calling thread for the time of one closure; a kernel reads it once, where
//!    it is entered, and hands it on to the threads that help.
//! 3. The default is one thread: a trainer uses what its actor was given, and whoever has more says so.

use std::cell::Cell;
use std::num::NonZeroUsize;

/// The instructions that a kernel is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InstructionSet {
    /// Vectors of 16 values.
    Avx512,
    /// Vectors of 8 values, with fused multiply-add.
    Avx2,
    /// One value after the other, on any CPU.
    Scalar,
}

impl InstructionSet {
    /// All there are, the fastest first.
    pub const ALL: [Self; 3] = [Self::Avx512, Self::Avx2, Self::Scalar];

    /// Whether this CPU has them.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => is_x86_feature_detected!("avx512f") && Self::Avx2.is_available(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx512 | Self::Avx2 => false,
            Self::Scalar => true,
        }
    }

    /// The fastest that this CPU has.
    #[must_use]
    pub fn best() -> Self {
        *Self::ALL
            .iter()
            .find(|set| set.is_available())
            .expect("scalar code runs everywhere")
    }
}

/// How kernels run on this thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Execution {
    instructions: InstructionSet,
    threads: NonZeroUsize,
}

thread_local! {
    static CURRENT: Cell<Option<Execution>> = const { Cell::new(None) };
}

impl Execution {
    /// What kernels called on this thread use: within [`Execution::run`] what it was called on, elsewhere
    /// the CPU's best instructions on one thread.
    #[must_use]
    pub fn current() -> Self {
        CURRENT.get().unwrap_or_else(|| Self {
            instructions: InstructionSet::best(),
            threads: NonZeroUsize::MIN,
        })
    }

    /// The same with other instructions; `None` where this CPU lacks them.
    #[must_use]
    pub fn with_instructions(self, instructions: InstructionSet) -> Option<Self> {
        instructions.is_available().then_some(Self {
            instructions,
            ..self
        })
    }

    /// The same with so many threads, of rayon's pool, at most.
    #[must_use]
    pub fn with_threads(self, threads: NonZeroUsize) -> Self {
        Self { threads, ..self }
    }

    /// The instructions used; the CPU has them.
    #[must_use]
    pub fn instructions(self) -> InstructionSet {
        self.instructions
    }

    /// How many threads may be used.
    #[must_use]
    pub fn threads(self) -> usize {
        self.threads.get()
    }

    /// Runs `work` with kernels that execute like this on the calling thread.
    pub fn run<R>(self, work: impl FnOnce() -> R) -> R {
        struct Restored(Option<Execution>);
        impl Drop for Restored {
            fn drop(&mut self) {
                CURRENT.set(self.0);
            }
        }
        let _restored = Restored(CURRENT.replace(Some(self)));
        work()
    }
}

/// Every execution that this CPU has, on one and on two threads: what kernels' tests go through.
#[cfg(test)]
pub(crate) fn all_executions() -> Vec<Execution> {
    let two = NonZeroUsize::new(2).expect("two is not zero");
    InstructionSet::ALL
        .iter()
        .filter_map(|set| Execution::current().with_instructions(*set))
        .flat_map(|execution| [execution, execution.with_threads(two)])
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_execution_lasts_as_long_as_its_closure_also_through_panics() {
        let before = Execution::current();
        let scalar = before.with_instructions(InstructionSet::Scalar).unwrap();
        let two = scalar.with_threads(NonZeroUsize::new(2).unwrap());
        scalar.run(|| {
            assert_eq!(Execution::current(), scalar);
            assert_eq!(two.run(Execution::current), two);
            assert_eq!(Execution::current(), scalar);
        });
        let panicked = std::panic::catch_unwind(|| two.run(|| panic!("on purpose")));
        assert!(panicked.is_err());
        assert_eq!(Execution::current(), before);
        assert!(all_executions().contains(&two));
    }
}
