//! Whether a machine computes what the others compute: found out before it takes part.
//!
//! The kernels have the same bits on every processor that they know (`actors/src/kernels`). A machine that computes
//! others all the same has a fault, another build of the program, or a model that is not a function of its arguments.
//! Found out by its sums it would be somebody's dissent in the midst of a step; so it is asked before.

use serde::{Deserialize, Serialize};

/// What becomes of a trainer whose probe differs from the driver's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Numerics {
    /// It takes no part: the result has one hash, whoever computed it.
    #[default]
    Strict,
    /// It takes part, and the run is marked: its result depends on who computed which shard.
    Mixed,
}

/// A machine's answer: the first bytes of the BLAKE3 of one shard's sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe([u8; 16]);

impl Probe {
    /// The probe of a shard with these sums.
    #[must_use]
    pub fn of(loss_sum: f64, gradient: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&loss_sum.to_le_bytes());
        hasher.update(gradient);
        let mut probe = [0; 16];
        probe.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Probe(probe)
    }
}

impl std::fmt::Display for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::spec::TrainSpec;
    use crate::training::value_bytes::bytes_of;
    use crate::training::workload::Workload;

    #[test]
    fn a_probe_is_a_function_of_the_job_and_sees_any_bit() {
        let spec = TrainSpec::digits_mlp("a");
        let probe = Workload::of(&spec).probe().unwrap();
        assert_eq!(Workload::of(&spec).probe().unwrap(), probe);
        let other_seed = TrainSpec { seed: 8, ..spec };
        assert_ne!(Workload::of(&other_seed).probe().unwrap(), probe);
        let (loss, gradient) = (0.5, [1.0_f32, -2.0]);
        let probe = Probe::of(loss, &bytes_of(&gradient));
        assert_ne!(
            Probe::of(f64::from_bits(loss.to_bits() ^ 1), &bytes_of(&gradient)),
            probe
        );
        let flipped = [1.0, f32::from_bits(gradient[1].to_bits() ^ 1)];
        assert_ne!(Probe::of(loss, &bytes_of(&flipped)), probe);
        assert_eq!(probe.to_string().len(), 32);
    }
}
