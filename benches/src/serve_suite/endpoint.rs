//! What is asked: a cluster with an endpoint, and servers of the protocol alone.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Outcome;
use crate::target::{Address, Target};

/// How long a cluster may take to train the model, and to put it into service.
const LIMIT: Duration = Duration::from_secs(300);

/// The model, and its first endpoint.
pub(crate) const MODEL: &str = "digits";

/// A model of the same inputs whose answers cost far more than what is around them: 17 million parameters, so 34 million
/// floating-point operations a row.
const WIDE_MODEL: &str = "wide";

/// The name of a text encoder.
const TEXT_MODEL: &str = "texts";

/// A graph of one operator that gives back what it takes, FP32 of 16: what tritonserver is asked for too.
pub(crate) const IDENTITY_MODEL: &str = "identity";

const IDENTITY_FILE: &[u8] = include_bytes!("identity.onnx");

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

    /// Has everything leave the worker whose ingress [`Digits::through_ingress`] does not ask; how long that took.
    pub(crate) fn drain_another(&self) -> Outcome<Duration> {
        let asked = self.through_ingress()?.address;
        let listed = self.cluster.asked(&["serve", "ingress"])?;
        let mut listed = listed.as_array().into_iter().flatten();
        let other = listed.find(|ingress| ingress["address"] != *asked);
        let node = other.and_then(|ingress| ingress["node"].as_str());
        let node = node.ok_or("there is no other worker with an ingress")?;
        let nodes = self.cluster.asked(&["nodes", "list"])?;
        let mut nodes = nodes.as_array().into_iter().flatten();
        let drained = nodes.find(|known| known["name"] == *node);
        let id = drained.map_or(&Value::Null, |known| &known["id"]);
        let began = Instant::now();
        let mut drain = self.cluster.command();
        drain.arg("--cluster").arg(self.cluster.dir.path());
        printed(drain.args(["nodes", "drain", node]))?;
        loop {
            let actors = self.cluster.asked(&["actors", "list"])?;
            let mut actors = actors.as_array().into_iter().flatten();
            let is_there = |actor: &Value| {
                let name = actor["name"].as_str().unwrap_or_default();
                let is_ours = name.starts_with("serving/digits/");
                is_ours && actor["state"] == "running" && actor["node"] == *id
            };
            if !actors.any(is_there) {
                return Ok(began.elapsed());
            }
            if began.elapsed() > LIMIT {
                return Err(format!("{node} was not left within {} s", LIMIT.as_secs()).into());
            }
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// The same endpoint, by way of an ingress: a process that looks the endpoint's router up and sends requests on.
    pub(crate) fn through_ingress(&self) -> Outcome<Target> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let listed = self.cluster.asked(&["serve", "ingress"])?;
            let running = listed.as_array().into_iter().flatten();
            let mut running = running.filter(|ingress| ingress["state"] == "running");
            if let Some(address) = running.find_map(|ingress| ingress["address"].as_str()) {
                return Ok(self.target.through(address));
            }
            if Instant::now() > deadline {
                return Err(
                    format!("no ingress runs within {} s: {listed}", LIMIT.as_secs()).into(),
                );
            }
            std::thread::sleep(Duration::from_millis(200));
        }
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

    /// Puts the graph that gives back what it takes behind an endpoint of two replicas.
    pub(crate) fn identity(&self) -> Outcome<Target> {
        let file = self.cluster.dir.path().join("identity.onnx");
        std::fs::write(&file, IDENTITY_FILE)?;
        let file = file.display().to_string();
        let register = ["models", "register", IDENTITY_MODEL, "--onnx", &file];
        self.cluster.asked(&register)?;
        let replicas = ["--replicas", "2"];
        let at = deployed(&self.cluster, IDENTITY_MODEL, IDENTITY_MODEL, &replicas)?;
        Ok(Target::of_identity(&at))
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
            .arg(cluster.dir.path())
            .args(["--ingress", &free_pair()?]);
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

/// An address of this machine whose port is free, and the one after it, for the ingresses of two workers.
fn free_pair() -> Outcome<String> {
    loop {
        let first = TcpListener::bind("127.0.0.1:0")?;
        let address = first.local_addr()?;
        let next = address.port().checked_add(1);
        if next.is_some_and(|next| TcpListener::bind(("127.0.0.1", next)).is_ok()) {
            return Ok(address.to_string());
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
