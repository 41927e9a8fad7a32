//! Endpoints whose replicas are to compute on GPUs, where there are none: what a user is told, and what is left.

use std::process::Stdio;

use serde_json::json;

use super::imported::Imported;
use crate::support::{Started, TestCluster, mobula, small_job};

#[test]
fn an_endpoint_that_finds_no_gpu_says_why_and_what_to_do() {
    // Also on a machine that has one.
    let hidden = ("CUDA_VISIBLE_DEVICES", "");
    let imported = Imported::on(TestCluster::up_with(1, &[], &[hidden]));
    let cluster = &imported.cluster;
    imported.register("mlp", &[]);
    let refused = cluster.refused(&["serve", "deploy", "mlp", "--device", "cuda"]);
    assert!(
        refused.contains("mlp:1 is imported, and imported models answer on CPUs only"),
        "{refused}"
    );
    assert_eq!(cluster.json(&["serve", "list"]), json!([]));

    let job = small_job("digits", 20).replace("seed = 7", "register = \"digits\"\nseed = 7");
    let job = cluster.submit_toml(&job);
    assert_eq!(cluster.wait_job(&job)["state"], "succeeded");
    let deploy = |endpoint: &str, timeout: &str| {
        cluster.refused(&[
            "serve",
            "deploy",
            "digits",
            "--endpoint",
            endpoint,
            "--replicas",
            "1",
            "--device",
            "cuda",
            "--timeout",
            timeout,
        ])
    };
    let said = deploy("nowhere", "3s");
    let asked = said.split("`mobula explain ").nth(1).expect(&said);
    let replica = asked.split('`').next().unwrap();
    let explained = cluster.ok(&["explain", replica]);
    assert!(explained.contains("gpu"), "{explained}");
    cluster.ok(&["serve", "delete", "nowhere"]);

    // A worker that says it has a GPU, which this program was built without support for: one that was built with it would
    // find a GPU that is hidden here only from the worker, not from the processes that it places on it.
    if cfg!(feature = "cuda") {
        return;
    }
    let dir = cluster.dir().join("gpu-1");
    std::fs::create_dir_all(&dir).unwrap();
    let (config, token) = (dir.join("worker.toml"), dir.join("worker.token"));
    std::fs::write(&config, "[worker.resources]\ngpu = 1.0\n").unwrap();
    let made = cluster.json(&["tokens", "create", "--role", "worker"]);
    std::fs::write(&token, made["token"].as_str().unwrap()).unwrap();
    let mut worker = mobula();
    worker.env(hidden.0, hidden.1);
    worker.args(["worker", "--name", "gpu-1", "--head", cluster.api()]);
    worker.arg("--config").arg(&config);
    worker.arg("--join-token-file").arg(&token);
    worker.arg("--data-dir").arg(&dir);
    worker.stdout(Stdio::null()).stderr(Stdio::null());
    let _worker = Started(worker.spawn().unwrap());
    let said = deploy("somewhere", "30s");
    assert!(
        said.contains("its last start came to this")
            && said.contains("the GPU that this process was placed on cannot be used")
            && said.contains("leave the device out"),
        "{said}"
    );
    let listed = cluster.json(&["serve", "list"]);
    assert_eq!(listed[0]["device"], "cuda", "{listed}");
    assert_eq!(listed[0]["replicas_running"], 0, "{listed}");
    cluster.ok(&["serve", "delete", "somewhere"]);
}
