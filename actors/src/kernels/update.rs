//! The update of a flat vector of parameters in one pass, in place or into other memory; and the norm of a gradient.
//!
//! Invariants:
//! 1. An update is elementwise, with one fixed order of operations, none of them fused.
//! 2. [`square_sum`] adds, in `f64`, sixteen lanes and a tree (`lanes.rs`) within each 65 536 values, and these
//!    sums in ascending order.

use super::Execution;
use super::division::divide;
use super::lanes::{LANES, LaneOperation, Lanes, dispatch, sixteens, tree_sum};
use super::target::Target;

/// Values whose squares are one sum. Part of the order of additions: another number gives other bits.
const SQUARES_CHUNK: usize = 1 << 16;

/// One update of stochastic gradient descent with momentum: `m ← momentum·m + scale·g`, then
/// `p ← keep·p − rate·m`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SgdUpdate {
    /// What gradients are multiplied by first.
    pub scale: f32,
    /// Share of the old direction that is kept.
    pub momentum: f32,
    /// Share of a parameter that weight decay leaves.
    pub keep: f32,
    /// Learning rate.
    pub rate: f32,
}

impl SgdUpdate {
    /// Makes the update.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn apply<'a>(
        &self,
        execution: Execution,
        params: impl Into<Target<'a>>,
        moments: impl Into<Target<'a>>,
        grads: &[f32],
    ) {
        let (params, moments) = (params.into(), moments.into());
        let count = grads.len();
        assert!(
            params.len() == count && moments.len() == count,
            "vectors of different lengths"
        );
        divide(execution, count, 3, LANES, |range| {
            let operation = Sgd {
                update: self,
                // SAFETY: the ranges do not overlap.
                params: unsafe { params.part(range.clone()) },
                // SAFETY: as above.
                moments: unsafe { moments.part(range.clone()) },
                grads: &grads[range],
            };
            dispatch(execution.instructions(), operation);
        });
    }

    #[inline(always)]
    fn of<L: Lanes>(&self, param: L, moment: L, grad: L) -> (L, L) {
        let scaled = L::splat(self.scale).multiply(grad);
        let moment = L::splat(self.momentum).multiply(moment).add(scaled);
        let step = L::splat(self.rate).multiply(moment);
        (L::splat(self.keep).multiply(param).subtract(step), moment)
    }
}

struct Sgd<'a> {
    update: &'a SgdUpdate,
    params: Target<'a>,
    moments: Target<'a>,
    grads: &'a [f32],
}

impl LaneOperation for Sgd<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        let (grads, grads_rest) = sixteens(self.grads);
        for (index, grad) in grads.iter().enumerate() {
            self.change(index, L::load(grad));
        }
        if !grads_rest.is_empty() {
            self.change(grads.len(), L::load_part(grads_rest));
        }
    }
}

impl Sgd<'_> {
    #[inline(always)]
    fn change<L: Lanes>(&mut self, index: usize, grad: L) {
        let (param, moment) = (self.params.load(index), self.moments.load(index));
        let (param, moment) = self.update.of(param, moment, grad);
        self.params.store(index, param);
        self.moments.store(index, moment);
    }
}

/// One update of AdamW (Loshchilov and Hutter, ICLR 2019).
///
/// With `g = scale · gradient`: `m ← β₁m + (1 − β₁)g`, `s ← β₂s + (1 − β₂)g²`,
/// `p ← keep·p − rate · m / (√(s · inverse_square_correction) + ε)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamwUpdate {
    /// What gradients are multiplied by first.
    pub scale: f32,
    /// Decay of the mean.
    pub beta1: f32,
    /// 1 − `beta1`, rounded once.
    pub one_minus_beta1: f32,
    /// Decay of the mean square.
    pub beta2: f32,
    /// 1 − `beta2`, rounded once.
    pub one_minus_beta2: f32,
    /// Added to the root of the mean square.
    pub epsilon: f32,
    /// 1 / (1 − β₂ᵗ).
    pub inverse_square_correction: f32,
    /// Share of a parameter that weight decay leaves.
    pub keep: f32,
    /// Learning rate / (1 − β₁ᵗ).
    pub rate: f32,
}

impl AdamwUpdate {
    /// Makes the update.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn apply<'a>(
        &self,
        execution: Execution,
        params: impl Into<Target<'a>>,
        means: impl Into<Target<'a>>,
        squares: impl Into<Target<'a>>,
        grads: &[f32],
    ) {
        let (params, means, squares) = (params.into(), means.into(), squares.into());
        let count = grads.len();
        assert!(
            params.len() == count && means.len() == count && squares.len() == count,
            "vectors of different lengths"
        );
        divide(execution, count, 4, LANES, |range| {
            let operation = Adamw {
                update: self,
                // SAFETY: the ranges do not overlap.
                params: unsafe { params.part(range.clone()) },
                // SAFETY: as above.
                means: unsafe { means.part(range.clone()) },
                // SAFETY: as above.
                squares: unsafe { squares.part(range.clone()) },
                grads: &grads[range],
            };
            dispatch(execution.instructions(), operation);
        });
    }

    #[inline(always)]
    fn of<L: Lanes>(&self, param: L, mean: L, square: L, grad: L) -> (L, L, L) {
        let grad = L::splat(self.scale).multiply(grad);
        let fresh = L::splat(self.one_minus_beta1).multiply(grad);
        let mean = L::splat(self.beta1).multiply(mean).add(fresh);
        let fresh = L::splat(self.one_minus_beta2).multiply(grad.multiply(grad));
        let square = L::splat(self.beta2).multiply(square).add(fresh);
        let corrected = square.multiply(L::splat(self.inverse_square_correction));
        let root = corrected.square_root().add(L::splat(self.epsilon));
        let step = L::splat(self.rate).multiply(mean.divide(root));
        (
            L::splat(self.keep).multiply(param).subtract(step),
            mean,
            square,
        )
    }
}

struct Adamw<'a> {
    update: &'a AdamwUpdate,
    params: Target<'a>,
    means: Target<'a>,
    squares: Target<'a>,
    grads: &'a [f32],
}

impl LaneOperation for Adamw<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self) {
        let (grads, grads_rest) = sixteens(self.grads);
        for (index, grad) in grads.iter().enumerate() {
            self.change(index, L::load(grad));
        }
        if !grads_rest.is_empty() {
            self.change(grads.len(), L::load_part(grads_rest));
        }
    }
}

impl Adamw<'_> {
    #[inline(always)]
    fn change<L: Lanes>(&mut self, index: usize, grad: L) {
        let old = (
            self.params.load(index),
            self.means.load(index),
            self.squares.load(index),
        );
        let (param, mean, square) = self.update.of(old.0, old.1, old.2, grad);
        self.params.store(index, param);
        self.means.store(index, mean);
        self.squares.store(index, square);
    }
}

/// Σ x², in `f64`. The squares of finite values cannot overflow it, so it is finite if and only if all are.
#[must_use]
pub fn square_sum(execution: Execution, values: &[f32]) -> f64 {
    let chunks = values.len().div_ceil(SQUARES_CHUNK);
    let mut sums = vec![0.0f64; chunks];
    let parts: Vec<std::sync::Mutex<&mut f64>> =
        sums.iter_mut().map(std::sync::Mutex::new).collect();
    divide(execution, chunks, SQUARES_CHUNK, 1, |range| {
        for chunk in range {
            let end = values.len().min((chunk + 1) * SQUARES_CHUNK);
            let squares = Squares(&values[chunk * SQUARES_CHUNK..end]);
            let sum = dispatch(execution.instructions(), squares);
            **parts[chunk].lock().expect("each is locked once") = sum;
        }
    });
    drop(parts);
    sums.iter().sum()
}

struct Squares<'a>(&'a [f32]);

impl LaneOperation for Squares<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<L: Lanes>(self) -> f64 {
        let (whole, rest) = sixteens(self.0);
        let mut sums = L::double_zero();
        for sixteen in whole {
            sums = L::load(sixteen).add_square(sums);
        }
        tree_sum(L::double_lanes(L::load_part(rest).add_square(sums)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::execution::all_executions;
    use crate::kernels::test_values::{ADAMW, bits, normal};

    #[test]
    fn updates_are_their_formulas_without_fusing_on_every_path() {
        for count in [1, 16, 100_007] {
            let vectors = ["p", "m", "s", "g"].map(|name| normal(name, count, 1.0));
            let [params, means, squares, grads] = vectors;
            let squares: Vec<f32> = squares.iter().map(|x| x.abs()).collect();
            let sgd = SgdUpdate {
                scale: 0.37,
                momentum: 0.9,
                keep: 0.999,
                rate: 0.01,
            };
            let mut expected = [
                params.clone(),
                means.clone(),
                squares.clone(),
                params.clone(),
                means.clone(),
            ];
            let [p, m, s, p2, m2] = &mut expected;
            for i in 0..count {
                let g = ADAMW.scale * grads[i];
                m[i] = ADAMW.beta1 * m[i] + ADAMW.one_minus_beta1 * g;
                s[i] = ADAMW.beta2 * s[i] + ADAMW.one_minus_beta2 * (g * g);
                let root = (s[i] * ADAMW.inverse_square_correction).sqrt() + ADAMW.epsilon;
                p[i] = ADAMW.keep * p[i] - ADAMW.rate * (m[i] / root);
                m2[i] = sgd.momentum * m2[i] + sgd.scale * grads[i];
                p2[i] = sgd.keep * p2[i] - sgd.rate * m2[i];
            }
            let expected = expected.map(|values| bits(&values));
            for execution in all_executions() {
                let mut found = [
                    params.clone(),
                    means.clone(),
                    squares.clone(),
                    params.clone(),
                    means.clone(),
                ];
                let [p, m, s, p2, m2] = &mut found;
                ADAMW.apply(execution, p, m, s, &grads);
                sgd.apply(execution, p2, m2, &grads);
                assert_eq!(found.map(|values| bits(&values)), expected, "{execution:?}");
                // Into other memory it is the same.
                let mut found = [(); 5].map(|()| vec![f32::NAN; count]);
                let [p, m, s, p2, m2] = &mut found;
                let to = |before, after| Target::between(before, after);
                let (p, p2) = (to(&params, p), to(&params, p2));
                let (m, m2) = (to(&means, m), to(&means, m2));
                ADAMW.apply(execution, p, m, to(&squares, s), &grads);
                sgd.apply(execution, p2, m2, &grads);
                assert_eq!(found.map(|values| bits(&values)), expected, "{execution:?}");
            }
        }
    }

    #[test]
    fn square_sums_have_one_value_on_every_path_and_show_what_is_not_finite() {
        for count in [0, 1, 17, 65_536, 300_001] {
            let values = normal("x", count, 1e3);
            let reference: f64 = values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
            let mut seen = None;
            for execution in all_executions() {
                let sum = square_sum(execution, &values);
                assert!((sum - reference).abs() <= 1e-12 * reference);
                assert_eq!(
                    *seen.get_or_insert(sum.to_bits()),
                    sum.to_bits(),
                    "{execution:?}"
                );
            }
        }
        for bad in [f32::NAN, f32::INFINITY] {
            let mut values = vec![f32::MAX; 70_000];
            assert!(square_sum(Execution::current(), &values).is_finite());
            values[69_999] = bad;
            assert!(!square_sum(Execution::current(), &values).is_finite());
        }
    }
}
