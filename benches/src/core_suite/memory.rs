//! What the cluster's processes take while nothing happens.

use std::collections::BTreeMap;

use crate::outcome::Outcome;

/// A size out of a process's status, in bytes; 0 if it is gone.
fn status_bytes(process: &str, name: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|value| value.trim().strip_suffix(" kB"))
        .and_then(|kib| kib.parse::<u64>().ok())
        .map_or(0, |kib| kib * 1024)
}

/// Processes of this cluster: those that share an ancestor with this one, `mobula local` itself.
fn relatives() -> Vec<(String, Vec<String>)> {
    let own = std::process::id().to_string();
    let worker = parent(&own);
    let cluster = parent(&worker);
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
        .filter(|process| {
            let mut ancestor = process.clone();
            for _ in 0..4 {
                if ancestor == cluster {
                    return true;
                }
                ancestor = parent(&ancestor);
            }
            false
        })
        .map(|process| {
            let line = std::fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
            let words = line.split(|byte| *byte == 0);
            let words = words
                .map(|word| String::from_utf8_lossy(word).into_owned())
                .collect();
            (process, words)
        })
        .collect()
}

fn parent(process: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("PPid:"))
        .map(|value| value.trim().to_owned())
        .unwrap_or_default()
}

/// Resident memory of head, worker and driver.
pub(crate) fn idle_processes(outcome: &mut Outcome) {
    let relatives = relatives();
    for role in ["head", "worker"] {
        let name = format!("idle memory, {role}");
        match relatives
            .iter()
            .find(|(_, words)| words.get(1).is_some_and(|word| word == role))
        {
            Some((process, _)) => {
                let mib = status_bytes(process, "VmRSS:") as f64 / f64::from(1 << 20);
                outcome.figure(&name, mib, "MiB");
            }
            None => outcome.absent(&name, "its process was not found beside the driver's"),
        }
    }
    let mib = status_bytes("self", "VmRSS:") as f64 / f64::from(1 << 20);
    outcome.figure("idle memory, driver or host", mib, "MiB");
}

/// Private memory in bytes of each process that runs this program, other than this one: the hosts.
/// Objects that they share are not counted.
pub(crate) fn hosts() -> BTreeMap<String, u64> {
    let own = std::process::id().to_string();
    let program = std::fs::read_link("/proc/self/exe").unwrap_or_default();
    relatives()
        .into_iter()
        .map(|(process, _)| process)
        .filter(|process| *process != own)
        .filter(|process| {
            std::fs::read_link(format!("/proc/{process}/exe")).is_ok_and(|exe| exe == program)
        })
        .map(|process| {
            let bytes = status_bytes(&process, "RssAnon:");
            (process, bytes)
        })
        .collect()
}

/// By how much hosts have grown since `before`; one that has ended meanwhile does not count.
pub(crate) fn growth_bytes(before: &BTreeMap<String, u64>) -> u64 {
    let now = hosts().into_iter();
    now.map(|(process, bytes)| {
        bytes.saturating_sub(before.get(&process).copied().unwrap_or_default())
    })
    .sum()
}
