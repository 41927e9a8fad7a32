//! What is asked: a cluster with an endpoint, and a server of the protocol alone.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Outcome;

/// How long a cluster may take to train the model, and to put it into service.
const LIMIT: Duration = Duration::from_secs(300);

/// The model, and its first endpoint.
pub(crate) const MODEL: &str = "digits";

/// A model of the same inputs whose answers cost far more than what is around them: 17 million parameters, so 34 million
/// floating-point operations a row.
const WIDE_MODEL: &str = "wide";

/// The name of a text encoder.
const TEXT_MODEL: &str = "texts";

const RAY_PROGRAM: &str = include_str!("ray_serve.py");

/// A job that trains a version.
#[derive(Debug, Clone, Copy)]
struct Job {
    model: &'static str,
    seed: u64,
    steps: u64,
    hidden: &'static [usize],
}

impl Job {
    fn digits(seed: u64) -> Self {
        Job {
            model: MODEL,
            seed,
            steps: 60,
            hidden: &[64],
        }
    }

    fn to_toml(self) -> String {
        let Job {
            model,
            seed,
            steps,
            hidden,
        } = self;
        format!(
            "name = \"{model}\"\nregister = \"{model}\"\nseed = {seed}\nsteps = {steps}\n\
             workers = {{ min = 1, max = 1 }}\n[model.mlp]\nhidden = {hidden:?}\n"
        )
    }
}

/// Where requests go, and what is sent: the same bytes each time.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) address: String,
    pub(crate) request: Arc<[u8]>,
    /// The same, asking for an explanation.
    pub(crate) explained: Arc<[u8]>,
}

impl Target {
    /// A request of one row of numbers.
    fn numbers(at: &Address, model: &str, input: &str, values: usize) -> Self {
        let row: Vec<u8> = (0..values)
            .flat_map(|value| (value as f32 / 64.0).to_le_bytes())
            .collect();
        Target::new(at, model, [input, &format!("[1,{values}]"), "FP32"], &row)
    }

    /// A request of one text.
    fn text(at: &Address, model: &str, text: &str) -> Self {
        let element = [&(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
        Target::new(at, model, ["text", "[1]", "BYTES"], &element)
    }

    /// A request of one row as binary data, answered in kind; of the input its name, shape and type.
    fn new(at: &Address, model: &str, [input, shape, datatype]: [&str; 3], row: &[u8]) -> Self {
        let Address { address, token } = at;
        let json = format!(
            "{{\"parameters\":{{\"binary_data_output\":true}},\"inputs\":[{{\"name\":\"{input}\",\"shape\":{shape},\
             \"datatype\":\"{datatype}\",\"parameters\":{{\"binary_data_size\":{}}}}}]}}",
            row.len()
        );
        let request = |more: &str| -> Arc<[u8]> {
            let head = format!(
                "POST /v2/models/{model}/infer HTTP/1.1\r\nHost: {address}\r\nAuthorization: Bearer {token}\r\n\
                 Inference-Header-Content-Length: {}\r\nContent-Length: {}\r\n{more}\r\n",
                json.len(),
                json.len() + row.len()
            );
            [head.as_bytes(), json.as_bytes(), row].concat().into()
        };
        Target {
            address: address.clone(),
            request: request(""),
            explained: request("X-Mobula-Explain: true\r\n"),
        }
    }

    /// A server that has no part of the protocol, and answers with the bytes that it is sent: as many as the row has.
    fn echo(address: &str) -> Self {
        let row = [0; 16 * 4];
        let head = format!(
            "POST / HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/octet-stream\r\nContent-Length: {}\r\n\r\n",
            row.len()
        );
        let request: Arc<[u8]> = [head.as_bytes(), &row].concat().into();
        Target {
            address: address.to_owned(),
            explained: Arc::clone(&request),
            request,
        }
    }

    /// The model `identity` of the conformance test: FP32 of 16.
    pub(crate) fn identity(address: &str, token: &str) -> Self {
        let at = Address {
            address: address.to_owned(),
            token: token.to_owned(),
        };
        Target::numbers(&at, "identity", "INPUT0", 16)
    }
}

/// Where an endpoint is, and what lets in.
struct Address {
    address: String,
    token: String,
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

/// Ray Serve with an application that answers with what it is sent; taken down with this. It runs only while it is asked: beside
/// the rows of others it has been seen to take its own starved proxy for dead.
pub(crate) struct RayServe {
    child: Child,
    /// Kept open: what Ray prints later must not fail.
    _output: BufReader<ChildStdout>,
    pub(crate) target: Target,
}

impl RayServe {
    pub(crate) fn start(python: &Path) -> Outcome<Self> {
        let mut child = Command::new(python)
            .args(["-c", RAY_PROGRAM])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = child.stdout.take().ok_or("no output to read")?;
        let mut output = BufReader::new(output);
        let mut line = String::new();
        let address = loop {
            line.clear();
            if output.read_line(&mut line)? == 0 {
                return Err("Ray Serve ended before it said where it is".into());
            }
            if let Some(address) = line.trim().strip_prefix("serving at ") {
                break address;
            }
        };
        let target = Target::echo(address);
        Ok(RayServe {
            child,
            _output: output,
            target,
        })
    }
}

impl Drop for RayServe {
    fn drop(&mut self) {
        // The program takes down what it has started when its input ends.
        drop(self.child.stdin.take());
        if let Err(error) = self.child.wait() {
            eprintln!("Ray Serve was not taken down: {error}");
        }
    }
}

/// A cluster of processes with `digits` behind an endpoint of two replicas; taken down with this.
pub(crate) struct Digits {
    cluster: Cluster,
    pub(crate) target: Target,
}

impl Digits {
    pub(crate) async fn deploy(programs: &Path) -> Outcome<Self> {
        let cluster = Cluster::up(programs.join("mobula"))?;
        train(&cluster, Job::digits(7)).await?;
        let target = deployed(&cluster, MODEL, MODEL, &["--replicas", "2"])?;
        let target = of_images(&target, MODEL);
        Ok(Digits { cluster, target })
    }

    /// Puts the text encoder of a folder behind an endpoint of two replicas, to be asked for a text.
    pub(crate) fn encoder(&self, folder: &Path, text: &str) -> Outcome<Target> {
        let folder = folder.display().to_string();
        let register = ["models", "register", TEXT_MODEL, "--encoder", &folder];
        self.cluster.asked(&register)?;
        let replicas = ["--replicas", "2"];
        let at = deployed(&self.cluster, TEXT_MODEL, TEXT_MODEL, &replicas)?;
        Ok(Target::text(&at, TEXT_MODEL, text))
    }

    /// The cluster, as a client of it.
    pub(crate) async fn client(&self) -> Outcome<mobula::Cluster> {
        Ok(mobula::Cluster::from_data_dir(self.cluster.dir.path()).await?)
    }

    /// Trains another version, as good as the first.
    pub(crate) async fn train_another(&self) -> Outcome {
        train(&self.cluster, Job::digits(8)).await
    }

    /// Trains a model whose answers cost more than what is around them, and puts it behind an endpoint of two replicas.
    pub(crate) async fn wide(&self) -> Outcome<Target> {
        let job = Job {
            model: WIDE_MODEL,
            seed: 7,
            // What it answers does not matter.
            steps: 2,
            hidden: &[4096, 4096],
        };
        train(&self.cluster, job).await?;
        let replicas = ["--replicas", "2"];
        let at = deployed(&self.cluster, WIDE_MODEL, WIDE_MODEL, &replicas)?;
        Ok(of_images(&at, WIDE_MODEL))
    }

    /// Another endpoint of the first version.
    pub(crate) fn another(&self, endpoint: &str, scaling: &[&str]) -> Outcome<Target> {
        let at = deployed(&self.cluster, MODEL, endpoint, scaling)?;
        Ok(of_images(&at, endpoint))
    }

    /// How many replicas an endpoint has now.
    pub(crate) fn replicas_running(&self, endpoint: &str) -> Outcome<u64> {
        let shown = self.cluster.asked(&["serve", "explain", endpoint])?;
        let running = shown["replicas_running"].as_u64();
        running.ok_or_else(|| format!("no replicas_running: {shown}").into())
    }
}

/// Trains a version of a model, and waits for it.
async fn train(cluster: &Cluster, job: Job) -> Outcome {
    let file = cluster.dir.path().join("job.toml");
    std::fs::write(&file, job.to_toml())?;
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
    match &ended["state"] {
        state if state == "succeeded" => Ok(()),
        _ => Err(format!("training ended as {ended}").into()),
    }
}

/// Puts the first version of a model behind an endpoint, and waits until it answers.
fn deployed(cluster: &Cluster, model: &str, endpoint: &str, scaling: &[&str]) -> Outcome<Address> {
    let first = format!("{model}:1");
    let command = ["serve", "deploy", &first, "--endpoint", endpoint];
    let deployed = cluster.asked(&[&command[..], scaling].concat())?;
    let text = |name: &str| {
        deployed[name]
            .as_str()
            .ok_or(format!("no {name}: {deployed}"))
    };
    Ok(Address {
        address: text("url")?.trim_start_matches("http://").to_owned(),
        token: text("token")?.to_owned(),
    })
}

/// An endpoint that is asked for the class of an image.
fn of_images(at: &Address, endpoint: &str) -> Target {
    Target::numbers(at, endpoint, "image", 64)
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
