use super::*;
use crate::drift::MonitorConfig;
use crate::drift::statistics::testing::Lcg;
use crate::registry::version_file::tests::digits;
use crate::serving::feed::ObservedRequest;
use crate::training::data::Dataset;
use crate::training::model::Model;
use crate::training::models::ModelSpec;

const FEATURES: usize = 64;

fn monitor_of(file: &VersionFile) -> (VitalsMonitor, Sentinels) {
    let window = WindowMonitor::new(
        digits(200).build_reference().unwrap(),
        MonitorConfig::with_window_size(100),
    )
    .unwrap();
    let sentinels = Sentinels::of(file);
    (VitalsMonitor::new(file, &sentinels, &Ok(window)), sentinels)
}

fn monitor() -> VitalsMonitor {
    monitor_of(&digits(200)).0
}

fn request(id: Option<&str>, slice: Option<&str>, rows: u32) -> ObservedRequest {
    ObservedRequest {
        id: id.map(str::to_owned),
        slice: slice.map(str::to_owned),
        rows,
    }
}

/// One row, answered as `class` with this confidence.
fn answered(request: ObservedRequest, class: u32, confidence: f32) -> Observation {
    Observation {
        rows: vec![0.5; FEATURES],
        classes: vec![class],
        confidences: vec![confidence],
        requests: vec![request],
        energies: vec![None],
        versions: vec![1],
    }
}

fn label(id: &str, class: u32) -> Label {
    Label {
        id: id.to_owned(),
        row: 0,
        truth: Truth::Class(class),
    }
}

#[test]
fn labels_give_accuracy_and_calibration_and_without_them_there_is_neither() {
    let mut monitor = monitor();
    for number in 0..10 {
        let request = request(Some(&number.to_string()), None, 1);
        monitor.observe(&answered(request, 3, 0.9), 1, false);
    }
    let truth = monitor.vitals().truth;
    assert_eq!((truth.total, truth.predictions_waiting), (None, 10));
    let labels: Vec<Label> = (0..10)
        .map(|number| label(&number.to_string(), if number < 6 { 3 } else { 4 }))
        .collect();
    let reply = monitor.label(&labels, 2);
    assert_eq!((reply.joined, reply.waiting, reply.refused), (10, 0, 0));
    let truth = monitor.vitals().truth;
    let total = truth.total.unwrap();
    assert_eq!((total.samples, total.accuracy), (10, 0.6));
    assert!((total.calibration_error - 0.3).abs() < 1e-6, "{total:?}");
    assert_eq!(truth.trained_accuracy, Some(0.97));
    assert_eq!((truth.windows, truth.window), (0, None));
}

#[test]
fn labels_may_name_classes_and_rows_and_those_of_no_class_are_refused() {
    let mut monitor = monitor();
    let three = Observation {
        rows: vec![0.5; 3 * FEATURES],
        classes: vec![1, 2, 3],
        confidences: vec![0.9; 3],
        requests: vec![request(None, None, 1), request(Some("a"), None, 2)],
        energies: vec![None; 3],
        versions: vec![1; 2],
    };
    monitor.observe(&three, 1, false);
    let of = |row, truth| Label {
        id: "a".to_owned(),
        row,
        truth,
    };
    let reply = monitor.label(
        &[
            of(1, Truth::Name("3".to_owned())),
            of(0, Truth::Class(10)),
            of(0, Truth::Name("ten".to_owned())),
        ],
        2,
    );
    assert_eq!((reply.joined, reply.refused), (1, 2));
    assert_eq!(
        reply.refusal.unwrap(),
        "class 10 of request \"a\" is none of this version's 10 classes"
    );
    let truth = monitor.vitals().truth;
    // The second row of the request was predicted as 3.
    assert_eq!(truth.total.unwrap().accuracy, 1.0);
    assert_eq!((truth.rows_without_id, truth.labels_refused), (1, 2));
}

#[test]
fn a_version_that_is_wrong_more_often_is_concept_drift_once() {
    let (mut monitor, mut random) = (monitor(), Lcg::new(1));
    let mut found = Vec::new();
    for number in 0..3000 {
        let wrong = random.next_unit() < if number < 1500 { 0.05 } else { 0.5 };
        let id = number.to_string();
        monitor.observe(
            &answered(request(Some(&id), None, 1), 3, 0.9),
            number,
            false,
        );
        monitor.label(&[label(&id, if wrong { 4 } else { 3 })], number);
        let (_, signals, lost) = monitor.take_news(number).unwrap();
        assert_eq!(lost, 0);
        found.extend(signals.into_iter().map(|signal| (number, signal)));
    }
    let [(number, signal)] = found.as_slice() else {
        panic!("{found:?}");
    };
    assert!((1500..1600).contains(number), "at {number}");
    let Signal::Stream {
        stream: Stream::Errors,
        change,
        ..
    } = signal
    else {
        panic!("{signal:?}");
    };
    assert!(signal.is_concept_drift(), "{signal:?}");
    assert!(change.before < 0.1 && change.after > 0.4, "{change:?}");
    let truth = monitor.vitals().truth;
    assert_eq!(truth.windows, 15);
    assert!(truth.window.unwrap().accuracy < 0.6);
}

#[test]
fn confidence_that_falls_is_found_without_labels() {
    let (mut monitor, mut random) = (monitor(), Lcg::new(2));
    for number in 0..2000 {
        let sure = if number < 1000 { 0.9 } else { 0.5 };
        let confidence = sure + 0.1 * random.next_unit() as f32;
        monitor.observe(
            &answered(request(None, None, 1), 3, confidence),
            number,
            false,
        );
    }
    let (vitals, signals, _) = monitor.take_news(2000).unwrap();
    let is_of_confidence = |signal: &Signal| {
        matches!(signal, Signal::Stream { stream: Stream::Confidence, change, .. }
            if change.after < change.before)
    };
    assert!(signals.iter().any(is_of_confidence), "{signals:?}");
    assert!(!signals.iter().any(Signal::is_concept_drift));
    assert_eq!(vitals.rows, 2000);
    assert_eq!(vitals.truth.rows_without_id, 2000);
    assert!((vitals.confidence_mean.unwrap() - 0.75).abs() < 0.01);
    assert_eq!(monitor.take_news(2001), None);
}

#[test]
fn a_version_without_a_reference_is_watched_as_far_as_that_goes() {
    let mut bare = digits(200);
    bare.reference.columns.clear();
    bare.reference.predictions.clear();
    let sentinels = Sentinels::of(&bare);
    assert_eq!(sentinels.count(), 0);
    let mut monitor = VitalsMonitor::new(&bare, &sentinels, &Err("no rows".to_owned()));
    for number in 0..500 {
        let id = number.to_string();
        let request = request(Some(&id), Some("north"), 1);
        assert_eq!(monitor.observe(&answered(request, 3, 0.2), 1, false), 0);
        monitor.label(&[label(&id, 3)], 2);
    }
    let (vitals, signals, _) = monitor.take_news(3).unwrap();
    assert_eq!(signals, []);
    let out = &vitals.out_of_distribution;
    assert!(
        out.no_reference
            .as_ref()
            .unwrap()
            .contains("no reference rows")
    );
    assert_eq!((out.windows, out.last), (0, None));
    let by_energy = &vitals.out_of_distribution_by_energy;
    assert_eq!(by_energy.no_reference, out.no_reference);
    assert_eq!(vitals.sentinels.sentinels, 0);
    assert_eq!(vitals.truth.total.unwrap().accuracy, 1.0);
    assert_eq!(vitals.no_reference.as_deref(), Some("no rows"));
    let slice = &vitals.slices[0];
    assert_eq!((slice.rows, slice.windows, slice.labelled), (500, 0, 500));
}

#[test]
fn while_windows_rest_only_those_of_slices_stand_still() {
    let mut monitor = monitor();
    let mut compared = |ids: std::ops::Range<u32>, windows_rest| -> u64 {
        ids.map(|number| {
            let id = number.to_string();
            let request = request(Some(&id), Some("north"), 1);
            let compared = monitor.observe(&answered(request, 3, 0.9), 1, windows_rest);
            monitor.label(&[label(&id, 3)], 2);
            compared
        })
        .sum()
    };
    assert_eq!(compared(0..300, true), 0);
    assert_eq!(compared(300..400, false), 1);
    let vitals = monitor.vitals();
    assert_eq!((vitals.rows, vitals.no_reference), (400, None));
    assert_eq!(vitals.out_of_distribution.windows, 2);
    assert_eq!(vitals.truth.total.unwrap().samples, 400);
    let slice = &vitals.slices[0];
    assert_eq!((slice.rows, slice.dropped, slice.windows), (400, 300, 1));
    assert_eq!(slice.labelled, 400);
}

#[test]
fn rows_that_the_version_does_not_know_are_out_of_distribution_once() {
    let (mut monitor, _) = monitor_of(&digits(1000));
    for _ in 0..600 {
        monitor.observe(&answered(request(None, None, 1), 3, 0.01), 1, false);
    }
    let (vitals, signals, _) = monitor.take_news(2).unwrap();
    let found: Vec<&Signal> = signals
        .iter()
        .filter(|signal| matches!(signal, Signal::OutOfDistribution(_)))
        .collect();
    assert_eq!(found.len(), 1, "{signals:?}");
    let out = vitals.out_of_distribution;
    assert_eq!(out.windows, 3);
    assert!(out.is_out());
    // Of logits that nobody saw there is no energy.
    let by_energy = vitals.out_of_distribution_by_energy;
    assert_eq!((by_energy.windows, by_energy.no_reference), (0, None));
    assert_eq!(vitals.rows_without_energy, 600);
}

/// A version of one layer, all of whose logits fall by 8 where the corner pixel is lit, which is dark in each image.
fn version_without_a_corner() -> VersionFile {
    let mut file = digits(1000);
    file.model = ModelSpec::Mlp { hidden: Vec::new() };
    let model = Model::new(&file.model, &file.samples, 7).unwrap();
    let weights = model.layout().slot("dense.0.weight").unwrap();
    assert_eq!(weights.shape, [FEATURES, 10]);
    file.parameters = model.flat().to_vec();
    // The corner is the first row of the weights, which has a weight for each class.
    file.parameters[weights.range()][..10].fill(-8.0);
    file
}

#[test]
fn rows_far_out_are_found_by_energy_though_the_version_is_as_sure_as_ever() {
    let file = version_without_a_corner();
    let model = file.build_model().unwrap();
    let reference = confidence::reference_rows(&file);
    let (mut monitor, _) = monitor_of(&file);
    // A window of 200 of the 1000 reference rows, with this much light in the corner.
    let mut window = |corner: f32| {
        for image in reference.chunks(FEATURES).step_by(5) {
            assert_eq!(image[0], 0.0);
            let mut row = image.to_vec();
            row[0] = corner;
            let said = model.classify(&row).unwrap();
            let class = said.classes[0];
            let sure = said.probabilities[class as usize];
            let observation = Observation {
                rows: row,
                energies: vec![Some(said.energies[0])],
                ..answered(request(None, None, 1), class, sure)
            };
            monitor.observe(&observation, 1, false);
        }
        let (vitals, mut signals, _) = monitor.take_news(1).unwrap();
        signals.retain(|signal| !matches!(signal, Signal::Stream { .. }));
        (vitals, signals)
    };

    let (vitals, signals) = window(0.0);
    assert_eq!((signals, vitals.rows_without_energy), (Vec::new(), 0));
    let dark = vitals.out_of_distribution.last.unwrap();
    let by_energy = vitals.out_of_distribution_by_energy;
    assert!(
        by_energy.windows == 1 && !by_energy.is_out(),
        "{by_energy:?}"
    );

    // Softmax takes away what all logits lose, so that each probability stays as it is.
    let (vitals, signals) = window(1.0);
    let lit = vitals.out_of_distribution.last.unwrap();
    assert!(!lit.is_out, "{lit:?}");
    assert!((lit.window_mean - dark.window_mean).abs() < 1e-5, "{lit:?}");
    let found = vitals.out_of_distribution_by_energy.last.unwrap();
    assert!(found.is_out && found.tail_share == 1.0, "{found:?}");
    let grew = found.window_mean - found.reference_mean;
    assert!((grew - 8.0).abs() < 0.2, "{found:?}");
    assert_eq!(signals, [Signal::OutOfDistributionByEnergy(found)]);

    // It goes on, and is no news.
    assert_eq!(window(1.0).1, []);
}

#[test]
fn slices_are_told_apart_in_windows_and_in_labels() {
    let mut monitor = monitor();
    let held_out = Dataset::digits().unwrap().split(7, 0.2).held_out;
    let images = held_out.all().unwrap();
    for (number, image) in images.features().chunks(FEATURES).take(300).enumerate() {
        let is_north = number % 2 == 0;
        let row: Vec<f32> = image
            .iter()
            .map(|pixel| if is_north { 1.0 - pixel } else { *pixel })
            .collect();
        let (id, slice) = (number.to_string(), if is_north { "north" } else { "south" });
        let observation = Observation {
            rows: row,
            classes: vec![(number / 2 % 10) as u32],
            confidences: vec![0.9],
            requests: vec![request(Some(&id), Some(slice), 1)],
            energies: vec![None],
            versions: vec![1],
        };
        monitor.observe(&observation, 1, false);
        let truth = if is_north {
            11
        } else {
            (number / 2 % 10) as u32
        };
        monitor.label(&[label(&id, truth.min(9))], 2);
    }
    let (vitals, signals, _) = monitor.take_news(3).unwrap();
    let drifting: Vec<&str> = vitals
        .slices
        .iter()
        .filter(|slice| slice.features_drifted * 2 > slice.features_compared)
        .map(|slice| slice.name.as_str())
        .collect();
    assert_eq!(drifting, ["north"]);
    assert!(vitals.slices[0].accuracy < vitals.slices[1].accuracy);
    let is_north =
        |signal: &Signal| matches!(signal, Signal::Slice { slice, .. } if slice == "north");
    assert_eq!(signals.iter().filter(|signal| is_north(signal)).count(), 1);
}

#[test]
fn a_replica_that_answers_wrongly_is_named_once_until_it_is_right_again() {
    let file = digits(50);
    let (mut monitor, sentinels) = monitor_of(&file);
    let right = file
        .build_model()
        .unwrap()
        .predictions(sentinels.rows())
        .unwrap();
    let mut wrong = right.clone();
    wrong[2] = (wrong[2] + 1) % 10;
    let mut rounds = |answers: &[u32]| {
        monitor.sentinel_answered(&sentinels, 1, Some(&right));
        monitor.sentinel_answered(&sentinels, 2, Some(answers));
        monitor.sentinel_answered(&sentinels, 3, None);
        monitor.sentinel_round_ended(3);
        monitor
            .take_news(1)
            .map_or(Vec::new(), |(_, signals, _)| signals)
    };
    assert_eq!(rounds(&right), []);
    let found = rounds(&wrong);
    let [Signal::Sentinel(mismatch)] = found.as_slice() else {
        panic!("{found:?}");
    };
    assert_eq!((mismatch.replica, mismatch.sentinel), (2, 2));
    assert_eq!(mismatch.expected, right[2]);
    assert_eq!(rounds(&wrong), []);
    assert_eq!(rounds(&right), []);
    assert_eq!(rounds(&wrong).len(), 1);
    let status = monitor.vitals().sentinels;
    assert_eq!((status.rounds, status.right, status.wrong), (5, 7, 3));
    assert_eq!((status.unanswered, status.replicas_wrong), (5, 1));
}

#[test]
fn signals_that_nobody_takes_are_bounded_and_counted() {
    let mut monitor = monitor();
    for number in 0..SIGNALS_MAX as u32 + 9 {
        monitor.raise(Signal::Sentinel(sentinels::Mismatch {
            replica: number,
            sentinel: 0,
            expected: 1,
            answered: None,
        }));
    }
    monitor.has_news = true;
    let (_, signals, lost) = monitor.take_news(1).unwrap();
    assert_eq!((signals.len(), lost), (SIGNALS_MAX, 9));
}
