//! Causal attention: scores, shares, values, and the way back.

use super::super::call::{Address, Argument, Call, Kernel, TooLarge, at_most};
use super::{ROWS, elementwise_grid};
use crate::kernels::attention::Attention;

use Argument::{Float, Int, Wide};

impl Attention {
    /// Values that hold something of each pair of tokens in a window, for each head.
    pub(in super::super) fn pair_count(&self) -> usize {
        self.rows * self.heads * self.context
    }

    /// The score of each query and key.
    pub(in super::super) fn scores(
        &self,
        projected: Address,
        scores: Address,
        multiprocessors: u32,
    ) -> Result<Call, TooLarge> {
        let (kernel, addresses) = (Kernel::AttentionScores, [projected, scores]);
        let mut call = self.elementwise(kernel, &addresses, self.pair_count(), multiprocessors)?;
        call.arguments.push(Float(self.scale));
        Ok(call)
    }

    /// Scores into shares, in place.
    pub(in super::super) fn shares(&self, scores: Address) -> Result<Call, TooLarge> {
        self.by_queries(Kernel::AttentionShares, &[scores])
    }

    /// The values, as each token shares them.
    pub(in super::super) fn forward(
        &self,
        [projected, shares]: [Address; 2],
        result: Address,
        multiprocessors: u32,
    ) -> Result<Call, TooLarge> {
        let (addresses, count) = ([projected, shares, result], self.rows * self.width());
        self.elementwise(Kernel::AttentionForward, &addresses, count, multiprocessors)
    }

    /// Of the gradient of the result, that of the shares.
    pub(in super::super) fn slopes(
        &self,
        [projected, gradient]: [Address; 2],
        slopes: Address,
        multiprocessors: u32,
    ) -> Result<Call, TooLarge> {
        let (addresses, count) = ([projected, gradient, slopes], self.pair_count());
        self.elementwise(Kernel::AttentionSlopes, &addresses, count, multiprocessors)
    }

    /// The gradient of shares into that of scores, in place.
    pub(in super::super) fn scores_backward(
        &self,
        shares: Address,
        slopes: Address,
    ) -> Result<Call, TooLarge> {
        let mut call = self.by_queries(Kernel::AttentionScoresBackward, &[shares, slopes])?;
        call.arguments.push(Float(self.scale));
        Ok(call)
    }

    /// The gradient of what was projected.
    pub(in super::super) fn backward(
        &self,
        [projected, gradient, shares, score_slopes]: [Address; 4],
        result: Address,
        multiprocessors: u32,
    ) -> Result<Call, TooLarge> {
        let addresses = [projected, gradient, shares, score_slopes, result];
        let (kernel, count) = (Kernel::AttentionBackward, 3 * self.rows * self.width());
        self.elementwise(kernel, &addresses, count, multiprocessors)
    }

    /// A call that goes through `count` values, each by itself.
    fn elementwise(
        &self,
        kernel: Kernel,
        addresses: &[Address],
        count: usize,
        multiprocessors: u32,
    ) -> Result<Call, TooLarge> {
        at_most("values of a token", self.width(), i32::MAX / 3)?;
        let mut arguments: Vec<Argument> =
            addresses.iter().copied().map(Argument::Address).collect();
        arguments.push(Wide(count as i64));
        for (what, size) in [
            ("tokens of a window", self.context),
            ("heads", self.heads),
            ("values of a head", self.size),
        ] {
            arguments.push(Int(at_most(what, size, i32::MAX)?));
        }
        Ok(Call {
            kernel,
            grid: elementwise_grid(count as u64, multiprocessors),
            arguments,
        })
    }

    /// A call with sixteen threads for each query.
    fn by_queries(&self, kernel: Kernel, addresses: &[Address]) -> Result<Call, TooLarge> {
        let queries = self.rows * self.heads;
        let blocks = at_most("blocks of queries", queries.div_ceil(ROWS), i32::MAX)?;
        let mut arguments: Vec<Argument> =
            addresses.iter().copied().map(Argument::Address).collect();
        arguments.push(Wide(queries as i64));
        for (what, size) in [("tokens of a window", self.context), ("heads", self.heads)] {
            arguments.push(Int(at_most(what, size, i32::MAX - ROWS as i32)?));
        }
        Ok(Call {
            kernel,
            grid: [blocks as u32, 1, 1],
            arguments,
        })
    }
}
