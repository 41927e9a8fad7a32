//! Every file in `cluster-configs/` is one that this version reads.

use mobula_core::config::Config;

use crate::support::{mobula, repository, text_of};

#[test]
fn every_example_configuration_is_valid() {
    let mut count = 0;
    for entry in std::fs::read_dir(repository("cluster-configs")).unwrap() {
        let path = entry.unwrap().path();
        if path
            .extension()
            .is_some_and(|extension| extension == "toml")
        {
            let text = std::fs::read_to_string(&path).unwrap();
            Config::from_toml(&text, &path.display().to_string()).unwrap();
            count += 1;
        }
    }
    assert!(count >= 6, "only {count} configurations");
}

#[test]
fn every_example_job_is_valid() {
    use mobula_actors::training::spec::TrainSpec;
    for entry in std::fs::read_dir(repository("cluster-configs/jobs")).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        TrainSpec::from_toml(&text, &path.display().to_string()).unwrap();
    }
}

#[test]
fn an_unknown_key_is_refused_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("head.toml");
    std::fs::write(&file, "[head]\ndata_dirr = \"/x\"\n").unwrap();
    let output = mobula()
        .args(["head", "--config"])
        .arg(&file)
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = text_of(&output);
    assert!(
        text.contains("head.toml:2:1: unknown field `data_dirr`"),
        "{text}"
    );
}

#[test]
fn a_head_that_is_to_join_without_a_token_says_how_to_get_one() {
    let dir = tempfile::tempdir().unwrap();
    let output = mobula()
        .args(["head", "--join", "127.0.0.1:1", "--data-dir"])
        .arg(dir.path().join("head"))
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = text_of(&output);
    assert!(text.contains("mobula head add"), "{text}");
    assert!(!dir.path().join("head").exists(), "nothing is left behind");
}

#[test]
fn an_even_number_of_heads_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let output = mobula()
        .args(["local", "up", "--heads", "2", "--data-dir"])
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let text = text_of(&output);
    assert!(text.contains("a group has 1, 3 or 5"), "{text}");
}
