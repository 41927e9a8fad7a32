//! What a run, or many of them, came across. A run in which little happens shows little: so it is
//! counted, and a run with too little traffic, or a campaign that never met some kind of trouble, does
//! not pass.

use super::violation::Violation;

/// Seeds from which on a campaign must have met everything; below, chance leaves something out.
const SEEDS_TO_JUDGE: u64 = 200;

/// How many seeds there are to each occurrence, at the most, of anything that is counted. The rarest
/// happens about once in sixty.
const SEEDS_PER_OCCURRENCE_MAX: u64 = 100;

/// What a run of some seconds has at the very least: the thinnest ones are those of a single client that
/// hardly gets through to a head.
const ENTRIES_MIN: u64 = 10;
const ANSWERS_MIN: u64 = 2;

/// Makes the counters with their names.
macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $field:ident = $name:literal,)+) => {
        /// What was counted in a run, or in all runs of a campaign.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct Counts {
            $($(#[doc = $doc])+ pub $field: u64,)+
        }

        impl Counts {
            /// All of them with their names.
            #[must_use]
            pub fn rows(&self) -> Vec<(&'static str, u64)> {
                vec![$(($name, self.$field)),+]
            }

            /// Adds another run's.
            pub fn add(&mut self, other: &Counts) {
                $(self.$field += other.$field;)+
            }
        }
    };
}

counters! {
    /// Events of the simulation.
    events = "events",
    /// Entries that were committed.
    entries = "committed entries",
    /// Answers to clients that were checked.
    answers = "checked answers",
    /// Answers to clients that were read from tables, through a quorum.
    reads = "reads by index",
    /// Commands that came again and were answered from their session.
    repeats = "repeated commands",
    /// Jobs.
    jobs = "jobs",
    /// Values that jobs began to keep.
    kept = "kept objects",
    /// Those of them that were dropped.
    kept_dropped = "dropped objects",
    /// Checkpoints that became visible.
    checkpoints = "checkpoints",
    /// Changes of modules that somebody who watches was told of.
    watched = "watched changes",
    /// Creations of actors that outlive their job.
    detached = "detached creations",
    /// Times that a head compared its state with another one's.
    compared = "compared states",
    /// Terms in which somebody led.
    leaders = "leaders",
    /// Times that a leader was told to hand over.
    transfers = "transfers",
    /// Heads that began to vote.
    promoted = "heads promoted",
    /// Heads that were removed from the group.
    removed = "heads removed",
    /// Disks of heads that were lost with all that was on them.
    lost_disks = "lost disks",
    /// Lives of heads that ended unasked.
    crashes = "crashes of heads",
    /// Those of them in which writes were lost that had been made.
    torn = "torn logs",
    /// Heads that ended because their disk refused a write.
    disk_faults = "failed writes",
    /// Logs that were shortened.
    compactions = "compactions",
    /// Snapshots that were installed.
    snapshots = "installed snapshots",
    /// Snapshots that did not arrive, or not whole.
    snapshots_lost = "lost snapshots",
    /// Heads that were stopped, and went on.
    pauses = "stopped heads",
    /// Clocks that jumped.
    clock_jumps = "clock jumps",
    /// Ways that were cut or clogged.
    cuts = "cut ways",
    /// Workers that were declared lost.
    nodes_lost = "lost workers",
    /// Words of workers that came too late to count.
    fenced = "fenced events",
    /// Steps that rollouts took by somebody's word.
    rollouts_decided = "decisions of rollouts",
    /// Leaders that ended as a rollout began.
    killed_at_start = "leaders killed at a rollout's start",
    /// Leaders that ended as a rollout passed a step.
    killed_at_pass = "leaders killed at a passed step",
    /// Leaders that ended as a rollout was paused.
    killed_at_pause = "leaders killed at a pause",
    /// Leaders that ended as a rollout went on.
    killed_at_resume = "leaders killed at a resumption",
    /// Leaders that ended as a candidate became the active version.
    killed_at_promotion = "leaders killed at a promotion",
    /// Leaders that ended as a rollout was given up.
    killed_at_abort = "leaders killed at an abort",
    /// Leaders that ended as the version of before became the active one again.
    killed_at_rollback = "leaders killed at a rollback",
    /// Experiments that began.
    experiments = "experiments",
    /// Experiments that ended by what the primary metric said.
    experiments_decided = "decided experiments",
    /// Experiments that a guardrail ended.
    experiments_guarded = "experiments ended by a guardrail",
    /// Experiments that a client ended.
    experiments_stopped = "stopped experiments",
    /// Plans that came while another one was followed.
    plans_refused = "refused plans",
    /// Leaders that ended as an experiment began.
    killed_at_experiment_start = "leaders killed at an experiment's start",
    /// Leaders that ended as an experiment was over.
    killed_at_experiment_end = "leaders killed at an experiment's end",
}

impl Counts {
    /// Whether so little happened in one run that it shows nothing.
    pub(crate) fn check_run(&self) -> Result<(), Violation> {
        if self.entries >= ENTRIES_MIN && self.answers >= ANSWERS_MIN {
            return Ok(());
        }
        Err(Violation::new(
            "a run has traffic",
            format!(
                "{} entries and {} checked answers, at least {ENTRIES_MIN} and {ANSWERS_MIN} are needed",
                self.entries, self.answers
            ),
        ))
    }

    /// What did not happen often enough in `seeds` runs for them to show anything about it.
    #[must_use]
    pub fn missing(&self, seeds: u64) -> Vec<&'static str> {
        if seeds < SEEDS_TO_JUDGE {
            return Vec::new();
        }
        let is_rare = |count: u64| count < seeds / SEEDS_PER_OCCURRENCE_MAX;
        let rows = self.rows().into_iter();
        rows.filter(|(_, count)| is_rare(*count))
            .map(|(name, _)| name)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_seeds_that_never_met_something_are_told_apart_from_few() {
        let counts = Counts {
            torn: 1,
            ..Counts::default()
        };
        assert!(counts.missing(SEEDS_TO_JUDGE - 1).is_empty());
        let missing = counts.missing(SEEDS_TO_JUDGE);
        assert_eq!(missing.len(), counts.rows().len());
        let mut all = Counts::default();
        for _ in 0..2 {
            all.add(&counts);
        }
        assert_eq!(all.torn, 2);
        assert!(!all.missing(SEEDS_TO_JUDGE).contains(&"torn logs"));
        assert!(all.missing(100 * SEEDS_TO_JUDGE).contains(&"torn logs"));
    }

    #[test]
    fn a_run_without_traffic_is_no_proof() {
        assert!(Counts::default().check_run().is_err());
        let busy = Counts {
            entries: ENTRIES_MIN,
            answers: ANSWERS_MIN,
            ..Counts::default()
        };
        assert_eq!(busy.check_run(), Ok(()));
    }
}
