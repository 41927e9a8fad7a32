//! Who may import whom.
//!
//! [`table::MAY_IMPORT`] is the table of `ARCHITECTURE.md` in code; this test compares it with what
//! the `Cargo.toml` files say, and with the page. Purity is a dependency fact: a crate that cannot name tokio cannot call
//! it.
//!
//! 1. Every edge between two crates of the workspace, normal or build, is in the table.
//! 2. Tests import upwards only in the crates that sit on top of everything.
//! 3. The pure crates reach no I/O, no clock and no randomness, not even through others.
//! 4. Some crates never name some libraries ([`NEVER_NAMES`]).
//! 5. `xtask` has no dependencies at all.
//! 6. The table of `ARCHITECTURE.md` and the one in code are the same.
//! 7. Nothing of CUDA is built unless somebody asks for the feature `cuda`.
//! 8. Crates that are for tests are imported by tests only.

mod table;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, PackageId};

use table::{
    Allowed, IMPURE, MAY_IMPORT, NEVER_NAMES, ONLY_TESTS_IMPORT, PURE, TESTS_MAY_IMPORT_ANYTHING,
    allowed_for,
};

/// One dependency as a `Cargo.toml` states it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Edge<'a> {
    importer: &'a str,
    imported: &'a str,
    is_dev: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Violation {
    NotInTable {
        importer: String,
    },
    Forbidden {
        importer: String,
        imported: String,
        is_dev: bool,
        allowed: Vec<&'static str>,
    },
    NeverNames {
        importer: String,
        imported: String,
        never: &'static [&'static str],
    },
    OnlyForTests {
        importer: String,
        imported: String,
    },
    Impure {
        path: Vec<String>,
    },
    XtaskHasDependency {
        imported: String,
    },
}

impl fmt::Display for Violation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotInTable { importer } => write!(
                formatter,
                "{importer} is not in the table: give it a place in ARCHITECTURE.md and in \
                 MAY_IMPORT"
            ),
            Self::Forbidden {
                importer,
                imported,
                is_dev,
                allowed,
            } => {
                let kind = if *is_dev { " (dev-dependency)" } else { "" };
                write!(
                    formatter,
                    "{importer} -> {imported}{kind}: not in the table; {importer} may import {}",
                    if allowed.is_empty() {
                        "nothing".to_owned()
                    } else {
                        allowed.join(", ")
                    }
                )
            }
            Self::NeverNames {
                importer,
                imported,
                never,
            } => write!(
                formatter,
                "{importer} -> {imported}: {importer} must never name any of {}",
                never.join(", ")
            ),
            Self::OnlyForTests { importer, imported } => write!(
                formatter,
                "{importer} -> {imported}: {imported} is for tests: make it a dev-dependency"
            ),
            Self::Impure { path } => write!(
                formatter,
                "{}: a pure crate reaches no I/O, clock or randomness; it takes them as arguments",
                path.join(" -> ")
            ),
            Self::XtaskHasDependency { imported } => write!(
                formatter,
                "xtask -> {imported}: xtask has no dependencies, so that it starts in seconds"
            ),
        }
    }
}

/// Checks the stated dependencies (rules 1, 2, 4, 5, 8).
fn check_edges(members: &[&str], edges: &[Edge<'_>]) -> Vec<Violation> {
    let missing = members
        .iter()
        .filter(|member| allowed_for(member).is_none())
        .map(|member| Violation::NotInTable {
            importer: (*member).to_owned(),
        });
    let wrong = edges.iter().filter_map(|edge| check_edge(members, *edge));
    missing.chain(wrong).collect()
}

fn check_edge(members: &[&str], edge: Edge<'_>) -> Option<Violation> {
    let Edge {
        importer,
        imported,
        is_dev,
    } = edge;
    if importer == "xtask" && !is_dev {
        return Some(Violation::XtaskHasDependency {
            imported: imported.to_owned(),
        });
    }
    if !members.contains(&imported) {
        let (_, never) = NEVER_NAMES.iter().find(|(name, _)| *name == importer)?;
        return (!is_dev && never.contains(&imported)).then(|| Violation::NeverNames {
            importer: importer.to_owned(),
            imported: imported.to_owned(),
            never,
        });
    }
    if ONLY_TESTS_IMPORT.contains(&imported) {
        return (!is_dev).then(|| Violation::OnlyForTests {
            importer: importer.to_owned(),
            imported: imported.to_owned(),
        });
    }
    if is_dev && TESTS_MAY_IMPORT_ANYTHING.contains(&importer) {
        return None;
    }
    match allowed_for(importer)? {
        Allowed::Anything => None,
        Allowed::Only(allowed) if allowed.contains(&imported) => None,
        Allowed::Only(allowed) => Some(Violation::Forbidden {
            importer: importer.to_owned(),
            imported: imported.to_owned(),
            is_dev,
            allowed: allowed.to_vec(),
        }),
    }
}

/// Checks what the pure crates reach through any number of crates (rule 3). `graph` maps a crate
/// to what it needs to be built and to run.
fn check_purity(graph: &BTreeMap<String, BTreeSet<String>>) -> Vec<Violation> {
    PURE.iter()
        .flat_map(|pure| impure_paths(graph, pure))
        .collect()
}

/// The shortest path from `start` to each impure crate that it reaches.
fn impure_paths(graph: &BTreeMap<String, BTreeSet<String>>, start: &str) -> Vec<Violation> {
    let mut violations = Vec::new();
    let mut seen = BTreeSet::from([start.to_owned()]);
    let mut queue = VecDeque::from([vec![start.to_owned()]]);
    while let Some(path) = queue.pop_front() {
        let end = path.last().expect("a path starts with its first crate");
        for next in graph.get(end).into_iter().flatten() {
            if !seen.insert(next.clone()) {
                continue;
            }
            let mut longer = path.clone();
            longer.push(next.clone());
            if IMPURE.contains(&next.as_str()) {
                violations.push(Violation::Impure { path: longer });
            } else {
                queue.push_back(longer);
            }
        }
    }
    violations
}

/// The resolved graph by crate name. Two versions of a crate count as one: either is too much.
fn resolved_graph(metadata: &Metadata) -> BTreeMap<String, BTreeSet<String>> {
    let names: BTreeMap<&PackageId, String> = metadata
        .packages
        .iter()
        .map(|package| (&package.id, package.name.to_string()))
        .collect();
    let resolve = metadata
        .resolve
        .as_ref()
        .expect("metadata was asked for with dependencies");
    let mut graph: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for node in &resolve.nodes {
        let needed = node
            .deps
            .iter()
            .filter(|dependency| {
                let kinds = &dependency.dep_kinds;
                kinds
                    .iter()
                    .any(|kind| kind.kind != DependencyKind::Development)
            })
            .map(|dependency| names[&dependency.pkg].clone());
        graph
            .entry(names[&node.id].clone())
            .or_default()
            .extend(needed);
    }
    graph
}

/// Asks cargo about this workspace, for the platform that the test runs on.
fn workspace_metadata() -> Metadata {
    let package = std::env::var("CARGO_MANIFEST_DIR").expect("cargo runs this test");
    let manifest = format!("{package}/../Cargo.toml");
    let platform = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    MetadataCommand::new()
        .manifest_path(manifest)
        .other_options(vec![
            "--locked".to_owned(),
            format!("--filter-platform={platform}"),
        ])
        .exec()
        .expect("the workspace this test runs in is readable")
}

fn report(violations: &[Violation]) -> String {
    let lines: Vec<String> = violations.iter().map(ToString::to_string).collect();
    lines.join("\n")
}

#[test]
fn every_import_is_in_the_table() {
    let metadata = workspace_metadata();
    let packages = metadata.workspace_packages();
    let members: Vec<&str> = packages
        .iter()
        .map(|package| package.name.as_str())
        .collect();
    let edges: Vec<Edge<'_>> = packages
        .iter()
        .flat_map(|package| {
            package.dependencies.iter().map(|dependency| Edge {
                importer: package.name.as_str(),
                imported: dependency.name.as_str(),
                is_dev: dependency.kind == DependencyKind::Development,
            })
        })
        .collect();
    let violations = check_edges(&members, &edges);
    assert!(
        violations.is_empty(),
        "layering is broken:\n{}",
        report(&violations)
    );
}

#[test]
fn pure_crates_reach_nothing_impure() {
    let graph = resolved_graph(&workspace_metadata());
    for pure in PURE {
        assert!(graph.contains_key(*pure), "{pure} is in the workspace");
    }
    let violations = check_purity(&graph);
    assert!(
        violations.is_empty(),
        "purity is broken:\n{}",
        report(&violations)
    );
}

#[test]
fn nothing_of_cuda_is_built_unless_it_is_asked_for() {
    let metadata = workspace_metadata();
    let graph = resolved_graph(&metadata);
    assert!(graph["mobula-actors"].contains("candle-core"));
    for crate_of_cuda in ["candle-kernels", "cudarc"] {
        assert!(!graph.contains_key(crate_of_cuda), "{crate_of_cuda}");
    }
    for package in ["mobula-actors", "mobula-cli"] {
        let mut packages = metadata.packages.iter();
        let package = packages.find(|found| *found.name == package);
        let features = &package.expect("it is in the workspace").features;
        assert!(features.contains_key("cuda") && !features.contains_key("default"));
    }
}

#[test]
fn the_checker_sees_planted_edges() {
    let members: Vec<&str> = MAY_IMPORT.iter().map(|(name, _)| *name).collect();
    let edge = |importer, imported, is_dev| Edge {
        importer,
        imported,
        is_dev,
    };
    for (planted, expected) in [
        // Upwards, sideways, and into the crates that nobody imports.
        (
            edge("mobula-net", "mobula-head", false),
            Some(
                "mobula-net -> mobula-head: not in the table; mobula-net may import mobula-core, mobula-wire",
            ),
        ),
        (
            edge("mobula-core", "mobula-wire", false),
            Some("mobula-core -> mobula-wire: not in the table; mobula-core may import nothing"),
        ),
        (
            edge("mobula-wire", "mobula-benches", false),
            Some(
                "mobula-wire -> mobula-benches: not in the table; mobula-wire may import mobula-core",
            ),
        ),
        (
            edge("mobula-storage", "mobula-host", true),
            Some(
                "mobula-storage -> mobula-host (dev-dependency): not in the table; mobula-storage may import mobula-core",
            ),
        ),
        (
            edge("mobula-net", "rocksdb", false),
            Some(
                "mobula-net -> rocksdb: mobula-net must never name any of object_store, raft, rocksdb",
            ),
        ),
        (
            edge("xtask", "clap", false),
            Some("xtask -> clap: xtask has no dependencies, so that it starts in seconds"),
        ),
        (
            edge("mobula-benches", "mobula-testing", false),
            Some(
                "mobula-benches -> mobula-testing: mobula-testing is for tests: make it a dev-dependency",
            ),
        ),
        // Allowed: by the table, in tests on top of everything, of what is for tests in any, and in xtask's own tests.
        (edge("mobula-head", "mobula-scheduler", false), None),
        (edge("mobula-benches", "mobula-cli", false), None),
        (edge("mobula-cli", "mobula-chaos", true), None),
        (edge("mobula", "mobula-testing", true), None),
        (edge("mobula-net", "quinn", false), None),
        (edge("xtask", "cargo_metadata", true), None),
    ] {
        let shown = check_edges(&members, &[planted])
            .first()
            .map(ToString::to_string);
        assert_eq!(shown.as_deref(), expected, "{planted:?}");
    }
}

#[test]
fn the_checker_sees_a_crate_without_a_place() {
    let violations = check_edges(&["mobula-core", "mobula-surprise"], &[]);
    let importer = "mobula-surprise".to_owned();
    assert_eq!(violations, [Violation::NotInTable { importer }]);
}

#[test]
fn the_checker_sees_impurity_through_another_crate() {
    let needs = |names: &[&str]| {
        names
            .iter()
            .map(ToString::to_string)
            .collect::<BTreeSet<_>>()
    };
    let mut graph = BTreeMap::from([
        (
            "mobula-scheduler".to_owned(),
            needs(&["mobula-core", "serde"]),
        ),
        ("mobula-core".to_owned(), needs(&["serde", "helper"])),
        ("serde".to_owned(), needs(&[])),
        ("helper".to_owned(), needs(&[])),
    ]);
    assert_eq!(check_purity(&graph), []);
    graph.insert("helper".to_owned(), needs(&["tokio"]));
    let path = |names: &[&str]| Violation::Impure {
        path: names.iter().map(ToString::to_string).collect(),
    };
    assert_eq!(
        check_purity(&graph),
        [
            path(&["mobula-core", "helper", "tokio"]),
            path(&["mobula-scheduler", "mobula-core", "helper", "tokio"]),
        ]
    );
}
