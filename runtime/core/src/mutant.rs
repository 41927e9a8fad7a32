//! Planted defects: each is a mistake that this project once was, or could have been, broken by. A
//! simulator that does not find them would not find the next one either.
//!
//! Invariants:
//! 1. Without the feature `mutants` nothing is ever planted: [`is_planted`] is the constant `false`,
//!    and the compiler removes what stands behind it. No crate turns the feature on by default.
//! 2. One defect is planted at a time, and for the calling thread only, so that a run with a defect
//!    can stand beside one without.

use std::fmt;

/// Makes the list of defects with their names and what they do.
macro_rules! mutants {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// A defect that can be planted.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Mutant {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Mutant {
            /// All of them.
            pub const ALL: &[Mutant] = &[$(Mutant::$variant,)+];

            /// Its name on a command line.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self {
                    $(Mutant::$variant => $name,)+
                }
            }

            /// What it does, in a sentence.
            #[must_use]
            pub fn description(self) -> &'static str {
                match self {
                    $(Mutant::$variant => concat!($($doc),+),)+
                }
            }
        }
    };
}

mutants! {
    /// A vote or an acknowledgement leaves before what it promises is on the disk.
    SendBeforeFsync = "send-before-fsync",
    /// The log is never synced.
    LogNotSynced = "log-not-synced",
    /// Term and vote are written only together with entries.
    VoteNotWritten = "vote-not-written",
    /// A leader answers reads from its own tables, without asking whether it still leads.
    ReadWithoutQuorum = "read-without-quorum",
    /// A read is answered before the entry is applied that the leader named.
    ReadBeforeApply = "read-before-apply",
    /// A change of the group that raft dropped is answered as made.
    ChangeSwallowed = "change-swallowed",
    /// That a change of the group is committed is told before it is on the disk.
    ChangeNotSynced = "change-not-synced",
    /// A learner is promoted that holds nothing yet.
    PromotedEmpty = "promoted-empty",
    /// The membership after a change is not stored.
    MembershipNotStored = "membership-not-stored",
    /// A head whose disk was lost starts again under its old id.
    WipedDiskRejoins = "wiped-disk-rejoins",
    /// A removed head becomes a member again.
    RemovedRejoins = "removed-rejoins",
    /// A deposed leader keeps its waiting proposals, and answers each with whatever entry is applied at
    /// its index.
    AnswerOfOtherTerm = "answer-of-other-term",
    /// raft is not told how the sending of a snapshot ended.
    SnapshotEndUnreported = "snapshot-end-unreported",
    /// The answers of sessions are missing from snapshots.
    SnapshotWithoutSessions = "snapshot-without-sessions",
    /// The hash of another head's state is compared with the newest one here, whatever entry it is about.
    ClaimOfOtherEntry = "claim-of-other-entry",
    /// A snapshot is installed over the old rows instead of in their place.
    SnapshotKeepsOldRows = "snapshot-keeps-old-rows",
    /// A snapshot is taken as one of the last entry in the log, applied or not.
    SnapshotTooNew = "snapshot-too-new",
    /// An append leaves what the log held beyond it.
    LogTailKept = "log-tail-kept",
    /// The applied index is written after the tables and not with them.
    AppliedNotWithTables = "applied-not-with-tables",
    /// A repeated command is applied again.
    SessionUnchecked = "session-unchecked",
    /// A command of a session that is over is applied.
    ExpiredSessionRuns = "expired-session-runs",
    /// Refusals are not kept as answers.
    RefusalNotRecorded = "refusal-not-recorded",
    /// Only the last answer of a session is kept, while older numbers still count as fresh.
    SessionWindowOfOne = "session-window-of-one",
    /// Time in the log is whatever the leader's clock says.
    LogTimeGoesBack = "log-time-goes-back",
    /// An idempotency key is not looked up.
    KeyIgnored = "key-ignored",
    /// What a stale incarnation of a node says counts.
    StaleNodeAccepted = "stale-node-accepted",
    /// What a stale incarnation of an actor says counts.
    StaleActorAccepted = "stale-actor-accepted",
    /// A node that was declared lost comes back under the same incarnation.
    LostNodeReturns = "lost-node-returns",
    /// An assignment keeps the incarnation of the one before.
    IncarnationReused = "incarnation-reused",
    /// A decision of placement is applied without looking whether it still fits.
    AssignUnchecked = "assign-unchecked",
    /// Within one decision of placement, what the first actor takes still counts as free.
    ResourcesNotTaken = "resources-not-taken",
    /// The lease of an actor that ended stays.
    LeaseLeaks = "lease-leaks",
    /// What ran on a lost node is left as it is.
    LostNodeKeepsActors = "lost-node-keeps-actors",
    /// An actor that was told to stop, and fails instead, starts again.
    RestartAfterStop = "restart-after-stop",
    /// A stop of a job that has ended changes its outcome.
    OutcomeOverwritten = "outcome-overwritten",
    /// A stale incarnation of a driver stores the job's result.
    StaleResultAccepted = "stale-result-accepted",
    /// A worker that comes back is not told what it should be running.
    OrdersForgotten = "orders-forgotten",
    /// A checkpoint of an earlier step hides a later one.
    CheckpointGoesBack = "checkpoint-goes-back",
    /// A driver that was replaced commits a checkpoint.
    CheckpointUnfenced = "checkpoint-unfenced",
    /// The address of a router that was replaced becomes the endpoint's.
    StaleRouterHeard = "stale-router-heard",
    /// An experiment that is over goes on hearing its router, and is decided again.
    ExperimentDecidedTwice = "experiment-decided-twice",
    /// A second start gives the experiment that is under way another plan.
    ExperimentPlanChanged = "experiment-plan-changed",
    /// What is left of an experiment counts as gone before its replicas have ended.
    TreatmentLeftRunning = "treatment-left-running",
    /// A router that was replaced counts for an experiment.
    StaleRouterCounts = "stale-router-counts",
    /// Numbers of an experiment that arrive late take the place of newer ones.
    LateReportHeard = "late-report-heard",
    /// What an experiment has counted is forgotten with the router that counted it.
    CountsForgotten = "counts-forgotten",
    /// Experiments stay when their endpoint goes.
    ExperimentOutlivesEndpoint = "experiment-outlives-endpoint",
    /// What a job keeps stays when the job is over.
    KeptOutlivesJob = "kept-outlives-job",
    /// Another value takes the place of the one that is kept under a name.
    KeptReplaced = "kept-replaced",
    /// An actor whose incarnation is over keeps and drops.
    StaleHolderKeeps = "stale-holder-keeps",
    /// A head that starts again does not know what was changed before.
    RevisionForgotten = "revision-forgotten",
    /// Whoever watches a module is not woken when a snapshot has changed it.
    SnapshotWakesNobody = "snapshot-wakes-nobody",
}

impl fmt::Display for Mutant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether this defect is planted for the calling thread.
#[cfg(not(feature = "mutants"))]
#[inline(always)]
#[must_use]
pub fn is_planted(_: Mutant) -> bool {
    false
}

#[cfg(feature = "mutants")]
std::thread_local! {
    static PLANTED: std::cell::Cell<Option<Mutant>> = const { std::cell::Cell::new(None) };
}

/// Whether this defect is planted for the calling thread.
#[cfg(feature = "mutants")]
#[must_use]
pub fn is_planted(mutant: Mutant) -> bool {
    PLANTED.get() == Some(mutant)
}

/// Plants a defect for the calling thread, or takes it away.
#[cfg(feature = "mutants")]
pub fn plant(mutant: Option<Mutant>) {
    PLANTED.set(mutant);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct_and_described() {
        let names: std::collections::BTreeSet<_> =
            Mutant::ALL.iter().map(|mutant| mutant.name()).collect();
        assert_eq!(names.len(), Mutant::ALL.len());
        assert!(Mutant::ALL.len() >= 25);
        for mutant in Mutant::ALL {
            assert!(mutant.description().ends_with('.'), "{mutant}");
        }
    }

    #[cfg(not(feature = "mutants"))]
    #[test]
    fn nothing_is_planted_in_a_common_build() {
        assert!(Mutant::ALL.iter().all(|mutant| !is_planted(*mutant)));
    }

    #[cfg(feature = "mutants")]
    #[test]
    fn a_defect_is_planted_for_one_thread_and_alone() {
        plant(Some(Mutant::LeaseLeaks));
        assert!(is_planted(Mutant::LeaseLeaks) && !is_planted(Mutant::KeyIgnored));
        let elsewhere = std::thread::spawn(|| is_planted(Mutant::LeaseLeaks));
        assert!(!elsewhere.join().unwrap());
        plant(None);
        assert!(!is_planted(Mutant::LeaseLeaks));
    }
}
