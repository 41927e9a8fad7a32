//! What is asked: a cluster with an endpoint, and a server of the protocol alone.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Outcome;

/// How long a cluster may take to train the model, and to put it into service.
const LIMIT: Duration = Duration::from_secs(300);

const JOB: &str = "name = \"digits\"\nregister = \"digits\"\nseed = 7\nsteps = 60\n\
                   workers = { min = 1, max = 1 }\n[model.mlp]\nhidden = [64]\n";

/// Where requests go, and what is sent: the same bytes each time.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) address: String,
    pub(crate) request: Arc<[u8]>,
    /// The same, asking for an explanation.
    pub(crate) explained: Arc<[u8]>,
}

impl Target {
    /// A request of one row as binary data, answered in kind.
    fn new(address: &str, token: &str, model: &str, input: &str, values: usize) -> Self {
        let row: Vec<u8> = (0..values)
            .flat_map(|value| (value as f32 / 64.0).to_le_bytes())
            .collect();
        let json = format!(
            "{{\"parameters\":{{\"binary_data_output\":true}},\"inputs\":[{{\"name\":\"{input}\",\"shape\":[1,{values}],\
             \"datatype\":\"FP32\",\"parameters\":{{\"binary_data_size\":{}}}}}]}}",
            row.len()
        );
        let request = |more: &str| -> Arc<[u8]> {
            let head = format!(
                "POST /v2/models/{model}/infer HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\n\
                 Inference-Header-Content-Length: {}\r\nContent-Length: {}\r\n{more}\r\n",
                json.len(),
                json.len() + row.len()
            );
            [head.as_bytes(), json.as_bytes(), &row].concat().into()
        };
        Target {
            address: address.to_owned(),
            request: request(""),
            explained: request("X-Mobula-Explain: true\r\n"),
        }
    }

    /// The model `identity` of the conformance test: FP32 of 16.
    pub(crate) fn identity(address: &str, token: &str) -> Self {
        Target::new(address, token, "identity", "INPUT0", 16)
    }
}

/// The example `identity_server`; it ends with this.
pub(crate) struct Identity {
    child: Child,
    pub(crate) target: Target,
}

impl Identity {
    pub(crate) fn start(programs: &Path) -> Outcome<Self> {
        let mut child = Command::new(programs.join("examples/identity_server"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        let output = child.stdout.take().ok_or("no output to read")?;
        BufReader::new(output).read_line(&mut line)?;
        let (address, token) = line.trim().split_once(' ').ok_or("no address and token")?;
        let target = Target::identity(address, token);
        Ok(Identity { child, target })
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A cluster of processes with `digits` behind an endpoint of two replicas; taken down with this.
pub(crate) struct Digits {
    _cluster: Cluster,
    pub(crate) target: Target,
}

impl Digits {
    pub(crate) async fn deploy(programs: &Path) -> Outcome<Self> {
        let cluster = Cluster::up(programs.join("mobula"))?;
        let file = cluster.dir.path().join("digits.toml");
        std::fs::write(&file, JOB)?;
        let submitted = cluster.asked(&["submit", &file.display().to_string()])?;
        let job = format!("job-{}", submitted["job"]);
        let deadline = Instant::now() + LIMIT;
        let ended = loop {
            let shown = cluster.asked(&["jobs", "show", &job])?;
            if shown["ended_ms"].is_u64() {
                break shown;
            }
            if Instant::now() > deadline {
                return Err(format!("{job} did not end within {} s", LIMIT.as_secs()).into());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        if ended["state"] != "succeeded" {
            return Err(format!("training ended as {ended}").into());
        }
        let deployed = cluster.asked(&["serve", "deploy", "digits", "--replicas", "2"])?;
        let text = |name: &str| {
            deployed[name]
                .as_str()
                .ok_or(format!("no {name}: {deployed}"))
        };
        let address = text("url")?.trim_start_matches("http://");
        let target = Target::new(address, text("token")?, "digits", "image", 64);
        Ok(Digits {
            _cluster: cluster,
            target,
        })
    }
}

/// What `mobula local up` starts.
struct Cluster {
    mobula: PathBuf,
    dir: tempfile::TempDir,
}

impl Cluster {
    fn up(mobula: PathBuf) -> Outcome<Self> {
        let dir = tempfile::Builder::new().prefix("mobula-serve-").tempdir()?;
        let cluster = Cluster { mobula, dir };
        let mut up = cluster.command();
        up.args(["local", "up", "--workers", "2", "--data-dir"])
            .arg(cluster.dir.path());
        printed(&mut up)?;
        Ok(cluster)
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.mobula);
        command.env_remove("MOBULA_CLUSTER").stdin(Stdio::null());
        command
    }

    /// Runs a command against the cluster; what it prints as JSON.
    fn asked(&self, arguments: &[&str]) -> Outcome<Value> {
        let mut command = self.command();
        command
            .arg("--cluster")
            .arg(self.dir.path())
            .args(arguments)
            .arg("--json");
        Ok(serde_json::from_slice(&printed(&mut command)?)?)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let mut down = self.command();
        down.args(["local", "down", "--data-dir"])
            .arg(self.dir.path());
        if let Err(error) = printed(&mut down) {
            eprintln!("the cluster was not taken down: {error}");
        }
    }
}

/// What a command prints, which must succeed.
fn printed(command: &mut Command) -> Outcome<Vec<u8>> {
    let output = command.output()?;
    if !output.status.success() {
        let words = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{command:?}: {words}").into());
    }
    Ok(output.stdout)
}
