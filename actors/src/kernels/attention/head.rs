//! One head over one window of tokens.

use super::super::Execution;
use super::super::division::Shared;
use super::super::elementary::shifted_exponentials;
use super::super::lanes::{LaneOperation, Lanes, dispatch, sixteens_mut};
use super::super::product::{MatrixView, multiply};
use super::super::softmax::divide_by;

/// Queries that are multiplied together. Larger blocks make larger products, and compute more that counts as zero.
/// `cuda/source/attention.cu` has the same number.
pub(crate) const BLOCK: usize = 32;

/// What a token looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mask {
    /// Itself, and what is before it in its window.
    Causal,
    /// All of its window.
    Full,
}

/// One head of one window, in rows that hold queries beside keys beside values of all heads.
#[derive(Debug, Clone, Copy)]
pub(super) struct Head {
    pub(super) mask: Mask,
    /// Tokens of the window.
    pub(super) context: usize,
    /// Values of a token, in all heads.
    pub(super) width: usize,
    /// Values of a token in this head.
    pub(super) size: usize,
    /// What scores are multiplied by.
    pub(super) scale: f32,
    /// The window's first row.
    pub(super) first: usize,
    /// Where the head begins in a width.
    pub(super) column: usize,
}

/// What the scores of heads of this size are multiplied by: one through the root of it.
pub(super) fn scale(size: usize) -> f32 {
    (1.0 / (size as f64).sqrt()) as f32
}

/// What a head over a window is worth, in values read or written, of which a thread handles some five a nanosecond:
/// multiply-adds are faster.
pub(super) fn worth(context: usize, size: usize) -> usize {
    context * context * size / 8
}

pub(super) fn one_thread(execution: Execution) -> Execution {
    execution.with_threads(std::num::NonZeroUsize::MIN)
}

impl Head {
    pub(super) fn row(&self, token: usize) -> usize {
        self.first + token
    }

    /// The head's values in rows of `stride`, from `column` of the row on.
    pub(super) fn of<'a>(&self, values: &'a [f32], stride: usize, column: usize) -> MatrixView<'a> {
        let start = self.first * stride + column + self.column;
        MatrixView::new(&values[start..], [self.context, self.size], [stride, 1])
    }

    /// Queries (0), keys (1) or values (2).
    pub(super) fn projected<'a>(&self, projected: &'a [f32], which: usize) -> MatrixView<'a> {
        self.of(projected, 3 * self.width, which * self.width)
    }

    pub(super) fn blocks(&self) -> impl Iterator<Item = Block> + use<> {
        let Head { context, mask, .. } = *self;
        (0..context).step_by(BLOCK).map(move |start| {
            let queries = BLOCK.min(context - start);
            let known = match mask {
                Mask::Causal => start + queries,
                Mask::Full => context,
            };
            Block {
                start,
                queries,
                known,
            }
        })
    }

    /// What each token sees of the values, into its place in the `result`, rows of a width.
    ///
    /// Safety: nobody else uses the head's values of the result meanwhile.
    pub(super) unsafe fn attend(
        &self,
        execution: Execution,
        projected: &[f32],
        result: &Shared<'_>,
    ) {
        let alone = one_thread(execution);
        let [keys, values] = [1, 2].map(|which| self.projected(projected, which));
        let mut shares = Shares::new(self);
        let mut sums = vec![0.0; BLOCK.min(self.context) * self.size];
        for block in self.blocks() {
            let query = self
                .projected(projected, 0)
                .rows_from(block.start, block.queries);
            shares.compute(alone, self, &block, query, keys);
            let sums = &mut sums[..block.queries * self.size];
            let known = shares.of(&block);
            multiply(alone, &known, &values.rows_from(0, block.known), sums);
            for (token, sums) in (block.start..).zip(sums.chunks_exact(self.size)) {
                let at = self.row(token) * self.width + self.column;
                // SAFETY: by the caller; each token has its own values.
                unsafe { result.part(at..at + self.size) }.copy_from_slice(sums);
            }
        }
    }
}

/// Some neighbouring queries.
pub(super) struct Block {
    pub(super) start: usize,
    pub(super) queries: usize,
    /// Tokens from the window's first on, as many as any of these queries looks at.
    pub(super) known: usize,
}

/// How much the queries of a block look at each token that the block knows.
pub(super) struct Shares {
    scores: Vec<f32>,
    values: Vec<f32>,
}

impl Shares {
    pub(super) fn new(head: &Head) -> Self {
        let count = BLOCK.min(head.context) * head.context;
        let [scores, values] = [(); 2].map(|()| vec![0.0; count]);
        Self { scores, values }
    }

    pub(super) fn compute(
        &mut self,
        execution: Execution,
        head: &Head,
        block: &Block,
        queries: MatrixView<'_>,
        keys: MatrixView<'_>,
    ) {
        let count = block.queries * block.known;
        let scores = &mut self.scores[..count];
        let keys = keys.rows_from(0, block.known);
        multiply(execution, &queries, &keys.transposed(), scores);
        let operation = ScaledSoftmax {
            scores,
            shares: &mut self.values[..count],
            block,
            head,
        };
        dispatch(execution.instructions(), operation);
    }

    /// Queries × known tokens, row-major.
    pub(super) fn values(&self, block: &Block) -> &[f32] {
        &self.values[..block.queries * block.known]
    }

    pub(super) fn of(&self, block: &Block) -> MatrixView<'_> {
        MatrixView::row_major(&self.values, block.queries, block.known)
    }
}

/// The softmax of each query's scaled scores; what it does not look at counts as zero.
struct ScaledSoftmax<'a> {
    scores: &'a mut [f32],
    shares: &'a mut [f32],
    block: &'a Block,
    head: &'a Head,
}

impl LaneOperation for ScaledSoftmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let length = self.block.known;
        let rows = self.scores.chunks_exact_mut(length);
        let rows = rows.zip(self.shares.chunks_exact_mut(length));
        for (token, (scores, shares)) in (self.block.start..).zip(rows) {
            let seen = match self.head.mask {
                Mask::Causal => token + 1,
                Mask::Full => length,
            };
            let scores = &mut scores[..seen];
            let (known, behind) = shares.split_at_mut(seen);
            scale_by::<L>(scores, self.head.scale);
            let (_, sum) = shifted_exponentials::<L>(scores, known);
            divide_by::<L>(known, sum);
            behind.fill(0.0);
        }
    }
}

#[inline(always)]
fn scale_by<L: Lanes>(values: &mut [f32], factor: f32) {
    let factor = L::splat(factor);
    let (whole, rest) = sixteens_mut(values);
    for sixteen in whole {
        L::load(sixteen).multiply(factor).store(sixteen);
    }
    L::load_part(rest).multiply(factor).store_part(rest);
}
