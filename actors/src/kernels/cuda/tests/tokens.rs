//! Embeddings and dropout.

use candle_core::{Device, Tensor};

use super::super::calls::tokens::{self, Uses};
use super::super::emulation::{Guarded, Numbers, check};
use super::flat;
use crate::kernels::test_values::normal;
use crate::training::models::layers::{Dropout, Scatter, embed};
use crate::training::trainable::{Mode, ShardContext};

#[test]
fn uses_are_in_ascending_order_row_by_row() {
    let found = Uses::of(&[2, 0, 2, 3, 0, 2], 5);
    assert_eq!(found.starts, [0, 2, 2, 5, 6, 6]);
    assert_eq!(found.uses, [1, 4, 0, 2, 5, 3]);
    let none = Uses::of(&[], 2);
    assert_eq!((none.starts.as_slice(), none.uses.len()), (&[0; 3][..], 0));
}

#[test]
fn an_embedding_has_the_bits_of_the_cpu_forward_and_backward() {
    for (count, width, used) in [(1, 1, 1), (7, 5, 40), (300, 3, 500)] {
        let table = normal("table", count * width, 1.0);
        // Some rows often, some never.
        let rows: Vec<u32> = (0..used)
            .map(|use_| (use_ * use_ * 7 % count) as u32)
            .collect();
        let gradient = normal("gradient", used * width, 1e3);
        let tensor = |values: &[f32], rows: usize| {
            Tensor::from_slice(values, (rows, width), &Device::Cpu).unwrap()
        };
        let forward = flat(&embed(&tensor(&table, count), rows.clone()).unwrap());
        let scatter = Scatter {
            rows: rows.clone(),
            count,
        };
        let backward = tensor(&gradient, used).apply_op1_no_bwd(&scatter);
        let backward = flat(&backward.unwrap());

        let Uses { starts, uses } = Uses::of(&rows, count);
        let mut numbers = [&rows, &starts, &uses].map(|numbers| Numbers::new(numbers));
        let [rows_at, starts_at, uses_at] = numbers.each_mut().map(Numbers::address);
        let mut stored = [&table, &gradient].map(|values| Guarded::new(values));
        let [table_at, gradient_at] = stored.each_mut().map(Guarded::address);
        check(used * width, &forward, |to| {
            tokens::embedding_forward([table_at, rows_at], to, used, width, 2).unwrap()
        });
        check(count * width, &backward, |to| {
            let operands = [gradient_at, starts_at, uses_at];
            tokens::embedding_backward(operands, to, count, width, 2).unwrap()
        });
    }
}

#[test]
fn what_is_dropped_is_what_the_cpu_drops() {
    for (samples, sample_values, rate, first_sample) in [
        (1, 1, 0.5, 0),
        (3, 10, 0.1, 77),
        (2, 517, 0.25, u64::from(u32::MAX)),
        (40, 16, 0.999, u64::MAX - 40),
    ] {
        let context = ShardContext {
            seed: 5,
            step: 9,
            first_sample,
            mode: Mode::Training,
        };
        let values = normal("values", samples * sample_values, 1.0);
        let tensor = Tensor::from_slice(&values, (samples, sample_values), &Device::Cpu).unwrap();
        let expected = Dropout::apply(&tensor, rate, "layer", samples, &context).unwrap();
        let dropping = Dropout::new(rate, "layer", sample_values, &context).dropping(values.len());
        let mut stored = Guarded::new(&values);
        let values_at = stored.address();
        check(values.len(), &flat(&expected), |to| {
            dropping.call(values_at, to, 2).unwrap()
        });
    }
}
