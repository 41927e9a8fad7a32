//! The table of crates in code, and that `ARCHITECTURE.md` shows the same one.

/// What one crate may import of the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Allowed {
    Only(&'static [&'static str]),
    Anything,
}

/// The table, low to high. Nothing imports upwards.
pub(crate) const MAY_IMPORT: &[(&str, Allowed)] = &[
    ("mobula-core", Allowed::Only(&[])),
    ("mobula-wire", Allowed::Only(&["mobula-core"])),
    ("mobula-scheduler", Allowed::Only(&["mobula-core"])),
    ("mobula-storage", Allowed::Only(&["mobula-core"])),
    ("mobula-net", Allowed::Only(&["mobula-core", "mobula-wire"])),
    ("mobula-gpu", Allowed::Only(&[])),
    (
        "mobula-host",
        Allowed::Only(&["mobula-core", "mobula-wire", "mobula-net", "mobula-storage"]),
    ),
    (
        "mobula-testing",
        Allowed::Only(&["mobula-core", "mobula-wire", "mobula-net", "mobula-host"]),
    ),
    ("mobula-macros", Allowed::Only(&[])),
    (
        "mobula",
        Allowed::Only(&[
            "mobula-core",
            "mobula-wire",
            "mobula-net",
            "mobula-host",
            "mobula-macros",
        ]),
    ),
    (
        "mobula-head",
        Allowed::Only(&[
            "mobula-core",
            "mobula-wire",
            "mobula-net",
            "mobula-scheduler",
            "mobula-storage",
        ]),
    ),
    (
        "mobula-worker",
        Allowed::Only(&[
            "mobula-core",
            "mobula-wire",
            "mobula-net",
            "mobula-storage",
            "mobula-gpu",
        ]),
    ),
    (
        "mobula-actors",
        Allowed::Only(&[
            "mobula",
            "mobula-core",
            "mobula-scheduler",
            "mobula-storage",
            "mobula-gpu",
        ]),
    ),
    ("mobula-chaos", Allowed::Anything),
    (
        "mobula-cli",
        Allowed::Only(&[
            "mobula-core",
            "mobula-wire",
            "mobula-scheduler",
            "mobula-storage",
            "mobula-net",
            "mobula-host",
            "mobula",
            "mobula-head",
            "mobula-worker",
            "mobula-actors",
            "mobula-chaos",
        ]),
    ),
    ("mobula-benches", Allowed::Anything),
    ("xtask", Allowed::Only(&[])),
];

/// Crates whose tests may import anything, because they test the whole house.
pub(crate) const TESTS_MAY_IMPORT_ANYTHING: &[&str] =
    &["mobula-cli", "mobula-chaos", "mobula-benches"];

/// Crates that are for tests: those of any crate may import them, and nothing else may.
pub(crate) const ONLY_TESTS_IMPORT: &[&str] = &["mobula-testing"];

/// Crates that are a function of their arguments.
pub(crate) const PURE: &[&str] = &["mobula-core", "mobula-scheduler"];

/// What no pure crate may reach, directly or through any other crate.
pub(crate) const IMPURE: &[&str] = &[
    "async-std",
    "axum",
    "chrono",
    "fastrand",
    "hyper",
    "librocksdb-sys",
    "mio",
    "object_store",
    "quinn",
    "quinn-proto",
    "raft",
    "ractor",
    "rand",
    "reqwest",
    "rocksdb",
    "rustls",
    "smol",
    "socket2",
    "tokio",
    "tonic",
];

/// The libraries that stand for the table's column "must never hold". Others may bring them along;
/// the crate itself must not name them.
pub(crate) const NEVER_NAMES: &[(&str, &[&str])] = &[
    (
        "mobula-core",
        &["getrandom", "libc", "rustix", "time", "uuid"],
    ),
    (
        "mobula-scheduler",
        &["getrandom", "libc", "rustix", "time", "uuid"],
    ),
    ("mobula-storage", &["axum", "quinn", "reqwest", "tonic"]),
    ("mobula-net", &["object_store", "raft", "rocksdb"]),
    ("mobula-host", &["raft", "rocksdb"]),
    ("mobula", &["object_store", "raft", "rocksdb"]),
    ("mobula-head", &["candle-core", "candle-nn", "ractor"]),
];

/// What the table says about `importer`; `None` where it has no place in it.
pub(crate) fn allowed_for(importer: &str) -> Option<Allowed> {
    let row = MAY_IMPORT.iter().find(|(name, _)| *name == importer);
    row.map(|(_, allowed)| *allowed)
}

/// The page's table, as text.
const ARCHITECTURE: &str = include_str!("../../../ARCHITECTURE.md");

/// One row of the page's table.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    name: String,
    folder: String,
    may_import: String,
}

/// How the page calls a crate.
fn short(name: &str) -> &str {
    name.strip_prefix("mobula-").unwrap_or(name)
}

/// How the page shows what a crate may import.
fn shown(allowed: Allowed) -> String {
    match allowed {
        Allowed::Anything => "anything".to_owned(),
        Allowed::Only([]) => "nothing".to_owned(),
        Allowed::Only(names) => {
            let names: Vec<&str> = names.iter().map(|name| short(name)).collect();
            names.join(", ")
        }
    }
}

/// The rows below the header `| crate | folder | may import |`.
fn rows_of(page: &str) -> Vec<Row> {
    let cells = |line: &str| -> Vec<String> {
        line.trim_matches('|')
            .split('|')
            .map(|cell| cell.trim().trim_matches('`').to_owned())
            .collect()
    };
    page.lines()
        .skip_while(|line| !line.starts_with("| crate | folder | may import |"))
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| {
            let cells = cells(line);
            assert_eq!(cells.len(), 5, "a row of the table has five cells: {line}");
            Row {
                name: cells[0].clone(),
                folder: cells[1].clone(),
                may_import: cells[2].clone(),
            }
        })
        .collect()
}

#[test]
fn the_page_shows_this_table() {
    let on_the_page: Vec<(String, String)> = rows_of(ARCHITECTURE)
        .into_iter()
        .map(|row| (row.name, row.may_import))
        .collect();
    let in_code: Vec<(String, String)> = MAY_IMPORT
        .iter()
        .map(|(name, allowed)| (short(name).to_owned(), shown(*allowed)))
        .collect();
    assert_eq!(
        on_the_page, in_code,
        "ARCHITECTURE.md and MAY_IMPORT differ"
    );
}

#[test]
fn the_page_names_the_folder_of_each_crate() {
    let package = std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo runs this test");
    let root = std::path::Path::new(&package)
        .parent()
        .expect("xtask lies in the workspace");
    for row in rows_of(ARCHITECTURE) {
        let manifest = root.join(&row.folder).join("Cargo.toml");
        let text = std::fs::read_to_string(&manifest)
            .unwrap_or_else(|error| panic!("{}: {error}", manifest.display()));
        let is_named = |name: &str| text.contains(&format!("name = \"{name}\"\n"));
        assert!(
            is_named(&row.name) || is_named(&format!("mobula-{}", row.name)),
            "{} does not hold the crate {}",
            row.folder,
            row.name
        );
    }
}

#[test]
fn the_table_names_only_crates_that_come_before() {
    for (index, (importer, allowed)) in MAY_IMPORT.iter().enumerate() {
        let Allowed::Only(allowed) = allowed else {
            continue;
        };
        for imported in *allowed {
            let place = MAY_IMPORT.iter().position(|(name, _)| name == imported);
            assert!(
                place.is_some_and(|place| place < index),
                "{importer} -> {imported} points upwards or nowhere"
            );
        }
    }
}

#[test]
fn a_row_of_the_page_is_read_cell_by_cell() {
    let page = "text\n| crate | folder | may import | holds | must never hold |\n|---|---|---|---|---|\n\
                | net | `runtime/net` | core, wire | QUIC | Raft |\n\nmore";
    let expected = Row {
        name: "net".to_owned(),
        folder: "runtime/net".to_owned(),
        may_import: "core, wire".to_owned(),
    };
    assert_eq!(rows_of(page), [expected]);
}
