//! Convolutions: patches of all images of a call in memory, and products of them.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Error, Layout, Result, Shape, bail};

use super::super::calls::convolution::ImageBatch;
use super::dense::add_bias;
use super::{Operand, multiprocessors, of_contiguous, product};
use crate::kernels::Activation;
use crate::kernels::convolution::Images;

/// The patches of images, a row each, and what there is of them.
fn patches(
    images: Operand<'_>,
    shape: Images,
    operation: &str,
) -> Result<(CudaStorage, Layout, ImageBatch)> {
    let (count, image_len) = images.1.shape().dims2()?;
    if image_len != shape.image_len() {
        bail!("{operation} of images of {image_len} values, which do not fit {shape:?}")
    }
    let batch = ImageBatch { shape, count };
    let multiprocessors = multiprocessors(images.0.device())?;
    let rows = Shape::from((batch.places(), shape.patch_len()));
    let (patches, rows) = of_contiguous(operation, [images], rows, |[images], patches| {
        batch
            .patches(images, patches, multiprocessors)
            .map_err(Error::wrap)
    })?;
    Ok((patches, Layout::contiguous(rows), batch))
}

/// A contiguous tensor as a matrix of other sizes.
fn matrix(layout: &Layout, rows: usize, columns: usize, operation: &str) -> Result<Layout> {
    match layout.contiguous_offsets() {
        Some((start, end)) if end - start == rows * columns => {
            Ok(Layout::contiguous_with_offset((rows, columns), start))
        }
        _ => bail!("{operation} needs {rows} rows of {columns} values, not {layout:?}"),
    }
}

/// Images by a weight, plus a bias, then the activation.
pub(in crate::kernels) fn convolution_forward(
    [images, weight, bias]: [Operand<'_>; 3],
    shape: Images,
    activation: Activation,
) -> Result<(CudaStorage, Shape)> {
    let (patches, patches_layout, batch) = patches(images, shape, "convolution")?;
    let outputs = bias.1.shape().elem_count();
    let weight_layout = matrix(weight.1, shape.patch_len(), outputs, "convolution")?;
    let sizes = [batch.places(), shape.patch_len(), outputs];
    let result_shape = Shape::from((batch.places(), outputs));
    let operands = ((&patches, &patches_layout), (weight.0, &weight_layout));
    let (mut result, _) = product(operands.0, operands.1, sizes, result_shape)?;
    add_bias(&mut result, batch.places(), bias, activation)?;
    let shape = Shape::from((batch.count, shape.output_len() * outputs));
    Ok((result, shape))
}

/// Of weight and gradient, the gradient of images of this shape.
pub(in crate::kernels) fn convolution_images_backward(
    images: &Shape,
    [weight, gradient]: [Operand<'_>; 2],
    shape: Images,
) -> Result<(CudaStorage, Shape)> {
    const NAME: &str = "convolution-images-backward";
    let (count, _) = images.dims2()?;
    let batch = ImageBatch { shape, count };
    let (patch_len, outputs) = weight.1.shape().dims2()?;
    let weight_layout = matrix(weight.1, shape.patch_len(), outputs, NAME)?.transpose(0, 1)?;
    let gradient_layout = matrix(gradient.1, batch.places(), outputs, NAME)?;
    let sizes = [batch.places(), outputs, patch_len];
    let (patches, rows) = product(
        (gradient.0, &gradient_layout),
        (weight.0, &weight_layout),
        sizes,
        Shape::from((batch.places(), patch_len)),
    )?;
    let rows = Layout::contiguous(rows);
    let multiprocessors = multiprocessors(patches.device())?;
    let operands = [(&patches, &rows)];
    of_contiguous(NAME, operands, images.clone(), |[patches], images| {
        batch
            .patches_backward(patches, images, multiprocessors)
            .map_err(Error::wrap)
    })
}

/// Of images and gradient, the gradient of a weight of this shape: one chain through the patches of all images.
pub(in crate::kernels) fn convolution_weight_backward(
    [images, gradient]: [Operand<'_>; 2],
    weight: &Shape,
    shape: Images,
) -> Result<(CudaStorage, Shape)> {
    const NAME: &str = "convolution-weight-backward";
    let (patches, patches_layout, batch) = patches(images, shape, NAME)?;
    let (patch_len, outputs) = weight.dims2()?;
    if patch_len != shape.patch_len() {
        bail!("{NAME} of a weight of {weight:?}, which does not fit {shape:?}")
    }
    let gradient_layout = matrix(gradient.1, batch.places(), outputs, NAME)?;
    let patches_layout = patches_layout.transpose(0, 1)?;
    product(
        (&patches, &patches_layout),
        (gradient.0, &gradient_layout),
        [patch_len, batch.places(), outputs],
        weight.clone(),
    )
}
