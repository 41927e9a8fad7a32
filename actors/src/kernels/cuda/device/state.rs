//! What a training's state needs: AdamW over flat vectors, and sums of gradients as the canonical tree adds them.

use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DevicePtr, DevicePtrMut};
use candle_core::{CudaDevice, Error, Result, bail};

use super::super::call::Address;
use super::super::calls::{self, Moved};
use super::super::digest::WrittenDigest;
use super::{launch, multiprocessors, read, written};
use crate::kernels::update::AdamwUpdate;

/// One part of the state of a training on a GPU: parameters, and AdamW's moments.
#[derive(Debug)]
pub struct FlatState {
    /// Parameters.
    pub params: CudaSlice<f32>,
    /// Running means of the gradient.
    pub means: CudaSlice<f32>,
    /// Running means of its square.
    pub squares: CudaSlice<f32>,
}

impl FlatState {
    /// Updates the state in place, in one pass, and returns the digest of what was written. `first` is the position of
    /// this part in the whole. Waits for the GPU, because of the digest.
    ///
    /// # Errors
    /// If the lengths differ, or the GPU fails.
    pub fn adamw(
        &mut self,
        device: &CudaDevice,
        update: &AdamwUpdate,
        grads: &CudaSlice<f32>,
        first: u64,
    ) -> Result<WrittenDigest> {
        let mut digest = device.alloc_zeros::<u64>(2)?;
        self.adamw_into(device, update, grads, first, &mut digest)?;
        match device.clone_dtoh(&digest)?[..] {
            [low, high] => Ok(WrittenDigest { low, high }),
            _ => bail!("a digest is two numbers"),
        }
    }

    /// As [`FlatState::adamw`], without waiting: the digest is added to the two numbers of `digest`.
    ///
    /// # Errors
    /// If the lengths differ, or the GPU fails.
    pub fn adamw_into(
        &mut self,
        device: &CudaDevice,
        update: &AdamwUpdate,
        grads: &CudaSlice<f32>,
        first: u64,
        digest: &mut CudaSlice<u64>,
    ) -> Result<()> {
        let count = grads.len();
        for (what, length, expected) in [
            ("parameters", self.params.len(), count),
            ("means", self.means.len(), count),
            ("squares", self.squares.len(), count),
            ("digest", digest.len(), 2),
        ] {
            if length != expected {
                bail!("{what} of {length} values where {expected} are needed")
            }
        }
        let stream = device.cuda_stream();
        let (params, _params) = written!(&mut self.params, &stream);
        let (means, _means) = written!(&mut self.means, &stream);
        let (squares, _squares) = written!(&mut self.squares, &stream);
        let (grads, _grads) = read!(grads, &stream);
        let (digest, _digest) = written!(digest, &stream);
        let moved = Moved {
            params,
            means,
            squares,
            grads,
            count: count as u64,
            first,
        };
        let call = calls::adamw(update, &moved, digest, multiprocessors(device)?);
        // SAFETY: four vectors of `count` values and two sums, as just checked, each borrowed for this call.
        unsafe { launch(device, &call) }
    }
}

/// `left += right`: the sum of two neighbours in the tree.
///
/// # Errors
/// If the lengths differ, or the GPU fails.
pub fn tree_add(
    device: &CudaDevice,
    left: &mut CudaSlice<f32>,
    right: &CudaSlice<f32>,
) -> Result<()> {
    let count = left.len();
    if count != right.len() {
        bail!("a sum of vectors of {count} and {} values", right.len())
    }
    let stream = device.cuda_stream();
    let (left, _left) = written!(left, &stream);
    let (right, _right) = read!(right, &stream);
    let call = calls::tree_add(left, right, count as u64, multiprocessors(device)?);
    // SAFETY: two vectors of `count` values, both borrowed, one of them alone.
    unsafe { launch(device, &call) }
}

/// The sum of the subtree over 2^`level` vectors of equal length, which lie in `partials` in the order of their shards.
///
/// # Errors
/// If they are not that many, or the GPU fails.
pub fn tree_fold(
    device: &CudaDevice,
    partials: &CudaSlice<f32>,
    level: u32,
) -> Result<CudaSlice<f32>> {
    if level > calls::LEVELS_MAX || !partials.len().is_multiple_of(1 << level) {
        bail!(
            "{} values are not 2^{level} vectors of one length, of at most 2^{}",
            partials.len(),
            calls::LEVELS_MAX
        )
    }
    let count = partials.len() >> level;
    // SAFETY: the kernel writes each value; nothing reads one before.
    let mut sum = unsafe { device.alloc::<f32>(count)? };
    {
        let stream = device.cuda_stream();
        let (partials, _partials) = read!(partials, &stream);
        let (sum, _sum) = written!(&mut sum, &stream);
        let multiprocessors = multiprocessors(device)?;
        let call = calls::tree_fold(partials, sum, count as u64, level, multiprocessors)
            .map_err(Error::wrap)?;
        // SAFETY: 2^level vectors of `count` values, and a new one.
        unsafe { launch(device, &call)? };
    }
    Ok(sum)
}
