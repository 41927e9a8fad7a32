use super::*;
use crate::training::data::{Batch, Dataset, Samples};
use crate::training::models::check_gradients;
use crate::training::trainable::ShardContext;

fn mlp() -> ModelSpec {
    ModelSpec::Mlp {
        hidden: vec![12, 8],
    }
}

fn cnn() -> ModelSpec {
    ModelSpec::Cnn {
        channels: vec![3, 5],
    }
}

fn digits() -> SampleShape {
    SampleShape::Classified {
        features: vec![8, 8],
        classes: 10,
    }
}

fn samples(count: usize) -> Batch {
    let indices: Vec<usize> = (0..count).collect();
    Dataset::digits().unwrap().gather(&indices).unwrap()
}

/// Numbers of all sizes, and classes that differ.
fn made_up(shape: &SampleShape, count: usize) -> Batch {
    let width = shape.feature_count();
    let features = (0..count * width)
        .map(|index| ((index * 37 % 101) as f32 - 50.0) / 40.0)
        .collect();
    let outputs = shape.output_count();
    let samples = match shape {
        SampleShape::Classified { .. } => Samples::Classified {
            features,
            labels: (0..count).map(|row| (row * 7 % outputs) as u32).collect(),
        },
        SampleShape::Measured { .. } => Samples::Measured {
            features,
            targets: (0..count * outputs).map(|i| (i % 5) as f32 - 2.0).collect(),
        },
        SampleShape::Tokens { .. } => panic!("no numbers"),
    };
    Batch { count, samples }
}

#[test]
fn gradients_match_differences_of_the_loss_for_all_kinds_of_samples() {
    let classified = |features: &[usize], classes| SampleShape::Classified {
        features: features.to_vec(),
        classes,
    };
    for (spec, shape) in [
        (mlp(), digits()),
        (mlp(), classified(&[5], 2)),
        (
            mlp(),
            SampleShape::Measured {
                features: vec![6],
                targets: 3,
            },
        ),
        (cnn(), digits()),
        (cnn(), classified(&[5, 7, 2], 4)),
    ] {
        let batch = made_up(&shape, 6);
        check_gradients(&*spec.build(&shape).unwrap(), &batch);
    }
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    let batch = samples(300);
    let images = batch.features();
    for spec in [mlp(), cnn()] {
        let model = Model::new(&spec, &digits(), 3).unwrap();
        let together = model.outputs(images).unwrap();
        for index in [0, 7, 255, 256, 299] {
            let alone = model.outputs(&images[index * 64..][..64]).unwrap();
            assert_eq!(alone, together[index * 10..][..10]);
        }
        let probabilities = model.probabilities(&images[..64]).unwrap();
        assert!((probabilities.iter().sum::<f32>() - 1.0).abs() < 1e-6);

        let said = model.classify(images).unwrap();
        assert_eq!(said.probabilities, model.probabilities(images).unwrap());
        assert_eq!(said.classes, model.predictions(images).unwrap());
        for (scores, energy) in together.chunks_exact(10).zip(&said.energies) {
            let sum: f64 = scores.iter().map(|score| f64::from(*score).exp()).sum();
            assert!((f64::from(*energy) + sum.ln()).abs() < 1e-5);
        }
    }
}

/// What is prepared for being asked changes no bit of what training measures.
#[test]
fn a_model_that_is_asked_has_the_bits_of_the_one_that_is_trained() {
    let batch = samples(70);
    for spec in [mlp(), cnn()] {
        let model = Model::new(&spec, &digits(), 3).unwrap();
        let network = spec.build(&digits()).unwrap();
        let layout = Arc::new(Layout::of(&network.parameters()));
        let trained = Parameters::new(layout, model.flat()).unwrap();
        for rows in [1, 5, 70] {
            let images = &batch.features()[..rows * 64];
            let expected = network.outputs(&trained, images).unwrap();
            let found = model.outputs(images).unwrap();
            let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&found), bits(&expected));
        }
    }
}

#[test]
fn parameters_survive_flattening_and_wrong_sizes_are_refused() {
    let model = Model::new(&cnn(), &digits(), 3).unwrap();
    let flat = model.flat();
    let again = Model::from_flat(&cnn(), &digits(), flat).unwrap();
    assert_eq!(again.flat(), flat);
    let network = cnn().build(&digits()).unwrap();
    let gradients = |batch: &Batch| {
        network.shard_gradients(&model.parameters, batch, &ShardContext::evaluation())
    };
    let mut short = samples(2);
    short.count = 3;
    for error in [
        Model::from_flat(&cnn(), &digits(), &flat[1..])
            .unwrap_err()
            .to_string(),
        model
            .outputs(&samples(2).features()[1..])
            .unwrap_err()
            .to_string(),
        gradients(&short).unwrap_err().to_string(),
    ] {
        assert!(error.contains("values where"), "{error}");
    }
    let mut batch = samples(2);
    let Samples::Classified { labels, .. } = &mut batch.samples else {
        panic!("digits have classes")
    };
    labels[1] = 10;
    let error = gradients(&batch).unwrap_err().to_string();
    assert!(
        error.contains("label 10 of sample 1 is outside 0 to 9"),
        "{error}"
    );
}
