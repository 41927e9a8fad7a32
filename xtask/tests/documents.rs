//! The pages for people say what is true.
//!
//! 1. Every path that a page names in a code span exists.
//! 2. The example in `README.md` is the one that the SDK's documentation compiles.
//! 3. `docs/cli-json.md` names every field of the messages that `--json` prints.
//! 4. Every part of the tree that needs a page of its own has it, and the map names it.

use std::fs;
use std::path::{Path, PathBuf};

/// The pages.
const PAGES: &[&str] = &[
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "docs/checkpoints.md",
    "docs/drift.md",
    "docs/cli-json.md",
    "docs/experiments.md",
    "docs/policy.md",
    "docs/registry.md",
    "docs/reproducing.md",
    "docs/rollouts.md",
    "runtime/head/OVERVIEW.md",
    "runtime/net/OVERVIEW.md",
    "storage/OVERVIEW.md",
    "actors/src/training/OVERVIEW.md",
];

/// Endings that make a name without a slash a path.
const PATH_ENDINGS: &[&str] = &[".rs", ".md", ".proto"];

/// Messages of the control API that `--json` prints as they are.
const PRINTED_MESSAGES: &[&str] = &[
    "StatusReply",
    "Job",
    "Actor",
    "Node",
    "Resources",
    "ExplainReply",
    "NodeVerdict",
    "CreateTokenReply",
    "Head",
    "ListHeadsReply",
];

/// Of the checkout in which the test runs: it may have been built in another one that shares the
/// target folder.
fn root() -> PathBuf {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo runs this test");
    Path::new(&package)
        .parent()
        .expect("xtask lies in the workspace")
        .to_owned()
}

fn read(path: &str) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A page without its fenced blocks, which hold commands and programs.
fn without_blocks(page: &str) -> String {
    let mut is_inside = false;
    let lines = page.lines().filter(|line| {
        let is_fence = line.starts_with("```");
        is_inside ^= is_fence;
        !is_inside && !is_fence
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// What stands between backticks.
fn code_spans(page: &str) -> Vec<String> {
    let text = without_blocks(page);
    let spans = text.split('`').skip(1).step_by(2);
    spans.map(str::to_owned).collect()
}

/// Whether a code span is meant as a path of this tree: no spaces, no placeholders, not absolute,
/// and either a slash or the ending of a source file.
fn is_path(span: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-./".contains(c);
    !span.starts_with(['/', '-', '.'])
        && span.chars().all(is_plain)
        && (span.contains('/') || PATH_ENDINGS.iter().any(|ending| span.ends_with(ending)))
}

/// Whether `span`, named in `page`, exists: from the root, or beside the page.
fn exists(page: &str, span: &str) -> bool {
    let beside = Path::new(page).parent().unwrap_or(Path::new(""));
    root().join(span).exists() || root().join(beside).join(span).exists()
}

#[test]
fn every_path_that_a_page_names_exists() {
    let mut missing = Vec::new();
    for page in PAGES {
        for span in code_spans(&read(page)) {
            if is_path(&span) && !exists(page, &span) {
                missing.push(format!("{page}: `{span}`"));
            }
        }
    }
    assert!(
        missing.is_empty(),
        "these are not in the tree:\n{}",
        missing.join("\n")
    );
}

#[test]
fn spans_that_look_like_paths_are_told_from_others() {
    for (span, expected) in [
        ("runtime/head/src/raft/driver.rs", true),
        ("scheduler/src/placement/", true),
        ("lib.rs", true),
        ("cargo xtask demo", false),
        ("/v2/health/ready", false),
        ("file:///tmp/store", false),
        ("<data_dir>/tokens", false),
        ("worker.toml", false),
        ("storage.url", false),
        ("target", false),
    ] {
        assert_eq!(is_path(span), expected, "{span}");
    }
}

#[test]
fn blocks_are_left_out_and_spans_found() {
    let page = "a `one` b\n```sh\nrun `two`\n```\nc `three`";
    assert_eq!(code_spans(page), ["one", "three"]);
}

/// The first block of Rust in a page.
fn rust_block(page: &str) -> Vec<String> {
    page.lines()
        .skip_while(|line| !line.starts_with("```rust") && !line.starts_with("```no_run"))
        .skip(1)
        .take_while(|line| !line.starts_with("```"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_readme_shows_the_example_that_is_compiled() {
    let documentation: Vec<String> = read("sdk/src/lib.rs")
        .lines()
        .map_while(|line| line.strip_prefix("//!"))
        .map(|line| line.strip_prefix(' ').unwrap_or(line).to_owned())
        .collect();
    let compiled = rust_block(&documentation.join("\n"));
    assert!(
        !compiled.is_empty(),
        "the SDK's documentation begins with an example"
    );
    assert_eq!(rust_block(&read("README.md")), compiled);
}

/// The names of a message's fields.
fn fields_of(proto: &str, message: &str) -> Vec<String> {
    let begin = format!("message {message} {{");
    proto
        .lines()
        .skip_while(|line| *line != begin)
        .skip(1)
        .take_while(|line| *line != "}")
        .map(str::trim)
        .filter(|line| !line.starts_with("//"))
        .filter_map(|line| line.split_once(" = ")?.0.split_whitespace().last())
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_printed_field_is_documented() {
    let proto = read("runtime/wire/proto/mobula/v1/control.proto");
    let page = read("docs/cli-json.md");
    for message in PRINTED_MESSAGES {
        let fields = fields_of(&proto, message);
        assert!(!fields.is_empty(), "{message} has fields");
        for field in fields {
            assert!(
                page.contains(&format!("`{field}`")),
                "docs/cli-json.md does not name `{field}` of {message}"
            );
        }
    }
}

#[test]
fn the_map_names_the_pages_of_the_hard_components() {
    let map = read("ARCHITECTURE.md");
    for page in PAGES.iter().filter(|page| page.ends_with("OVERVIEW.md")) {
        assert!(
            map.contains(&format!("`{page}`")),
            "ARCHITECTURE.md does not name {page}"
        );
    }
}
