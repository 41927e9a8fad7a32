//! Looks for libclang as the `clang-sys` crate will look for it when RocksDB's bindings are made.
//!
//! The search follows clang-sys so that "found" here means "found" there, and no environment
//! variable needs to be set for the build: a variable that plain `cargo` does not see would make
//! the two build differently, and RocksDB twice.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Directories to search once the environment has named none; `*` stands for any part of one name.
/// The same list, in the same order, as clang-sys 1.9 has for Linux.
const LINUX_PATTERNS: [&str; 7] = [
    "/usr/local/llvm*/lib*",
    "/usr/local/lib*/*/*",
    "/usr/local/lib*/*",
    "/usr/local/lib*",
    "/usr/lib*/*/*",
    "/usr/lib*/*",
    "/usr/lib*",
];

/// Where clang's own headers (`stddef.h` and its like) may lie beside a library directory.
const HEADER_PATTERNS: [&str; 4] = [
    "/usr/lib*/clang/*/include",
    "/usr/lib/llvm*/lib*/clang/*/include",
    "/usr/local/lib*/clang/*/include",
    "/usr/local/llvm*/lib*/clang/*/include",
];

/// The shared library that clang-sys will load, or `None`.
pub(crate) fn find_library() -> Option<PathBuf> {
    if let Some(path) = env::var_os("LIBCLANG_PATH").map(PathBuf::from) {
        // clang-sys looks nowhere else once this is set; a wrong value is a missing library.
        return library_at(&path);
    }
    let mut directories = Vec::new();
    if let Some(prefix) = llvm_config_prefix() {
        directories.extend(["bin", "lib", "lib64"].map(|folder| prefix.join(folder)));
    }
    for variable in ["LD_LIBRARY_PATH", "LIBRARY_PATH"] {
        if let Some(paths) = env::var_os(variable) {
            directories.extend(env::split_paths(&paths));
        }
    }
    directories.extend(LINUX_PATTERNS.iter().flat_map(|pattern| expand(pattern)));
    directories
        .iter()
        .find_map(|directory| library_in(directory))
}

/// Whether the headers that belong to `library` are installed. Debian splits them from the
/// library, and without them bindgen stops at the first `#include <stddef.h>`.
pub(crate) fn has_headers(library: &Path) -> bool {
    let library = fs::canonicalize(library).unwrap_or_else(|_| library.to_path_buf());
    let beside = library
        .parent()
        .map(|directory| format!("{}/clang/*/include", directory.display()));
    beside
        .iter()
        .map(String::as_str)
        .chain(HEADER_PATTERNS)
        .flat_map(expand)
        .any(|directory| directory.join("stddef.h").is_file())
}

fn library_at(path: &Path) -> Option<PathBuf> {
    let is_library = path.is_file() && path.file_name().is_some_and(is_library_name);
    if is_library {
        Some(path.to_path_buf())
    } else {
        library_in(path)
    }
}

fn library_in(directory: &Path) -> Option<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(directory)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(is_library_name) && path.exists())
        .collect();
    found.sort();
    found.into_iter().next()
}

/// `libclang.so`, `libclang-14.so`, `libclang.so.14`; not `libclang-cpp.so`,
/// which is another library.
fn is_library_name(name: &OsStr) -> bool {
    let Some(rest) = name.to_str().and_then(|name| name.strip_prefix("libclang")) else {
        return false;
    };
    let is_c_interface = rest.starts_with('.') || rest.starts_with('-');
    let is_shared = rest.contains(".so");
    is_c_interface && is_shared && !rest.starts_with("-cpp.")
}

fn llvm_config_prefix() -> Option<PathBuf> {
    let program = env::var_os("LLVM_CONFIG_PATH").unwrap_or_else(|| "llvm-config".into());
    let output = Command::new(program).arg("--prefix").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let prefix = text.lines().next()?.trim();
    (output.status.success() && !prefix.is_empty()).then(|| PathBuf::from(prefix))
}

/// All directories that match an absolute pattern, in name order.
fn expand(pattern: &str) -> Vec<PathBuf> {
    let mut directories = vec![PathBuf::from("/")];
    for part in pattern.split('/').filter(|part| !part.is_empty()) {
        directories = directories
            .iter()
            .flat_map(|directory| children_matching(directory, part))
            .collect();
    }
    directories
}

fn children_matching(directory: &Path, part: &str) -> Vec<PathBuf> {
    if !part.contains('*') {
        let child = directory.join(part);
        return if child.is_dir() { vec![child] } else { vec![] };
    }
    let mut children: Vec<PathBuf> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().and_then(OsStr::to_str);
            name.is_some_and(|name| matches_star(name, part)) && path.is_dir()
        })
        .collect();
    children.sort();
    children
}

/// Whether `name` matches `pattern`, in which the first `*` stands for any text.
fn matches_star(name: &str, pattern: &str) -> bool {
    match pattern.split_once('*') {
        Some((before, after)) => {
            name.len() >= before.len() + after.len()
                && name.starts_with(before)
                && name.ends_with(after)
        }
        None => name == pattern,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_the_library_by_its_many_names() {
        for name in [
            "libclang.so",
            "libclang-14.so",
            "libclang.so.14",
            "libclang-14.so.14.0.6",
        ] {
            assert!(is_library_name(OsStr::new(name)), "{name}");
        }
        for name in [
            "libclang-cpp.so.14",
            "libclangAST.a",
            "libclang.a",
            "libclangIndex.so",
            "clang",
        ] {
            assert!(!is_library_name(OsStr::new(name)), "{name}");
        }
    }

    #[test]
    fn a_star_stands_for_part_of_one_name() {
        for (name, pattern, expected) in [
            ("llvm-14", "llvm*", true),
            ("lib", "lib*", true),
            ("lib64", "lib*", true),
            ("li", "lib*", false),
            ("anything", "*", true),
            ("ab", "ab*b", false),
            ("lib", "lib", true),
            ("lib64", "lib", false),
        ] {
            assert_eq!(matches_star(name, pattern), expected, "{name} ~ {pattern}");
        }
    }

    #[test]
    fn expanding_a_pattern_of_nothing_gives_nothing() {
        assert!(expand("/no/such*/place").is_empty());
    }
}
