//! A cluster of processes for one test, and what tests do with it.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long anything that a test waits for may take. Generous: the machine may be busy.
pub(crate) const LIMIT: Duration = Duration::from_secs(120);

/// How often is looked.
const POLL: Duration = Duration::from_millis(50);

/// The binary under test.
pub(crate) fn mobula() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mobula"));
    // What a developer's shell may have set must not reach the tests.
    command
        .env_remove("MOBULA_CLUSTER")
        .env_remove("MOBULA_TOKEN")
        .env_remove("MOBULA_ENDPOINT_TOKEN")
        .stdin(Stdio::null());
    command
}

/// What a command printed on both outputs.
pub(crate) fn text_of(output: &Output) -> String {
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    write!(text, "{}", String::from_utf8_lossy(&output.stderr)).unwrap();
    text
}

/// Waits until `look` finds something.
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            Instant::now() < deadline,
            "{what} did not happen within {} s",
            LIMIT.as_secs()
        );
        std::thread::sleep(POLL);
    }
}

/// A folder of the repository that is tested, which need not be the one that this was built in.
pub(crate) fn repository(path: &str) -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR")
        .expect("cargo says which package it tests; start this by `cargo nextest run`");
    Path::new(&package).join("../..").join(path)
}

/// A cluster that is taken down when the test ends.
pub(crate) struct TestCluster {
    dir: tempfile::TempDir,
    record: Value,
}

impl TestCluster {
    /// One head and `workers` workers.
    pub(crate) fn up(workers: u32) -> Self {
        TestCluster::up_with(workers, &[], &[])
    }

    /// The same, with more arguments and environment for `local up`.
    pub(crate) fn up_with(workers: u32, arguments: &[&str], env: &[(&str, &str)]) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("mobula-test-")
            .tempdir()
            .unwrap();
        let output = mobula()
            .args([
                "local",
                "up",
                "--json",
                "--workers",
                &workers.to_string(),
                "--data-dir",
            ])
            .arg(dir.path())
            .args(arguments)
            .envs(env.iter().copied())
            .output()
            .unwrap();
        assert!(output.status.success(), "local up: {}", text_of(&output));
        let record = serde_json::from_slice(&output.stdout).unwrap();
        TestCluster { dir, record }
    }

    /// The same cluster once more, from what its dead processes left on disk.
    pub(crate) fn up_again(&mut self, workers: u32) {
        // Who was killed a moment ago may still be dying, and counts as running until then.
        wait_for("the end of the processes of before", || {
            let mut processes = self.record["processes"].as_array().unwrap().iter();
            let is_dead = |process: &Value| !runs(process["pid"].as_u64().unwrap() as u32);
            processes.all(is_dead).then_some(())
        });
        let output = mobula()
            .args(["local", "up", "--json", "--workers", &workers.to_string()])
            .arg("--data-dir")
            .arg(self.dir())
            .output()
            .unwrap();
        assert!(output.status.success(), "local up: {}", text_of(&output));
        self.record = serde_json::from_slice(&output.stdout).unwrap();
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// `ip:port` of the control API.
    pub(crate) fn api(&self) -> &str {
        self.record["api_addresses"][0].as_str().unwrap()
    }

    /// The process id of a process of the cluster.
    pub(crate) fn pid(&self, name: &str) -> u32 {
        let processes = self.record["processes"].as_array().unwrap();
        let process = processes
            .iter()
            .find(|process| process["name"] == name)
            .unwrap();
        u32::try_from(process["pid"].as_u64().unwrap()).unwrap()
    }

    /// Runs a command against the cluster.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        mobula()
            .arg("--cluster")
            .arg(self.dir())
            .args(arguments)
            .output()
            .unwrap()
    }

    /// Starts a command and does not wait for its end.
    pub(crate) fn start(&self, arguments: &[&str]) -> Child {
        mobula()
            .arg("--cluster")
            .arg(self.dir())
            .args(arguments)
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    /// Runs a command that must succeed; what it printed.
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            text_of(&output)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command with `--json`; what it printed.
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let mut arguments = arguments.to_vec();
        arguments.push("--json");
        serde_json::from_str(&self.ok(&arguments)).unwrap()
    }

    /// Runs a command that must fail; what it printed.
    pub(crate) fn refused(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(
            !output.status.success(),
            "{arguments:?} succeeded: {}",
            text_of(&output)
        );
        text_of(&output)
    }

    /// Submits a built-in job; its id.
    pub(crate) fn submit_toml(&self, text: &str) -> String {
        let file = self.dir().join("job.toml");
        std::fs::write(&file, text).unwrap();
        let reply = self.json(&["submit", file.to_str().unwrap()]);
        format!("job-{}", reply["job"])
    }

    /// Waits until a job has ended; the job.
    pub(crate) fn wait_job(&self, job: &str) -> Value {
        wait_for(&format!("the end of {job}"), || {
            let output = self.run(&["jobs", "show", job, "--json"]);
            // A head that is being started again cannot answer.
            let shown: Value = serde_json::from_slice(&output.stdout).ok()?;
            shown["ended_ms"].is_u64().then_some(shown)
        })
    }

    /// Waits until a job has succeeded; its result.
    pub(crate) fn result_of(&self, job: &str) -> Value {
        let ended = self.wait_job(job);
        if ended["state"] != "succeeded" {
            let logs = text_of(&self.run(&["jobs", "logs", job]));
            panic!(
                "{job} ended as {ended}; it printed:\n{logs}\n{}",
                self.logs()
            );
        }
        serde_json::from_str(ended["result_json"].as_str().unwrap()).unwrap()
    }

    /// The ends of all processes' logs, for messages.
    pub(crate) fn logs(&self) -> String {
        let mut text = String::new();
        for process in self.record["processes"].as_array().unwrap() {
            let log = std::fs::read_to_string(process["log"].as_str().unwrap()).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let end = lines[lines.len().saturating_sub(30)..].join("\n");
            writeln!(text, "--- {} ---\n{end}", process["name"]).unwrap();
        }
        text
    }
}

impl Drop for TestCluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        let _ = mobula()
            .args(["local", "down", "--data-dir"])
            .arg(self.dir())
            .output();
    }
}

/// A process that a test started itself; it ends with the test.
pub(crate) struct Started(pub(crate) Child);

impl Drop for Started {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Kills a process the hard way and waits until its ports and its files are free.
pub(crate) fn kill_9(pid: u32) {
    signal(pid, libc::SIGKILL);
    wait_for(&format!("process {pid} to be gone"), || {
        // A first thread that is a zombie already says nothing about the others, and any of them keeps all files open.
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
        (threads <= 1 && !runs(pid)).then_some(())
    });
}

pub(crate) fn signal(pid: u32, signal: i32) {
    // SAFETY: kill takes two numbers and touches no memory of ours.
    unsafe { libc::kill(pid.cast_signed(), signal) };
}

/// Whether a process runs; one that nobody has waited for yet does not.
pub(crate) fn runs(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let state = status.lines().find(|line| line.starts_with("State:"));
    state.is_some_and(|state| !state.contains('Z'))
}

/// Processes below `ancestor`, and itself.
pub(crate) fn family(ancestor: u32) -> BTreeSet<u32> {
    let parent_of = |pid: u32| -> Option<u32> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
    };
    let mut family = BTreeSet::from([ancestor]);
    loop {
        let before = family.len();
        for pid in processes() {
            if parent_of(pid).is_some_and(|parent| family.contains(&parent)) {
                family.insert(pid);
            }
        }
        if family.len() == before {
            return family;
        }
    }
}

pub(crate) fn processes() -> Vec<u32> {
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect()
}

/// A small training job: seconds when nothing happens to it.
pub(crate) fn small_job(name: &str, steps: u32) -> String {
    format!(
        "name = \"{name}\"\nseed = 7\nsteps = {steps}\ncheckpoint_every_steps = 40\n\
         workers = {{ min = 1, max = 2 }}\n[model.mlp]\nhidden = [64]\n"
    )
}
