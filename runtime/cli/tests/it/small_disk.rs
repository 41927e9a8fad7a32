//! A disk so small that a test can fill it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// A disk of its own, in memory. The mount is in a mount namespace that only this thread and the
/// processes that it starts have, so it goes with them however the test ends.
pub(crate) struct SmallDisk {
    path: PathBuf,
    /// Where it is mounted, if the disk brought the directory along.
    _dir: Option<tempfile::TempDir>,
}

impl SmallDisk {
    /// `Err` says why this system does not allow it.
    pub(crate) fn mount(size_bytes: u64) -> std::io::Result<Self> {
        let dir = tempfile::tempdir().unwrap();
        let mut disk = SmallDisk::mount_at(dir.path(), size_bytes)?;
        disk._dir = Some(dir);
        Ok(disk)
    }

    /// The same in a directory of the test's, which is made if need be. Only its user can enter it.
    pub(crate) fn mount_at(path: &Path, size_bytes: u64) -> std::io::Result<Self> {
        std::fs::create_dir_all(path).unwrap();
        let target = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
        let options = std::ffi::CString::new(format!("size={size_bytes},mode=0700")).unwrap();
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
        Ok(SmallDisk {
            path: path.to_owned(),
            _dir: None,
        })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Leaves no space at all.
    pub(crate) fn fill(&self) {
        let filler = self.path().join("filler");
        let mut filler = File::options()
            .create(true)
            .append(true)
            .open(filler)
            .unwrap();
        let page = [0xA5; 4096];
        while filler.write_all(&page).is_ok() {}
    }

    pub(crate) fn free(&self) {
        std::fs::remove_file(self.path().join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let target = std::ffi::CString::new(self.path.to_str().unwrap()).unwrap();
        // SAFETY: the text ends with a zero byte and lives until the call returns.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}
