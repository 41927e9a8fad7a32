//! Dense layers, GELU, and the loss at the end.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, DevicePtrMut};
use candle_core::{CudaStorage, Error, Layout, Result, Shape, bail};

use super::super::call::Address;
use super::super::calls::{self, dense};
use super::{
    Contiguous, Operand, in_place, launch, multiprocessors, of_contiguous, one_a_column, product,
    read, rows_of, same_dims, written,
};
use crate::kernels::Activation;

/// Rows by a weight, plus a bias, then the activation.
pub(in crate::kernels) fn affine_forward(
    [values, weight, bias]: [Operand<'_>; 3],
    activation: Activation,
) -> Result<(CudaStorage, Shape)> {
    let (inputs, outputs) = weight.1.shape().dims2()?;
    let (rows, Some((start, _))) = (rows_of(values.1), values.1.contiguous_offsets()) else {
        bail!("affine needs contiguous values, not {:?}", values.1)
    };
    if rows.columns != inputs {
        bail!(
            "rows of {} values do not fit a dense layer of {inputs} inputs",
            rows.columns
        )
    }
    let matrix = Layout::contiguous_with_offset((rows.rows, inputs), start);
    let shape = Shape::from((rows.rows, outputs));
    let sizes = [rows.rows, inputs, outputs];
    let (mut result, _) = product((values.0, &matrix), weight, sizes, shape)?;
    add_bias(&mut result, rows.rows, bias, activation)?;
    let mut dims = values.1.dims().to_vec();
    *dims.last_mut().expect("rows have a dimension") = outputs;
    Ok((result, Shape::from(dims)))
}

/// Adds the bias to each of the rows that a tensor has, and applies the activation.
pub(super) fn add_bias(
    values: &mut CudaStorage,
    rows: usize,
    bias: Operand<'_>,
    activation: Activation,
) -> Result<()> {
    let columns = bias.1.shape().elem_count();
    let rows = calls::Rows { rows, columns };
    if values.as_cuda_slice::<f32>()?.len() != rows.rows * columns {
        bail!("a bias of {columns} values for other rows")
    }
    one_a_column("affine", rows, bias)?;
    let multiprocessors = multiprocessors(values.device())?;
    in_place("affine", values, [bias], |values, [bias]| {
        dense::add_bias(values, bias, rows, activation.floor(), multiprocessors)
            .map_err(Error::wrap)
    })
}

/// Of the gradient and the rectifier's result, that of what the rectifier was applied to.
pub(in crate::kernels) fn rectifier_backward(
    gradient: Operand<'_>,
    result: Operand<'_>,
) -> Result<(CudaStorage, Shape)> {
    const NAME: &str = "relu-backward";
    same_dims(NAME, gradient, result)?;
    let shape = result.1.shape().clone();
    let count = shape.elem_count() as u64;
    let multiprocessors = multiprocessors(result.0.device())?;
    of_contiguous(NAME, [gradient, result], shape, |addresses, slope| {
        Ok(dense::rectifier_backward(
            addresses,
            slope,
            count,
            multiprocessors,
        ))
    })
}

/// The sum of each column.
pub(in crate::kernels) fn column_sums(values: Operand<'_>) -> Result<(CudaStorage, Shape)> {
    let rows = rows_of(values.1);
    let shape = Shape::from(rows.columns);
    of_contiguous("column-sums", [values], shape, |[values], sums| {
        rows.column_sums(values, sums).map_err(Error::wrap)
    })
}

/// GELU of each value.
pub(in crate::kernels) fn gelu_forward(values: Operand<'_>) -> Result<(CudaStorage, Shape)> {
    let shape = values.1.shape().clone();
    let count = shape.elem_count() as u64;
    let multiprocessors = multiprocessors(values.0.device())?;
    of_contiguous("gelu", [values], shape, |[values], result| {
        Ok(dense::gelu_forward(values, result, count, multiprocessors))
    })
}

/// Of values and gradient, the gradient of the values.
pub(in crate::kernels) fn gelu_backward(
    values: Operand<'_>,
    gradient: Operand<'_>,
) -> Result<(CudaStorage, Shape)> {
    const NAME: &str = "gelu-backward";
    same_dims(NAME, values, gradient)?;
    let shape = values.1.shape().clone();
    let count = shape.elem_count() as u64;
    let multiprocessors = multiprocessors(values.0.device())?;
    of_contiguous(NAME, [values, gradient], shape, |addresses, result| {
        Ok(dense::gelu_backward(
            addresses,
            result,
            count,
            multiprocessors,
        ))
    })
}

/// Of rows of logits, the gradient of their loss times `scale`, and of each row three numbers of which the CPU makes the
/// loss: the largest logit, the sum of the exponentials, the label's logit. The labels are below the number of columns.
pub(in crate::kernels) fn cross_entropy(
    logits: Operand<'_>,
    labels: &[u32],
    scale: f32,
) -> Result<(CudaStorage, Vec<f32>)> {
    let rows = rows_of(logits.1);
    let is_below = |label: &u32| (*label as usize) < rows.columns;
    if labels.len() != rows.rows || !labels.iter().all(is_below) {
        bail!("{} labels do not fit {rows:?} of logits", labels.len())
    }
    let device = logits.0.device().clone();
    let stream = device.cuda_stream();
    let contiguous = Contiguous::of(logits.0, logits.1, "cross-entropy")?;
    let labels = device.clone_htod(labels)?;
    // SAFETY: the kernel writes each value of both; nothing reads them before.
    let (mut gradient, mut facts) = unsafe {
        (
            device.alloc::<f32>(rows.rows * rows.columns)?,
            device.alloc::<f32>(rows.rows * dense::FACTS)?,
        )
    };
    {
        let (start, _logits_read) = read!(contiguous.values, &stream);
        let (labels, _labels_read) = read!(&labels, &stream);
        let (gradient, _gradient_written) = written!(&mut gradient, &stream);
        let (facts, _facts_written) = written!(&mut facts, &stream);
        let call = rows
            .cross_entropy(
                [contiguous.address(start), labels],
                [gradient, facts],
                scale,
            )
            .map_err(Error::wrap)?;
        // SAFETY: the logits have the size of their layout, there is a label for each row, the results are new.
        unsafe { launch(&device, &call)? };
    }
    let facts = device.clone_dtoh(&facts)?;
    Ok((CudaStorage::wrap_cuda_slice(gradient, device), facts))
}

/// A scalar, zero, where `beside` is.
pub(in crate::kernels) fn zero(beside: &CudaStorage) -> Result<(CudaStorage, Shape)> {
    let device = beside.device().clone();
    let zero = device.alloc_zeros::<f32>(1)?;
    Ok((CudaStorage::wrap_cuda_slice(zero, device), Shape::from(())))
}

/// Replaces a tensor's values.
pub(in crate::kernels) fn overwrite(
    storage: &mut CudaStorage,
    layout: &Layout,
    values: &[f32],
) -> Result<()> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("only contiguous f32 variables are overwritten, not {layout:?}")
    };
    if end - start != values.len() {
        bail!("{} values for a variable of {}", values.len(), end - start)
    }
    let device = storage.device().clone();
    let place = storage.as_cuda_slice_mut::<f32>()?;
    device.memcpy_htod(values, &mut place.slice_mut(start..end))
}
