//! What the build needs beside Rust, and whether this machine has it.
//!
//! RocksDB is C++ (a C++20 compiler) with bindings made by bindgen (libclang and its headers); the
//! Raft crate compiles its messages with protoc. Nothing else is needed: no cmake, no make.

use std::env;
use std::ffi::OsString;
use std::fmt;
use std::process::{Command, Stdio};

use crate::libclang;

/// Oldest protoc that knows every option which the Raft crate's build passes to it.
const PROTOC_VERSION_MIN: (u32, u32) = (3, 12);

/// Something that the build cannot do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Requirement {
    CompilerC,
    CompilerCpp,
    Libclang,
    Protoc,
}

impl Requirement {
    /// All of them, in the order of the report.
    pub(crate) const ALL: [Self; 4] = [
        Self::CompilerC,
        Self::CompilerCpp,
        Self::Libclang,
        Self::Protoc,
    ];

    /// What needs it.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::CompilerC => "links every binary and compiles ring, blake3 and lz4",
            Self::CompilerCpp => "compiles RocksDB",
            Self::Libclang => "makes RocksDB's Rust bindings",
            Self::Protoc => "compiles the messages of the Raft crate",
        }
    }

    /// Looks for it: where it is, or what is wrong.
    pub(crate) fn find(self) -> Result<String, String> {
        match self {
            Self::CompilerC => find_compiler("CC", "cc", &["-fsyntax-only", "-x", "c"]),
            Self::CompilerCpp => find_compiler(
                "CXX",
                "c++",
                // As RocksDB is compiled; the header shows that the C++ library is there too.
                &[
                    "-std=c++20",
                    "-include",
                    "cstdint",
                    "-fsyntax-only",
                    "-x",
                    "c++",
                ],
            ),
            Self::Libclang => find_libclang(),
            Self::Protoc => find_protoc(),
        }
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::CompilerC => "C compiler",
            Self::CompilerCpp => "C++20 compiler",
            Self::Libclang => "libclang",
            Self::Protoc => "protoc",
        })
    }
}

/// What is missing, with what is wrong with each; empty when the build can start.
pub(crate) fn missing() -> Vec<(Requirement, String)> {
    Requirement::ALL
        .into_iter()
        .filter_map(|requirement| Some((requirement, requirement.find().err()?)))
        .collect()
}

fn find_compiler(variable: &str, default: &str, flags: &[&str]) -> Result<String, String> {
    let program = program_from(variable, default);
    let shown = program.to_string_lossy().into_owned();
    let output = Command::new(&program)
        .args(flags)
        .arg("/dev/null")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("cannot start `{shown}`: {error}"))?;
    if output.status.success() {
        return Ok(version_line(&program).unwrap_or(shown));
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let first = complaint.lines().next().unwrap_or("no message");
    Err(format!("`{shown} {}` fails: {first}", flags.join(" ")))
}

fn find_libclang() -> Result<String, String> {
    let Some(library) = libclang::find_library() else {
        let hint = match env::var_os("LIBCLANG_PATH") {
            Some(path) => format!(
                "no libclang at LIBCLANG_PATH={}; correct or unset it",
                path.to_string_lossy()
            ),
            None => "no libclang shared library under /usr/lib or /usr/local".to_owned(),
        };
        return Err(hint);
    };
    if !libclang::has_headers(&library) {
        return Err(format!(
            "{} is there but clang's own headers (stddef.h) are not",
            library.display()
        ));
    }
    Ok(library.display().to_string())
}

fn find_protoc() -> Result<String, String> {
    let program = program_from("PROTOC", "protoc");
    let shown = program.to_string_lossy().into_owned();
    let line =
        version_line(&program).ok_or_else(|| format!("`{shown} --version` cannot be run"))?;
    match protoc_version(&line) {
        Some(version) if version >= PROTOC_VERSION_MIN => Ok(format!("{shown} ({line})")),
        _ => Err(format!(
            "`{shown}` says `{line}`; {}.{} or newer is needed",
            PROTOC_VERSION_MIN.0, PROTOC_VERSION_MIN.1
        )),
    }
}

/// Major and minor number out of `libprotoc 3.21.12` or `libprotoc 29.3`.
fn protoc_version(line: &str) -> Option<(u32, u32)> {
    let mut numbers = line.rsplit(' ').next()?.split('.');
    let major = numbers.next()?.parse().ok()?;
    let minor = numbers.next()?.parse().ok()?;
    Some((major, minor))
}

fn program_from(variable: &str, default: &str) -> OsString {
    env::var_os(variable)
        .filter(|program| !program.is_empty())
        .unwrap_or_else(|| default.into())
}

fn version_line(program: &OsString) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let line = text.lines().next()?.trim().to_owned();
    output.status.success().then_some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_both_ways_protoc_numbers_itself() {
        for (line, expected) in [
            ("libprotoc 3.21.12", Some((3, 21))),
            ("libprotoc 29.3", Some((29, 3))),
            ("libprotoc 3.6.1", Some((3, 6))),
            ("libprotoc", None),
            ("", None),
        ] {
            assert_eq!(protoc_version(line), expected, "{line:?}");
        }
        assert!((29, 3) >= PROTOC_VERSION_MIN);
        assert!((3, 6) < PROTOC_VERSION_MIN);
    }

    #[test]
    fn an_absent_compiler_is_named() {
        let error = find_compiler("MOBULA_NO_SUCH_VARIABLE", "mobula-no-such-compiler", &[])
            .expect_err("no such compiler exists");
        assert!(error.contains("mobula-no-such-compiler"), "{error}");
    }
}
