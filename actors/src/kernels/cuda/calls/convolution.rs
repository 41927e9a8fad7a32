//! From images to patches, and the way back.

use super::super::call::{Address, Argument, Call, Kernel, TooLarge, at_most};
use super::elementwise_grid;
use crate::kernels::convolution::Images;

/// Some images of one size.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct ImageBatch {
    pub(in super::super) shape: Images,
    pub(in super::super) count: usize,
}

impl ImageBatch {
    /// Rows of patches: a place of the output each.
    pub(in super::super) fn places(&self) -> usize {
        self.count * self.shape.output_len()
    }

    /// The patches of the images, a row each.
    pub(in super::super) fn patches(
        &self,
        images: Address,
        patches: Address,
        multiprocessors: u32,
    ) -> Result<Call, TooLarge> {
        let values = self.places().saturating_mul(self.shape.patch_len());
        self.call(Kernel::Patches, [images, patches], values, multiprocessors)
    }

    /// Of the patches' gradients, the images'.
    pub(in super::super) fn patches_backward(
        &self,
        patches: Address,
        images: Address,
        multiprocessors: u32,
    ) -> Result<Call, TooLarge> {
        // The kernel counts places in the patches, too.
        at_most(
            "values of patches",
            self.places().saturating_mul(self.shape.patch_len()),
            i32::MAX,
        )?;
        let values = self.count.saturating_mul(self.shape.image_len());
        let addresses = [patches, images];
        self.call(Kernel::PatchesBackward, addresses, values, multiprocessors)
    }

    /// A call that goes through the `values` of its result.
    fn call(
        &self,
        kernel: Kernel,
        addresses: [Address; 2],
        values: usize,
        multiprocessors: u32,
    ) -> Result<Call, TooLarge> {
        let (output_height, output_width) = self.shape.output_size();
        let mut arguments = addresses.map(Argument::Address).to_vec();
        for (what, size) in [
            ("values of images or patches", values),
            ("rows of an image", self.shape.height),
            ("columns of an image", self.shape.width),
            ("channels", self.shape.channels),
            ("places between patches", self.shape.stride),
            ("rows of an output", output_height),
            ("columns of an output", output_width),
        ] {
            arguments.push(Argument::Int(at_most(what, size, i32::MAX)?));
        }
        Ok(Call {
            kernel,
            grid: elementwise_grid(values as u64, multiprocessors),
            arguments,
        })
    }
}
