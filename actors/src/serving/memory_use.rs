//! How much of the memory that this process may have is in use.

use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::serving::arm::lock;

/// How long a measurement holds: files of the kernel are not read for every batch.
const INTERVAL: Duration = Duration::from_secs(1);

/// The latest measurement.
static MEASURED: Mutex<Option<(Instant, Option<u8>)>> = Mutex::new(None);

/// In percent of the tightest limit: those of the control groups that the process is in, and what the machine has. Files
/// that the kernel can drop are not in use. `None` where the kernel does not say.
pub(super) fn memory_percent() -> Option<u8> {
    let mut measured = lock(&MEASURED);
    let known = measured.filter(|(at, _)| at.elapsed() < INTERVAL);
    if let Some((_, percent)) = known {
        return percent;
    }
    let percent = percent_below(Path::new("/"));
    *measured = Some((Instant::now(), percent));
    percent
}

fn percent_below(root: &Path) -> Option<u8> {
    let groups = groups(root).into_iter();
    let used = groups.chain(machine(root));
    let percent = |(used, limit): (u64, u64)| used.saturating_mul(100).checked_div(limit);
    let most = used.filter_map(percent).max()?;
    Some(u8::try_from(most.min(100)).unwrap_or(100))
}

/// What the machine uses, and what it has, in bytes.
fn machine(root: &Path) -> Option<(u64, u64)> {
    let text = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let bytes = |name| Some(field(&text, name)? * 1024);
    let total = bytes("MemTotal:")?;
    Some((total.saturating_sub(bytes("MemAvailable:")?), total))
}

/// What the control groups (version 2) of this process use and may use, in bytes: its own, and every one above that.
fn groups(root: &Path) -> Vec<(u64, u64)> {
    let mount = root.join("sys/fs/cgroup");
    let own = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("0::"));
    let leaf = mount.join(own.unwrap_or_default().trim_start_matches('/'));
    let groups = leaf.ancestors().take_while(|path| path.starts_with(&mount));
    groups.filter_map(limited).collect()
}

fn limited(group: &Path) -> Option<(u64, u64)> {
    let read = |name| fs::read_to_string(group.join(name)).ok();
    let number = |name| read(name)?.trim().parse::<u64>().ok();
    let limit = number("memory.max")?;
    let droppable = read("memory.stat").and_then(|text| field(&text, "inactive_file"));
    let used = number("memory.current")?.saturating_sub(droppable.unwrap_or(0));
    Some((used, limit))
}

/// The number after a name at the beginning of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::split_whitespace);
    let mut line = lines.find(|line| line.clone().next() == Some(name))?;
    line.nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_limit_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let percent = || percent_below(root.path());
        assert_eq!(percent(), None);
        write(
            "proc/meminfo",
            "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    700 kB\n",
        );
        assert_eq!(percent(), Some(30));
        write("proc/self/cgroup", "0::/a/b\n");
        write("sys/fs/cgroup/a/b/memory.max", "max\n");
        write("sys/fs/cgroup/a/b/memory.current", "9000\n");
        assert_eq!(percent(), Some(30));
        write("sys/fs/cgroup/a/memory.max", "10000\n");
        write("sys/fs/cgroup/a/memory.current", "9000\n");
        assert_eq!(percent(), Some(90));
        write(
            "sys/fs/cgroup/a/memory.stat",
            "anon 5\ninactive_file 2000\n",
        );
        assert_eq!(percent(), Some(70));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_process_is_measured() {
        assert!(memory_percent().is_some_and(|percent| percent <= 100));
    }
}
