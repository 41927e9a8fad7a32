//! What operators are given fits together: rules and dashboards name metrics that exist, alerts name runbooks
//! that exist, and runbooks name commands that exist.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use clap::Parser;
use serde_json::Value;

use super::Arguments;

/// What the names of our metrics begin with.
const PREFIXES: [&str; 4] = ["mobula_", "nv_inference_", "nv_cache_", "ml_"];

/// What the text format appends to a name.
const SUFFIXES: [&str; 4] = ["_total", "_bucket", "_sum", "_count"];

/// The incidents for which there must be a page.
const INCIDENTS: [&str; 6] = [
    "training-failure",
    "restore",
    "key-rotation",
    "rollback",
    "drift",
    "cost-overrun",
];

/// A path of the checkout in which the test runs.
fn at(path: &str) -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo runs this test");
    PathBuf::from(package).join("../..").join(path)
}

fn read(path: &str) -> String {
    fs::read_to_string(at(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The names in the first column of the tables of `docs/metrics.md`, which a test on processes compares with
/// what is exported.
fn documented() -> BTreeSet<String> {
    read("docs/metrics.md")
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .filter_map(|line| line.split('`').next())
        .map(str::to_owned)
        .collect()
}

/// The names of metrics in an expression.
fn metrics_in(expression: &str) -> Vec<&str> {
    let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words
        .filter(|word| PREFIXES.iter().any(|prefix| word.starts_with(prefix)))
        .collect()
}

fn assert_documented(documented: &BTreeSet<String>, expression: &str, whose: &str) {
    let metrics = metrics_in(expression);
    assert!(!metrics.is_empty(), "{whose}: no metric in `{expression}`");
    for metric in metrics {
        let bases = SUFFIXES
            .iter()
            .filter_map(|suffix| metric.strip_suffix(suffix));
        let is_known = bases.chain([metric]).any(|name| documented.contains(name));
        assert!(is_known, "{whose}: docs/metrics.md has no `{metric}`");
    }
}

/// The alerts: name → what stands under it, key by key, with the lines of a block joined.
pub(super) fn alerts() -> BTreeMap<String, BTreeMap<String, String>> {
    let text = read("cluster-configs/alerts.yml");
    let mut alerts = BTreeMap::<String, BTreeMap<String, String>>::new();
    let (mut alert, mut key) = (String::new(), String::new());
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("- alert: ") {
            alert = name.to_owned();
            assert!(!alerts.contains_key(name), "two alerts are called {name}");
            alerts.insert(alert.clone(), BTreeMap::new());
            continue;
        }
        let Some(fields) = alerts.get_mut(&alert) else {
            continue;
        };
        let is_key = |key: &str| key.chars().all(|c| c.is_ascii_lowercase() || c == '_');
        match line.split_once(':') {
            Some((name, value)) if is_key(name) && !line.starts_with("- ") => {
                key = name.to_owned();
                let value = value.trim().trim_start_matches('|').trim();
                fields.insert(key.clone(), value.to_owned());
            }
            _ if line.starts_with("- ") || line.is_empty() => key.clear(),
            _ => {
                if let Some(value) = fields.get_mut(&key) {
                    value.push(' ');
                    value.push_str(line);
                }
            }
        }
    }
    alerts
}

#[test]
fn alerts_name_metrics_and_runbooks_that_exist() {
    let documented = documented();
    let alerts = alerts();
    assert!(alerts.len() >= INCIDENTS.len());
    let mut linked = BTreeSet::new();
    let index = read("docs/runbooks/README.md");
    for (name, fields) in &alerts {
        assert_documented(&documented, &fields["expr"], name);
        for field in ["severity", "summary", "description"] {
            assert!(!fields[field].is_empty(), "{name} lacks {field}");
        }
        let url = &fields["runbook_url"];
        let path = url
            .strip_prefix("https://github.com/mobula-runtime/mobula/blob/main/")
            .unwrap_or_else(|| panic!("{name}: {url} is not in this repository"));
        let page = read(path);
        assert!(
            page.contains(&format!("`{name}`")),
            "{path} does not speak of {name}"
        );
        assert!(
            index.contains(&format!("`{name}`")),
            "the list lacks {name}"
        );
        linked.insert(path.to_owned());
    }
    let expected = INCIDENTS.map(|incident| format!("docs/runbooks/{incident}.md"));
    assert_eq!(linked, BTreeSet::from(expected));
}

#[test]
fn dashboards_are_json_and_name_metrics_that_exist() {
    let documented = documented();
    let mut uids = BTreeSet::new();
    for entry in fs::read_dir(at("cluster-configs/dashboards")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.display().to_string();
        let board: Value = serde_json::from_slice(&fs::read(&path).unwrap())
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(
            uids.insert(board["uid"].as_str().unwrap().to_owned()),
            "{name}"
        );
        let panels = board["panels"].as_array().unwrap();
        assert!(!panels.is_empty(), "{name}");
        for target in panels
            .iter()
            .flat_map(|panel| panel["targets"].as_array().unwrap())
        {
            assert_documented(&documented, target["expr"].as_str().unwrap(), &name);
        }
        for variable in board["templating"]["list"].as_array().unwrap() {
            if variable["type"] == "query" {
                assert_documented(&documented, variable["query"].as_str().unwrap(), &name);
            }
        }
    }
    assert!(uids.len() >= 3, "{uids:?}");
}

/// The words of a command as a shell sees them; quotes are double, and nothing is escaped.
fn words(command: &str) -> Vec<String> {
    let mut words = Vec::new();
    for (index, part) in command.split('"').enumerate() {
        if index % 2 == 1 {
            words.push(part.to_owned());
        } else {
            words.extend(part.split_whitespace().map(str::to_owned));
        }
    }
    words
}

#[test]
fn commands_of_runbooks_are_commands() {
    for incident in INCIDENTS {
        let page = read(&format!("docs/runbooks/{incident}.md"));
        let commands: Vec<&str> = page
            .lines()
            .filter_map(|line| line.strip_prefix("$ "))
            .collect();
        assert!(commands.len() >= 3, "{incident} says little to do");
        for command in commands {
            let words = words(command);
            assert_eq!(words[0], "mobula", "{incident}: `{command}`");
            if let Err(error) = Arguments::try_parse_from(&words) {
                panic!("{incident}: `{command}`: {error}");
            }
        }
    }
}
