//! A disk so small that a test can fill it.

use std::fs::File;
use std::io::Write;
use std::path::Path;

/// A disk of its own, in memory. The mount is in a mount namespace that only this thread and the
/// processes that it starts have, so it goes with them however the test ends.
pub(super) struct SmallDisk {
    dir: tempfile::TempDir,
}

impl SmallDisk {
    /// `Err` says why this system does not allow it.
    pub(super) fn mount(size_bytes: u64) -> std::io::Result<Self> {
        let dir = tempfile::tempdir().unwrap();
        let target = std::ffi::CString::new(dir.path().to_str().unwrap()).unwrap();
        let options = std::ffi::CString::new(format!("size={size_bytes}")).unwrap();
        let succeeded = |result: i32| match result {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        };
        // SAFETY: unshare takes a number; the texts that mount gets end with a zero byte and live
        // until it returns, and null is allowed where it is given.
        unsafe {
            succeeded(libc::unshare(libc::CLONE_NEWNS))?;
            let private = libc::MS_REC | libc::MS_PRIVATE;
            let (none, root) = (std::ptr::null(), c"/".as_ptr());
            succeeded(libc::mount(none, root, none, private, none.cast()))?;
            let tmpfs = c"tmpfs".as_ptr();
            let options = options.as_ptr().cast();
            succeeded(libc::mount(tmpfs, target.as_ptr(), tmpfs, 0, options))?;
        }
        Ok(SmallDisk { dir })
    }

    pub(super) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Leaves no space at all.
    pub(super) fn fill(&self) {
        let filler = self.path().join("filler");
        let mut filler = File::options()
            .create(true)
            .append(true)
            .open(filler)
            .unwrap();
        let page = [0xA5; 4096];
        while filler.write_all(&page).is_ok() {}
    }

    pub(super) fn free(&self) {
        std::fs::remove_file(self.path().join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let target = std::ffi::CString::new(self.dir.path().to_str().unwrap()).unwrap();
        // SAFETY: the text ends with a zero byte and lives until the call returns.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}
