//! What this machine offers: CPU, memory and GPUs, within the limits that a container sets.
//!
//! Invariants:
//! 1. The smallest limit counts: affinity mask, cgroup quota, cgroup memory, of this group and of
//!    every one above it.
//! 2. A machine without NVML has no GPUs, which is not an error.

use std::fs;
use std::path::{Path, PathBuf};

use mobula_core::label::Labels;
use mobula_core::resource::Resources;
use mobula_gpu::Gpu;

/// What a machine offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// CPU cores, in thousandths.
    pub cpu_milli: u64,
    /// Memory, in bytes.
    pub memory_bytes: u64,
    /// GPUs, in the order of NVML.
    pub gpus: Vec<Gpu>,
}

impl Machine {
    /// Looks at the machine that this process runs on.
    #[must_use]
    pub fn discover() -> Machine {
        let root = Path::new("/");
        Machine {
            cpu_milli: cpu_milli(root, allowed_cpus()),
            memory_bytes: memory_bytes(root),
            gpus: visible_gpus(mobula_gpu::gpus(), cuda_visible_devices().as_deref()),
        }
    }

    /// As quantities to place on.
    #[must_use]
    pub fn resources(&self) -> Resources {
        Resources {
            cpu_milli: self.cpu_milli,
            memory_bytes: self.memory_bytes,
            gpu_milli: self.gpus.len() as u64 * 1000,
            custom: std::collections::BTreeMap::new(),
        }
    }

    /// Labels that describe the machine: `arch`, `os`, and `gpu` where there is one.
    #[must_use]
    pub fn labels(&self) -> Labels {
        let mut labels = Labels::from([
            ("arch".to_owned(), std::env::consts::ARCH.to_owned()),
            ("os".to_owned(), std::env::consts::OS.to_owned()),
        ]);
        if let Some(gpu) = self.gpus.first() {
            labels.insert("gpu".to_owned(), gpu.name.clone());
        }
        labels
    }
}

fn cuda_visible_devices() -> Option<String> {
    std::env::var("CUDA_VISIBLE_DEVICES").ok()
}

/// Only the devices that the agent itself may see; as for CUDA, the list ends at the first entry
/// that names no device.
fn visible_gpus(gpus: Vec<Gpu>, visible: Option<&str>) -> Vec<Gpu> {
    let Some(visible) = visible else { return gpus };
    visible
        .split(',')
        .map(str::trim)
        .map_while(|entry| match entry.parse::<usize>() {
            Ok(index) => gpus.get(index).cloned(),
            Err(_) if entry.is_empty() => None,
            Err(_) => gpus.iter().find(|gpu| gpu.id.starts_with(entry)).cloned(),
        })
        .collect()
}

/// CPUs in this process's affinity mask.
fn allowed_cpus() -> u64 {
    match rustix::thread::sched_getaffinity(None) {
        Ok(set) => u64::from(set.count()),
        Err(_) => std::thread::available_parallelism().map_or(1, |count| count.get() as u64),
    }
}

fn cpu_milli(root: &Path, allowed_cpus: u64) -> u64 {
    let quota_v2 = cgroup_v2_files(root, "cpu.max")
        .into_iter()
        .filter_map(|text| {
            let mut fields = text.split_whitespace();
            let quota: u64 = fields.next()?.parse().ok()?;
            let period: u64 = fields.next()?.parse().ok()?;
            (quota * 1000).checked_div(period)
        });
    let quota_v1 = || {
        let read = |name| read_number(&root.join("sys/fs/cgroup/cpu").join(name));
        (read("cpu.cfs_quota_us")? * 1000).checked_div(read("cpu.cfs_period_us")?)
    };
    let least = quota_v2.chain(quota_v1()).min().unwrap_or(u64::MAX);
    // Less than a hundredth of a core is a limit that nothing could run under.
    (allowed_cpus.max(1) * 1000).min(least).max(10)
}

fn memory_bytes(root: &Path) -> u64 {
    let total = fs::read_to_string(root.join("proc/meminfo"))
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        })
        .map_or(0, |kib| kib * 1024);
    let limits_v2 = cgroup_v2_files(root, "memory.max")
        .into_iter()
        .filter_map(|text| text.trim().parse::<u64>().ok());
    let limit_v1 = read_number(&root.join("sys/fs/cgroup/memory/memory.limit_in_bytes"));
    limits_v2
        .chain(limit_v1)
        .chain([total])
        .filter(|bytes| *bytes > 0)
        .min()
        .unwrap_or(0)
}

fn read_number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The contents of `name` in this process's cgroup and in every group above it.
fn cgroup_v2_files(root: &Path, name: &str) -> Vec<String> {
    let mount = root.join("sys/fs/cgroup");
    let group = fs::read_to_string(root.join("proc/self/cgroup"))
        .ok()
        .and_then(|text| {
            let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
            Some(path.trim_start_matches('/').to_owned())
        })
        .unwrap_or_default();
    let leaf: PathBuf = mount.join(group);
    leaf.ancestors()
        .take_while(|path| path.starts_with(&mount))
        .filter_map(|path| fs::read_to_string(path.join(name)).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn this_machine_offers_something() {
        let machine = Machine::discover();
        assert!(
            machine.cpu_milli >= 10 && machine.memory_bytes > 0,
            "{machine:?}"
        );
        assert_eq!(
            machine.resources().gpu_milli,
            machine.gpus.len() as u64 * 1000
        );
    }

    #[test]
    fn the_smallest_cgroup_limit_on_the_way_up_counts() {
        let root = tree(&[
            ("proc/self/cgroup", "0::/a/b\n"),
            ("proc/meminfo", "MemTotal:        8000 kB\nMemFree: 1 kB\n"),
            ("sys/fs/cgroup/a/cpu.max", "150000 100000\n"),
            ("sys/fs/cgroup/a/b/cpu.max", "max 100000\n"),
            ("sys/fs/cgroup/a/memory.max", "4096000\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
        ]);
        assert_eq!(cpu_milli(root.path(), 8), 1500);
        assert_eq!(cpu_milli(root.path(), 1), 1000);
        assert_eq!(memory_bytes(root.path()), 4_096_000);
    }

    #[test]
    fn cgroup_version_1_and_no_cgroup_at_all_work_too() {
        let root = tree(&[
            ("proc/meminfo", "MemTotal: 100 kB\n"),
            ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "50000\n"),
            ("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"),
            (
                "sys/fs/cgroup/memory/memory.limit_in_bytes",
                "9223372036854771712\n",
            ),
        ]);
        assert_eq!(cpu_milli(root.path(), 4), 500);
        assert_eq!(memory_bytes(root.path()), 102_400);
        let unlimited = tree(&[("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")]);
        assert_eq!(cpu_milli(unlimited.path(), 4), 4000);
    }

    #[test]
    fn only_devices_that_the_agent_may_see_are_offered() {
        let gpu = |id: &str| Gpu {
            id: id.into(),
            name: "x".into(),
            memory_bytes: Some(1),
        };
        let gpus = vec![gpu("GPU-aa"), gpu("GPU-bb")];
        let ids = |visible| {
            visible_gpus(gpus.clone(), visible)
                .into_iter()
                .map(|g| g.id)
                .collect::<Vec<_>>()
        };
        assert_eq!(ids(None), ["GPU-aa", "GPU-bb"]);
        assert_eq!(ids(Some("1,0")), ["GPU-bb", "GPU-aa"]);
        assert_eq!(ids(Some("GPU-b")), ["GPU-bb"]);
        assert!(ids(Some("")).is_empty());
        assert_eq!(ids(Some("0,-1,1")), ["GPU-aa"]);
    }
}
