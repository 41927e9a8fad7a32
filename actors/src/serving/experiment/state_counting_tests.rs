//! Who may say what an experiment has counted, and what becomes of that when another router takes over.

use super::*;

const NEXT: Incarnation = Incarnation(901);

fn report_of(router: Incarnation, uncounted: u64) -> Command {
    Command::Report {
        endpoint: "digits".into(),
        experiment: 1,
        router,
        findings: Findings {
            uncounted,
            ..findings(Decision::Undecided)
        },
        stored: STORED,
    }
}

#[test]
fn only_the_newest_router_counts_and_goes_on_with_what_was_stored() {
    let mut head = Head::new();
    head.say(start(2)).unwrap();
    // Who has not said that it counts has nothing to say.
    for early in [report(1, ROUTER), count_anew(1, 0, ROUTER)] {
        assert_eq!(head.say(early).unwrap_err().code, ErrorCode::Fenced);
    }
    head.say(count(1, ROUTER)).unwrap();
    let begun = head.say(count(1, ROUTER)).unwrap();
    assert_eq!(
        (begun.counts, begun.counting, begun.stored),
        (1, Some(ROUTER), None)
    );
    head.say(report_of(ROUTER, 20)).unwrap();
    let first = head.now();
    assert_eq!(first.stored, Some(STORED));
    assert!((first.alpha() - 0.025).abs() < 1e-12);

    head.router(NEXT);
    for late in [
        count(1, ROUTER),
        report_of(ROUTER, 30),
        count_anew(1, 1, ROUTER),
        conclude(1, ROUTER, Ending::Decided, Decision::Treatment),
    ] {
        assert_eq!(head.say(late).unwrap_err().code, ErrorCode::Fenced);
    }
    // A router that has not said so yet does not count, though it is the newest.
    assert_eq!(
        head.say(report_of(NEXT, 30)).unwrap_err().code,
        ErrorCode::Fenced
    );
    let second = head.say(count(1, NEXT)).unwrap();
    let expected = Experiment {
        counting: Some(NEXT),
        ..first
    };
    assert_eq!(second, expected);
    // It knows what was counted, so it has no less.
    assert_eq!(
        head.say(report_of(NEXT, 19)).unwrap_err().code,
        ErrorCode::Fenced
    );
    head.say(report_of(NEXT, 21)).unwrap();

    let other = head.say(conclude(2, NEXT, Ending::Decided, Decision::Treatment));
    assert_eq!(other.unwrap_err().code, ErrorCode::Fenced);
    let over = head
        .say(conclude(1, NEXT, Ending::Decided, Decision::Treatment))
        .unwrap();
    assert_eq!((over.ending, over.stored), (Some(Ending::Decided), None));
    // The version is whose it was: an experiment promotes nothing.
    assert_eq!(
        find_endpoint(&head.applied.tables, "digits")
            .unwrap()
            .version,
        1
    );
    let late = head.say(report(1, NEXT)).unwrap_err();
    assert_eq!(late.code, ErrorCode::Fenced);
}

#[test]
fn a_count_that_is_lost_begins_anew_with_half_of_what_is_left() {
    let mut head = Head::new();
    head.say(start(2)).unwrap();
    head.say(count(1, ROUTER)).unwrap();
    head.say(report_of(ROUTER, 20)).unwrap();
    head.router(NEXT);
    head.say(count(1, NEXT)).unwrap();
    let second = head.say(count_anew(1, 1, NEXT)).unwrap();
    assert_eq!(
        (second.counts, second.counting, &second.findings),
        (2, Some(NEXT), &None)
    );
    assert_eq!((second.reported_ms, second.stored), (None, None));
    assert!((second.alpha() - 0.0125).abs() < 1e-12);
    // What is said twice gives no second count up.
    head.say(report_of(NEXT, 5)).unwrap();
    let again = head.say(count_anew(1, 1, NEXT)).unwrap_err();
    assert_eq!(again.code, ErrorCode::Fenced);
    assert!(again.message.contains("count 2 is under way"), "{again}");
    assert!(head.now().findings.is_some());

    // And what all counts may have together is what the plan says.
    let all: f64 = (1..60)
        .map(|counts| {
            Experiment {
                counts,
                ..second.clone()
            }
            .alpha()
        })
        .sum();
    assert!(all <= 0.05 && all > 0.0499, "{all}");
    let many = Experiment {
        counts: u32::MAX,
        ..second
    };
    assert!(many.alpha() > 0.0);
}

#[test]
fn a_router_decides_nothing_that_it_has_not_found() {
    let mut head = Head::new();
    head.say(start(2)).unwrap();
    head.say(count(1, ROUTER)).unwrap();
    for (ending, decision) in [
        (Ending::Decided, Decision::Undecided),
        (Ending::Stopped, Decision::Control),
    ] {
        let refused = head.say(conclude(1, ROUTER, ending, decision)).unwrap_err();
        assert_eq!(refused.code, ErrorCode::InvalidArgument);
    }
    let long = Command::Report {
        endpoint: "digits".into(),
        experiment: 1,
        router: ROUTER,
        findings: Findings::because("x".repeat(1_000)),
        stored: STORED,
    };
    assert!(head.say(long).unwrap_err().message.contains("too long"));
    assert!(head.now().is_open());
}

#[test]
fn numbers_that_arrive_late_take_no_newer_ones_place() {
    let mut head = Head::new();
    head.say(start(2)).unwrap();
    head.say(count(1, ROUTER)).unwrap();
    for known in [10, 20, 20] {
        head.say(report_of(ROUTER, known)).unwrap();
    }
    let late = head.say(report_of(ROUTER, 10)).unwrap_err();
    assert_eq!(late.code, ErrorCode::Fenced);
    assert!(late.message.contains("a report of 10 keys"), "{late}");
    assert_eq!(head.now().findings.unwrap().counted(), 20);

    // Whoever begins anew begins with nothing, and may end it with less.
    head.router(NEXT);
    head.say(count(1, NEXT)).unwrap();
    head.say(count_anew(1, 1, NEXT)).unwrap();
    head.say(report_of(NEXT, 5)).unwrap();
    let unfit = conclude(1, NEXT, Ending::Unfit, Decision::Control);
    assert_eq!(head.say(unfit).unwrap().ending, Some(Ending::Unfit));
}
