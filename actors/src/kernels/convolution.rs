//! Convolution with a kernel of 3 by 3 as a product of patches ("im2col"), bias and rectifier included.
//!
//! candle's own convolution spreads over threads and sums in an order that depends on the shape. Here an output is
//! one chain over its patch, as of a [`super::affine()`] of patches, and a pixel's gradient is added up patch by
//! patch. The patches of one image are made when they are multiplied: they never are in memory all at once.
//!
//! Order: of the output and the bias, that of `affine`; of the weight's gradient, one chain through the patches of
//! all images in ascending order; of an image's gradient, ascending places of the output.

use std::cell::RefCell;
use std::ops::Range;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};

use super::affine::{Activation, add_bias, bias_gradient, slope};
#[cfg(feature = "cuda")]
use super::cuda::device;
use super::division::{Shared, divide};
use super::product::{MatrixView, copy_row, multiply, multiply_add};
use super::{Execution, contiguous_values, gradients};

/// Side of the square kernel; the image is padded by one zero all round.
pub const KERNEL_SIDE: usize = 3;
/// Positions in a kernel.
pub const KERNEL_AREA: usize = KERNEL_SIDE * KERNEL_SIDE;

/// The shape of a convolution's input, and its stride.
#[derive(Debug, Clone, Copy)]
pub struct Images {
    /// Height of the input.
    pub height: usize,
    /// Width of the input.
    pub width: usize,
    /// Channels of the input; the last dimension in memory.
    pub channels: usize,
    /// Distance between neighbouring patches.
    pub stride: usize,
}

impl Images {
    /// Height and width of the output.
    #[must_use]
    pub fn output_size(&self) -> (usize, usize) {
        let output = |side: usize| side.div_ceil(self.stride);
        (output(self.height), output(self.width))
    }

    /// Values of one image.
    #[must_use]
    pub fn image_len(&self) -> usize {
        self.height * self.width * self.channels
    }

    /// Places of the output of one image.
    #[must_use]
    pub fn output_len(&self) -> usize {
        let (height, width) = self.output_size();
        height * width
    }

    /// Values of a patch.
    #[must_use]
    pub fn patch_len(&self) -> usize {
        KERNEL_AREA * self.channels
    }

    /// Calls `visit(offset in the image, place of the output, offset in the patch, length)` for every row of the
    /// kernel at every place of the output, with the part of it that lies inside the image. What is visited of one
    /// pixel comes in ascending places.
    #[inline(always)]
    fn for_each_run(&self, mut visit: impl FnMut(usize, usize, usize, usize)) {
        // The usual first layer, with runs of three values: their length must be known to be fast.
        match self.channels {
            1 => self.for_each_run_of(1, &mut visit),
            channels => self.for_each_run_of(channels, &mut visit),
        }
    }

    #[inline(always)]
    fn for_each_run_of(&self, channels: usize, visit: &mut impl FnMut(usize, usize, usize, usize)) {
        let (height, width) = self.output_size();
        for row in 0..height {
            for kernel_row in 0..KERNEL_SIDE {
                // The kernel begins one before: above the image it wraps, and is beyond the height too.
                let y = (row * self.stride + kernel_row).wrapping_sub(1);
                if y >= self.height {
                    continue;
                }
                let (image, patch) = (y * self.width, kernel_row * KERNEL_SIDE);
                // What lies outside at the left, or beyond the other side, is left out.
                let first = KERNEL_SIDE.min(self.width + 1) - 1;
                visit(
                    image * channels,
                    row * width,
                    (patch + 1) * channels,
                    first * channels,
                );
                for column in 1..width {
                    let left = column * self.stride - 1;
                    let (from, place) = ((image + left) * channels, row * width + column);
                    match KERNEL_SIDE.min(self.width - left) {
                        KERNEL_SIDE => visit(from, place, patch * channels, KERNEL_SIDE * channels),
                        cut => visit(from, place, patch * channels, cut * channels),
                    }
                }
            }
        }
    }

    /// Writes what `part` of its patches says of an image, a row for each place of the output. What lies outside of
    /// the image stays as it is.
    fn extract(&self, image: &[f32], part: &Range<usize>, patches: &mut [f32]) {
        let patch_len = self.patch_len();
        if part.len() == patch_len {
            return self.for_each_run(|from, place, in_patch, length| {
                let to = place * patch_len + in_patch;
                copy_row(&image[from..from + length], &mut patches[to..to + length]);
            });
        }
        self.for_each_run(|from, place, in_patch, length| {
            let start = in_patch.max(part.start);
            let end = (in_patch + length).min(part.end);
            if start < end {
                let from = from + start - in_patch;
                let to = place * part.len() + start - part.start;
                let length = end - start;
                copy_row(&image[from..from + length], &mut patches[to..to + length]);
            }
        });
    }

    /// Adds each patch value to the pixel that it came from.
    fn gather(&self, patches: &[f32], image: &mut [f32]) {
        let patch_len = self.patch_len();
        self.for_each_run(|to, place, in_patch, length| {
            let from = place * patch_len + in_patch;
            let added = &patches[from..from + length];
            for (sum, value) in image[to..to + length].iter_mut().zip(added) {
                *sum += value;
            }
        });
    }
}

/// Images `(count, height * width * channels)` by a weight `(9 * channels, outputs)`, plus a bias `(outputs)`, then
/// the activation: `(count, output height * output width * outputs)`.
pub fn convolution(
    images: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    shape: Images,
    activation: Activation,
) -> Result<Tensor> {
    let (&[_, image_len], &[patch_len, outputs]) = (images.dims(), weight.dims()) else {
        bail!(
            "a convolution needs rows and a matrix, not {:?} and {:?}",
            images.dims(),
            weight.dims()
        )
    };
    if image_len != shape.image_len() || patch_len != shape.patch_len() || bias.dims() != [outputs]
    {
        bail!(
            "images of {image_len} values, a weight of {patch_len} by {outputs} and a bias of {:?} do not fit {shape:?}",
            bias.dims()
        )
    }
    images.contiguous()?.apply_op3(
        &weight.contiguous()?,
        &bias.contiguous()?,
        Convolution { shape, activation },
    )
}

#[derive(Debug, Clone, Copy)]
struct Convolution {
    shape: Images,
    activation: Activation,
}

impl CustomOp3 for Convolution {
    fn name(&self) -> &'static str {
        "convolution"
    }

    fn cpu_fwd(
        &self,
        images: &CpuStorage,
        layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let images = contiguous_values(images, layout, self.name())?;
        let weight = contiguous_values(weight, weight_layout, self.name())?;
        let bias = contiguous_values(bias, bias_layout, self.name())?;
        let (shape, outputs) = (self.shape, bias.len());
        let (places, patch_len) = (shape.output_len(), shape.patch_len());
        let weight = MatrixView::row_major(weight, patch_len, outputs);
        let count = layout.dims()[0];
        let mut result = vec![0.0; count * places * outputs];
        by_images(
            &shape,
            &mut result,
            places * outputs,
            |execution, range, part| {
                let images = images[range.start * shape.image_len()..range.end * shape.image_len()]
                    .chunks_exact(shape.image_len());
                with_patches(places * patch_len, |patches| {
                    for (image, sums) in images.zip(part.chunks_exact_mut(places * outputs)) {
                        shape.extract(image, &(0..patch_len), patches);
                        let patches = MatrixView::row_major(patches, places, patch_len);
                        multiply(execution, &patches, &weight, sums);
                        add_bias(execution, sums, bias, self.activation);
                    }
                });
            },
        );
        Ok((
            CpuStorage::F32(result),
            Shape::from((count, places * outputs)),
        ))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        images: &CudaStorage,
        layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let operands = [
            (images, layout),
            (weight, weight_layout),
            (bias, bias_layout),
        ];
        device::convolution_forward(operands, self.shape, self.activation)
    }

    fn bwd(
        &self,
        images: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let gradient = slope(self.activation, result, &gradient.contiguous()?)?;
        // The input of the first layer needs no gradient; computing it would cost a third of the step.
        let for_images = match images.track_op() {
            true => {
                Some(images.apply_op3_no_bwd(weight, &gradient, &ImagesBackward(self.shape))?)
            }
            false => None,
        };
        let for_weight = match weight.track_op() {
            true => {
                let sum =
                    images.apply_op3_no_bwd(weight, &gradient, &WeightBackward(self.shape))?;
                gradients::keep(weight, sum)?
            }
            false => None,
        };
        let for_bias = match bias.track_op() {
            true => {
                let rows = gradient.reshape(((), bias.elem_count()))?;
                gradients::keep(bias, bias_gradient(&rows)?)?
            }
            false => None,
        };
        Ok((for_images, for_weight, for_bias))
    }
}

/// Of images (for their shape), weight and gradient, the gradient of the images.
pub(super) struct ImagesBackward(pub(super) Images);

impl CustomOp3 for ImagesBackward {
    fn name(&self) -> &'static str {
        "convolution-images-backward"
    }

    fn cpu_fwd(
        &self,
        _images: &CpuStorage,
        layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let weight = contiguous_values(weight, weight_layout, self.name())?;
        let gradient = contiguous_values(gradient, gradient_layout, self.name())?;
        let shape = self.0;
        let (places, patch_len) = (shape.output_len(), shape.patch_len());
        let outputs = weight.len() / patch_len;
        let weight = MatrixView::row_major(weight, patch_len, outputs).transposed();
        let mut result = vec![0.0; layout.shape().elem_count()];
        by_images(
            &shape,
            &mut result,
            shape.image_len(),
            |execution, range, part| {
                let gradients = gradient
                    [range.start * places * outputs..range.end * places * outputs]
                    .chunks_exact(places * outputs);
                with_patches(places * patch_len, |patches| {
                    for (gradient, image) in gradients.zip(part.chunks_exact_mut(shape.image_len()))
                    {
                        let gradient = MatrixView::row_major(gradient, places, outputs);
                        multiply(execution, &gradient, &weight, patches);
                        shape.gather(patches, image);
                    }
                });
            },
        );
        Ok((CpuStorage::F32(result), layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _images: &CudaStorage,
        layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
        gradient: &CudaStorage,
        gradient_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let operands = [(weight, weight_layout), (gradient, gradient_layout)];
        device::convolution_images_backward(layout.shape(), operands, self.0)
    }
}

/// Of images, weight (for its shape) and gradient, the gradient of the weight.
pub(super) struct WeightBackward(pub(super) Images);

impl CustomOp3 for WeightBackward {
    fn name(&self) -> &'static str {
        "convolution-weight-backward"
    }

    fn cpu_fwd(
        &self,
        images: &CpuStorage,
        layout: &Layout,
        _weight: &CpuStorage,
        weight_layout: &Layout,
        gradient: &CpuStorage,
        gradient_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let images = contiguous_values(images, layout, self.name())?;
        let gradient = contiguous_values(gradient, gradient_layout, self.name())?;
        let shape = self.0;
        let (places, patch_len) = (shape.output_len(), shape.patch_len());
        let (_, outputs) = weight_layout.shape().dims2()?;
        let mut result = vec![0.0; patch_len * outputs];
        let shared = Shared::new(&mut result);
        // Images follow one another in the chains, so threads divide the rows of the weight.
        let work_each = layout.dims()[0] * places * outputs;
        let one = Execution::current().with_threads(std::num::NonZeroUsize::MIN);
        divide(Execution::current(), patch_len, work_each, 1, |rows| {
            // SAFETY: the ranges do not overlap.
            let sums = unsafe { shared.part(rows.start * outputs..rows.end * outputs) };
            let images = images.chunks_exact(shape.image_len());
            with_patches(places * rows.len(), |patches| {
                for (image, gradient) in images.zip(gradient.chunks_exact(places * outputs)) {
                    shape.extract(image, &rows, patches);
                    multiply_add(
                        one,
                        &MatrixView::row_major(patches, places, rows.len()).transposed(),
                        &MatrixView::row_major(gradient, places, outputs),
                        sums,
                    );
                }
            });
        });
        Ok((CpuStorage::F32(result), weight_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        images: &CudaStorage,
        layout: &Layout,
        _weight: &CudaStorage,
        weight_layout: &Layout,
        gradient: &CudaStorage,
        gradient_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let operands = [(images, layout), (gradient, gradient_layout)];
        device::convolution_weight_backward(operands, weight_layout.shape(), self.0)
    }
}

/// Calls `work` with some images and their part of `output`, where each has `each` values, on several threads; an
/// image is one thread's.
fn by_images(
    shape: &Images,
    output: &mut [f32],
    each: usize,
    work: impl Fn(Execution, Range<usize>, &mut [f32]) + Sync,
) {
    let execution = Execution::current();
    let one = execution.with_threads(std::num::NonZeroUsize::MIN);
    let count = output.len().checked_div(each).unwrap_or_default();
    let shared = Shared::new(output);
    let work_each = shape.output_len() * shape.patch_len();
    divide(execution, count, work_each, 1, |range| {
        // SAFETY: the ranges do not overlap.
        let part = unsafe { shared.part(range.start * each..range.end * each) };
        work(one, range, part);
    });
}

/// Gives `work` room for one image's patches, all zeros: what lies outside of an image stays so.
fn with_patches<R>(values: usize, work: impl FnOnce(&mut [f32]) -> R) -> R {
    thread_local! {
        /// Kept from layer to layer; as large as the largest image's.
        static PATCHES: RefCell<Vec<f32>> = RefCell::default();
    }
    PATCHES.with_borrow_mut(|patches| {
        patches.clear();
        patches.resize(values, 0.0);
        work(patches)
    })
}

#[cfg(test)]
mod tests;
