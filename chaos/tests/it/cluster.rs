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
pub(crate) fn binary(name: &str) -> PathBuf {
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

/// A head that can be hurt.
struct Head {
    name: String,
    process: Target,
    /// Of one that this test started itself, which it must also wait for.
    child: Option<Child>,
}

/// A cluster that is taken down, with every head that was started again, when the test ends.
pub(crate) struct HurtCluster {
    dir: tempfile::TempDir,
    heads: Vec<Head>,
}

impl Head {
    fn reap(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It was killed just before.
            let _ = child.wait();
        }
    }
}

impl HurtCluster {
    /// `heads` heads and `workers` workers.
    pub(crate) fn up(heads: u32, workers: u32) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("mobula-chaos-")
            .tempdir()
            .unwrap();
        let output = mobula()
            .args([
                "local",
                "up",
                "--json",
                "--heads",
                &heads.to_string(),
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
        let heads = processes.iter().filter(|process| process["role"] == "head");
        let heads = heads.map(|head| {
            let pid = u32::try_from(head["pid"].as_u64().unwrap()).unwrap();
            Head {
                name: head["name"].as_str().unwrap().to_owned(),
                process: Target::adopt(pid, head["start_time"].as_u64().unwrap()).unwrap(),
                child: None,
            }
        });
        HurtCluster {
            heads: heads.collect(),
            dir,
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A new client with a connection and a session of its own.
    pub(crate) async fn client(&self) -> Cluster {
        Cluster::from_data_dir(self.dir()).await.unwrap()
    }

    /// The place of the head that leads. Where none says so, the first: it is hurt all the same.
    fn leader(&self) -> usize {
        if self.heads.len() == 1 {
            return 0;
        }
        let listed = mobula()
            .arg("--cluster")
            .arg(self.dir())
            .args(["head", "members", "--json"])
            .output()
            .unwrap();
        let listed: Value = serde_json::from_slice(&listed.stdout).unwrap_or_default();
        let members = listed["heads"].as_array().into_iter().flatten();
        let leads = |member: &&Value| member["leader"] == true;
        let name = members.clone().find(leads).map(|member| &member["name"]);
        let named = |head: &Head| name.is_some_and(|name| *name == head.name);
        self.heads.iter().position(named).unwrap_or(0)
    }

    /// Puts a fault onto the head that leads, and heals it.
    pub(crate) async fn hurt_head(&mut self, fault: Fault) {
        let leader = self.leader();
        println!("it is {}", self.heads[leader].name);
        match fault {
            Fault::Kill { down } => {
                self.heads[leader].process.kill().unwrap();
                self.heads[leader]
                    .process
                    .wait_until_gone(GONE_LIMIT)
                    .unwrap();
                self.heads[leader].reap();
                tokio::time::sleep(down).await;
                self.start_head(leader);
            }
            Fault::Pause { silent } => {
                let paused = self.heads[leader].process.pause().unwrap();
                tokio::time::sleep(silent).await;
                paused.resume();
            }
        }
    }

    /// Starts a killed head again on its own directory and addresses.
    fn start_head(&mut self, position: usize) {
        let name = self.heads[position].name.clone();
        let ready = std::fs::read_to_string(self.dir().join(&name).join("ready.json")).unwrap();
        let ready: Value = serde_json::from_str(&ready).unwrap();
        let log = self.dir().join(format!("{name}.log"));
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
            .arg(self.dir().join(&name))
            .arg("--storage-url")
            .arg(format!("file://{}", self.dir().join("store").display()))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        let head = &mut self.heads[position];
        head.process = Target::running(child.id()).unwrap();
        head.child = Some(child);
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
        // The record names the first life of each head only.
        for head in &mut self.heads {
            let _ = head.process.kill();
            head.reap();
        }
    }
}
