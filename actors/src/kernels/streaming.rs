//! Writing past the caches, to memory that is not read soon: its old contents are not loaded first, which is half of
//! what a copy of a large vector costs.

use std::marker::PhantomData;

/// Values that are being written. They may be read by anybody when this is dropped, and by nobody before.
#[derive(Default)]
pub(crate) struct PastCaches<'a> {
    written: PhantomData<&'a mut [f32]>,
}

impl<'a> PastCaches<'a> {
    /// Copies values.
    ///
    /// # Panics
    /// If the lengths differ.
    pub(crate) fn copy(&mut self, from: &[f32], to: &'a mut [f32]) {
        assert_eq!(from.len(), to.len(), "vectors of different lengths");
        copy(from, to);
    }
}

impl Drop for PastCaches<'_> {
    fn drop(&mut self) {
        // Such writes are in no order with others before this.
        // SAFETY: every processor of this architecture has it.
        #[cfg(target_arch = "x86_64")]
        unsafe {
            std::arch::x86_64::_mm_sfence();
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn copy(from: &[f32], to: &mut [f32]) {
    use std::arch::x86_64::{_mm_loadu_ps, _mm_stream_ps};

    /// A line of the caches; whole ones are written without being read.
    #[repr(align(64))]
    struct Line([f32; 16]);

    // SAFETY: any bits are an f32.
    let (head, lines, _) = unsafe { to.align_to_mut::<Line>() };
    let (start, whole) = (head.len(), lines.len() * 16);
    head.copy_from_slice(&from[..start]);
    for (line, values) in lines.iter_mut().zip(from[start..].as_chunks::<16>().0) {
        for quarter in [0, 4, 8, 12] {
            // SAFETY: both have four values from there on, and a quarter of a line is aligned as a vector is. Nobody reads
            // the line before the fence: it is borrowed until then.
            unsafe {
                let values = _mm_loadu_ps(values.as_ptr().add(quarter));
                _mm_stream_ps(line.0.as_mut_ptr().add(quarter), values);
            }
        }
    }
    to[start + whole..].copy_from_slice(&from[start + whole..]);
}

#[cfg(not(target_arch = "x86_64"))]
fn copy(from: &[f32], to: &mut [f32]) {
    to.copy_from_slice(from);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_arrives_wherever_the_target_begins() {
        let from: Vec<f32> = (0..200).map(|at| at as f32).collect();
        for start in 0..20 {
            for length in [0, 1, 15, 16, 17, 64, 150] {
                let mut to = vec![-1.0; 200];
                let mut writing = PastCaches::default();
                writing.copy(&from[..length], &mut to[start..start + length]);
                drop(writing);
                assert_eq!(to[start..start + length], from[..length], "{start}");
                let others = to[..start].iter().chain(&to[start + length..]);
                assert!(others.clone().all(|value| *value == -1.0), "{start}");
            }
        }
    }
}
