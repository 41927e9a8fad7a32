//! Bad input gets a clear error, and nothing is lost.

use std::net::TcpListener;
use std::path::Path;
use std::process::Output;

use crate::support::{TestCluster, mobula, repository, small_job, text_of, wait_for};

/// Asks for the status with a token text.
fn ask_with_token(cluster: &TestCluster, token: &str) -> Output {
    let file = cluster.dir().join("a.token");
    std::fs::write(&file, token).unwrap();
    mobula()
        .args(["status", "--api", cluster.api(), "--token-file"])
        .arg(&file)
        .output()
        .unwrap()
}

/// The same, with a token that must be refused; what was said.
fn refusal_of_token(cluster: &TestCluster, token: &str) -> String {
    let output = ask_with_token(cluster, token);
    assert!(!output.status.success(), "{}", text_of(&output));
    text_of(&output)
}

/// What a worker says that must not become one of this cluster's.
fn refusal_of_worker(cluster: &TestCluster, token_file: Option<&Path>) -> String {
    let mut worker = mobula();
    worker.args(["worker", "--name", "stray", "--head", cluster.api()]);
    worker.arg("--data-dir").arg(cluster.dir().join("stray"));
    if let Some(file) = token_file {
        worker.arg("--join-token-file").arg(file);
    }
    let output = worker.output().unwrap();
    assert!(!output.status.success(), "{}", text_of(&output));
    text_of(&output)
}

#[test]
fn tokens_that_are_wrong_expired_absent_or_foreign_are_told_apart() {
    let cluster = TestCluster::up(1);
    let good = std::fs::read_to_string(cluster.dir().join("tokens/client.token")).unwrap();

    let text = refusal_of_token(&cluster, "nonsense");
    assert!(text.contains("token"), "{text}");

    let (start, secret) = good.trim().rsplit_once('.').unwrap();
    let mut changed: Vec<u8> = secret.bytes().collect();
    changed[3] = if changed[3] == b'A' { b'B' } else { b'A' };
    let forged = format!("{start}.{}", String::from_utf8(changed).unwrap());
    let text = refusal_of_token(&cluster, &forged);
    assert!(text.contains("unknown to this cluster"), "{text}");

    let short = cluster.ok(&["tokens", "create", "--role", "client", "--ttl", "1s"]);
    wait_for("the refusal of a token that lives for a second", || {
        let output = ask_with_token(&cluster, &short);
        let is_refused = !output.status.success() && text_of(&output).contains("expired");
        is_refused.then_some(())
    });

    let made = cluster.json(&["tokens", "create", "--role", "client"]);
    let (id, token) = (
        made["id"].as_str().unwrap(),
        made["token"].as_str().unwrap(),
    );
    assert!(ask_with_token(&cluster, token).status.success());
    let listed = cluster.ok(&["tokens", "list"]);
    assert!(listed.contains(id), "{listed}");
    let (_, secret) = token.rsplit_once('.').unwrap();
    assert!(!listed.contains(&secret[secret.len() - 5..]), "{listed}");
    cluster.ok(&["tokens", "revoke", id]);
    let text = refusal_of_token(&cluster, token);
    assert!(text.contains("was revoked"), "{text}");
    let text = cluster.refused(&["tokens", "revoke", id]);
    assert!(text.contains("there is no token"), "{text}");

    let other = TestCluster::up(0);
    let foreign = std::fs::read_to_string(other.dir().join("tokens/client.token")).unwrap();
    let text = refusal_of_token(&cluster, &foreign);
    assert!(
        text.contains("another cluster") || text.contains("other cluster"),
        "{text}"
    );

    let text = refusal_of_worker(&cluster, None);
    assert!(text.contains("--join-token-file"), "{text}");

    // A client's token does not make a worker.
    let client_token = cluster.dir().join("tokens/client.token");
    let text = refusal_of_worker(&cluster, Some(&client_token));
    assert!(text.contains("worker"), "{text}");
    assert_eq!(
        cluster.json(&["nodes", "list"]).as_array().unwrap().len(),
        1
    );
}

/// What a command says that needs no cluster to be refused.
#[test]
fn a_command_line_that_cannot_be_meant_is_refused_with_what_to_write() {
    let home = tempfile::tempdir().unwrap();
    let digits = repository("cluster-configs/jobs/digits-mlp.toml");
    let digits = digits.to_str().unwrap();
    let text_file = repository("LICENSE");
    let text_file = text_file.to_str().unwrap();
    let refused = |arguments: &[&str]| {
        let output = mobula()
            .args(arguments)
            .env("HOME", home.path())
            .output()
            .unwrap();
        assert!(!output.status.success(), "{}", text_of(&output));
        text_of(&output)
    };
    for (arguments, what) in [
        (&["explain", "foo"][..], "job-<number> or actor-<number>"),
        (&["status", "--token-file", "t"], "--api"),
        (&["chaos", "sim", "--seeds", "0"], "not in 1.."),
        (&["chaos", "sim", "--minutes", "nan"], "write 10 or 0.5"),
        (&["local", "up", "--heads", "2"], "1, 3 or 5"),
        (&["local", "up", "--workers", "1000"], "128 at the most"),
        (&["worker", "--cloud", "ours"], "aws, gcp or azure"),
        (&["submit", digits, "--", "x"], "take no arguments"),
        (&["submit", "/dev/null"], "is not a file"),
        (&["submit", text_file], "not a Linux program"),
        (
            &["train", digits, "--program", "/no/such"],
            "/no/such cannot be read",
        ),
    ] {
        let text = refused(arguments);
        assert!(text.contains(what), "{arguments:?}: {text}");
    }
    assert!(!home.path().join(".mobula").exists(), "nothing was begun");
    // Each cause once.
    let text = refused(&["head", "restore", "--check", "/not/there"]);
    assert_eq!(text.matches("No such file").count(), 1, "{text}");
}

#[test]
fn an_empty_variable_is_as_one_that_is_not_set() {
    let home = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let output = mobula()
            .args(arguments)
            .env("MOBULA_CLUSTER", "")
            .env("MOBULA_CLOUD", "")
            .env("HOME", home.path())
            .output()
            .unwrap();
        text_of(&output)
    };
    let text = run(&["status"]);
    let default = home.path().join(".mobula/local").display().to_string();
    assert!(
        text.contains(&format!("there is no cluster in {default}")),
        "{text}"
    );
    let text = run(&["worker", "--config", "/not/there"]);
    assert!(text.contains("/not/there cannot be read"), "{text}");
    // An option that is empty is a slip.
    let text = run(&["--cluster", "", "status"]);
    assert!(text.contains("a value is required"), "{text}");
}

#[test]
fn a_second_cluster_in_the_same_directory_and_a_port_in_use_are_refused() {
    let cluster = TestCluster::up(1);
    let output = mobula()
        .args(["local", "up", "--data-dir"])
        .arg(cluster.dir())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = text_of(&output);
    assert!(
        text.contains("a cluster runs in") && text.contains("local down"),
        "{text}"
    );
    assert!(cluster.ok(&["status"]).contains("1 alive of 1"));

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let dir = tempfile::tempdir().unwrap();
    let output = mobula()
        .args([
            "head",
            "--api-listen",
            &address,
            "--cluster-listen",
            "127.0.0.1:0",
        ])
        .args(["--storage-url", "memory://", "--data-dir"])
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = text_of(&output);
    assert!(text.contains(&address) && text.contains("in use"), "{text}");

    let head_dir = cluster.dir().join("head-1");
    let output = mobula()
        .args([
            "head",
            "--api-listen",
            "127.0.0.1:0",
            "--cluster-listen",
            "127.0.0.1:0",
        ])
        .args(["--storage-url", "memory://", "--data-dir"])
        .arg(&head_dir)
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(
        text_of(&output).contains("in use by another process"),
        "{}",
        text_of(&output)
    );
}

#[test]
fn job_files_and_data_are_refused_with_file_and_line() {
    let cluster = TestCluster::up(1);
    let submit = |text: &str| {
        let file = cluster.dir().join("bad.toml");
        std::fs::write(&file, text).unwrap();
        cluster.refused(&["submit", file.to_str().unwrap()])
    };
    let text =
        submit("name = \"x\"\nseed = 1\nsteps = 10\nstepps = 3\n[model.mlp]\nhidden = [8]\n");
    assert!(
        text.contains("bad.toml:4") && text.contains("stepps"),
        "{text}"
    );
    let text = submit("name = \"x\"\nseed = \"one\"\nsteps = 10\n[model.mlp]\nhidden = [8]\n");
    assert!(text.contains("bad.toml:2"), "{text}");
    let text = submit("name = \"x\"\nseed = 1\nsteps = 0\n[model.mlp]\nhidden = [8]\n");
    assert!(text.contains("steps"), "{text}");
    assert!(
        cluster
            .json(&["jobs", "list"])
            .as_array()
            .unwrap()
            .is_empty()
    );

    let data_job = |path: &str| {
        let spec = small_job("bad-data", 10).replace(
            "seed = 7",
            &format!("seed = 7\ndataset = {{ csv = {{ files = [\"{path}\"] }} }}"),
        );
        let job = cluster.submit_toml(&spec);
        let ended = cluster.wait_job(&job);
        assert_eq!(ended["state"], "failed", "{ended}");
        let logs = text_of(&cluster.run(&["jobs", "logs", &job]));
        format!("{} {logs}", ended["exit_reason"])
    };
    let text = data_job("/nowhere/digits.csv");
    assert!(text.contains("/nowhere/digits.csv"), "{text}");
    let file = cluster.dir().join("bad.csv");
    let row = vec!["0"; 65].join(",");
    std::fs::write(&file, format!("{row}\n{}\n", row.replacen('0', "x", 1))).unwrap();
    let text = data_job(file.to_str().unwrap());
    assert!(text.contains("bad.csv:2"), "{text}");
    let whole = std::fs::read(repository("actors/data/digits.csv.gz")).unwrap();
    let file = cluster.dir().join("cut.csv.gz");
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let text = data_job(file.to_str().unwrap());
    assert!(text.contains("cut.csv.gz"), "{text}");
}

#[test]
fn what_does_not_exist_is_said_so() {
    let cluster = TestCluster::up(1);
    let cases: [(&[&str], &str); 8] = [
        (&["jobs", "show", "job-99"], "job-99"),
        (&["jobs", "show", "node-1"], "expected `job-<number>`"),
        (&["actors", "show", "actor-99"], "actor-99"),
        (&["nodes", "drain", "nobody"], "no node is called `nobody`"),
        (
            &["models", "show", "nothing"],
            "no model is called `nothing`",
        ),
        (
            &["serve", "deploy", "nothing:3"],
            "no model is called `nothing`",
        ),
        (
            &["serve", "delete", "nothing"],
            "no endpoint is called `nothing`",
        ),
        (&["submit", "/nowhere/program"], "is not a file"),
    ];
    for (arguments, expected) in cases {
        let text = cluster.refused(arguments);
        assert!(text.contains(expected), "{arguments:?}: {text}");
    }
}

#[test]
fn a_job_that_cannot_be_placed_says_why() {
    let cluster = TestCluster::up(1);
    let file = cluster.dir().join("job.toml");
    std::fs::write(&file, small_job("too-big", 10)).unwrap();
    let reply = cluster.json(&["submit", file.to_str().unwrap(), "--cpus", "64"]);
    let job = format!("job-{}", reply["job"]);
    let text = cluster.ok(&["explain", &job]);
    assert!(text.contains("cpu: asks 64, 4 free"), "{text}");
    let shown = cluster.json(&["jobs", "show", &job]);
    assert_eq!(shown["state"], "pending");
    assert!(shown["pending_reason"].is_string(), "{shown}");
    cluster.ok(&["jobs", "stop", &job]);
    assert_eq!(cluster.wait_job(&job)["state"], "stopped");
}

#[test]
fn a_command_whose_reader_has_gone_ends_without_a_word() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = mobula()
        .args(["chaos", "list"])
        .stdout(writer)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    // What a shell shows for SIGPIPE.
    assert_eq!((output.status.code(), said.as_str()), (Some(141), ""));
}
