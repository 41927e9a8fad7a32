//! The command line of xtask: a wrong one is refused with status 2 and says what is right.

use std::process::{Command, Output};

fn xtask(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(arguments)
        .output()
        .expect("cargo built xtask for this test")
}

#[test]
fn a_wrong_command_line_is_refused_with_status_2() {
    for (arguments, complaint) in [
        (&[][..], "usage: cargo xtask"),
        (&["tset"], "unknown command `tset`"),
        (&["test", "--fast"], "`test` does not take `--fast`"),
        (
            &["test", "--quick", "more"],
            "`test` does not take `--quick more`",
        ),
        (&["doctor", "now"], "`doctor` does not take `now`"),
        (&["gpu-check", "1"], "`gpu-check` does not take `1`"),
    ] {
        let output = xtask(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
        assert!(stderr.contains(complaint), "{arguments:?}: {stderr}");
        assert!(
            stderr.contains("usage: cargo xtask"),
            "{arguments:?}: {stderr}"
        );
    }
}

#[test]
fn help_is_no_error() {
    for arguments in [&["help"][..], &["--help"], &["test", "--help"]] {
        let output = xtask(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("demo [args]"));
    }
}

/// Where there is a GPU this would build for minutes and check it, which is not what this test is for.
#[test]
fn without_a_gpu_the_check_says_so_and_builds_nothing() {
    if std::path::Path::new("/dev/nvidia0").exists() || std::path::Path::new("/dev/dxg").exists() {
        eprintln!("there is a GPU here; `cargo xtask gpu-check` checks it");
        return;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .arg("gpu-check")
        // Whatever it would build with does not work.
        .env("CARGO", "/bin/false")
        .output()
        .expect("cargo built xtask for this test");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{stderr}");
    assert!(
        stderr.contains("no GPU: this machine has no /dev/nvidia0"),
        "{stderr}"
    );
    assert!(
        stderr.contains("nothing was checked (exit status 3)"),
        "{stderr}"
    );
}

#[test]
fn missing_tools_are_named_and_nothing_is_installed() {
    let nowhere = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .arg("test")
        .env("MOBULA_NO_INSTALL", "1")
        .env("PROTOC", "/no/such/protoc")
        .env("LIBCLANG_PATH", "/no/such/folder")
        .output()
        .expect("cargo built xtask for this test");
    let stderr = String::from_utf8_lossy(&nowhere.stderr);
    assert_eq!(nowhere.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("missing: protoc"), "{stderr}");
    assert!(stderr.contains("missing: libclang"), "{stderr}");
    assert!(stderr.contains("MOBULA_NO_INSTALL is set"), "{stderr}");
    assert!(stderr.contains("to install"), "{stderr}");
}

#[test]
fn doctor_fails_where_something_is_missing_and_names_it() {
    let lacking = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .arg("doctor")
        .env("PROTOC", "/no/such/protoc")
        .output()
        .expect("cargo built xtask for this test");
    let stdout = String::from_utf8_lossy(&lacking.stdout);
    assert_eq!(lacking.status.code(), Some(2), "{stdout}");
    assert!(stdout.contains("MISSING  protoc"), "{stdout}");
    assert!(stdout.contains("to install"), "{stdout}");
    // A cargo that has no such subcommands is all it takes, whatever else is there.
    let without_components = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .arg("doctor")
        .env("CARGO", "/bin/false")
        .output()
        .expect("cargo built xtask for this test");
    let stdout = String::from_utf8_lossy(&without_components.stdout);
    assert_eq!(without_components.status.code(), Some(2), "{stdout}");
    assert!(stdout.contains("MISSING  cargo clippy"), "{stdout}");
}
