//! Bytes at rest: checkpoints in S3, a store that is down, damaged bytes, and a disk that is full.

mod s3_server;

use std::collections::BTreeSet;
use std::fs::File;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};

use mobula_actors::training::data::Files;
use mobula_actors::training::local::LocalTrainer;
use mobula_actors::training::spec::TrainSpec;
use mobula_actors::training::workload::Workload;
use serde_json::Value;

use self::s3_server::{ACCESS_KEY, BUCKET, ClosedPort, PREFIX, S3Server, SECRET_KEY};
use crate::small_disk::SmallDisk;
use crate::support::{TestCluster, kill_9, mobula, signal, small_job, text_of, wait_for};

/// Long enough that there is a middle to be killed in.
const STEPS: u32 = 1500;

/// All files below a folder, sorted.
fn files_under(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(folder) else {
            continue;
        };
        for entry in entries {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// A cluster whose store is the S3 server at `address`, set up as `cluster-configs/s3.toml` says.
fn cluster_on_s3(workers: u32, address: SocketAddr) -> TestCluster {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("s3.toml");
    let text = format!(
        "[head]\napi_listen = \"127.0.0.1:0\"\ncluster_listen = \"127.0.0.1:0\"\n\
         [storage.s3]\nendpoint = \"http://{address}\"\nregion = \"us-east-1\"\n\
         allow_http = true\naccess_key_env = \"MOBULA_TEST_KEY\"\n\
         secret_key_env = \"MOBULA_TEST_SECRET\"\n"
    );
    std::fs::write(&config, text).unwrap();
    TestCluster::up_with(
        workers,
        &[
            "--storage-url",
            &format!("s3://{BUCKET}/{PREFIX}"),
            "--config",
            config.to_str().unwrap(),
        ],
        &[
            ("MOBULA_TEST_KEY", ACCESS_KEY),
            ("MOBULA_TEST_SECRET", SECRET_KEY),
        ],
    )
}

/// The hash that a job must end with, from training in this process: no cluster, no store.
fn expected_hash(job: &str) -> String {
    let spec = TrainSpec::from_toml(job, "job.toml").unwrap();
    let workload = Workload::load(&spec, &Files::local()).unwrap();
    let mut trainer = LocalTrainer::new(&workload).unwrap();
    trainer.run(1).unwrap();
    trainer.state().weights_blake3()
}

fn log_of(cluster: &TestCluster, job: &str) -> String {
    String::from_utf8_lossy(&cluster.run(&["jobs", "logs", job]).stdout).into_owned()
}

/// Waits for a line of the job's log that contains `text`.
fn wait_for_line(cluster: &TestCluster, job: &str, text: &str) -> String {
    wait_for(&format!("`{text}` in the log of {job}"), || {
        let log = log_of(cluster, job);
        log.lines()
            .find(|line| line.contains(text))
            .map(str::to_owned)
    })
}

/// The steps of the checkpoints that the log says are committed.
pub(crate) fn committed_steps(log: &str) -> Vec<u64> {
    log.lines()
        .filter(|line| line.contains(" committed: "))
        .filter_map(|line| {
            let rest = line.split_once("checkpoint of step ")?.1;
            rest.split_once(' ')?.0.parse().ok()
        })
        .collect()
}

/// Waits until at least `count` checkpoints are committed; their steps.
pub(crate) fn wait_for_checkpoints(cluster: &TestCluster, job: &str, count: usize) -> Vec<u64> {
    wait_for(&format!("{count} checkpoints of {job}"), || {
        let steps = committed_steps(&log_of(cluster, job));
        (steps.len() >= count).then_some(steps)
    })
}

/// All processes that run something of a job, its driver among them.
fn processes_of(cluster: &TestCluster, job: &str) -> BTreeSet<u32> {
    let actors = cluster.json(&["actors", "list", "--job", job]);
    let actors = actors.as_array().unwrap();
    assert!(actors.iter().any(|actor| actor["type_name"] == "driver"));
    actors
        .iter()
        .filter_map(|actor| u32::try_from(actor["pid"].as_u64()?).ok())
        .collect()
}

#[test]
fn checkpoints_in_s3_survive_every_process_of_the_job() {
    let port = ClosedPort::take();
    let address = port.address;
    let server = S3Server::start(port);
    let cluster = cluster_on_s3(2, address);
    assert_eq!(cluster.json(&["status"])["storage_problem"], "");

    let text = small_job("in-s3", STEPS);
    let job = cluster.submit_toml(&text);
    wait_for_checkpoints(&cluster, &job, 2);
    assert!(server.files(&format!("manifest/{job}")).len() >= 2);
    assert!(server.files("chunks").len() >= 2);
    // Nobody is left who remembers: what it goes on from was read back from the bucket.
    processes_of(&cluster, &job).into_iter().for_each(kill_9);
    wait_for_line(&cluster, &job, "restored the checkpoint of step ");

    let result = cluster.result_of(&job);
    assert_eq!(result["weights_blake3"], expected_hash(&text), "{result}");
    assert_eq!(result["rejected_checkpoints"], 0, "{result}");
    let digest = result["model_digest"].as_str().unwrap();
    let is_model = |path: &PathBuf| path.to_string_lossy().contains(digest);
    assert!(
        server.files("").iter().any(is_model),
        "{:?}",
        server.files("")
    );
}

#[test]
fn a_job_waits_for_a_store_that_is_down_and_says_so() {
    let port = ClosedPort::take();
    let address = port.address;
    let cluster = cluster_on_s3(1, address);
    let text = small_job("waits", 60);
    let job = cluster.submit_toml(&text);

    let line = wait_for_line(&cluster, &job, "is not saved");
    let names_the_store = |text: &str| text.contains(&format!("s3://{BUCKET}/{PREFIX}"));
    assert!(line.contains("waiting, next attempt in"), "{line}");
    assert!(names_the_store(&line), "{line}");
    let status = cluster.json(&["status"]);
    let problem = status["storage_problem"].as_str().unwrap();
    assert!(
        names_the_store(problem) && problem.contains("reach"),
        "{problem}"
    );
    assert!(cluster.ok(&["status"]).contains("PROBLEM: "));
    let shown = cluster.json(&["jobs", "show", &job]);
    assert_eq!(shown["state"], "running");
    assert!(names_the_store(shown["storage_problem"].as_str().unwrap()));
    let for_people = cluster.ok(&["jobs", "show", &job]);
    assert!(for_people.contains("storage    PROBLEM: "), "{for_people}");
    let explained = cluster.ok(&["explain", &job]);
    assert!(
        explained.contains("the object store does not answer") && names_the_store(&explained),
        "{explained}"
    );

    let server = S3Server::start(port);
    let result = cluster.result_of(&job);
    assert_eq!(result["weights_blake3"], expected_hash(&text), "{result}");
    assert_eq!(result["restarts"], 0, "waiting is no failure: {result}");
    assert!(!server.files(&format!("manifest/{job}")).is_empty());
    assert_eq!(cluster.json(&["status"])["storage_problem"], "");
}

#[test]
fn a_damaged_checkpoint_is_rejected_with_its_reason_and_the_one_before_is_used() {
    let cluster = TestCluster::up(2);
    let text = small_job("damaged", STEPS);
    let undisturbed = cluster.submit_toml(&text);
    let expected = cluster.result_of(&undisturbed)["weights_blake3"].clone();
    assert_eq!(expected, expected_hash(&text));

    let job = cluster.submit_toml(&text);
    wait_for_checkpoints(&cluster, &job, 2);
    // Stopped first, so that no newer checkpoint comes while the newest one is being damaged.
    let processes = processes_of(&cluster, &job);
    processes.iter().for_each(|pid| signal(*pid, libc::SIGSTOP));
    let steps = committed_steps(&log_of(&cluster, &job));
    let newest = *steps.iter().max().unwrap();
    let store = cluster.dir().join("store");
    // The driver may not have heard yet of the last ones that are committed: those count too.
    let damaged: Vec<u64> = files_under(&store.join("manifest").join(&job))
        .iter()
        .filter(|manifest| step_of(manifest) >= newest)
        .map(|manifest| {
            flip_a_byte_of_the_first_chunk(&store, manifest);
            step_of(manifest)
        })
        .collect();
    processes.into_iter().for_each(kill_9);

    let line = wait_for_line(
        &cluster,
        &job,
        &format!("checkpoint of step {newest} is rejected: "),
    );
    assert!(line.contains("chunk") && line.contains("hash"), "{line}");
    let line = wait_for_line(&cluster, &job, "restored the checkpoint of step ");
    let before = steps.iter().filter(|step| **step < newest).max().unwrap();
    assert!(line.contains(&format!("of step {before}:")), "{line}");
    let result = cluster.result_of(&job);
    assert_eq!(result["weights_blake3"], expected, "{result}");
    let rejected = result["rejected_checkpoints"].as_u64().unwrap();
    assert!((1..=damaged.len() as u64).contains(&rejected), "{result}");
}

/// The step that a manifest's file name says.
fn step_of(manifest: &Path) -> u64 {
    let name = manifest.file_name().unwrap().to_str().unwrap();
    name.split_once('-').unwrap().0.parse().unwrap()
}

fn flip_a_byte_of_the_first_chunk(store: &Path, manifest: &Path) {
    let manifest: Value = serde_json::from_slice(&std::fs::read(manifest).unwrap()).unwrap();
    let digest = manifest["chunks"][0]["blake3"].as_str().unwrap();
    let path = store.join("chunks").join(digest);
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
}

/// A head without workers; killed when dropped.
struct LoneHead {
    process: Child,
    dir: PathBuf,
    log: PathBuf,
}

impl LoneHead {
    fn start(disk: &SmallDisk, elsewhere: &Path) -> Self {
        let dir = disk.path().join("head");
        let log = elsewhere.join("head.log");
        let ready = elsewhere.join("ready.json");
        let _ = std::fs::remove_file(&ready);
        let process = mobula()
            .args(["head", "--api-listen", "127.0.0.1:0"])
            .args(["--cluster-listen", "127.0.0.1:0", "--storage-url"])
            .arg(format!("file://{}", elsewhere.join("store").display()))
            .arg("--ready-file")
            .arg(&ready)
            .arg("--data-dir")
            .arg(&dir)
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        LoneHead { process, dir, log }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until it serves; where.
    fn wait_ready(&mut self) -> String {
        let ready = self.log.with_file_name("ready.json");
        wait_for("a head that serves", || {
            let ended = self.process.try_wait().unwrap();
            assert!(ended.is_none(), "{ended:?}: {}", self.log());
            let token = self.dir.join("tokens/client.token");
            let text = std::fs::read_to_string(&ready).ok()?;
            let ready: Value = serde_json::from_str(&text).ok()?;
            token
                .is_file()
                .then(|| ready["api_address"].as_str().unwrap().to_owned())
        })
    }

    /// Waits until it has ended by itself, which must be a failure; what it said.
    fn wait_end(&mut self) -> String {
        let status = wait_for("the head to end", || self.process.try_wait().unwrap());
        assert!(!status.success());
        self.log()
    }

    /// Runs a command against it.
    fn run(&self, api: &str, arguments: &[&str]) -> Output {
        mobula()
            .args(["--api", api, "--token-file"])
            .arg(self.dir.join("tokens/client.token"))
            .args(arguments)
            .output()
            .unwrap()
    }
}

impl Drop for LoneHead {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn a_head_without_space_says_so_and_loses_nothing_that_it_acknowledged() {
    const DISK_BYTES: u64 = 32 << 20;
    /// More than RocksDB has reserved for its log, in submissions of `PADDING_BYTES`.
    const SUBMISSIONS_MAX: usize = 600;
    const PADDING_BYTES: usize = 60_000;
    let disk = match SmallDisk::mount(DISK_BYTES) {
        Ok(disk) => disk,
        Err(error) => {
            println!("skipped: this system does not let the test mount a small disk: {error}");
            return;
        }
    };
    let elsewhere = tempfile::tempdir().unwrap();
    let mut head = LoneHead::start(&disk, elsewhere.path());
    let api = head.wait_ready();
    let file = elsewhere.path().join("job.toml");
    std::fs::write(
        &file,
        format!("{}# {}\n", small_job("kept", 10), "x".repeat(PADDING_BYTES)),
    )
    .unwrap();
    let file = file.to_str().unwrap();
    let mut acknowledged = BTreeSet::new();
    let mut submit = |head: &LoneHead, number: usize| {
        let name = format!("job-number-{number}");
        let output = head.run(&api, &["submit", file, "--name", &name]);
        if output.status.success() {
            acknowledged.insert(name);
            return None;
        }
        Some(text_of(&output))
    };
    assert_eq!(submit(&head, 0), None);
    disk.fill();
    let refused = (1..SUBMISSIONS_MAX).find_map(|number| submit(&head, number));
    assert!(
        refused.is_some(),
        "no space was ever missed: {}",
        head.log()
    );
    let said = head.wait_end();
    assert!(
        said.contains("no space is left") && said.contains("free some"),
        "{said}"
    );

    // What RocksDB had reserved and not used is free now. Without that the head does not start.
    disk.fill();
    let mut head = LoneHead::start(&disk, elsewhere.path());
    let said = head.wait_end();
    assert!(
        said.contains("no space is left") && said.contains("free some"),
        "{said}"
    );

    disk.free();
    let mut head = LoneHead::start(&disk, elsewhere.path());
    let api = head.wait_ready();
    let output = head.run(&api, &["jobs", "list", "--json"]);
    assert!(output.status.success(), "{}", text_of(&output));
    let jobs: Value = serde_json::from_slice(&output.stdout).unwrap();
    let kept: BTreeSet<String> = jobs
        .as_array()
        .unwrap()
        .iter()
        .map(|job| job["name"].as_str().unwrap().to_owned())
        .collect();
    let lost: Vec<&String> = acknowledged.difference(&kept).collect();
    assert!(lost.is_empty(), "acknowledged and lost: {lost:?}");
    let output = head.run(&api, &["submit", file, "--name", "afterwards"]);
    assert!(output.status.success(), "{}", text_of(&output));
}
