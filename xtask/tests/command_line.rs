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
