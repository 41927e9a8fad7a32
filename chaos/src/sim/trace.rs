//! What happened, as one number: two runs of a seed are the same run exactly if their traces are.

/// Mixes everything that happens into 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trace(u64);

impl Trace {
    pub(crate) fn new(seed: u64) -> Self {
        Trace(seed ^ 0xcbf2_9ce4_8422_2325)
    }

    /// Notes one fact.
    pub(crate) fn note(&mut self, fact: u64) {
        // FNV-1a over words, with a rotation so that high bits come down again.
        self.0 = (self.0 ^ fact)
            .wrapping_mul(0x0000_0100_0000_01b3)
            .rotate_left(23);
    }

    /// Notes several facts.
    pub(crate) fn note_all(&mut self, facts: &[u64]) {
        for fact in facts {
            self.note(*fact);
        }
    }

    pub(crate) fn value(self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_and_every_fact_count() {
        let of = |facts: &[u64]| {
            let mut trace = Trace::new(1);
            trace.note_all(facts);
            trace.value()
        };
        assert_eq!(of(&[1, 2, 3]), of(&[1, 2, 3]));
        assert_ne!(of(&[1, 2, 3]), of(&[2, 1, 3]));
        assert_ne!(of(&[1, 2]), of(&[1, 2, 0]));
        assert_ne!(of(&[1 << 63]), of(&[0]));
    }
}
