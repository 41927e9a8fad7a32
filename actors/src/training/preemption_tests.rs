//! The machine by cases, and by whatever may be said in any order.

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
fn a_save_may_wait_only_as_long_as_it_still_fits() {
    // 5.1 s are needed. Of 12 s there are 6.5 usable after 3 of them, of 8 s there are 3.5 after 2.
    assert!(facts().allows(3_000, NOW_MS + 12_000));
    assert!(!facts().allows(2_000, NOW_MS + 8_000));
    // What is on its way goes on meanwhile: a second of its four is left after three.
    let running = Facts {
        running_ms: Some(4_000),
        ..facts()
    };
    assert!(running.allows(3_000, NOW_MS + 12_000));
    assert!(!running.allows(3_000, NOW_MS + 10_000));
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
    machine.advice_withdrawn().unwrap();
    assert_eq!(machine.phase(), Phase::Running);
    assert_eq!(machine.advice_withdrawn(), None);

    machine.advised().unwrap();
    machine.noticed(NOW_MS + 8_000, NOW_MS).unwrap();
    assert_eq!(machine.advice_withdrawn(), None, "the notice stands");
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
    AdviceWithdrawn,
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
        Just(Said::AdviceWithdrawn),
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
        (from, Noticed { deadline_ms }) if chosen(from) => from.deadline_ms() > Some(deadline_ms),
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
                Said::AdviceWithdrawn => machine.advice_withdrawn(),
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
        let transition = machine.choose(&facts).expect("there is a notice");
        let chosen = transition.to;
        let budget = Budget::until(deadline_ms, facts.now_ms, facts.lag_ms);
        prop_assert_eq!(transition.usable_ms, Some(budget.usable_ms), "what there was is recorded");
        prop_assert!(budget.usable_ms + MARGIN_MIN_MS <= budget.left_ms.max(MARGIN_MIN_MS));
        let alone_ms = facts.needed_ms(facts.savers);
        let soonest_ms = facts.running_ms.unwrap_or(alone_ms);
        match chosen {
            Phase::Handoff { .. } => prop_assert!(facts.survivors > 0),
            Phase::SaveSolo { .. } => prop_assert!(soonest_ms <= budget.usable_ms && facts.savers <= 1),
            Phase::SaveShared { .. } => prop_assert!(soonest_ms <= budget.usable_ms && facts.savers > 1),
            Phase::Abandon { .. } => {
                prop_assert!(soonest_ms > budget.usable_ms && facts.survivors == 0);
                prop_assert!(transition.needed_ms > transition.usable_ms, "and what was needed");
            }
            other => prop_assert!(false, "{}", other),
        }
        if machine.begins_new_save(&facts) {
            prop_assert!(facts.running_ms.unwrap_or(0).saturating_add(alone_ms) <= budget.usable_ms);
        }
    }
}
