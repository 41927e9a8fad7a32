//! Gradients beside the slope of the loss, and gathered in both ways, for tests of models.

use std::sync::Arc;

use super::super::data::Batch;
use super::super::layout::Layout;
use super::super::parameters::{Parameters, initial_values};
use super::super::trainable::{Mode, ShardContext, Trainable};
use crate::kernels::gradients::run_elsewhere;
use crate::kernels::test_values::bits;

/// Compares, for some values of each parameter, the gradient with the slope of the loss; and all bits of it with those that
/// are gathered as on a GPU.
///
/// # Panics
/// If they differ by more than rounding explains, in one bit, or the model refuses the batch.
pub(in crate::training) fn check_gradients(model: &dyn Trainable, batch: &Batch) {
    let list = model.parameters();
    let layout = Arc::new(Layout::of(&list));
    // Off zero: a rectifier has no slope where a zero bias puts its input.
    let flat: Vec<f32> = initial_values(&list, 3)
        .iter()
        .enumerate()
        .map(|(index, value)| value + 0.02 + 0.001 * (index % 7) as f32)
        .collect();
    let mut parameters = Parameters::new(Arc::clone(&layout), &flat).unwrap();
    let context = ShardContext {
        seed: 5,
        step: 3,
        first_sample: 96,
        mode: Mode::Training,
    };
    let ours = model.shard_gradients(&parameters, batch, &context).unwrap();
    let apart = run_elsewhere(|| model.shard_gradients(&parameters, batch, &context)).unwrap();
    assert_eq!(bits(apart.gradients()), bits(ours.gradients()));
    for slot in &layout.slots {
        let count = slot.value_count();
        for within in [0, count / 3, count / 2, count - 1] {
            let index = slot.offset + within;
            let mut loss_at = |by: f32| {
                let mut moved = flat.clone();
                moved[index] += by;
                parameters.load(&moved).unwrap();
                let output = model.shard_gradients(&parameters, batch, &context);
                output.unwrap().loss_sum()
            };
            let slope = (loss_at(1e-3) - loss_at(-1e-3)) / 2e-3;
            let gradient = f64::from(ours.gradients()[index]);
            assert!(
                (slope - gradient).abs() < 2e-2 * gradient.abs().max(1.0),
                "{}[{within}]: slope {slope}, gradient {gradient}",
                slot.name
            );
        }
    }
}
