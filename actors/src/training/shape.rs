//! The sizes that follow from a job's description, the same in every process of the job.

use super::protocol::buckets::Buckets;
use super::protocol::gather::TreeShape;
use super::protocol::leader::LeaderShape;
use super::protocol::member::MemberShape;
use super::spec::TrainSpec;
use super::state::HEADER_BYTES;
use super::validation::PARAMETERS_MAX;

/// Memory for the sums of finished steps, kept for those who are behind.
const HISTORY_BYTES: usize = 64 << 20;
/// Steps that are kept at least: to take a state over must take less than so many.
const HISTORY_MIN: usize = 4;
/// Steps that are kept at most: so far may trainers be ahead of the driver's copy.
const HISTORY_MAX: usize = 64;

/// Bytes of the largest state that any job may have with this optimizer.
#[must_use]
pub fn state_bytes_max(spec: &TrainSpec) -> u64 {
    let vectors = 1 + spec.optimizer.moment_count() as u64;
    HEADER_BYTES as u64 + PARAMETERS_MAX as u64 * 4 * vectors
}

/// What a member has to know of a model with `value_count` values.
#[must_use]
pub fn member_shape(spec: &TrainSpec, value_count: usize) -> MemberShape {
    let fitting = HISTORY_BYTES / (value_count * 4).max(1);
    MemberShape {
        tree: TreeShape {
            shard_count: spec.virtual_shards,
            samples_per_shard: spec.global_batch / u64::from(spec.virtual_shards),
        },
        buckets: Buckets::for_workers(value_count, spec.workers.max),
        steps: spec.steps,
        history: fitting.clamp(HISTORY_MIN, HISTORY_MAX),
    }
}

/// What the coordinator has to know.
#[must_use]
pub fn leader_shape(spec: &TrainSpec, value_count: usize) -> LeaderShape {
    let shape = member_shape(spec, value_count);
    LeaderShape {
        shard_count: spec.virtual_shards,
        bucket_count: shape.buckets.count(),
        members_min: spec.workers.min,
        // Whoever follows at this distance still finds the sums that it lacks.
        lead_max: shape.history as u64,
        steps: spec.steps,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_model_keeps_few_steps_and_a_small_one_many() {
        let spec = TrainSpec::digits_mlp("a");
        let small = member_shape(&spec, 17_000);
        assert_eq!(small.history, HISTORY_MAX);
        let large = member_shape(&spec, 50 << 20);
        assert_eq!(large.history, HISTORY_MIN);
        assert!(large.buckets.count() > small.buckets.count());
        let leader = leader_shape(&spec, 50 << 20);
        assert_eq!(leader.bucket_count, large.buckets.count());
        assert_eq!(leader.lead_max, HISTORY_MIN as u64);
    }
}
