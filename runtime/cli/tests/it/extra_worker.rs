//! A worker of a test's own making, beside those of `mobula local up`: with a label by which actors find
//! it, and with settings of its own.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use crate::support::{TestCluster, mobula, wait_for};

/// A worker of a test's own making, beside those of `mobula local up`.
pub(crate) struct ExtraWorker {
    pub(crate) process: Child,
    pub(crate) dir: PathBuf,
    log: PathBuf,
}

impl ExtraWorker {
    /// It is called `spot`, and has a label `spot` that says so. `settings` are lines of the section
    /// `[worker]`.
    pub(crate) fn start(cluster: &TestCluster, spot: &str, settings: &str) -> Self {
        ExtraWorker::start_with(cluster, spot, settings, &[])
    }

    /// The same with more `arguments`.
    pub(crate) fn start_with(
        cluster: &TestCluster,
        spot: &str,
        settings: &str,
        arguments: &[&str],
    ) -> Self {
        let dir = ExtraWorker::dir(cluster, spot);
        std::fs::create_dir_all(&dir).unwrap();
        let config = dir.join("worker.toml");
        std::fs::write(&config, format!("[worker]\n{settings}\n")).unwrap();
        let log = dir.join("worker.log");
        let process = mobula()
            .args(["worker", "--name", spot, "--label", &format!("spot={spot}")])
            .args(["--cpus", "8", "--head", cluster.api()])
            .arg("--config")
            .arg(&config)
            .arg("--data-dir")
            .arg(&dir)
            .arg("--join-token-file")
            .arg(cluster.dir().join("tokens/worker.token"))
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let worker = ExtraWorker { process, dir, log };
        wait_for("the worker to join", || {
            let nodes = cluster.json(&["nodes", "list"]);
            let nodes = nodes.as_array().unwrap();
            let node = nodes.iter().find(|node| node["name"] == spot)?;
            (node["state"] == "alive").then_some(())
        });
        worker
    }

    /// Its data directory.
    pub(crate) fn dir(cluster: &TestCluster, spot: &str) -> PathBuf {
        cluster.dir().join(format!("extra-{spot}"))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for ExtraWorker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {} ---\n{}", self.dir.display(), self.log());
        }
        // It may have ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
