//! The call of each kernel: its grid and its arguments, in the order of its source.
//!
//! Invariant: the numbers of blocks and of multiprocessors decide the speed, and never show in a result.
//!
//! Here are products, rows, and what a training's state needs; `dense`, `convolution`, `attention` and `tokens` have what
//! layers need beside.

pub(super) mod attention;
pub(super) mod convolution;
pub(super) mod dense;
pub(super) mod tokens;

use candle_core::Layout;

use super::call::{Address, Argument, Call, Kernel, THREADS, TooLarge, at_most};
use crate::kernels::update::AdamwUpdate;

use Argument::{Count, Float, Int, Wide};

/// Most blocks in y and z of a grid.
const BLOCKS_MAX: i32 = 65_535;

/// Blocks for each multiprocessor where threads go through many values each: 8 of 256 threads fill one.
const BLOCKS_EACH: u32 = 8;

/// Where the matrices of a batch lie; strides in values.
#[derive(Debug, Clone, Copy)]
pub(super) struct Matrices {
    pub(super) values: Address,
    pub(super) row_stride: i64,
    pub(super) column_stride: i64,
    pub(super) batch_stride: i64,
}

impl Matrices {
    /// The matrices of the last two dimensions of a tensor whose storage starts at `storage`. `None` where the leading
    /// dimensions have no one stride, or there are no two dimensions.
    pub(super) fn of(Address(storage): Address, layout: &Layout) -> Option<Self> {
        let (dims, strides) = (layout.dims(), layout.stride());
        let leading = dims.len().checked_sub(2)?;
        // From the last to the first, a stride must be what the dimension after it spans.
        let mut batch_stride = None;
        let mut spanned = 0;
        for index in (0..leading).rev().filter(|index| dims[*index] != 1) {
            match batch_stride {
                None => batch_stride = Some(strides[index]),
                Some(_) if strides[index] == spanned => {}
                Some(_) => return None,
            }
            spanned = strides[index] * dims[index];
        }
        Some(Self {
            values: Address(storage + (layout.start_offset() * size_of::<f32>()) as u64),
            row_stride: strides[leading] as i64,
            column_stride: strides[leading + 1] as i64,
            batch_stride: batch_stride.unwrap_or_default() as i64,
        })
    }
}

/// The sizes of `batch` products: `(rows, inner) · (inner, columns)`.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProductShape {
    pub(super) batch: usize,
    pub(super) rows: usize,
    pub(super) inner: usize,
    pub(super) columns: usize,
}

/// `c = a · b`, c row-major without gaps.
pub(super) fn product(
    shape: ProductShape,
    a: &Matrices,
    b: &Matrices,
    c: Address,
    multiprocessors: u32,
) -> Result<Call, TooLarge> {
    let rows = at_most("rows", shape.rows, i32::MAX - 128)?;
    let columns = at_most("columns", shape.columns, BLOCKS_MAX * 32)?;
    let inner = at_most("inner dimensions", shape.inner, i32::MAX - 128)?;
    let batch = at_most("matrices", shape.batch, i32::MAX - BLOCKS_MAX)?;
    // The largest tile of which there is one for each multiprocessor: larger tiles read less, fewer leave some idle.
    let blocks = |tile: usize| {
        let tiles = shape.rows.div_ceil(tile) * shape.columns.div_ceil(tile);
        tiles * shape.batch
    };
    let (kernel, tile) = [(Kernel::Product128, 128), (Kernel::Product64, 64)]
        .into_iter()
        .find(|(_, tile)| blocks(*tile) >= multiprocessors as usize)
        .unwrap_or((Kernel::Product32, 32));
    let mut arguments = Vec::with_capacity(13);
    for operand in [a, b] {
        arguments.extend([
            Argument::Address(operand.values),
            Wide(operand.row_stride),
            Wide(operand.column_stride),
            Wide(operand.batch_stride),
        ]);
    }
    arguments.push(Argument::Address(c));
    arguments.extend([rows, columns, inner, batch].map(Int));
    Ok(Call {
        kernel,
        grid: [
            shape.rows.div_ceil(tile) as u32,
            shape.columns.div_ceil(tile) as u32,
            batch.min(BLOCKS_MAX) as u32,
        ],
        arguments,
    })
}

/// Blocks for a pass over `count` values.
fn elementwise_grid(count: u64, multiprocessors: u32) -> [u32; 3] {
    let blocks = count.div_ceil(u64::from(THREADS));
    [
        blocks.min(u64::from(multiprocessors * BLOCKS_EACH)) as u32,
        1,
        1,
    ]
}

/// The vectors of an update, of `count` values each, the first of which is at `first` in the whole.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moved {
    pub(super) params: Address,
    pub(super) means: Address,
    pub(super) squares: Address,
    pub(super) grads: Address,
    pub(super) count: u64,
    pub(super) first: u64,
}

/// AdamW in place; the digest of what is written is added to the two numbers at `digest`.
pub(super) fn adamw(
    update: &AdamwUpdate,
    moved: &Moved,
    digest: Address,
    multiprocessors: u32,
) -> Call {
    let mut arguments: Vec<Argument> = [moved.params, moved.means, moved.squares, moved.grads]
        .map(Argument::Address)
        .to_vec();
    arguments.extend([moved.count, moved.first].map(Count));
    arguments.push(Argument::Address(digest));
    let scalars = [
        update.scale,
        update.beta1,
        update.one_minus_beta1,
        update.beta2,
        update.one_minus_beta2,
        update.epsilon,
        update.inverse_square_correction,
        update.keep,
        update.rate,
    ];
    arguments.extend(scalars.map(Float));
    Call {
        kernel: Kernel::Adamw,
        grid: elementwise_grid(moved.count, multiprocessors),
        arguments,
    }
}

/// `left += right`.
pub(super) fn tree_add(left: Address, right: Address, count: u64, multiprocessors: u32) -> Call {
    Call {
        kernel: Kernel::TreeAdd,
        grid: elementwise_grid(count, multiprocessors),
        arguments: vec![
            Argument::Address(left),
            Argument::Address(right),
            Count(count),
        ],
    }
}

/// Levels of the largest tree, over 256 shards.
pub(super) const LEVELS_MAX: u32 = 8;

/// The sum of 2^`level` vectors of `count` values that lie one after the other.
pub(super) fn tree_fold(
    partials: Address,
    sum: Address,
    count: u64,
    level: u32,
    multiprocessors: u32,
) -> Result<Call, TooLarge> {
    let level = at_most("levels", level as usize, LEVELS_MAX as i32)?;
    Ok(Call {
        kernel: Kernel::TreeFold,
        grid: elementwise_grid(count, multiprocessors),
        arguments: vec![
            Argument::Address(partials),
            Argument::Address(sum),
            Count(count),
            Int(level),
        ],
    })
}

/// Rows in a block of the kernels that go by rows.
const ROWS: usize = 16;

/// Columns in a block where sums go through the rows.
const COLUMNS: usize = 32;

/// Rows of equal length, without gaps.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    pub(super) rows: usize,
    pub(super) columns: usize,
}

impl Rows {
    fn call(
        self,
        kernel: Kernel,
        addresses: &[Address],
        epsilon: Option<f32>,
    ) -> Result<Call, TooLarge> {
        let columns = at_most("columns", self.columns, i32::MAX - 128)?;
        let blocks = match kernel {
            Kernel::LayerNormParametersBackward => self.columns.div_ceil(COLUMNS),
            Kernel::ColumnSums => self.columns.div_ceil(THREADS as usize),
            _ if self.columns == 0 => 0,
            _ => self.rows.div_ceil(ROWS),
        };
        let blocks = at_most("blocks of rows", blocks, i32::MAX)?;
        let mut arguments: Vec<Argument> =
            addresses.iter().copied().map(Argument::Address).collect();
        arguments.extend([Wide(self.rows as i64), Int(columns)]);
        arguments.extend(epsilon.map(Float));
        Ok(Call {
            kernel,
            grid: [blocks as u32, 1, 1],
            arguments,
        })
    }

    pub(super) fn softmax_forward(
        self,
        logits: Address,
        probabilities: Address,
    ) -> Result<Call, TooLarge> {
        self.call(Kernel::SoftmaxForward, &[logits, probabilities], None)
    }

    pub(super) fn softmax_backward(
        self,
        gradient: Address,
        probabilities: Address,
        result: Address,
    ) -> Result<Call, TooLarge> {
        let addresses = [gradient, probabilities, result];
        self.call(Kernel::SoftmaxBackward, &addresses, None)
    }

    /// Of values, scale and shift, into a result.
    pub(super) fn layer_norm_forward(
        self,
        [values, scale, shift]: [Address; 3],
        result: Address,
        epsilon: f32,
    ) -> Result<Call, TooLarge> {
        let addresses = [values, scale, shift, result];
        self.call(Kernel::LayerNormForward, &addresses, Some(epsilon))
    }

    /// Of values, scale and gradient, into the gradient of the values.
    pub(super) fn layer_norm_backward(
        self,
        [values, scale, gradient]: [Address; 3],
        result: Address,
        epsilon: f32,
    ) -> Result<Call, TooLarge> {
        let addresses = [values, scale, gradient, result];
        self.call(Kernel::LayerNormBackward, &addresses, Some(epsilon))
    }

    /// Mean and inverse deviation of each row, side by side.
    pub(super) fn layer_norm_moments(
        self,
        values: Address,
        moments: Address,
        epsilon: f32,
    ) -> Result<Call, TooLarge> {
        let addresses = [values, moments];
        self.call(Kernel::LayerNormMoments, &addresses, Some(epsilon))
    }

    /// Of values, gradient and moments, the gradients of scale and shift as two rows.
    pub(super) fn layer_norm_parameters_backward(
        self,
        [values, gradient, moments]: [Address; 3],
        result: Address,
    ) -> Result<Call, TooLarge> {
        let addresses = [values, gradient, moments, result];
        self.call(Kernel::LayerNormParametersBackward, &addresses, None)
    }
}
