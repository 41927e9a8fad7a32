//! A machine's own disk: a small file system on a loop device, which can be filled and frozen.
//!
//! It is mounted where only its machine sees it, and goes with the machine. The kernel gives the loop
//! device back when the mount is gone.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::machine::Machine;

/// What a filler writes at a time, at first; smaller pieces follow until nothing fits.
const PIECE_BYTES: usize = 256 * 1024;

/// A disk that is mounted on one machine.
#[derive(Debug, Clone)]
pub struct Disk {
    mounted_at: PathBuf,
}

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
#[error(
    "no file system of {size_mib} MiB can be mounted at {} ({step}: {reason}): it needs mkfs.ext4, \
     mount and a free loop device",
    at.display()
)]
pub struct DiskError {
    at: PathBuf,
    size_mib: u32,
    step: &'static str,
    reason: String,
}

impl Disk {
    /// Makes the image, a file system in it, and mounts it at `at`, all on `machine`.
    pub fn mount(
        machine: &Machine,
        image: PathBuf,
        at: PathBuf,
        size_mib: u32,
    ) -> Result<Disk, DiskError> {
        let target = at.clone();
        let made = machine.run(move || -> Result<(), (&'static str, String)> {
            let io = |step| move |error: io::Error| (step, error.to_string());
            std::fs::create_dir_all(&target).map_err(io("its directory"))?;
            File::create(&image)
                .and_then(|file| file.set_len(u64::from(size_mib) << 20))
                .map_err(io("its image"))?;
            run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image))
                .map_err(|reason| ("mkfs.ext4", reason))?;
            run(Command::new("mount")
                .args(["-o", "loop"])
                .arg(&image)
                .arg(&target))
            .map_err(|reason| ("mount", reason))
        });
        match made {
            Ok(()) => Ok(Disk { mounted_at: at }),
            Err((step, reason)) => Err(DiskError {
                at,
                size_mib,
                step,
                reason,
            }),
        }
    }

    /// Leaves no byte free.
    pub fn fill(&self, machine: &Machine) -> io::Result<()> {
        let filler = self.filler();
        machine.run(move || {
            let mut file = File::options().create(true).append(true).open(filler)?;
            let piece = vec![0xA5; PIECE_BYTES];
            let mut length = PIECE_BYTES;
            while length > 0 {
                match file.write(&piece[..length]) {
                    Ok(written) if written > 0 => {}
                    _ => length /= 2,
                }
            }
            Ok(())
        })
    }

    /// Takes back what [`Disk::fill`] took.
    pub fn free(&self, machine: &Machine) -> io::Result<()> {
        let filler = self.filler();
        machine.run(move || match std::fs::remove_file(filler) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        })
    }

    /// Lets no write through for this long. The process that does it thaws the file system by itself:
    /// one that stays frozen could never be unmounted.
    pub fn freeze(&self, machine: &Machine, time: Duration) -> io::Result<()> {
        let at = self.mounted_at.clone();
        // Not through `Machine::spawn`: this must outlive the runner if that is killed meanwhile.
        let mut child = machine.run(move || {
            Command::new("sh")
                .args([
                    "-c",
                    "fsfreeze -f \"$0\" && sleep \"$1\"; fsfreeze -u \"$0\"",
                ])
                .arg(at)
                .arg(format!("{:.3}", time.as_secs_f64()))
                .stdin(Stdio::null())
                .spawn()
        })?;
        let status = child.wait()?;
        if status.success() {
            Ok(())
        } else {
            Err(io::Error::other(format!("fsfreeze ended with {status}")))
        }
    }

    fn filler(&self) -> PathBuf {
        self.mounted_at.join("filler")
    }

    /// Where it is mounted, for the machine's own processes.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.mounted_at
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{}: {}", output.status, said.trim()))
}
