//! The update by its formulas, and what it refuses.

use super::*;
use crate::training::reduction::Subtree;

fn spec(optimizer: OptimizerSpec) -> TrainSpec {
    TrainSpec {
        optimizer,
        weight_decay: 0.1,
        clip_norm: None,
        ..TrainSpec::digits_mlp("test")
    }
}

fn layout(spec: &TrainSpec) -> Layout {
    workload(spec).layout().clone()
}

fn workload(spec: &TrainSpec) -> crate::training::workload::Workload {
    let files = crate::training::data::Files::local();
    crate::training::workload::Workload::load(spec, &files).unwrap()
}

fn root(spec: &TrainSpec, state: &TrainState, value: f32) -> Partial {
    let grads = vec![value; state.params.len()];
    let subtree = Subtree { level: 4, index: 0 };
    Partial {
        subtree,
        loss_sum: 2.0 * spec.global_batch as f64,
        count: spec.global_batch,
        grads,
    }
}

const ADAMW: OptimizerSpec = OptimizerSpec::Adamw {
    beta1: 0.9,
    beta2: 0.999,
    epsilon: 1e-8,
};

#[test]
fn weight_decay_leaves_vectors_alone_if_told_so() {
    for rule in [OptimizerSpec::Sgd { momentum: 0.9 }, ADAMW] {
        let mut spec = spec(rule);
        spec.weight_decay_on = Decayed::Matrices;
        let layout = layout(&spec);
        let optimizer = Optimizer::new(&spec, &layout);
        let mut state = TrainState::initial(&workload(&spec));
        state.params = vec![1.0; state.params.len()].into();
        let sums = root(&spec, &state, 0.0);
        // With an open snapshot what is not written is not there.
        let _snapshot = state.params.snapshot();
        optimizer.step(&mut state, &sums).unwrap();
        for slot in &layout.slots {
            let values = &state.params[slot.range()];
            let is_matrix = slot.shape.len() == 2;
            let as_told = |value: &f32| (*value < 1.0) == is_matrix;
            assert!(
                values.iter().all(as_told),
                "{} {:?}",
                slot.name,
                &values[..3]
            );
        }
    }
}

#[test]
fn updates_follow_the_published_formulas() {
    for rule in [OptimizerSpec::Sgd { momentum: 0.9 }, ADAMW] {
        let mut spec = spec(rule);
        spec.schedule = Schedule::Constant;
        let optimizer = Optimizer::new(&spec, &layout(&spec));
        let mut state = TrainState::initial(&workload(&spec));
        let (rate, decay) = (spec.learning_rate, spec.weight_decay);
        let (mut param, mut mean, mut square) = (f64::from(state.params[9]), 0.0f64, 0.0f64);
        for step in 1..=20 {
            let grad = (f64::from(step) * 0.7).sin();
            let sums = root(&spec, &state, (grad * spec.global_batch as f64) as f32);
            let report = optimizer.step(&mut state, &sums).unwrap();
            assert_eq!((report.step, report.loss_mean), (step as u64 - 1, 2.0));
            param -= rate * decay * param;
            match rule {
                OptimizerSpec::Sgd { momentum } => {
                    mean = momentum * mean + grad;
                    param -= rate * mean;
                }
                OptimizerSpec::Adamw {
                    beta1,
                    beta2,
                    epsilon,
                } => {
                    mean = beta1 * mean + (1.0 - beta1) * grad;
                    square = beta2 * square + (1.0 - beta2) * grad * grad;
                    let mean_hat = mean / (1.0 - beta1.powi(step));
                    let square_hat = square / (1.0 - beta2.powi(step));
                    param -= rate * mean_hat / (square_hat.sqrt() + epsilon);
                }
            }
            assert!(
                (param - f64::from(state.params[9])).abs() < 1e-5,
                "step {step}"
            );
        }
        assert_eq!(state.step, 20);
    }
}

#[test]
fn clipping_bounds_the_norm_and_keeps_the_direction() {
    let mut spec = spec(OptimizerSpec::Sgd { momentum: 0.0 });
    spec.clip_norm = Some(0.5);
    spec.weight_decay = 0.0;
    let mut state = TrainState::initial(&workload(&spec));
    let before = state.params.clone();
    let sums = root(&spec, &state, 1000.0);
    let report = Optimizer::new(&spec, &layout(&spec))
        .step(&mut state, &sums)
        .unwrap();
    assert!(report.gradient_norm > 0.5);
    let moved = before
        .iter()
        .zip(&state.params)
        .map(|(a, b)| f64::from(a - b).powi(2));
    let distance = moved.sum::<f64>().sqrt();
    assert!(
        (distance / report.learning_rate - 0.5).abs() < 1e-3,
        "{distance}"
    );
}

#[test]
fn what_cannot_be_used_changes_nothing() {
    let spec = spec(ADAMW);
    let optimizer = Optimizer::new(&spec, &layout(&spec));
    let mut state = TrainState::initial(&workload(&spec));
    let before = state.clone();
    let good = root(&spec, &state, 1.0);
    let mut infinite = good.clone();
    infinite.grads[0] = f32::INFINITY;
    let error = optimizer
        .step(&mut state, &infinite)
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("step 0: the gradient of dense.0.bias is not finite"),
        "{error}"
    );
    let few = Partial {
        count: 1,
        ..good.clone()
    };
    assert!(matches!(
        optimizer.step(&mut state, &few),
        Err(StepError::Count { .. })
    ));
    let short = Partial {
        grads: vec![1.0],
        ..good
    };
    assert!(matches!(
        optimizer.step(&mut state, &short),
        Err(StepError::Length(_))
    ));
    assert_eq!(state, before);
}

#[test]
fn a_loss_that_is_not_finite_is_refused_though_its_gradients_are() {
    let spec = spec(ADAMW);
    let optimizer = Optimizer::new(&spec, &layout(&spec));
    let mut state = TrainState::initial(&workload(&spec));
    let before = state.clone();
    for loss_sum in [f64::INFINITY, f64::NAN] {
        let sums = Partial {
            loss_sum,
            ..root(&spec, &state, 1.0)
        };
        let error = optimizer.step(&mut state, &sums).unwrap_err();
        assert!(
            matches!(error, StepError::Loss { step: 0, loss } if !loss.is_finite()),
            "{error}"
        );
        assert!(!error.spoils_state());
        let text = error.to_string();
        let expected = "while all gradients are finite; the loss has diverged";
        assert!(
            text.starts_with("step 0: the loss is ") && text.contains(expected),
            "{text}"
        );
    }
    assert_eq!(state, before);
}

#[test]
fn an_update_that_makes_parameters_infinite_is_refused_with_the_first_ones_name() {
    for momentum in [0.0, 0.9] {
        let mut spec = spec(OptimizerSpec::Sgd { momentum });
        let workload = workload(&spec);
        let layout = workload.layout();
        let mut state = TrainState::initial(&workload);
        // As no job may have it: one step is enough then.
        (spec.learning_rate, spec.weight_decay) = (1e30, 0.0);
        let optimizer = Optimizer::new(&spec, layout);
        let mut sums = root(&spec, &state, 0.0);
        for name in ["dense.2.weight", "dense.1.weight"] {
            let slot = layout.slot(name).unwrap();
            // The last value of each: finite, as are its square and the norm of all.
            sums.grads[slot.range().end - 1] = 1e12;
        }
        let error = optimizer.step(&mut state, &sums).unwrap_err();
        assert!(error.spoils_state());
        let text = error.to_string();
        assert!(
            text.starts_with("step 0: after its update dense.1.weight is not finite; the loss"),
            "{text}"
        );
        assert_eq!(state.step, 0, "it is not the state of a step");
    }
}

#[test]
fn a_mean_square_that_overflows_is_refused_with_its_tensors_name() {
    let mut spec = spec(ADAMW);
    let workload = workload(&spec);
    let layout = workload.layout();
    let initial = TrainState::initial(&workload);
    let slot = layout.slot("dense.1.weight").unwrap();
    // The last value, alone: the mean gradient is finite, and each parameter stays so.
    let sums = |mean: f32| {
        let mut sums = root(&spec, &initial, 0.0);
        sums.grads[slot.range().end - 1] = mean * spec.global_batch as f32;
        sums
    };
    let [safe, large, overflowing] = [1e18, 1.5e19, 1e20].map(sums);
    let optimizer = Optimizer::new(&spec, layout);
    for taken in [&safe, &large] {
        let mut state = initial.clone();
        optimizer.step(&mut state, taken).unwrap();
        assert!(state.moments[1].iter().all(|square| square.is_finite()));
    }
    let mut state = initial.clone();
    let error = optimizer.step(&mut state, &overflowing).unwrap_err();
    assert!(error.spoils_state());
    let text = error.to_string();
    let expected = "step 0: after its update moments.1.dense.1.weight is not finite; the loss";
    assert!(text.starts_with(expected), "{text}");
    assert!(state.params.iter().all(|value| value.is_finite()));
    // What is clipped cannot overflow.
    spec.clip_norm = Some(1.0);
    let mut state = initial.clone();
    let optimizer = Optimizer::new(&spec, layout);
    optimizer.step(&mut state, &overflowing).unwrap();
}

#[test]
fn large_finite_parameters_are_taken() {
    let mut spec = spec(OptimizerSpec::Sgd { momentum: 0.0 });
    spec.weight_decay = 0.0;
    let optimizer = Optimizer::new(&spec, &layout(&spec));
    let mut state = TrainState::initial(&workload(&spec));
    state.params = vec![f32::MAX; state.params.len()].into();
    let sums = root(&spec, &state, 0.0);
    let report = optimizer.step(&mut state, &sums).unwrap();
    assert_eq!((report.step, state.step), (0, 1));
    assert!(report.took > Duration::ZERO, "{report:?}");
}
