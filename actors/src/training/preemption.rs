//! What a driver does about the notice that its machine will be taken away: a machine of few states and the
//! arithmetic behind its choice. Pure: time and measurements come in, decisions come out.
//!
//! ```text
//! RUNNING ─► ADVISED ─► NOTICED ─┬► HANDOFF ─────┬► DETACHED ─► GONE
//!    ▲          │          │     ├► SAVE_SHARED ─┤
//!    │          │          │     ├► SAVE_SOLO ───┤
//!    └──────────┴──────────┘     └► ABANDON ─────┘
//!         a withdrawn notice, up to DETACHED
//! ```
//!
//! Invariants:
//! 1. A save is begun only if it fits: what it needs is at most what can be counted on
//!    ([`Budget::usable_ms`]), as far as was measured, and by a cautious estimate before that.
//! 2. While another replica lives nothing is saved for the notice's sake: too short a grace costs nothing.
//! 3. Every transition says why, with the numbers.
//! 4. An earlier deadline asks for a new choice; a later one changes no choice that was made.

use std::fmt;

use crate::checkpoint::preemptions::PreemptionPhase;

/// Time before the deadline that is not counted on, as a share of what is left: the machine may go early.
const MARGIN_PERCENT: u64 = 15;
/// The least of it, in milliseconds.
pub const MARGIN_MIN_MS: u64 = 2_000;

/// Where a driver stands with its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Nobody said anything.
    Running,
    /// The machine may be taken away; there is no deadline yet.
    Advised,
    /// It will be.
    Noticed {
        /// When, in milliseconds since the Unix epoch.
        deadline_ms: u64,
    },
    /// Another replica goes on: leave.
    Handoff {
        /// When the machine goes.
        deadline_ms: u64,
    },
    /// Save together with the others that go, then leave.
    SaveShared {
        /// When the machine goes.
        deadline_ms: u64,
    },
    /// Save alone, then leave.
    SaveSolo {
        /// When the machine goes.
        deadline_ms: u64,
    },
    /// No save fits: leave, and repeat what is lost.
    Abandon {
        /// When the machine goes.
        deadline_ms: u64,
    },
    /// The head was asked to start the driver elsewhere.
    Detached,
    /// This process ends.
    Gone,
}

impl Phase {
    /// When the machine goes, in milliseconds since the Unix epoch, where that is known.
    #[must_use]
    pub fn deadline_ms(self) -> Option<u64> {
        match self {
            Phase::Noticed { deadline_ms }
            | Phase::Handoff { deadline_ms }
            | Phase::SaveShared { deadline_ms }
            | Phase::SaveSolo { deadline_ms }
            | Phase::Abandon { deadline_ms } => Some(deadline_ms),
            Phase::Running | Phase::Advised | Phase::Detached | Phase::Gone => None,
        }
    }

    /// Its name, as it is recorded.
    #[must_use]
    pub fn name(self) -> PreemptionPhase {
        match self {
            Phase::Running => PreemptionPhase::Running,
            Phase::Advised => PreemptionPhase::Advised,
            Phase::Noticed { .. } => PreemptionPhase::Noticed,
            Phase::Handoff { .. } => PreemptionPhase::Handoff,
            Phase::SaveShared { .. } => PreemptionPhase::SaveShared,
            Phase::SaveSolo { .. } => PreemptionPhase::SaveSolo,
            Phase::Abandon { .. } => PreemptionPhase::Abandon,
            Phase::Detached => PreemptionPhase::Detached,
            Phase::Gone => PreemptionPhase::Gone,
        }
    }

    /// Whether a save is to be made.
    #[must_use]
    pub fn saves(self) -> bool {
        matches!(self, Phase::SaveShared { .. } | Phase::SaveSolo { .. })
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name().fmt(f)
    }
}

/// The time that can be counted on before a deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// From now to the deadline.
    pub left_ms: u64,
    /// How much later than it was given the notice may have been heard.
    pub lag_ms: u64,
    /// What is left out, for the machine may go early.
    pub margin_ms: u64,
    /// What remains.
    pub usable_ms: u64,
}

impl Budget {
    /// deadline − now − lag − margin, where the margin is 15 % of what is left and 2 s at least.
    #[must_use]
    pub fn until(deadline_ms: u64, now_ms: u64, lag_ms: u64) -> Self {
        let left_ms = deadline_ms.saturating_sub(now_ms);
        let margin_ms = MARGIN_MIN_MS.max(left_ms / 100 * MARGIN_PERCENT);
        Budget {
            left_ms,
            lag_ms,
            margin_ms,
            usable_ms: left_ms.saturating_sub(lag_ms).saturating_sub(margin_ms),
        }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} ms are left, less {} ms of lag and a margin of {} ms: {} ms are usable",
            self.left_ms, self.lag_ms, self.margin_ms, self.usable_ms
        )
    }
}

/// What a choice rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// Now, in milliseconds since the Unix epoch.
    pub now_ms: u64,
    /// How much later than it was given the notice may have been heard.
    pub lag_ms: u64,
    /// Replicas that hold these very bits on machines without notice.
    pub survivors: usize,
    /// Who can send a share of the state, this process included: 1 or more.
    pub savers: u64,
    /// What a snapshot takes, and what a save takes beside its bytes.
    pub overhead_ms: u64,
    /// Bytes that the store lacks.
    pub missing_bytes: u64,
    /// What one saver sends in a second, as measured, or as is thought before; at least 1.
    pub bytes_per_second: u64,
    /// How long a save that is on its way still takes, if there is one.
    pub running_ms: Option<u64>,
}

impl Facts {
    /// Whether a save by this process alone also fits if it is begun after so many milliseconds, behind one that is on its way.
    #[must_use]
    pub fn allows(&self, wait_ms: u64, deadline_ms: u64) -> bool {
        let begins_ms = self.now_ms.saturating_add(wait_ms);
        let budget = Budget::until(deadline_ms, begins_ms, self.lag_ms);
        let running_ms = self.running_ms.unwrap_or(0).saturating_sub(wait_ms);
        running_ms.saturating_add(self.needed_ms(1)) <= budget.usable_ms
    }

    /// What a save by `savers` takes.
    fn needed_ms(&self, savers: u64) -> u64 {
        let rate = u128::from(self.bytes_per_second.max(1)) * u128::from(savers.max(1));
        let upload_ms = (u128::from(self.missing_bytes) * 1000).div_ceil(rate);
        self.overhead_ms
            .saturating_add(u64::try_from(upload_ms).unwrap_or(u64::MAX))
    }
}

/// A step of the machine, for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transition {
    /// Where it was.
    pub from: Phase,
    /// Where it is.
    pub to: Phase,
    /// Why, with the numbers.
    pub why: String,
    /// What a save takes, in milliseconds, where the choice rests on that.
    pub needed_ms: Option<u64>,
    /// What can be counted on of the time to the deadline, in milliseconds, where a choice was made.
    pub usable_ms: Option<u64>,
}

impl fmt::Display for Transition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "notice: {} -> {}: {}", self.from, self.to, self.why)
    }
}

/// The machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preemption {
    phase: Phase,
}

impl Default for Preemption {
    fn default() -> Self {
        Preemption {
            phase: Phase::Running,
        }
    }
}

impl Preemption {
    /// Where it stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    fn go(&mut self, to: Phase, why: String) -> Transition {
        let from = std::mem::replace(&mut self.phase, to);
        Transition {
            from,
            to,
            why,
            needed_ms: None,
            usable_ms: None,
        }
    }

    /// The cloud says that it may take the machine.
    pub fn advised(&mut self) -> Option<Transition> {
        let why = "the cloud may take this machine away; no deadline yet".to_owned();
        (self.phase == Phase::Running).then(|| self.go(Phase::Advised, why))
    }

    /// The machine will go at `deadline_ms`. A later deadline changes no choice that was made.
    pub fn noticed(&mut self, deadline_ms: u64, now_ms: u64) -> Option<Transition> {
        let left_ms = deadline_ms.saturating_sub(now_ms);
        let to = Phase::Noticed { deadline_ms };
        let why = match (self.phase, self.phase.deadline_ms()) {
            (Phase::Detached | Phase::Gone, _) => return None,
            (_, None) => format!("the machine goes in {left_ms} ms"),
            (Phase::Noticed { deadline_ms: known }, _) if known != deadline_ms => {
                format!("the machine goes in {left_ms} ms, and not at {known}")
            }
            (_, Some(known)) if deadline_ms < known => format!(
                "the machine goes {} ms sooner, in {left_ms} ms",
                known - deadline_ms
            ),
            _ => return None,
        };
        Some(self.go(to, why))
    }

    /// The advice does not stand any more. A notice that has come since does.
    pub fn advice_withdrawn(&mut self) -> Option<Transition> {
        let why = "the cloud does not say any more that it may take this machine away".to_owned();
        (self.phase == Phase::Advised).then(|| self.go(Phase::Running, why))
    }

    /// The notice does not stand any more. Who has left does not come back.
    pub fn withdrawn(&mut self) -> Option<Transition> {
        if matches!(self.phase, Phase::Running | Phase::Detached | Phase::Gone) {
            return None;
        }
        Some(self.go(Phase::Running, "the notice is withdrawn".to_owned()))
    }

    /// Chooses what to do. Only where there is a notice about which nothing was chosen yet.
    pub fn choose(&mut self, facts: &Facts) -> Option<Transition> {
        let Phase::Noticed { deadline_ms } = self.phase else {
            return None;
        };
        let budget = Budget::until(deadline_ms, facts.now_ms, facts.lag_ms);
        if facts.survivors > 0 {
            let why = format!(
                "{} replicas on machines without notice hold these bits; {budget}",
                facts.survivors
            );
            return Some(Transition {
                usable_ms: Some(budget.usable_ms),
                ..self.go(Phase::Handoff { deadline_ms }, why)
            });
        }
        let savers = facts.savers.max(1);
        let mut needed_ms = facts.needed_ms(savers);
        let mut how = format!(
            "{} bytes at {} a second by each of {savers}, and {} ms beside",
            facts.missing_bytes, facts.bytes_per_second, facts.overhead_ms
        );
        if let Some(running_ms) = facts.running_ms {
            // It goes first either way; the new one is worth it only if both fit.
            let both_ms = running_ms.saturating_add(needed_ms);
            if both_ms <= budget.usable_ms {
                needed_ms = both_ms;
                how = format!("{running_ms} ms for the save on its way, then {how}");
            } else {
                needed_ms = running_ms;
                how = "the save on its way, for no other fits behind it".to_owned();
            }
        }
        let to = match needed_ms <= budget.usable_ms {
            false => Phase::Abandon { deadline_ms },
            true if savers > 1 => Phase::SaveShared { deadline_ms },
            true => Phase::SaveSolo { deadline_ms },
        };
        let verdict = if to.saves() { "fits" } else { "does not fit" };
        let why = format!("a save needs {needed_ms} ms ({how}) and {verdict}; {budget}");
        Some(Transition {
            needed_ms: Some(needed_ms),
            usable_ms: Some(budget.usable_ms),
            ..self.go(to, why)
        })
    }

    /// Whether a new save fits behind one that is on its way.
    #[must_use]
    pub fn begins_new_save(&self, facts: &Facts) -> bool {
        let (true, Some(deadline_ms)) = (self.phase.saves(), self.phase.deadline_ms()) else {
            return false;
        };
        let budget = Budget::until(deadline_ms, facts.now_ms, facts.lag_ms);
        let running_ms = facts.running_ms.unwrap_or(0);
        let needed_ms = facts.needed_ms(facts.savers.max(1));
        running_ms.saturating_add(needed_ms) <= budget.usable_ms
    }

    /// A save that had begun did not end in time.
    pub fn ran_out(&mut self, took_ms: u64) -> Option<Transition> {
        let deadline_ms = self.phase.deadline_ms()?;
        let why = format!("the save is not committed after {took_ms} ms, which was all there was");
        self.phase
            .saves()
            .then(|| self.go(Phase::Abandon { deadline_ms }, why))
    }

    /// The head starts the driver elsewhere. Only after a choice.
    pub fn detached(&mut self) -> Option<Transition> {
        let has_chosen =
            self.phase.deadline_ms().is_some() && !matches!(self.phase, Phase::Noticed { .. });
        has_chosen.then(|| {
            self.go(
                Phase::Detached,
                "the head starts the driver elsewhere".to_owned(),
            )
        })
    }

    /// This process ends.
    pub fn gone(&mut self) -> Option<Transition> {
        (self.phase == Phase::Detached)
            .then(|| self.go(Phase::Gone, "this process ends".to_owned()))
    }
}

#[cfg(test)]
#[path = "preemption_tests.rs"]
mod tests;
