//! A cluster of processes whose head can be killed and started again.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use mobula::Cluster;
use mobula_chaos::faults::Target;
use mobula_chaos::schedule::Fault;
use serde_json::Value;

/// The head's name in the records of a local cluster.
pub(crate) const HEAD: &str = "head-1";

/// How long a killed process may take to be gone.
const GONE_LIMIT: Duration = Duration::from_secs(20);

/// A binary that cargo put beside this test's own program.
fn binary(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_mobula-chaos-job")).with_file_name(name);
    assert!(
        path.is_file(),
        "{} is not built, and this scenario runs it: `cargo build --workspace --bins`",
        path.display()
    );
    path
}

fn mobula() -> Command {
    let mut command = Command::new(binary("mobula"));
    // What a developer's shell may have set must not reach the tests.
    command
        .env_remove("MOBULA_CLUSTER")
        .env_remove("MOBULA_TOKEN")
        .stdin(Stdio::null());
    command
}

fn text_of(output: &Output) -> String {
    let both = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    String::from_utf8_lossy(&both).into_owned()
}

/// A cluster that is taken down, with every head that was started again, when the test ends.
pub(crate) struct HurtCluster {
    dir: tempfile::TempDir,
    head: Target,
    /// The head that this test started itself, which it must also wait for.
    head_child: Option<Child>,
}

impl HurtCluster {
    /// One head and `workers` workers.
    pub(crate) fn up(workers: u32) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("mobula-chaos-")
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
            .output()
            .unwrap();
        assert!(output.status.success(), "local up: {}", text_of(&output));
        let record: Value = serde_json::from_slice(&output.stdout).unwrap();
        let processes = record["processes"].as_array().unwrap();
        let head = processes
            .iter()
            .find(|process| process["name"] == HEAD)
            .unwrap();
        let pid = u32::try_from(head["pid"].as_u64().unwrap()).unwrap();
        let head = Target::adopt(pid, head["start_time"].as_u64().unwrap()).unwrap();
        HurtCluster {
            dir,
            head,
            head_child: None,
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A new client with a connection and a session of its own.
    pub(crate) async fn client(&self) -> Cluster {
        Cluster::from_data_dir(self.dir()).await.unwrap()
    }

    /// Puts a fault onto the head, and heals it.
    pub(crate) async fn hurt_head(&mut self, fault: Fault) {
        match fault {
            Fault::Kill { down } => {
                self.head.kill().unwrap();
                self.head.wait_until_gone(GONE_LIMIT).unwrap();
                self.reap();
                tokio::time::sleep(down).await;
                self.start_head();
            }
            Fault::Pause { silent } => {
                let paused = self.head.pause().unwrap();
                tokio::time::sleep(silent).await;
                paused.resume();
            }
        }
    }

    fn reap(&mut self) {
        if let Some(mut child) = self.head_child.take() {
            child.wait().unwrap();
        }
    }

    /// Starts a killed head again on its own directory and addresses.
    fn start_head(&mut self) {
        let ready = std::fs::read_to_string(self.dir().join(HEAD).join("ready.json")).unwrap();
        let ready: Value = serde_json::from_str(&ready).unwrap();
        let log = self.dir().join(format!("{HEAD}.log"));
        let log = std::fs::File::options().append(true).open(log).unwrap();
        let child = mobula()
            .args([
                "head",
                "--api-listen",
                ready["api_address"].as_str().unwrap(),
            ])
            .args([
                "--cluster-listen",
                ready["cluster_address"].as_str().unwrap(),
            ])
            .arg("--data-dir")
            .arg(self.dir().join(HEAD))
            .arg("--storage-url")
            .arg(format!("file://{}", self.dir().join("store").display()))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.head = Target::running(child.id()).unwrap();
        self.head_child = Some(child);
    }

    /// The ends of all logs, for messages.
    fn logs(&self) -> String {
        let mut files: Vec<PathBuf> = std::fs::read_dir(self.dir())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
            .collect();
        files.sort();
        let end_of = |path: &PathBuf| {
            let log = std::fs::read_to_string(path).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let end = lines[lines.len().saturating_sub(40)..].join("\n");
            format!("--- {} ---\n{end}\n", path.display())
        };
        files.iter().map(end_of).collect()
    }
}

impl Drop for HurtCluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        let _ = mobula()
            .args(["local", "down", "--data-dir"])
            .arg(self.dir())
            .output();
        // The record names the first head only.
        let _ = self.head.kill();
        if let Some(mut child) = self.head_child.take() {
            let _ = child.wait();
        }
    }
}
