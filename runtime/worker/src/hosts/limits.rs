//! What a host process may use, enforced by the kernel's control groups where that is allowed.
//!
//! A process of one actor's own (a driver, an isolated actor, one with a GPU) gets a group of its own:
//! its memory is limited to what the actor asked for, if it asked for any, and its share of a busy CPU
//! is that of the cores it asked for. Processes that actors share are not limited: whose memory it is
//! cannot be told apart there.
//!
//! Where groups are made, and whether they may be, [`place`] finds out.
//!
//! Invariants:
//! 1. A process is in its group before its program begins, so nothing of it escapes.
//! 2. A process counts as out of memory only if a kill ended it and the kernel says that it ended one
//!    of the group for that reason.
//! 3. A group is removed when its process is dead, and all of a worker's when the worker ends. What a
//!    worker leaves that was killed itself, the next one on the machine removes at its start.

mod place;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use mobula_core::id::HostId;
use mobula_core::resource::Resources;

use self::place::{Folders, Unlimited, Version};

/// The label of a node that says whether memory is limited: `cgroup-v2`, `cgroup-v1`, or why not.
pub(crate) const MEMORY_LIMITS_LABEL: &str = "memory_limits";

/// The lowest limit that is set, in bytes: below this no host of ours even starts.
const MEMORY_BYTES_MIN: u64 = 32 << 20;

/// The kernel ended a process of a group for want of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OutOfMemory {
    pub(crate) limit_bytes: u64,
    /// The most that the group used; 0 if the kernel does not say.
    pub(crate) used_bytes: u64,
}

/// The groups of one worker's hosts. Dropped with the worker, after its hosts.
#[derive(Debug)]
pub(crate) struct Limits {
    folders: Result<Folders, Unlimited>,
}

impl Limits {
    /// Finds out what is allowed, says it in the log, and removes what dead workers left; `name` is
    /// the worker's.
    pub(crate) fn discover(name: &str) -> Limits {
        let folders = Folders::claim(name);
        match &folders {
            Ok(folders) => {
                let path = folders.memory.display();
                tracing::info!(%path, "the memory of hosts of their own is limited");
            }
            Err(why) => tracing::warn!(%why, "the memory of hosts is not limited"),
        }
        Limits { folders }
    }

    /// For the node's label.
    pub(crate) fn label(&self) -> &'static str {
        match &self.folders {
            Ok(folders) => match folders.version {
                Version::One => "cgroup-v1",
                Version::Two => "cgroup-v2",
            },
            Err(why) => why.label(),
        }
    }

    /// Makes the group of a host; the files by which its process enters, none where nothing is limited.
    /// [`Limits::leave`] removes it, also when the process was never started.
    pub(crate) fn enter(&self, host: HostId, resources: &Resources) -> io::Result<Vec<File>> {
        let Ok(folders) = &self.folders else {
            return Ok(Vec::new());
        };
        let mut entrances = vec![limit_memory(folders, host, resources.memory_bytes)?];
        // A fair share of the CPU is a nicety: no host fails for want of it.
        if resources.cpu_milli > 0
            && let Some(entrance) = weigh_cpu(folders, host, resources.cpu_milli)
        {
            entrances.push(entrance);
        }
        Ok(entrances)
    }

    /// Removes the group of a dead host; whether the kernel ended one of it for want of memory.
    pub(crate) fn leave(&self, host: HostId) -> Option<OutOfMemory> {
        let folders = self.folders.as_ref().ok()?;
        let group = group_of(&folders.memory, host);
        let found = out_of_memory(folders.version, &group);
        for folder in folders.all() {
            // Where the host left a process of another session in it, it stays until the worker ends.
            let _ = fs::remove_dir(group_of(folder, host));
        }
        found
    }
}

fn group_of(folder: &Path, host: HostId) -> PathBuf {
    folder.join(host.to_string())
}

fn open_entrance(group: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .open(group.join("cgroup.procs"))
}

fn limit_memory(folders: &Folders, host: HostId, memory_bytes: u64) -> io::Result<File> {
    let group = group_of(&folders.memory, host);
    fs::create_dir_all(&group)?;
    if memory_bytes > 0 {
        let limit = memory_bytes.max(MEMORY_BYTES_MIN).to_string();
        fs::write(group.join(folders.version.memory_limit_file()), &limit)?;
        // Without this a process that is too large would crawl through swap instead. The file is not
        // there where the kernel does not count swap.
        let _ = match folders.version {
            Version::One => fs::write(group.join("memory.memsw.limit_in_bytes"), &limit),
            Version::Two => fs::write(group.join("memory.swap.max"), "0"),
        };
    }
    open_entrance(&group)
}

fn weigh_cpu(folders: &Folders, host: HostId, cpu_milli: u64) -> Option<File> {
    let group = group_of(folders.cpu.as_ref()?, host);
    fs::create_dir_all(&group).ok()?;
    // One core is what a group weighs that nobody weighed.
    let (file, weight) = match folders.version {
        Version::One => {
            let shares = cpu_milli.saturating_mul(1024) / 1000;
            ("cpu.shares", shares.clamp(2, 262_144))
        }
        Version::Two => ("cpu.weight", (cpu_milli / 10).clamp(1, 10_000)),
    };
    fs::write(group.join(file), weight.to_string()).ok()?;
    match folders.version {
        Version::One => open_entrance(&group).ok(),
        // It is the group that limits memory, which the process enters anyhow.
        Version::Two => None,
    }
}

fn out_of_memory(version: Version, group: &Path) -> Option<OutOfMemory> {
    let (events, peak) = match version {
        Version::One => ("memory.oom_control", "memory.max_usage_in_bytes"),
        Version::Two => ("memory.events", "memory.peak"),
    };
    let read = |name: &str| fs::read_to_string(group.join(name)).ok();
    let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
    let kills = value_of(&read(events)?, "oom_kill")?;
    // The limit is no number where this group has none, and the machine's memory was at its end.
    (kills > 0).then(|| OutOfMemory {
        limit_bytes: number(version.memory_limit_file())
            .filter(|limit| *limit < NO_LIMIT_BYTES)
            .unwrap_or(0),
        used_bytes: number(peak).unwrap_or(0),
    })
}

/// Version 1 has no word for "no limit" but a number that no machine reaches.
const NO_LIMIT_BYTES: u64 = 1 << 60;

/// The number behind `key` in a file of lines `key number`.
fn value_of(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        (name == key).then(|| value.trim().parse().ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_kill_that_the_kernel_counted_is_out_of_memory() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        let found = |version| out_of_memory(version, dir.path());
        let expected = |limit_bytes, used_bytes| {
            Some(OutOfMemory {
                limit_bytes,
                used_bytes,
            })
        };
        let events =
            |kills| format!("low 0\nhigh 0\nmax 12\noom 1\noom_kill {kills}\noom_group_kill 7\n");
        write("memory.max", "67108864\n");
        write("memory.peak", "67100000\n");
        write("memory.events", &events(0));
        assert_eq!(found(Version::Two), None);
        write("memory.events", &events(1));
        assert_eq!(found(Version::Two), expected(67_108_864, 67_100_000));
        write("memory.max", "max\n");
        assert_eq!(found(Version::Two), expected(0, 67_100_000));

        let control = |kills| format!("oom_kill_disable 9\nunder_oom 0\noom_kill {kills}\n");
        write("memory.limit_in_bytes", "64\n");
        write("memory.oom_control", &control(0));
        assert_eq!(found(Version::One), None);
        write("memory.oom_control", &control(1));
        assert_eq!(found(Version::One), expected(64, 0));
        write("memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(found(Version::One), expected(0, 0));
    }
}
