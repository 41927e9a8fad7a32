//! Causal attention, in the order in which `device` calls its kernels.

use candle_core::{Device, Tensor};

use super::super::emulation::{Guarded, check_all};
use super::flat;
use crate::kernels::attention::{BLOCK, Backward, CausalAttention};
use crate::kernels::test_values::normal;

#[test]
fn attention_has_the_bits_of_the_cpu_forward_and_backward() {
    for (windows, context, heads, size, deviation) in [
        (1, 1, 1, 1, 1.0),
        (2, 5, 2, 3, 1.0),
        (1, 19, 3, 8, 3.0),
        (2, 33, 1, 21, 8.0),
        (1, 70, 2, 16, 1.0),
    ] {
        let layer = CausalAttention { context, heads };
        let (rows, width) = (windows * context, heads * size);
        let mut projected = normal("projected", rows * 3 * width, deviation);
        if context == 19 {
            // A score that is infinite, one that is no number, and powers that are zero beside the largest.
            projected[3 * width * 4] = f32::INFINITY;
            projected[3 * width * 9 + size] = f32::NAN;
            projected[3 * width * 2 + width + 2 * size] = -1e4;
        }
        let gradient = normal("gradient", rows * width, 1.0);
        let tensor = |values: &[f32], columns: usize| {
            Tensor::from_slice(values, (rows, columns), &Device::Cpu).unwrap()
        };
        let (x, g) = (tensor(&projected, 3 * width), tensor(&gradient, width));
        let attention = layer.sizes(x.layout()).unwrap();
        let forward = flat(&layer.apply(&x).unwrap());
        let backward = x.apply_op2_no_bwd(&g, &Backward(layer));
        let backward = flat(&backward.unwrap());

        let mut stored = [&projected, &gradient].map(|values| Guarded::new(values));
        let [x_at, g_at] = stored.each_mut().map(Guarded::address);
        let [mut shares, mut slopes] = [(); 2].map(|()| Guarded::unwritten(attention.pair_count()));
        let (shares_at, slopes_at) = (shares.address(), slopes.address());
        check_all(rows * width, &forward, |to| {
            vec![
                attention.scores(x_at, shares_at, 2).unwrap(),
                attention.shares(shares_at).unwrap(),
                attention.forward([x_at, shares_at], to, 2).unwrap(),
            ]
        });
        check_all(rows * 3 * width, &backward, |to| {
            let operands = [x_at, g_at, shares_at, slopes_at];
            vec![
                attention.scores(x_at, shares_at, 1).unwrap(),
                attention.shares(shares_at).unwrap(),
                attention.slopes([x_at, g_at], slopes_at, 1).unwrap(),
                attention.scores_backward(shares_at, slopes_at).unwrap(),
                attention.backward(operands, to, 1).unwrap(),
            ]
        });
        // Of the tokens behind a query's block nothing was written, nor beyond the end.
        for pairs in [shares.values(), slopes.values()] {
            for (query, row) in pairs.chunks_exact(context).enumerate() {
                let token = query / heads % context;
                let (own, behind) = row.split_at(context.min((token / BLOCK + 1) * BLOCK));
                assert!(own.iter().all(|value| *value != 1e30));
                assert!(own[token + 1..].iter().all(|value| *value == 0.0));
                assert!(behind.iter().all(|value| *value == 1e30));
            }
        }
    }
}
