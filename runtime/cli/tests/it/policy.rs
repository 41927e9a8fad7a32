//! Gates of a real cluster: what may be trained on, promoted and deployed, and who says so.

use std::process::Output;

use serde_json::{Value, json};

use crate::heads::{leader, start_head, wait_for_voters};
use crate::support::{TestCluster, kill_9, mobula, small_job, text_of, wait_for};

/// Somebody else than whom the cluster's first token was made for: the file with their token.
struct Person {
    token_file: String,
}

impl Person {
    fn new(cluster: &TestCluster, name: &str) -> Self {
        let made = cluster.json(&["tokens", "create", "--role", "client", "--principal", name]);
        let file = cluster.dir().join(format!("{name}.token"));
        std::fs::write(&file, made["token"].as_str().unwrap()).unwrap();
        let token_file = file.display().to_string();
        Person { token_file }
    }

    fn run(&self, cluster: &TestCluster, arguments: &[&str]) -> Output {
        mobula()
            .args(["--api", cluster.api(), "--token-file", &self.token_file])
            .args(arguments)
            .output()
            .unwrap()
    }

    fn ok(&self, cluster: &TestCluster, arguments: &[&str]) -> String {
        let output = self.run(cluster, arguments);
        let text = text_of(&output);
        assert!(output.status.success(), "{arguments:?}: {text}");
        text
    }
}

fn key(cluster: &TestCluster, name: &str, arguments: &[&str]) -> String {
    let file = cluster.dir().join(name).display().to_string();
    cluster.ok(&[&["keys", "create", &file], arguments].concat());
    file
}

/// A file of people's data, and the text of a job that trains on it.
fn people(cluster: &TestCluster) -> (String, String) {
    let file = cluster.dir().join("people.csv");
    let rows: String = (0..200)
        .map(|row| format!("{}.0,{}.0,{}\n", row % 7, row % 11, row % 2))
        .collect();
    std::fs::write(&file, rows).unwrap();
    let text = small_job("people", 20).replace("seed = 7", "register = \"people\"\nseed = 7");
    (
        file.display().to_string(),
        format!("{text}[dataset.csv]\nfiles = [\"people.csv\"]\n"),
    )
}

/// The gates that the registry's log tells of.
fn gates(cluster: &TestCluster) -> Vec<Value> {
    let file = cluster.dir().join("registry.log");
    let _ = std::fs::remove_file(&file);
    cluster.ok(&["audit", "export", file.to_str().unwrap()]);
    let text = std::fs::read_to_string(&file).unwrap();
    cluster.ok(&["audit", "verify", file.to_str().unwrap()]);
    let entries = text
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let texts = entries.filter_map(|line| {
        let text = line["entry"].as_str()?;
        serde_json::from_str::<Value>(text).ok()
    });
    texts
        .map(|event| event["gate"].clone())
        .filter(Value::is_object)
        .collect()
}

/// The last call that the heads' log says was refused.
fn last_refusal(cluster: &TestCluster) -> Value {
    let records = cluster.json(&["audit"]);
    let mut refused = records.as_array().unwrap().iter().rev();
    let is_refused = |record: &&Value| {
        record["refused"]
            .as_str()
            .is_some_and(|why| !why.is_empty())
    };
    refused.find(is_refused).unwrap().clone()
}

#[test]
fn what_comes_of_labelled_data_waits_for_another_persons_approval() {
    let cluster = TestCluster::up(1);
    let (file, job) = people(&cluster);
    let labelled = cluster.json(&["data", "label", &file, "--label", "pii"]);
    assert_eq!(
        (&labelled["name"], &labelled["labels"]),
        (&json!("people.csv"), &json!(["pii"]))
    );
    let eve = Person::new(&cluster, "eve");
    let approver = key(&cluster, "approver", &["--role", "approve"]);
    let release = key(&cluster, "release", &["--role", "release"]);

    trains_when_approved(&cluster, &eve, &approver, (&file, &job));
    promotes_when_approved(&cluster, &eve, &approver, &release);
    deploys_when_approved(&cluster, &eve, &approver);
    let actions: Vec<(String, bool)> = gates(&cluster)
        .iter()
        .map(|gate| {
            let subject = gate["subject"].as_str().unwrap();
            let action = subject.split(' ').next().unwrap().to_owned();
            (action, gate["permitted"] == true)
        })
        .collect();
    let expected = [
        ("train", false),
        ("train", false),
        ("train", true),
        ("promote", true),
        ("deploy", true),
    ];
    assert_eq!(
        actions,
        expected.map(|(action, permitted)| (action.to_owned(), permitted))
    );
    cluster.ok(&["audit", "--verify"]);
}

fn trains_when_approved(
    cluster: &TestCluster,
    eve: &Person,
    approver: &str,
    (file, text): (&str, &str),
) {
    let refused = |expected: &str| {
        let job = cluster.submit_toml(text);
        let ended = cluster.wait_job(&job);
        assert_eq!(ended["state"], "failed", "{ended}");
        assert_eq!(ended["restarts"], 0, "{ended}");
        let why = ended["exit_reason"].to_string();
        for part in [
            "policy pii-needs-approval forbids to train ",
            "mobula approvals add",
            expected,
        ] {
            assert!(why.contains(part), "{part}: {why}");
        }
    };
    refused("asked in the name of operator, labels pii, approvals that count 0");
    let approve = ["approvals", "add", "train", file, "--key", approver];
    // What the one asks for who submits the job.
    cluster.ok(&approve);
    refused("approved in the name of operator, who asks for it");
    eve.ok(cluster, &approve);
    let job = cluster.submit_toml(text);
    cluster.result_of(&job);
    let listed = cluster.json(&["approvals", "list"]);
    assert_eq!(listed[0]["approvals"][0]["principal"], "eve", "{listed}");
}

fn promotes_when_approved(cluster: &TestCluster, eve: &Person, approver: &str, release: &str) {
    let promote = ["models", "promote", "people:1", "--key", release];
    let text = cluster.refused(&promote);
    assert!(
        text.contains("policy pii-needs-approval forbids to promote people:1 to staging"),
        "{text}"
    );
    let record = last_refusal(cluster);
    assert!(
        record["refused"]
            .as_str()
            .unwrap()
            .contains("policy pii-needs-approval forbids"),
        "{record}"
    );
    let text = text_of(&eve.run(
        cluster,
        &["approvals", "add", "promote", "people:1", "--key", approver],
    ));
    assert!(text.contains("say which stage"), "{text}");
    let text = text_of(&eve.run(
        cluster,
        &[
            "approvals",
            "add",
            "promote",
            "people:1",
            "--to",
            "staging",
            "--key",
            release,
        ],
    ));
    assert!(text.contains("lacks the role `approve`"), "{text}");
    let explain = [
        "policy", "explain", "promote", "people:1", "--to", "staging",
    ];
    assert_eq!(cluster.json(&explain)["permitted"], false);
    eve.ok(
        cluster,
        &[
            "approvals",
            "add",
            "promote",
            "people:1",
            "--to",
            "staging",
            "--key",
            approver,
        ],
    );
    assert_eq!(cluster.json(&explain)["permitted"], true);
    cluster.ok(&promote);
}

fn deploys_when_approved(cluster: &TestCluster, eve: &Person, approver: &str) {
    let deploy = ["serve", "deploy", "people:1", "--replicas", "1"];
    let text = cluster.refused(&deploy);
    assert!(
        text.contains("policy pii-needs-approval forbids to deploy people:1"),
        "{text}"
    );
    assert_ne!(last_refusal(cluster)["principal"], "");
    let approve = ["approvals", "add", "deploy", "people:1", "--key", approver];
    eve.ok(cluster, &approve);
    cluster.ok(&["approvals", "withdraw", "deploy", "people:1"]);
    cluster.refused(&deploy);
    eve.ok(cluster, &approve);
    cluster.ok(&deploy);
    // Another version at that endpoint is a deployment too.
    let text = cluster.refused(&["rollout", "start", "people", "people:2"]);
    assert!(text.contains("has no version 2"), "{text}");
}

#[test]
fn policies_are_checked_set_by_admins_and_outlive_the_leader() {
    let cluster = TestCluster::up_with(1, &["--heads", "3"], &[]);
    wait_for_voters(&cluster, 3);
    let file = |name: &str, text: &str| {
        let file = cluster.dir().join(name);
        std::fs::write(&file, text).unwrap();
        file.display().to_string()
    };
    let wrong = file(
        "wrong.cedar",
        "@id(\"closed\")\nforbid (principal, action == Action::\"Train\" resource);\n",
    );
    for command in ["check", "set"] {
        let text = cluster.refused(&["policy", command, &wrong]);
        for part in ["wrong.cedar", "line 2, column ", "expected"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
    let closed = "@id(\"closed\")\n@reason(\"it is Friday\")\n@next(\"come back on Monday\")\n\
                  forbid (principal, action == Action::\"Train\", resource);\n";
    let closed = file("closed.cedar", closed);
    assert_eq!(
        cluster.json(&["policy", "check", &closed])["policies"],
        json!(["closed"])
    );
    assert_eq!(cluster.json(&["policy", "show"])["revision"], 0);
    assert_eq!(cluster.json(&["policy", "set", &closed])["revision"], 1);
    let text = cluster.refused(&["policy", "set", &closed, "--revision", "0"]);
    assert!(text.contains("at revision 1"), "{text}");

    // Whoever leads now has it from the log, and decides the same.
    let lost = leader(&cluster);
    kill_9(cluster.pid(&lost));
    let (_, job) = people(&cluster);
    let job = cluster.submit_toml(&job);
    let ended = cluster.wait_job(&job);
    let why = ended["exit_reason"].to_string();
    for part in [
        "policy closed forbids to train",
        "it is Friday",
        "come back on Monday",
    ] {
        assert!(why.contains(part), "{part}: {why}");
    }
    let _restarted = start_head(&cluster, &lost, &[]);
    wait_for("the head that was killed to hold the same", || {
        let status = cluster.json(&["status"]);
        (status["state_problem"] == "").then_some(())
    });
    wait_for_voters(&cluster, 3);
    let decided = gates(&cluster).pop().unwrap();
    assert_eq!(
        (&decided["permitted"], &decided["revision"]),
        (&json!(false), &json!(1))
    );

    // From the first admin on, an admin's key signs what counts.
    let admin = key(&cluster, "admin", &["--role", "admin"]);
    let text = cluster.refused(&["policy", "remove"]);
    assert!(
        text.contains("signed by a key with the role `admin`"),
        "{text}"
    );
    assert_eq!(
        cluster.json(&["policy", "remove", "--sign-with", &admin])["revision"],
        2
    );
    let offline = cluster.dir().join("offline").display().to_string();
    cluster.ok(&["keys", "create", &offline, "--offline"]);
    let public = format!("{offline}.pub");
    let add = [
        "keys", "add", &public, "--role", "release", "--role", "approve",
    ];
    let text = cluster.refused(&add);
    assert!(
        text.contains("needs the enrolment signed") && text.contains("--sign-with"),
        "{text}"
    );
    let added = cluster.json(&[&add, ["--sign-with", &admin].as_slice()].concat());
    assert_eq!(added["roles"], json!(["release", "approve"]));
    let id = added["key"].as_str().unwrap();
    let revoke = ["keys", "revoke", id, "--reason", "lost"];
    assert!(
        cluster
            .refused(&revoke)
            .contains("needs the revocation signed")
    );
    cluster.ok(&[&revoke, ["--sign-with", &admin].as_slice()].concat());
    let keys = cluster.json(&["keys", "list"]);
    let admins = keys
        .as_array()
        .unwrap()
        .iter()
        .find(|key| key["owner"] == "admin");
    let id = admins.unwrap()["key"].as_str().unwrap();
    let text = cluster.refused(&[
        "keys",
        "revoke",
        id,
        "--reason",
        "lost",
        "--sign-with",
        &admin,
    ]);
    assert!(text.contains("is the last with the role `admin`"), "{text}");
}
