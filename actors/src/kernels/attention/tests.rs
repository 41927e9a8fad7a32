use super::*;
use crate::kernels::execution::all_executions;
use crate::kernels::test_values::{bits, normal, relative_error};

/// The same in `f64`, of one head and one window, with the gradient: rows of queries, keys and values.
struct Reference {
    context: usize,
    size: usize,
    parts: [Vec<Vec<f64>>; 3],
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(sums: &mut [f64], factor: f64, values: &[f64]) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += factor * value;
    }
}

impl Reference {
    fn shares(&self, token: usize) -> Vec<f64> {
        let scale = 1.0 / (self.size as f64).sqrt();
        let [queries, keys, _] = &self.parts;
        let scores = (0..=token).map(|other| dot(&queries[token], &keys[other]) * scale);
        let scores: Vec<f64> = scores.collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let powers: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
        let sum: f64 = powers.iter().sum();
        powers.iter().map(|power| power / sum).collect()
    }

    fn forward(&self) -> Vec<Vec<f64>> {
        let rows = (0..self.context).map(|token| {
            let mut sums = vec![0.0; self.size];
            for (other, share) in self.shares(token).iter().enumerate() {
                add(&mut sums, *share, &self.parts[2][other]);
            }
            sums
        });
        rows.collect()
    }

    fn backward(&self, gradient: &[Vec<f64>]) -> [Vec<Vec<f64>>; 3] {
        let scale = 1.0 / (self.size as f64).sqrt();
        let mut result = [(); 3].map(|()| vec![vec![0.0; self.size]; self.context]);
        let [queries, keys, values] = &self.parts;
        for (token, above) in gradient.iter().enumerate() {
            let shares = self.shares(token);
            let slopes: Vec<f64> = (0..=token)
                .map(|other| dot(above, &values[other]))
                .collect();
            let mean = dot(&shares, &slopes);
            for (other, (share, slope)) in shares.iter().zip(&slopes).enumerate() {
                let to_score = share * (slope - mean) * scale;
                add(&mut result[0][token], to_score, &keys[other]);
                add(&mut result[1][other], to_score, &queries[token]);
                add(&mut result[2][other], *share, above);
            }
        }
        result
    }
}

/// The values of a head as rows, of rows of `stride` that begin at `column`.
fn rows_of(values: &[f32], head: Head, stride: usize, column: usize) -> Vec<Vec<f64>> {
    let rows = values
        .chunks_exact(stride)
        .skip(head.first)
        .take(head.context);
    let wide = |row: &[f32]| {
        row[column + head.column..][..head.size]
            .iter()
            .map(|x| f64::from(*x))
            .collect()
    };
    rows.map(wide).collect()
}

/// Within `1e-5` of `f64`, and equal bits on every path; contexts of less, of one, and of several blocks.
#[test]
fn agrees_with_f64_forward_and_backward_on_every_path() {
    for (windows, context, heads, size) in [
        (1, 1, 1, 1),
        (2, 7, 2, 3),
        (1, 32, 3, 8),
        (2, 33, 1, 21),
        (1, 100, 2, 16),
        (9, 64, 4, 32),
    ] {
        let attention = Attention {
            rows: windows * context,
            context,
            heads,
            size,
            scale: (1.0 / (size as f64).sqrt()) as f32,
        };
        let width = attention.width();
        let projected = normal("projected", attention.rows * 3 * width, 1.0);
        let gradient = normal("gradient", attention.rows * width, 1.0);
        let mut seen: Option<[Vec<u32>; 2]> = None;
        for execution in all_executions() {
            let mut result = vec![f32::NAN; gradient.len()];
            let mut back = vec![f32::NAN; projected.len()];
            attention.compute(execution, &projected, &mut result);
            attention.compute_gradient(execution, &projected, &gradient, &mut back);
            let found = [bits(&result), bits(&back)];
            if let Some(seen) = &seen {
                assert_eq!(*seen, found, "{attention:?} {execution:?}");
                continue;
            }
            seen = Some(found);
            for item in 0..windows * heads {
                let head = Head {
                    mask: Mask::Causal,
                    context,
                    width,
                    size,
                    scale: attention.scale,
                    first: item / heads * context,
                    column: item % heads * size,
                };
                let of = |values: &[f32], stride, column| rows_of(values, head, stride, column);
                let parts = [0, 1, 2].map(|which| of(&projected, 3 * width, which * width));
                let reference = Reference {
                    context,
                    size,
                    parts,
                };
                let flat = |rows: Vec<Vec<f64>>| rows.concat();
                let narrow = |rows: Vec<Vec<f64>>| {
                    flat(rows).iter().map(|x| *x as f32).collect::<Vec<f32>>()
                };
                let found = narrow(of(&result, width, 0));
                assert!(relative_error(&found, &flat(reference.forward())) < 1e-5);
                let expected = reference.backward(&of(&gradient, width, 0));
                for (which, expected) in expected.into_iter().enumerate() {
                    let found = narrow(of(&back, 3 * width, which * width));
                    let error = relative_error(&found, &flat(expected));
                    assert!(error < 1e-5, "{attention:?}: {which} {error:e}");
                }
            }
        }
    }
}

/// What a token says does not depend on those behind it, whichever block they are in.
#[test]
fn nobody_sees_what_comes_later() {
    let attention = Attention {
        rows: 80,
        context: 80,
        heads: 1,
        size: 4,
        scale: 0.5,
    };
    let mut projected = normal("projected", 80 * 12, 1.0);
    let forward = |projected: &[f32]| {
        let mut result = vec![0.0; 80 * 4];
        attention.compute(Execution::current(), projected, &mut result);
        bits(&result)
    };
    let before = forward(&projected);
    for later in [1, 31, 32, 50, 79] {
        projected[later * 12..]
            .iter_mut()
            .for_each(|value| *value += 1.0);
        let after = forward(&projected);
        assert_eq!(before[..later * 4], after[..later * 4]);
        assert_ne!(
            before[later * 4..(later + 1) * 4],
            after[later * 4..(later + 1) * 4]
        );
        projected.clone_from(&normal("projected", 80 * 12, 1.0));
    }
}
