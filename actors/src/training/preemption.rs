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
//!    ([`Budget::usable_ms`]), as far as was measured.
//! 2. While another replica lives nothing is saved for the notice's sake: too short a grace costs nothing.
//! 3. Every transition says why, with the numbers.
//! 4. An earlier deadline asks for a new choice; a later one changes no choice that was made.

use std::fmt;

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
    fn deadline_ms(self) -> Option<u64> {
        match self {
            Phase::Noticed { deadline_ms }
            | Phase::Handoff { deadline_ms }
            | Phase::SaveShared { deadline_ms }
            | Phase::SaveSolo { deadline_ms }
            | Phase::Abandon { deadline_ms } => Some(deadline_ms),
            Phase::Running | Phase::Advised | Phase::Detached | Phase::Gone => None,
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
        f.write_str(match self {
            Phase::Running => "RUNNING",
            Phase::Advised => "ADVISED",
            Phase::Noticed { .. } => "NOTICED",
            Phase::Handoff { .. } => "HANDOFF",
            Phase::SaveShared { .. } => "SAVE_SHARED",
            Phase::SaveSolo { .. } => "SAVE_SOLO",
            Phase::Abandon { .. } => "ABANDON",
            Phase::Detached => "DETACHED",
            Phase::Gone => "GONE",
        })
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
    /// What one saver sends in a second, as measured; at least 1.
    pub bytes_per_second: u64,
    /// How long a save that is on its way still takes, if there is one.
    pub running_ms: Option<u64>,
}

impl Facts {
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
        Transition { from, to, why }
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
            return Some(self.go(Phase::Handoff { deadline_ms }, why));
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
        Some(self.go(to, why))
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
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW_MS: u64 = 1_000_000;

    fn facts() -> Facts {
        Facts {
            now_ms: NOW_MS,
            lag_ms: 500,
            survivors: 0,
            savers: 1,
            overhead_ms: 100,
            missing_bytes: 10_000_000,
            bytes_per_second: 2_000_000,
            running_ms: None,
        }
    }

    fn chosen(left_ms: u64, facts: Facts) -> Transition {
        let mut machine = Preemption::default();
        machine.noticed(NOW_MS + left_ms, NOW_MS).unwrap();
        machine.choose(&facts).unwrap()
    }

    #[test]
    fn the_margin_is_a_share_of_a_long_grace_and_two_seconds_of_a_short_one() {
        let usable = |left_ms| Budget::until(NOW_MS + left_ms, NOW_MS, 500).usable_ms;
        assert_eq!(
            [
                usable(1_000),
                usable(2_500),
                usable(10_000),
                usable(100_000)
            ],
            [0, 0, 7_500, 84_500]
        );
        assert_eq!(
            Budget::until(5, NOW_MS, 0).usable_ms,
            0,
            "a deadline in the past"
        );
    }

    #[test]
    fn the_choice_follows_the_numbers_and_says_them() {
        let check = |left_ms, facts, phase: &str, why: &[&str]| {
            let transition = chosen(left_ms, facts);
            let text = transition.to_string();
            assert_eq!(transition.to.to_string(), phase, "{text}");
            for part in why {
                assert!(text.contains(part), "{text}");
            }
        };
        // 100 ms and 5 s for 10 MB; of 8 s there are 5.5 usable, of 7 s there are 4.5.
        let numbers = ["5100 ms", "10000000 bytes", "5500 ms are usable", "fits"];
        check(8_000, facts(), "SAVE_SOLO", &numbers);
        check(
            7_000,
            facts(),
            "ABANDON",
            &["does not fit", "4500 ms are usable"],
        );
        let shared = Facts {
            savers: 4,
            ..facts()
        };
        check(7_000, shared, "SAVE_SHARED", &["1350 ms", "each of 4"]);
        let survived = Facts {
            survivors: 2,
            ..facts()
        };
        check(1, survived, "HANDOFF", &["2 replicas"]);
        let running = |running_ms| Facts {
            running_ms: Some(running_ms),
            ..facts()
        };
        check(
            7_000,
            running(4_000),
            "SAVE_SOLO",
            &["no other fits behind it", "4000 ms"],
        );
        check(20_000, running(4_000), "SAVE_SOLO", &["9100 ms"]);
        check(7_000, running(4_600), "ABANDON", &["does not fit"]);
        let stuck = Facts {
            bytes_per_second: 0,
            missing_bytes: u64::MAX,
            ..facts()
        };
        check(60_000, stuck, "ABANDON", &["does not fit"]);
    }

    #[test]
    fn a_new_save_begins_only_if_it_fits_behind_the_one_on_its_way() {
        let mut machine = Preemption::default();
        machine.noticed(NOW_MS + 7_000, NOW_MS).unwrap();
        let facts = Facts {
            running_ms: Some(4_000),
            ..facts()
        };
        assert!(machine.choose(&facts).unwrap().to.saves());
        assert!(!machine.begins_new_save(&facts));
        let alone = Facts {
            running_ms: None,
            missing_bytes: 1_000_000,
            ..facts
        };
        assert!(machine.begins_new_save(&alone));
    }

    #[test]
    fn the_way_out_and_the_way_back() {
        let mut machine = Preemption::default();
        assert_eq!(machine.withdrawn(), None);
        assert_eq!(machine.choose(&facts()), None);
        assert_eq!(machine.detached(), None);
        machine.advised().unwrap();
        assert_eq!(machine.advised(), None);
        machine.withdrawn().unwrap();
        assert_eq!(machine.phase(), Phase::Running);

        machine.advised().unwrap();
        machine.noticed(NOW_MS + 8_000, NOW_MS).unwrap();
        assert_eq!(machine.noticed(NOW_MS + 8_000, NOW_MS), None, "said twice");
        assert_eq!(machine.detached(), None, "nothing was chosen yet");
        machine.choose(&facts()).unwrap();
        assert_eq!(machine.noticed(NOW_MS + 90_000, NOW_MS), None, "later");
        assert!(machine.phase().saves());
        machine.noticed(NOW_MS + 3_000, NOW_MS).unwrap();
        let sooner = machine.choose(&facts()).unwrap();
        assert_eq!(sooner.to.to_string(), "ABANDON");
        machine.withdrawn().unwrap();

        machine.noticed(NOW_MS + 8_000, NOW_MS).unwrap();
        machine.choose(&facts()).unwrap();
        let late = machine.ran_out(5_500).unwrap();
        assert!(late.why.contains("5500 ms"), "{late}");
        assert_eq!(machine.ran_out(1), None);
        machine.detached().unwrap();
        assert_eq!(machine.withdrawn(), None, "who has left does not come back");
        machine.gone().unwrap();
        assert_eq!(machine.noticed(NOW_MS, NOW_MS), None);
        assert_eq!(machine.phase(), Phase::Gone);
    }

    #[derive(Debug, Clone)]
    enum Said {
        Advised,
        Noticed(u64),
        Withdrawn,
        Choose(Facts),
        RanOut,
        Detached,
        Gone,
    }

    fn any_facts() -> impl Strategy<Value = Facts> {
        (
            0_u64..200_000,
            0_u64..5_000,
            0_usize..3,
            0_u64..5,
            (0_u64..10_000, 0_u64..u64::MAX, 0_u64..1 << 40),
            prop::option::of(0_u64..100_000),
        )
            .prop_map(
                |(now_ms, lag_ms, survivors, savers, save, running_ms)| Facts {
                    now_ms,
                    lag_ms,
                    survivors,
                    savers,
                    overhead_ms: save.0,
                    missing_bytes: save.1,
                    bytes_per_second: save.2,
                    running_ms,
                },
            )
    }

    fn said() -> impl Strategy<Value = Said> {
        prop_oneof![
            Just(Said::Advised),
            (0_u64..200_000).prop_map(Said::Noticed),
            Just(Said::Withdrawn),
            any_facts().prop_map(Said::Choose),
            Just(Said::RanOut),
            Just(Said::Detached),
            Just(Said::Gone),
        ]
    }

    /// The ways that the picture above shows.
    fn is_drawn(from: Phase, to: Phase) -> bool {
        use Phase::*;
        let chosen = |phase| {
            matches!(
                phase,
                Handoff { .. } | SaveShared { .. } | SaveSolo { .. } | Abandon { .. }
            )
        };
        match (from, to) {
            (Running, Advised) | (Detached, Gone) => true,
            (Running | Advised, Noticed { .. }) => true,
            (Noticed { .. }, Noticed { .. }) => true,
            // An earlier deadline.
            (from, Noticed { deadline_ms }) if chosen(from) => {
                from.deadline_ms() > Some(deadline_ms)
            }
            (Noticed { .. }, to) if chosen(to) => from.deadline_ms() == to.deadline_ms(),
            (from, Abandon { .. }) if from.saves() => true,
            (from, Detached) => chosen(from),
            (from, Running) => !matches!(from, Running | Detached | Gone),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn whatever_is_said_the_machine_goes_only_ways_that_are_drawn(
            all in prop::collection::vec(said(), 1..60),
        ) {
            let mut machine = Preemption::default();
            for one in all {
                let before = machine.phase();
                let transition = match one {
                    Said::Advised => machine.advised(),
                    Said::Noticed(deadline_ms) => machine.noticed(deadline_ms, 5),
                    Said::Withdrawn => machine.withdrawn(),
                    Said::Choose(facts) => machine.choose(&facts),
                    Said::RanOut => machine.ran_out(7),
                    Said::Detached => machine.detached(),
                    Said::Gone => machine.gone(),
                };
                match transition {
                    None => prop_assert_eq!(machine.phase(), before),
                    Some(transition) => {
                        prop_assert_eq!(transition.from, before);
                        prop_assert_eq!(transition.to, machine.phase());
                        prop_assert!(is_drawn(transition.from, transition.to), "{}", transition);
                        prop_assert!(!transition.why.is_empty());
                    }
                }
            }
        }

        #[test]
        fn what_is_chosen_fits_and_what_is_given_up_did_not(
            facts in any_facts(),
            deadline_ms in 0_u64..400_000,
        ) {
            let mut machine = Preemption::default();
            machine.noticed(deadline_ms, facts.now_ms);
            let chosen = machine.choose(&facts).expect("there is a notice").to;
            let budget = Budget::until(deadline_ms, facts.now_ms, facts.lag_ms);
            prop_assert!(budget.usable_ms + MARGIN_MIN_MS <= budget.left_ms.max(MARGIN_MIN_MS));
            let alone_ms = facts.needed_ms(facts.savers);
            let soonest_ms = facts.running_ms.unwrap_or(alone_ms);
            match chosen {
                Phase::Handoff { .. } => prop_assert!(facts.survivors > 0),
                Phase::SaveSolo { .. } => prop_assert!(soonest_ms <= budget.usable_ms && facts.savers <= 1),
                Phase::SaveShared { .. } => prop_assert!(soonest_ms <= budget.usable_ms && facts.savers > 1),
                Phase::Abandon { .. } => prop_assert!(soonest_ms > budget.usable_ms && facts.survivors == 0),
                other => prop_assert!(false, "{}", other),
            }
            if machine.begins_new_save(&facts) {
                prop_assert!(facts.running_ms.unwrap_or(0).saturating_add(alone_ms) <= budget.usable_ms);
            }
        }
    }
}
