//! The model registry of a real cluster: who decides, what is signed, and what the log says afterwards.

mod signed;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use self::signed::Signed;
use crate::examples::example;
use crate::python::python_with;
use crate::support::{TestCluster, mobula, small_job, text_of};

/// Trains and registers a version of `digits`; the job's result.
fn train(cluster: &TestCluster, seed: u32) -> Value {
    let text = small_job("digits", 40)
        .replace("seed = 7", &format!("register = \"digits\"\nseed = {seed}"));
    let job = cluster.submit_toml(&text);
    cluster.result_of(&job)
}

/// Makes a key; its file.
fn key(cluster: &TestCluster, name: &str, arguments: &[&str]) -> String {
    let file = cluster.dir().join(name).display().to_string();
    cluster.ok(&[&["keys", "create", &file], arguments].concat());
    file
}

fn stage_of(cluster: &TestCluster, version: &str) -> Value {
    cluster.json(&["models", "show", version])[0]["stage"].clone()
}

#[test]
fn versions_are_promoted_with_signatures_and_the_log_proves_it() {
    let cluster = TestCluster::up(1);
    let result = train(&cluster, 7);
    train(&cluster, 8);
    comes_with_its_provenance(&cluster, &result);

    let stage = key(&cluster, "stage", &[]);
    let ann = key(&cluster, "ann", &["--role", "release"]);
    let bob = key(&cluster, "bob", &["--role", "release"]);
    let mode = std::fs::metadata(&ann).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let listed = cluster.json(&["keys", "list"]);
    assert_eq!(listed.as_array().unwrap().len(), 3, "{listed}");

    let signed = Signed::up(&cluster);
    promotes(&cluster, &stage, &ann);
    needs_two(&cluster, &ann, &bob);
    signed.names_its_signers(&cluster);
    refuses_other_keys(&cluster, &bob);
    serves_and_tells_where(&cluster, &result);
    verifies(&cluster);
    logs(&cluster);
}

fn comes_with_its_provenance(cluster: &TestCluster, result: &Value) {
    let shown = &cluster.json(&["models", "show", "digits:1"])[0];
    assert_eq!(shown["stage"], "candidate", "{shown}");
    assert_eq!(shown["missing"], json!([]), "{shown}");
    let provenance = &shown["provenance"];
    assert_eq!(provenance["run_record"], result["record"], "{shown}");
    assert_eq!(
        (&provenance["seed"], &provenance["parent"]),
        (&json!(7), &json!("seed"))
    );
    let checkpoint = provenance["checkpoint"].as_str().unwrap();
    assert!(checkpoint.starts_with("manifest/job-"), "{shown}");
    assert_eq!(provenance["code_blake3"].as_str().unwrap().len(), 64);
}

fn promotes(cluster: &TestCluster, stage: &str, ann: &str) {
    let promote =
        |version: &str, key: &str| cluster.json(&["models", "promote", version, "--key", key]);
    for version in ["digits:1", "digits:2"] {
        assert_eq!(promote(version, stage)["stage"], "staging");
    }
    let text = cluster.refused(&["models", "promote", "digits:1", "--key", stage]);
    assert!(text.contains("lacks the role `release`"), "{text}");
    assert_eq!(promote("digits:1", ann)["stage"], "production");
    let text = cluster.ok(&[
        "models", "promote", "digits:2", "--key", ann, "--reason", "better",
    ]);
    assert!(text.contains("digits:1 is archived"), "{text}");
    let found = cluster.json(&["models", "search", "--stage", "production"]);
    assert_eq!(found.as_array().unwrap().len(), 1, "{found}");
    assert_eq!(found[0]["version"], 2, "{found}");
    let text = cluster.refused(&[
        "models", "promote", "digits:2", "--to", "staging", "--key", ann,
    ]);
    assert!(text.contains("from there it can become archived"), "{text}");
    let text = cluster.refused(&["models", "promote", "digits", "--key", ann]);
    assert!(text.contains("say which version"), "{text}");
}

/// A model of high risk: two people sign, one after the other, on one file.
fn needs_two(cluster: &TestCluster, ann: &str, bob: &str) {
    cluster.ok(&["models", "policy", "digits", "--risk", "high"]);
    let back = ["models", "promote", "digits:1", "--to", "production"];
    let run = |more: &[&str]| cluster.run(&[&back, more].concat());
    let refused = |more: &[&str], expected: &str| {
        let output = run(more);
        let text = text_of(&output);
        assert!(
            !output.status.success() && text.contains(expected),
            "{text}"
        );
    };
    refused(&["--key", ann], "1 of the 2 different keys");
    refused(&["--key", ann, "--key", ann], "signed more than once");
    let file = cluster.dir().join("decision.json");
    let path = file.display().to_string();
    let saved = run(&["--key", ann, "--save", &path, "--reason", "back"]);
    assert!(
        text_of(&saved).contains("signed by 1 of 2"),
        "{}",
        text_of(&saved)
    );
    assert_eq!(stage_of(cluster, "digits:1"), "archived");

    let text = std::fs::read_to_string(&file).unwrap();
    let mut forged: Value = serde_json::from_str(&text).unwrap();
    let listed = cluster.json(&["keys", "list"]);
    let of_bob = listed
        .as_array()
        .unwrap()
        .iter()
        .find(|key| key["owner"] == "bob");
    let signatures = &mut forged["promotion"]["signatures"];
    signatures[0]["keyid"] = of_bob.unwrap()["key"].clone();
    let forged_path = cluster.dir().join("forged.json");
    std::fs::write(&forged_path, forged.to_string()).unwrap();
    let forged_path = forged_path.display().to_string();
    refused(
        &["--envelope", &forged_path, "--key", ann],
        "is not genuine",
    );

    // Somebody decides something else meanwhile.
    cluster.ok(&["models", "alias", "digits:2", "champion"]);
    refused(&["--envelope", &path, "--key", bob], "revision is");
    std::fs::remove_file(&file).unwrap();
    run(&["--key", ann, "--save", &path, "--reason", "back"]);
    let promoted = run(&["--envelope", &path, "--key", bob]);
    assert!(promoted.status.success(), "{}", text_of(&promoted));
    assert_eq!(stage_of(cluster, "digits:1"), "production");
    assert_eq!(stage_of(cluster, "digits:champion"), "archived");
    let text = cluster.refused(&["models", "policy", "digits", "--key", ann]);
    assert!(text.contains("1 of the 2 different keys"), "{text}");
    cluster.ok(&["models", "policy", "digits", "--key", ann, "--key", bob]);
}

fn refuses_other_keys(cluster: &TestCluster, bob: &str) {
    let stranger = key(cluster, "stranger", &["--offline"]);
    let archive = |key: &str| cluster.refused(&["models", "archive", "digits:1", "--key", key]);
    let text = archive(&stranger);
    assert!(text.contains("is not known"), "{text}");
    let listed = cluster.json(&["keys", "list"]);
    let of_bob = listed
        .as_array()
        .unwrap()
        .iter()
        .find(|key| key["owner"] == "bob");
    let id = of_bob.unwrap()["key"].as_str().unwrap();
    cluster.ok(&["keys", "revoke", &id[..12], "--reason", "laptop lost"]);
    let text = archive(bob);
    assert!(text.contains("was revoked (laptop lost)"), "{text}");
    let text = cluster.refused(&["keys", "add", &format!("{bob}.pub"), "--role", "release"]);
    assert!(text.contains("stays so"), "{text}");
    std::fs::set_permissions(bob, std::fs::Permissions::from_mode(0o644)).unwrap();
    let text = archive(bob);
    assert!(text.contains("can be read by others"), "{text}");
    assert_eq!(stage_of(cluster, "digits:1"), "production");
}

/// A job has no key: it asks the actor that holds one.
#[test]
fn a_job_decides_with_signatures_of_the_key_holder() {
    let cluster = TestCluster::up(1);
    train(&cluster, 7);
    let file = key(&cluster, "service", &[]);
    let program = example("signing_job");
    let submitted = cluster.ok(&[
        "submit",
        "--json",
        program.to_str().unwrap(),
        "--",
        &file,
        "1",
    ]);
    let submitted: Value = serde_json::from_str(&submitted).unwrap();
    let result = cluster.result_of(&format!("job-{}", submitted["job"]));
    assert_eq!(result["stage"], "staging", "{result}");
    let refused = result["refused"].as_str().unwrap();
    assert!(refused.contains("only statements about models"), "{result}");
    assert_eq!(stage_of(&cluster, "digits:1"), "staging");
    let known = cluster.json(&["keys", "list"]);
    assert_eq!(known[0]["key"], result["key"]);
    cluster.ok(&["models", "verify", "digits:1"]);
}

/// Who runs the command line needs no key: the cluster's holder signs.
#[test]
fn the_command_line_signs_with_the_key_holder() {
    let cluster = TestCluster::up(1);
    train(&cluster, 7);
    let promote = |key: &str| cluster.run(&["models", "promote", "digits:1", "--key", key]);
    let text = text_of(&promote("holder:00000000"));
    assert!(text.contains("no key holder runs"), "{text}");
    let missing = cluster.dir().join("missing").display().to_string();
    let text = cluster.refused(&["keys", "hold", &missing]);
    assert!(text.contains("missing"), "{text}");

    let file = key(&cluster, "vault", &[]);
    let held = cluster.json(&["keys", "hold", &file]);
    let id = held["keys"][0].as_str().unwrap();
    assert_eq!(cluster.json(&["keys", "list"])[0]["key"], id);
    // Nobody can read it any more, and the actor has it.
    std::fs::remove_file(&file).unwrap();
    let text = text_of(&promote("holder:00000000"));
    assert!(
        text.contains("no key that begins with `00000000`"),
        "{text}"
    );
    let output = promote(&format!("holder:{}", &id[..12]));
    assert!(output.status.success(), "{}", text_of(&output));
    assert_eq!(stage_of(&cluster, "digits:1"), "staging");
    cluster.ok(&["models", "verify", "digits:1"]);
}

fn serves_and_tells_where(cluster: &TestCluster, result: &Value) {
    let deployed = cluster.json(&["serve", "deploy", "digits:champion", "--replicas", "1"]);
    assert_eq!(deployed["version"], 2, "{deployed}");
    let text = cluster.refused(&["serve", "deploy", "digits:latest", "--endpoint", "other"]);
    assert!(text.contains("has no alias `latest`"), "{text}");
    cluster.ok(&["models", "tag", "digits:2", "team=vision"]);
    let shown = &cluster.json(&["models", "show", "digits:1"])[0];
    let data = shown["dataset_blake3"].as_str().unwrap();
    let lineage = cluster.json(&["models", "lineage", "--data", data]);
    let endpoints: Vec<&Value> = lineage
        .as_array()
        .unwrap()
        .iter()
        .map(|version| &version["endpoints"])
        .collect();
    assert_eq!(
        endpoints,
        [&json!(["signed"]), &json!(["digits"])],
        "{lineage}"
    );
    let text = cluster.ok(&["models", "lineage", "digits"]);
    for part in [
        format!("data {data}"),
        // Each version stands under the run and the checkpoint that it came from.
        format!(
            "    run {}\n    checkpoint {}\n    version digits:1 (production)\n      endpoint signed\n",
            &result["record"].as_str().unwrap()[..12],
            shown["provenance"]["checkpoint"].as_str().unwrap()
        ),
        "version digits:2 (archived)".to_owned(),
        "endpoint digits".to_owned(),
    ] {
        assert!(text.contains(&part), "{part}: {text}");
    }
    let found = cluster.json(&[
        "models",
        "search",
        "--tag",
        "team=vision",
        "--metric",
        "accuracy>=0",
    ]);
    assert_eq!(found.as_array().unwrap().len(), 1, "{found}");
    let found = cluster.json(&["models", "search", "--metric", "accuracy>1"]);
    assert_eq!(found, json!([]));
}

fn verifies(cluster: &TestCluster) {
    let findings = cluster.json(&["models", "verify", "digits:1"]);
    let findings = findings.as_array().unwrap();
    let checks: Vec<&str> = findings
        .iter()
        .map(|finding| finding["check"].as_str().unwrap())
        .collect();
    assert_eq!(checks, ["stage", "promotion", "provenance", "keys", "file"]);
    assert!(
        findings.iter().all(|finding| finding["ok"] == true),
        "{findings:?}"
    );
    let shown = &cluster.json(&["models", "show", "digits:2"])[0];
    let digest = shown["digest"].as_str().unwrap();
    let file = blob(cluster.dir(), digest);
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let text = cluster.refused(&["models", "verify", "digits:2"]);
    assert!(
        text.contains("BAD file") && text.contains("is damaged"),
        "{text}"
    );
}

/// The file of this name somewhere below `dir`.
fn blob(dir: &Path, name: &str) -> PathBuf {
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            if entry.file_name() == name {
                return entry.path();
            }
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            }
        }
    }
    panic!("{name} is nowhere below {}", dir.display());
}

fn logs(cluster: &TestCluster) {
    let file = cluster.dir().join("registry.log");
    let path = file.display().to_string();
    let exported = cluster.json(&["audit", "export", &path]);
    // Without a cluster.
    let verify = |path: &str, more: &[&str]| {
        let output = mobula()
            .args(["audit", "verify", path])
            .args(more)
            .output()
            .unwrap();
        (output.status.success(), text_of(&output))
    };
    let root = exported["root"].as_str().unwrap();
    let (is_intact, text) = verify(&path, &["--root", root]);
    assert!(is_intact, "{text}");
    let text = std::fs::read_to_string(&file).unwrap();
    let staged = text.matches("\\\"event\\\":\\\"staged\\\"").count();
    // Two to staging, three to production.
    assert_eq!(staged, 5, "{text}");
    let line = text
        .lines()
        .position(|line| line.contains("aliased"))
        .unwrap();
    let altered: Vec<String> = text
        .lines()
        .enumerate()
        .map(|(number, text)| match number == line {
            true => text.replacen("champion", "champiom", 1),
            false => text.to_owned(),
        })
        .collect();
    let altered_path = cluster.dir().join("altered.log").display().to_string();
    std::fs::write(&altered_path, altered.join("\n")).unwrap();
    let (is_intact, text) = verify(&altered_path, &[]);
    assert!(!is_intact, "{text}");
    assert!(
        text.contains(&format!("entry {line} was changed")),
        "{text}"
    );

    let proof = cluster.ok(&["audit", "prove", "3"]);
    let proof_path = cluster.dir().join("proof.json").display().to_string();
    std::fs::write(&proof_path, &proof).unwrap();
    let (is_intact, text) = verify(&proof_path, &["--root", root]);
    assert!(is_intact, "{text}");
    let text = cluster.refused(&["audit", "prove", "1000"]);
    assert!(text.contains("no entry 1000"), "{text}");
    // Who called is in the head's own log.
    let records = cluster.json(&["audit", "--since", "0"]);
    let subjects: Vec<&Value> = records
        .as_array()
        .unwrap()
        .iter()
        .map(|record| &record["subject"])
        .collect();
    assert!(
        subjects.contains(&&json!("digits:2 to production")),
        "{subjects:?}"
    );
    cluster.ok(&["audit", "--verify"]);
}

/// What PyPI's `model-signing` of this version says. It does not name pyOpenSSL, which it imports.
const MODEL_SIGNING: [&str; 2] = ["model-signing==1.1.1", "pyOpenSSL"];

#[test]
fn bundles_are_those_of_model_signing_both_ways() {
    let Some(python) = python_with("model-signing", &MODEL_SIGNING) else {
        return;
    };
    let cluster = TestCluster::up(1);
    train(&cluster, 7);
    let key = key(&cluster, "ann", &["--role", "release"]);
    let public = format!("{key}.pub");
    let theirs = |arguments: &[&str]| {
        let output = Command::new(&python)
            .args(["-m", "model_signing"])
            .args(arguments)
            .output()
            .unwrap();
        (output.status.success(), text_of(&output))
    };
    cluster.ok(&["models", "promote", "digits:1", "--key", &key]);
    let folder = cluster.dir().join("exported");
    let path = folder.display().to_string();
    cluster.ok(&["models", "export", "digits:1", &path, "--key", &key]);
    let signature = folder.join("model.sig").display().to_string();
    let verify = [
        "verify",
        "key",
        &path,
        "--signature",
        &signature,
        "--public_key",
        &public,
    ];
    let (is_accepted, text) = theirs(&verify);
    assert!(is_accepted, "{text}");
    cluster.ok(&["models", "verify-bundle", &path, "--public-key", &public]);
    // Both find one byte.
    let file = folder.join("version.mobula");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let (is_accepted, text) = theirs(&verify);
    assert!(!is_accepted, "{text}");
    let text = cluster.refused(&["models", "verify-bundle", &path, "--public-key", &public]);
    assert!(text.contains("`version.mobula` was changed"), "{text}");

    // Names whose order is not that of their letters, and git's files, which do not count.
    let folder = cluster.dir().join("theirs");
    for name in ["a/b", "a.b", "a-b/c", "é/ü", ".gitignore", "empty"] {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, name).unwrap();
    }
    let path = folder.display().to_string();
    let signature = folder.join("model.sig").display().to_string();
    let (is_signed, text) = theirs(&[
        "sign",
        "key",
        &path,
        "--signature",
        &signature,
        "--private_key",
        &key,
    ]);
    assert!(is_signed, "{text}");
    let shown = cluster.json(&["models", "verify-bundle", &path, "--public-key", &public]);
    assert_eq!(shown["files"], 5, "{shown}");
    std::fs::write(folder.join("more"), "").unwrap();
    let text = cluster.refused(&["models", "verify-bundle", &path, "--public-key", &public]);
    assert!(text.contains("`more` was not signed"), "{text}");
}
