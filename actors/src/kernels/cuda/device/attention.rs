//! Causal attention. What is said of pairs of tokens is in memory for the time of one call, forward and backward.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Error, Layout, Result, Shape, bail};

use super::{Operand, in_place, multiprocessors, of_contiguous};
use crate::kernels::attention::Attention;

/// Refuses a tensor that has not the sizes of the attention, `columns` in widths of a token.
fn check(operation: &str, attention: &Attention, layout: &Layout, columns: usize) -> Result<()> {
    if layout.dims() != [attention.rows, columns * attention.width()]
        || !attention.rows.is_multiple_of(attention.context.max(1))
    {
        bail!(
            "{operation} of {:?} does not fit {attention:?}",
            layout.dims()
        )
    }
    Ok(())
}

/// How much each token looks at those up to it.
fn shares(projected: Operand<'_>, attention: &Attention) -> Result<(CudaStorage, Layout)> {
    let multiprocessors = multiprocessors(projected.0.device())?;
    let shape = Shape::from(attention.pair_count());
    let (mut shares, shape) =
        of_contiguous("attention", [projected], shape, |[projected], scores| {
            attention
                .scores(projected, scores, multiprocessors)
                .map_err(Error::wrap)
        })?;
    in_place("attention", &mut shares, [], |scores, []| {
        attention.shares(scores).map_err(Error::wrap)
    })?;
    Ok((shares, Layout::contiguous(shape)))
}

/// From `[rows, 3 * width]`, queries beside keys beside values, to `[rows, width]`.
pub(crate) fn attention_forward(
    projected: Operand<'_>,
    attention: &Attention,
) -> Result<(CudaStorage, Shape)> {
    check("attention", attention, projected.1, 3)?;
    let (shares, layout) = shares(projected, attention)?;
    let multiprocessors = multiprocessors(projected.0.device())?;
    let shape = Shape::from((attention.rows, attention.width()));
    let operands = [projected, (&shares, &layout)];
    of_contiguous("attention", operands, shape, |addresses, result| {
        attention
            .forward(addresses, result, multiprocessors)
            .map_err(Error::wrap)
    })
}

/// Of what was projected and the gradient of the result, the gradient of what was projected.
pub(crate) fn attention_backward(
    projected: Operand<'_>,
    gradient: Operand<'_>,
    attention: &Attention,
) -> Result<(CudaStorage, Shape)> {
    const NAME: &str = "attention-backward";
    check(NAME, attention, projected.1, 3)?;
    check(NAME, attention, gradient.1, 1)?;
    let (shares, layout) = shares(projected, attention)?;
    let multiprocessors = multiprocessors(projected.0.device())?;
    let shape = Shape::from(attention.pair_count());
    let operands = [projected, gradient];
    let (mut slopes, _) = of_contiguous(NAME, operands, shape, |addresses, slopes| {
        attention
            .slopes(addresses, slopes, multiprocessors)
            .map_err(Error::wrap)
    })?;
    let operands = [(&shares, &layout)];
    in_place(NAME, &mut slopes, operands, |slopes, [shares]| {
        attention
            .scores_backward(shares, slopes)
            .map_err(Error::wrap)
    })?;
    let operands = [projected, gradient, (&shares, &layout), (&slopes, &layout)];
    let shape = projected.1.shape().clone();
    of_contiguous(NAME, operands, shape, |addresses, result| {
        attention
            .backward(addresses, result, multiprocessors)
            .map_err(Error::wrap)
    })
}
