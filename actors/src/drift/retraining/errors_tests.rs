//! Wrong answers that are a drift event, and which of them begin another retraining: those that labels confirm after the end of the
//! last one, and neither traffic nor a monitor that has been started again.

use mobula_core::codec;
use mobula_core::control::ModuleId;

use super::plan::{Mode, Phase};
use super::world::World;
use crate::drift::growth::LABELS_TO_CONFIRM;
use crate::drift::signals::tests::{stream, vitals_of};
use crate::drift::signals::{Signal, Stream, VitalsReport};
use crate::drift::state::Command as DriftCommand;
use crate::drift::vitals::calibration::Reliability;

/// The cooldown of the worlds here.
const COOLDOWN_MS: u64 = 1_000;

/// A world whose endpoint has a monitor that is told labels.
struct Watched {
    world: World,
    incarnation: u64,
    sequence: u64,
    rows: u64,
    labels: u64,
    wrong: u64,
}

impl Watched {
    fn new() -> Self {
        Watched {
            world: World::new(Mode::Auto),
            incarnation: 1,
            sequence: 0,
            rows: 0,
            labels: 0,
            wrong: 0,
        }
    }

    /// The monitor is started again: it knows nothing of what was before.
    fn restart(&mut self) {
        self.incarnation += 1;
        (self.sequence, self.rows, self.labels, self.wrong) = (0, 0, 0, 0);
    }

    fn report(&mut self, signals: Vec<Signal>) {
        self.sequence += 1;
        let mut vitals = vitals_of(self.rows);
        vitals.truth.total = (self.labels > 0).then(|| Reliability {
            samples: self.labels,
            accuracy: (self.labels - self.wrong) as f64 / self.labels as f64,
            calibration_error: 0.0,
            bins: Vec::new(),
        });
        let report = VitalsReport {
            endpoint: "digits".into(),
            model: "digits".into(),
            version: self.world.active(),
            incarnation: self.incarnation,
            sequence: self.sequence,
            vitals,
            signals,
            signals_lost: 0,
        };
        let command = DriftCommand::Vitals(Box::new(report));
        self.world
            .apply(ModuleId::DRIFT, &codec::encode_plain(&command))
            .unwrap();
    }

    /// Requests are answered, and nobody says how well.
    fn traffic(&mut self) {
        self.rows += 1_000;
        self.report(Vec::new());
        self.world.settle();
    }

    /// So many labels come, so many of them of wrong answers.
    fn labelled(&mut self, labels: u64, wrong: u64) {
        self.rows += labels;
        self.labels += labels;
        self.wrong += wrong;
        self.report(Vec::new());
        self.world.settle();
    }

    /// The monitor finds that half of the answers are wrong, where a tenth was.
    fn grow(&mut self) {
        self.rows += 1_000;
        self.labels += 1_000;
        self.wrong += 150;
        self.report(vec![stream(Stream::Errors, 0.1, 0.5)]);
        self.world.settle();
    }

    /// The job of the retraining that is under way fails, a moment later.
    fn fail(&mut self) {
        self.world.pass(10);
        let job = self.world.newest().job.unwrap();
        self.world.fail_job(job, "no luck");
        self.world.settle();
        assert_eq!(self.world.newest().phase, Phase::Failed);
    }

    /// The newest retraining, and the event that led to it.
    fn newest(&self) -> (u64, u64) {
        let newest = self.world.newest();
        (newest.number, newest.event)
    }
}

#[test]
fn traffic_without_labels_after_errors_grew_begins_no_other_retraining() {
    let mut watched = Watched::new();
    watched.grow();
    watched.fail();
    for _ in 0..100 {
        watched.world.pass(COOLDOWN_MS);
        watched.traffic();
    }
    assert_eq!(watched.newest(), (1, 1));
    assert_eq!(watched.world.job_count(), 1);
    // Nor do a few labels.
    watched.labelled(LABELS_TO_CONFIRM - 1, LABELS_TO_CONFIRM - 1);
    assert_eq!(watched.world.job_count(), 1);
}

#[test]
fn a_monitor_that_is_started_again_confirms_only_what_it_finds_itself() {
    let mut watched = Watched::new();
    watched.grow();
    watched.fail();
    // Errors are as few as before, which the next start cannot know.
    watched.restart();
    for _ in 0..100 {
        watched.world.pass(COOLDOWN_MS);
        watched.labelled(1_000, 100);
        watched.traffic();
    }
    watched.labelled(100_000, 90_000);
    assert_eq!((watched.newest(), watched.world.job_count()), ((1, 1), 1));
    watched.grow();
    assert_eq!((watched.newest(), watched.world.job_count()), ((2, 1), 2));
}

#[test]
fn labels_that_stay_bad_begin_another_retraining_after_the_cooldown() {
    let mut watched = Watched::new();
    watched.grow();
    watched.fail();
    watched.labelled(LABELS_TO_CONFIRM, LABELS_TO_CONFIRM / 2);
    assert_eq!(watched.newest(), (1, 1));
    watched.world.pass(COOLDOWN_MS);
    watched.world.settle();
    assert_eq!((watched.newest(), watched.world.job_count()), ((2, 1), 2));
    // They are as few as before from then on, and no detector has found that yet.
    watched.fail();
    for _ in 0..100 {
        watched.world.pass(COOLDOWN_MS);
        watched.labelled(LABELS_TO_CONFIRM, LABELS_TO_CONFIRM / 10);
    }
    assert_eq!((watched.newest(), watched.world.job_count()), ((2, 1), 2));
    watched.labelled(LABELS_TO_CONFIRM, LABELS_TO_CONFIRM / 2);
    assert_eq!((watched.newest(), watched.world.job_count()), ((3, 1), 3));
}
