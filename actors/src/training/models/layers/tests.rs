use candle_core::{Device, Tensor, Var};

use super::*;
use crate::training::random::{Purpose, Stream};
use crate::training::trainable::{Mode, ShardContext};

fn values(name: &str, count: usize) -> Vec<f32> {
    let stream = Stream::new(5, Purpose::Initialise, name, 0);
    (0..count as u64)
        .map(|index| stream.normal(index, 0) as f32)
        .collect()
}

fn var(name: &str, rows: usize, columns: usize) -> Var {
    Var::from_vec(values(name, rows * columns), (rows, columns), &Device::Cpu).unwrap()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn rows_of_a_table_bring_their_gradients_back_even_when_repeated() {
    let table = var("table", 4, 3);
    let rows = embed(table.as_tensor(), vec![2, 0, 2]).unwrap();
    assert_eq!(flat(&rows)[..3], flat(table.as_tensor())[6..9]);
    let factors = Tensor::from_vec(values("f", 9), (3, 3), &Device::Cpu).unwrap();
    let store = (rows * &factors)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    let gradient = flat(store.get(table.as_tensor()).unwrap());
    let factors = flat(&factors);
    assert_eq!(gradient[6], factors[0] + factors[6]);
    assert_eq!((gradient[0], gradient[3]), (factors[3], 0.0));
    assert!(embed(table.as_tensor(), vec![4]).is_err());
}

#[test]
fn what_is_dropped_is_a_share_scaled_up_and_comes_back_in_the_gradient() {
    let context = ShardContext {
        seed: 1,
        step: 2,
        first_sample: 3,
        mode: Mode::Training,
    };
    let ones = Var::ones((40, 250), candle_core::DType::F32, &Device::Cpu).unwrap();
    let dropped = Dropout::apply(ones.as_tensor(), 0.25, "layer", 40, &context).unwrap();
    let found = flat(&dropped);
    let scale = 1.0f32 / 0.75;
    assert!(found.iter().all(|value| *value == 0.0 || *value == scale));
    let zeros = found.iter().filter(|value| **value == 0.0).count();
    assert!((2300..2700).contains(&zeros), "{zeros} of 10000");
    let store = dropped.sum_all().unwrap().backward().unwrap();
    assert_eq!(flat(store.get(ones.as_tensor()).unwrap()), found);
    // The second sample alone.
    let one = Tensor::ones((1, 250), candle_core::DType::F32, &Device::Cpu).unwrap();
    let second = ShardContext {
        first_sample: 4,
        ..context
    };
    let alone = Dropout::apply(&one, 0.25, "layer", 1, &second).unwrap();
    assert_eq!(flat(&alone), found[250..500]);
    let measured = Dropout::apply(&one, 0.25, "layer", 1, &ShardContext::evaluation()).unwrap();
    assert_eq!(flat(&measured), flat(&one));
}
