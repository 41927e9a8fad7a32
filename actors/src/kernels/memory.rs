//! Keeps what one step frees for the next.
//!
//! A step makes and drops the same large tensors as the one before. glibc gives such memory back to the kernel, and the
//! kernel gives it out again page by page, zeroed: in a convolution's step that took more time than its arithmetic.

/// Tells the C library to keep up to 2 GiB of freed memory for this process's next allocations. It stays with the
/// process: what is kept is never more than was in use at once before. Does nothing where the library is not glibc.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// The largest that glibc takes; larger blocks are mapped one by one still.
        const MAPPED_FROM_BYTES: libc::c_int = 32 << 20;
        // SAFETY: both only change numbers that the allocator reads under its lock.
        let taken = unsafe {
            [
                libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_FROM_BYTES),
                libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX),
            ]
        };
        if taken.contains(&0) {
            tracing::debug!("the C library does not keep freed memory; steps will be slower");
        }
    }
}
