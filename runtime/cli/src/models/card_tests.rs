use mobula_actors::registry::provenance::Provenance;
use mobula_actors::registry::stages::{Stage, Standing};
use mobula_actors::registry::state::{ModelVersion, NewVersion};
use mobula_actors::serving::experiment::findings::{
    Decision as Choice, Findings, Interval, Measured, Values,
};
use mobula_actors::serving::experiment::plan::Ending;
use mobula_actors::serving::experiment::{Direction, Measure, Metric, Plan};
use mobula_actors::serving::rollout::plan::{Cleanup, Decision, Phase, Served};
use mobula_actors::serving::rollout::trial::Evidence;
use mobula_actors::serving::rollout::{Guardrails, Strategy};

use super::*;

fn version() -> VersionView {
    let tags = [("owner", "vision | team"), ("tier", "1")];
    let tags = tags.map(|(tag, value)| (tag.to_owned(), value.to_owned()));
    VersionView {
        version: ModelVersion {
            version: 2,
            registered_ms: 1_800_000_000_000,
            description: NewVersion {
                model: "digits".into(),
                digest: "d".repeat(64),
                size_bytes: 7,
                weights_blake3: "e".repeat(64),
                dataset_blake3: "f".repeat(64),
                job: 5,
                metrics: [("accuracy".to_owned(), 0.96)].into(),
                training_json: "{\"seed\":7}".into(),
            },
        },
        standing: Standing {
            stage: Stage::Staging,
            since_ms: 1_800_000_060_000,
            was_production: false,
            tags: tags.into(),
        },
        provenance: Some(Provenance {
            seed: Some(7),
            ..Provenance::default()
        }),
        aliases: vec!["champion".into()],
        endpoints: Vec::new(),
    }
}

fn rollout() -> Rollout {
    let served = |version| Served {
        version,
        digest: "d".repeat(64),
        size_bytes: 7,
    };
    Rollout {
        endpoint: "front".into(),
        number: 3,
        strategy: Strategy::Canary,
        stable: served(1),
        candidate: served(2),
        steps: vec![5, 100],
        step: 0,
        phase: Phase::RolledBack,
        guardrails: Guardrails::STANDARD,
        min_samples: 200,
        started_ms: 0,
        revision: 9,
        cleanup: Cleanup::Done,
        decisions: vec![Decision {
            at_ms: 1_800_000_120_000,
            step: 0,
            action: Action::RollBack,
            evidence: Some(Evidence {
                reason: "worse than the stable version: errors\n| and more".into(),
                candidate: SideEvidence {
                    requests: 300,
                    errors: 40,
                    latency_p95_us: 900,
                    ..SideEvidence::default()
                },
                ..Evidence::default()
            }),
        }],
        replica_wait_max_ms: 0,
    }
}

/// An experiment in which version 2 was compared with 1.
fn experiment() -> Experiment {
    let served = |version| Served {
        version,
        digest: "d".repeat(64),
        size_bytes: 7,
    };
    let values = |mean| Values {
        count: 500,
        mean,
        deviation: 1.0,
    };
    Experiment {
        number: 4,
        plan: Plan {
            endpoint: "front".into(),
            model: "digits".into(),
            control: served(1),
            treatment: served(2),
            control_share_bp: 5_000,
            treatment_share_bp: 5_000,
            seed: "s".into(),
            primary: Metric {
                measure: Measure::Latency,
                direction: Direction::Down,
            },
            effect_min: 0.1,
            guardrails: Vec::new(),
            alpha_bp: 500,
            samples_max: 1_000,
        },
        started_ms: 1_800_000_000_000,
        ended_ms: Some(1_800_000_180_000),
        ending: Some(Ending::Decided),
        revision: 9,
        cleanup: Cleanup::Done,
        counts: 1,
        counting: None,
        reported_ms: None,
        findings: Some(Findings {
            decision: Choice::Treatment,
            reason: "the treatment is better |\nby enough".into(),
            measured: vec![Measured {
                measure: Measure::Latency,
                control: values(2_000.0),
                treatment: values(1_500.0),
                effect: Some(Interval {
                    estimate: -0.25,
                    lower: -0.3,
                    upper: -0.2,
                }),
            }],
            ..Findings::default()
        }),
        stored: None,
    }
}

/// Every cell of a table in one line, of as many cells as its header.
fn check_tables(text: &str) {
    let mut columns = None;
    for line in text.lines() {
        if !line.starts_with('|') {
            columns = None;
            continue;
        }
        let cells = line.replace("\\|", "").matches('|').count();
        assert_eq!(*columns.get_or_insert(cells), cells, "{line}");
    }
}

#[test]
fn a_card_says_what_is_known_and_names_what_is_not() {
    let finding = Finding {
        check: "promotion",
        ok: false,
        detail: "the key ab is revoked".into(),
    };
    let text = Card {
        version: &version(),
        findings: &[finding],
        rollouts: &[rollout()],
        experiments: &[experiment()],
    }
    .render();
    check_tables(&text);
    for said in [
        "# digits:2\n",
        "## Owner\n\nvision | team\n",
        "## Not said\n\ndescription, license, intended-use, limitations. Say it with",
        "| stage | staging since 2027-01-15T08:01:00Z |",
        "| tags | tier=1 |",
        "| accuracy | 0.9600 |",
        "| seed | 7 |",
        "Not known, and needed for production: ",
        "| promotion | **wrong** | the key ab is revoked |",
        "| front 3 | 2027-01-15T08:02:00Z | 5 % | rolled back | worse than the stable version: errors \\| and more; \
         candidate 300 requests, 40 errors, p95 900 µs; baseline 0 requests",
        "| front 4 | 2027-01-15T08:03:00Z | 2 against 1 by latency:down | decided | treatment | the treatment is better \\| by \
         enough; latency: control 2.00 ms of 500, treatment 1.50 ms of 500, difference -25.00 % (-30.00 % to -20.00 %) |",
    ] {
        assert!(text.contains(said), "{said} in:\n{text}");
    }
}

#[test]
fn a_version_without_rollouts_or_metrics_has_a_card() {
    let mut version = version();
    version.version.description.metrics.clear();
    version.provenance = None;
    let text = Card {
        version: &version,
        findings: &[],
        rollouts: &[],
        experiments: &[],
    }
    .render();
    check_tables(&text);
    assert!(text.contains("None were measured."));
    for heading in ["Rollouts", "Experiments"] {
        let said = format!("## {heading}\n\nNone that is kept.\n");
        assert!(text.contains(&said), "{text}");
    }
}
