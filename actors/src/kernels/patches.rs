//! Image patches as matrix rows ("im2col"), so that a convolution is one [`super::product()`].
//!
//! candle's own convolution spreads over threads and sums in an order that depends on the shape; this one
//! copies values in a fixed order, and its gradient adds them in the same order: an image is one thread's.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::division::divide_rows;
use super::product::copy_row;
use super::{Execution, contiguous_values};

/// Side of the square kernel; the image is padded by one zero all round.
pub const KERNEL_SIDE: usize = 3;
/// Positions in a kernel.
pub const KERNEL_AREA: usize = KERNEL_SIDE * KERNEL_SIDE;

/// The shape of one convolution's input.
#[derive(Debug, Clone, Copy)]
pub struct Patches {
    /// Height of the input.
    pub height: usize,
    /// Width of the input.
    pub width: usize,
    /// Channels of the input; the last dimension in memory.
    pub channels: usize,
    /// Distance between neighbouring patches.
    pub stride: usize,
}

impl Patches {
    /// Height and width of the output.
    #[must_use]
    pub fn output_size(&self) -> (usize, usize) {
        let output = |side: usize| side.div_ceil(self.stride);
        (output(self.height), output(self.width))
    }

    /// From `(images, height * width * channels)` to `(images * output height * output width,
    /// 9 * channels)`.
    pub fn extract(self, images: &Tensor) -> Result<Tensor> {
        images.apply_op1(self)
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

    fn row_len(&self) -> usize {
        KERNEL_AREA * self.channels
    }

    fn patches_len(&self) -> usize {
        self.output_len() * self.row_len()
    }

    /// Calls `visit(offset in the image, offset in the image's patches, length)` for every row of the kernel
    /// at every place of the output, in a fixed order, with the part of it that lies inside the image.
    #[inline(always)]
    fn for_each_run(&self, mut visit: impl FnMut(usize, usize, usize)) {
        let (height, width) = self.output_size();
        for row in 0..height * width {
            let (top, left) = (row / width * self.stride, row % width * self.stride);
            // The kernel begins one before; what lies outside by that, or beyond the other side, is left out.
            let first = usize::from(left == 0);
            let end = KERNEL_SIDE.min(self.width + 1 - left);
            for kernel_row in 0..KERNEL_SIDE {
                // Above the image it wraps, and is beyond the height too.
                let y = (top + kernel_row).wrapping_sub(1);
                if y < self.height {
                    let in_image = (y * self.width + left + first - 1) * self.channels;
                    let in_patch = (kernel_row * KERNEL_SIDE + first) * self.channels;
                    let length = (end - first) * self.channels;
                    visit(in_image, row * self.row_len() + in_patch, length);
                }
            }
        }
    }
}

impl CustomOp1 for Patches {
    fn name(&self) -> &'static str {
        "image-patches"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let images = contiguous_values(storage, layout, self.name())?;
        let count = images.len() / self.image_len();
        let mut patches = vec![0.0; count * self.patches_len()];
        let each = self.patches_len();
        divide_rows(Execution::current(), &mut patches, each, |range, part| {
            let images = &images[range.start * self.image_len()..range.end * self.image_len()];
            let images = images.chunks_exact(self.image_len());
            for (image, out) in images.zip(part.chunks_exact_mut(each)) {
                self.for_each_run(|from, to, length| {
                    copy_row(&image[from..from + length], &mut out[to..to + length]);
                });
            }
        });
        let rows = count * self.output_len();
        Ok((
            CpuStorage::F32(patches),
            Shape::from((rows, self.row_len())),
        ))
    }

    fn bwd(&self, images: &Tensor, _result: &Tensor, gradient: &Tensor) -> Result<Option<Tensor>> {
        if !images.track_op() {
            return Ok(None);
        }
        Ok(Some(
            gradient.contiguous()?.apply_op1_no_bwd(&Gathered(*self))?,
        ))
    }
}

/// The transpose of [`Patches`]: adds each patch value to the pixel that it came from.
struct Gathered(Patches);

impl CustomOp1 for Gathered {
    fn name(&self) -> &'static str {
        "image-patches-gathered"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let patches = contiguous_values(storage, layout, self.name())?;
        let shape = self.0;
        let count = patches.len() / shape.patches_len();
        let mut images = vec![0.0; count * shape.image_len()];
        let each = shape.image_len();
        divide_rows(Execution::current(), &mut images, each, |range, part| {
            let patches = &patches[range.start * shape.patches_len()..];
            let patches = patches.chunks_exact(shape.patches_len());
            for (image, from_patches) in part.chunks_exact_mut(each).zip(patches) {
                shape.for_each_run(|to, from, length| {
                    let added = &from_patches[from..from + length];
                    for (sum, value) in image[to..to + length].iter_mut().zip(added) {
                        *sum += value;
                    }
                });
            }
        });
        Ok((
            CpuStorage::F32(images),
            Shape::from((count, shape.image_len())),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::super::product;
    use super::*;
    use crate::training::random::{Purpose, Stream};
    use candle_core::{Device, Var};

    fn values(name: &str, count: usize) -> Vec<f32> {
        let stream = Stream::new(6, Purpose::Initialise, name, 0);
        (0..count)
            .map(|index| stream.normal(index as u64, 0) as f32)
            .collect()
    }

    /// Output and gradients against candle's convolution, which wants channels first.
    fn check((height, width): (usize, usize), channels: usize, outputs: usize, stride: usize) {
        let count = 3;
        let images = Var::from_vec(
            values("x", count * height * width * channels),
            (count, height * width * channels),
            &Device::Cpu,
        )
        .unwrap();
        let weight = Var::from_vec(
            values("w", KERNEL_AREA * channels * outputs),
            (KERNEL_AREA * channels, outputs),
            &Device::Cpu,
        )
        .unwrap();
        let patches = Patches {
            height,
            width,
            channels,
            stride,
        };
        let rows_out = patches.output_len();
        let ours = product(&patches.extract(&images).unwrap(), &weight).unwrap();
        let theirs = {
            let images = images.reshape((count, height, width, channels)).unwrap();
            let images = images.permute((0, 3, 1, 2)).unwrap().contiguous().unwrap();
            let kernel = weight
                .reshape((KERNEL_SIDE, KERNEL_SIDE, channels, outputs))
                .unwrap();
            let kernel = kernel.permute((3, 2, 0, 1)).unwrap().contiguous().unwrap();
            let result = images.conv2d(&kernel, 1, stride, 1, 1).unwrap();
            let result = result.permute((0, 2, 3, 1)).unwrap().contiguous().unwrap();
            result.reshape((count * rows_out, outputs)).unwrap()
        };
        let flat = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let close = |ours: &Tensor, theirs: &Tensor| {
            for (ours, theirs) in flat(ours).iter().zip(flat(theirs)) {
                assert!(
                    (ours - theirs).abs() < 1e-3 * theirs.abs().max(1.0),
                    "{ours} {theirs}"
                );
            }
        };
        close(&ours, &theirs);
        let ours = ours.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let theirs = theirs.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        for var in [&images, &weight] {
            close(
                ours.get(var.as_tensor()).unwrap(),
                theirs.get(var.as_tensor()).unwrap(),
            );
        }
    }

    #[test]
    fn a_product_of_patches_is_a_convolution() {
        check((8, 8), 1, 4, 1);
        check((8, 8), 3, 5, 2);
        check((5, 9), 2, 3, 2);
        check((3, 7), 2, 3, 1);
        check((1, 1), 2, 3, 2);
        check((1, 2), 2, 3, 1);
    }
}
