//! Where a worker makes control groups for its hosts.
//!
//! Version 2 of control groups is used where it has the memory controller and this process may use it
//! (root, or a delegated subtree), version 1 where the memory controller is mounted there. Elsewhere
//! nothing is enforced, and the node's label `memory_limits` and one line in the log say why.
//!
//! ```text
//! <the worker's own group>/mobula-<name>-<pid>/host-7     a host
//!                                             /agent      the worker itself; version 2 only, where
//!                                                         a group with groups in it has no processes
//! ```
//!
//! Invariants:
//! 1. A worker holds a lock on its folders as long as it lives. Folders of ours that nobody has locked
//!    are a dead worker's, and whoever starts next removes them.
//! 2. What cannot be written cannot limit: that is found out at the start and not at the first launch.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// What the folders of all workers begin with.
const PREFIX: &str = "mobula-";

/// Folders that are tried, where a worker of another process namespace has the name and the id.
const ATTEMPTS: u32 = 8;

/// Why nothing is limited.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unlimited {
    /// No control group with a memory controller is mounted.
    NoController,
    /// There is one, and this process may not make groups in it.
    NotAllowed(String),
}

impl Unlimited {
    pub(super) fn label(&self) -> &'static str {
        match self {
            Unlimited::NoController => "none-no-controller",
            Unlimited::NotAllowed(_) => "none-not-allowed",
        }
    }
}

impl fmt::Display for Unlimited {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unlimited::NoController => f.write_str(
                "no control group with a memory controller is mounted: mount cgroup2, or run on a \
                 kernel that has it",
            ),
            Unlimited::NotAllowed(why) => write!(
                f,
                "{why}: run the worker as root, or give it a subtree (`Delegate=yes` in its systemd \
                 unit)"
            ),
        }
    }
}

/// Which files a controller has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    One,
    Two,
}

impl Version {
    pub(super) fn memory_limit_file(self) -> &'static str {
        match self {
            Version::One => "memory.limit_in_bytes",
            Version::Two => "memory.max",
        }
    }
}

/// One worker's folders, locked.
#[derive(Debug)]
pub(super) struct Folders {
    pub(super) version: Version,
    /// In the hierarchy that has the memory controller.
    pub(super) memory: PathBuf,
    /// In the one that has the CPU controller: in version 2 the same; absent where it cannot be used.
    pub(super) cpu: Option<PathBuf>,
    /// By which others see that this worker lives.
    _locks: Vec<File>,
}

impl Folders {
    /// Makes the folders of this process for the worker `name`, in its own control group.
    pub(super) fn claim(name: &str) -> Result<Folders, Unlimited> {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let mounts = read("/proc/self/mountinfo");
        let cgroups = read("/proc/self/cgroup");
        let (version, own) = own_memory_group(&mounts, &cgroups).ok_or(Unlimited::NoController)?;
        let folder = format!("{PREFIX}{name}-{}", std::process::id());
        let (memory, lock) = claim_in(&own, &folder)
            .map_err(|error| not_allowed("create a group in", &own, &error))?;
        let mut folders = Folders {
            version,
            memory,
            cpu: None,
            _locks: vec![lock],
        };
        if version == Version::Two {
            hand_down_controllers(&own, &folders.memory)?;
            folders.cpu = Some(folders.memory.clone());
        } else if let Some(own) = own_group(&mounts, &cgroups, Version::One, "cpu")
            && let Ok((cpu, lock)) = claim_in(&own, &folder)
        {
            folders.cpu = Some(cpu);
            folders._locks.push(lock);
        }
        folders.probe()?;
        Ok(folders)
    }

    /// Every folder that has groups of hosts in it.
    pub(super) fn all(&self) -> impl Iterator<Item = &PathBuf> {
        std::iter::once(&self.memory).chain(&self.cpu)
    }

    fn probe(&self) -> Result<(), Unlimited> {
        let probe = self.memory.join("probe");
        let file = probe.join(self.version.memory_limit_file());
        let probed = fs::create_dir(&probe).and_then(|()| fs::write(file, "1073741824"));
        let _ = fs::remove_dir(&probe);
        probed.map_err(|error| not_allowed("limit memory in", &self.memory, &error))
    }
}

impl Drop for Folders {
    fn drop(&mut self) {
        for folder in self.all() {
            remove(folder);
        }
    }
}

fn not_allowed(what: &str, path: &Path, error: &io::Error) -> Unlimited {
    Unlimited::NotAllowed(format!("cannot {what} `{}`: {error}", path.display()))
}

/// The group of this process that has the memory controller, from the texts of
/// `/proc/self/mountinfo` and `/proc/self/cgroup`.
fn own_memory_group(mounts: &str, cgroups: &str) -> Option<(Version, PathBuf)> {
    let has_memory = |own: &PathBuf| {
        let controllers = fs::read_to_string(own.join("cgroup.controllers"));
        controllers.is_ok_and(|text| text.split_whitespace().any(|c| c == "memory"))
    };
    let two = own_group(mounts, cgroups, Version::Two, "").filter(has_memory);
    two.map(|own| (Version::Two, own)).or_else(|| {
        let own = own_group(mounts, cgroups, Version::One, "memory")?;
        Some((Version::One, own))
    })
}

/// The group of this process in the hierarchy of version 2, or in that of version 1 with
/// `controller`.
fn own_group(mounts: &str, cgroups: &str, version: Version, controller: &str) -> Option<PathBuf> {
    let names_it = |list: &str| list.split(',').any(|name| name == controller);
    let (mount_point, root) = mounts.lines().find_map(|line| {
        // id parent device root mount-point options … - type source options
        let (before, after) = line.split_once(" - ")?;
        let mut before = before.split(' ').skip(3);
        let mut after = after.split(' ');
        let fits = match version {
            Version::Two => after.next()? == "cgroup2",
            Version::One => after.next()? == "cgroup" && names_it(after.nth(1)?),
        };
        let root = before.next()?;
        fits.then_some((before.next()?, root))
    })?;
    let path = cgroups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let fits = match version {
            Version::Two => controllers.is_empty(),
            Version::One => names_it(controllers),
        };
        fits.then_some(path)
    })?;
    // In a container the mount shows only a part of the hierarchy.
    let inside = path.strip_prefix(root).unwrap_or(path);
    Some(Path::new(mount_point).join(inside.trim_start_matches('/')))
}

/// Makes and locks a folder in `own`, from which it first removes what dead workers left.
fn claim_in(own: &Path, folder: &str) -> io::Result<(PathBuf, File)> {
    sweep(own);
    let mut attempt = 0;
    loop {
        let path = match attempt {
            0 => own.join(folder),
            number => own.join(format!("{folder}.{number}")),
        };
        attempt += 1;
        match fs::create_dir(&path).and_then(|()| lock(&path)) {
            Ok(Some(lock)) => return Ok((path, lock)),
            // Somebody has swept it away before it was locked, or lives in it.
            Ok(None) if attempt < ATTEMPTS => {}
            Err(error)
                if attempt < ATTEMPTS
                    && matches!(
                        error.kind(),
                        io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound
                    ) => {}
            Ok(None) => return Err(io::ErrorKind::ResourceBusy.into()),
            Err(error) => return Err(error),
        }
    }
}

/// Locks a folder that is there; `None` if somebody has, or it is gone by now.
fn lock(path: &Path) -> io::Result<Option<File>> {
    let file = File::open(path)?;
    match file.try_lock() {
        Ok(()) => Ok(path.is_dir().then_some(file)),
        Err(fs::TryLockError::WouldBlock) => Ok(None),
        Err(fs::TryLockError::Error(error)) => Err(error),
    }
}

/// Removes the folders of dead workers.
fn sweep(own: &Path) {
    for entry in fs::read_dir(own).into_iter().flatten().flatten() {
        let is_ours = entry.file_name().to_string_lossy().starts_with(PREFIX);
        if is_ours && let Ok(Some(_lock)) = lock(&entry.path()) {
            let path = entry.path();
            tracing::info!(path = %path.display(), "removing the control groups of a dead worker");
            remove(&path);
        }
    }
}

/// Removes a worker's folder and the groups in it, as far as nobody is left in them.
fn remove(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            let _ = fs::remove_dir(entry.path());
        }
    }
    let _ = fs::remove_dir(folder);
}

/// Lets the groups in `folder`, which is in `own`, have the controllers of `own`.
fn hand_down_controllers(own: &Path, folder: &Path) -> Result<(), Unlimited> {
    if enable(own).is_err() {
        // Processes may only be in leaves: this one goes into a leaf of its own first.
        let leaf = folder.join("agent");
        let moved = fs::create_dir_all(&leaf)
            .and_then(|()| fs::write(leaf.join("cgroup.procs"), "0"))
            .and_then(|()| enable(own));
        if let Err(error) = moved {
            // Back to where it was, so that the leaf can go.
            let _ = fs::write(own.join("cgroup.procs"), "0");
            return Err(not_allowed("hand controllers down in", own, &error));
        }
    }
    enable(folder).map_err(|error| not_allowed("hand controllers down in", folder, &error))
}

fn enable(folder: &Path) -> io::Result<()> {
    let control = folder.join("cgroup.subtree_control");
    // The CPU's weight is a nicety: memory must not fail for want of it.
    let _ = fs::write(&control, "+cpu");
    fs::write(&control, "+memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_group_is_found_in_either_version() {
        let mounts = "24 1 0:21 / /sys rw - sysfs sysfs rw\n\
                      29 24 0:25 / /sys/fs/cgroup/cpu rw,relatime shared:3 - cgroup cgroup rw,cpu,cpuacct\n\
                      30 24 0:26 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n";
        let cgroups = "9:cpu,cpuacct:/\n4:memory:/workers/a\n0::/\n";
        let own = |mounts: &str| own_memory_group(mounts, cgroups);
        let expected = |path: &str| Some((Version::One, PathBuf::from(path)));
        assert_eq!(own(mounts), expected("/sys/fs/cgroup/memory/workers/a"));
        let cpu = own_group(mounts, cgroups, Version::One, "cpu");
        assert_eq!(cpu, Some("/sys/fs/cgroup/cpu/".into()));
        // A container sees its part of the hierarchy as the root of the mount.
        let inside = mounts.replace("0:26 / ", "0:26 /workers ");
        assert_eq!(own(&inside), expected("/sys/fs/cgroup/memory/a"));
        assert_eq!(own(""), None);
        // Version 2 without the memory controller is of no use.
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().display();
        let v2 = format!("30 24 0:26 / {path} rw - cgroup2 none rw\n");
        fs::write(dir.path().join("cgroup.controllers"), "cpu io\n").unwrap();
        assert_eq!(own(&v2), None);
        fs::write(dir.path().join("cgroup.controllers"), "cpu memory\n").unwrap();
        assert_eq!(own(&v2).unwrap().0, Version::Two);
    }

    #[test]
    fn a_dead_workers_groups_are_swept_and_a_living_ones_stay() {
        let own = tempfile::tempdir().unwrap();
        let (living, lock) = claim_in(own.path(), "mobula-w-1").unwrap();
        fs::create_dir(living.join("host-1")).unwrap();
        let dead = own.path().join("mobula-w-2");
        fs::create_dir_all(dead.join("host-1")).unwrap();
        let strangers = own.path().join("somebody");
        fs::create_dir(&strangers).unwrap();
        // The name is taken by who lives; another one will do.
        let (second, _lock) = claim_in(own.path(), "mobula-w-1").unwrap();
        assert_ne!(second, living);
        assert!(living.join("host-1").exists() && strangers.exists());
        assert!(!dead.exists());
        drop(lock);
        sweep(own.path());
        assert!(!living.exists() && second.exists());
    }
}
