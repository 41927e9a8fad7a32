//! Installs what is missing where that is allowed, and otherwise says which command will.
//!
//! "Allowed" means: the system has apt-get, and this process is root or sudo asks no password.
//! Nothing here ever waits for a password.

use std::env;
use std::fmt;
use std::fs;
use std::process::{Command, Stdio};

use crate::requirements::{self, Requirement};

/// A family of systems that share a package manager and package names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Debian,
    Fedora,
    Suse,
    Arch,
    Alpine,
}

impl Family {
    const ALL: [Self; 5] = [
        Self::Debian,
        Self::Fedora,
        Self::Suse,
        Self::Arch,
        Self::Alpine,
    ];

    fn of_this_machine() -> Option<Self> {
        from_os_release(&fs::read_to_string("/etc/os-release").ok()?)
    }

    fn package(self, requirement: Requirement) -> &'static str {
        use Requirement::{CompilerC, CompilerCpp, Libclang, Protoc};
        match (self, requirement) {
            (Self::Debian, CompilerC | CompilerCpp) => "build-essential",
            (Self::Debian, Libclang) => "libclang-dev",
            (Self::Debian, Protoc) => "protobuf-compiler",
            (Self::Fedora | Self::Suse, CompilerC) => "gcc",
            (Self::Fedora | Self::Suse, CompilerCpp) => "gcc-c++",
            (Self::Fedora | Self::Suse, Libclang) => "clang-devel",
            (Self::Fedora, Protoc) => "protobuf-compiler",
            (Self::Suse, Protoc) => "protobuf-devel",
            (Self::Arch, CompilerC | CompilerCpp) => "base-devel",
            (Self::Arch, Libclang) => "clang",
            (Self::Arch, Protoc) => "protobuf",
            (Self::Alpine, CompilerC | CompilerCpp) => "build-base",
            (Self::Alpine, Libclang) => "clang-dev",
            (Self::Alpine, Protoc) => "protobuf-dev",
        }
    }

    fn packages(self, requirements: &[Requirement]) -> Vec<&'static str> {
        let mut packages: Vec<&'static str> = Vec::new();
        for requirement in requirements {
            let package = self.package(*requirement);
            if !packages.contains(&package) {
                packages.push(package);
            }
        }
        packages
    }

    /// The command a person would type to get `requirements`.
    fn command(self, requirements: &[Requirement]) -> String {
        let packages = self.packages(requirements).join(" ");
        match self {
            Self::Debian => format!("sudo apt-get update && sudo apt-get install -y {packages}"),
            Self::Fedora => format!("sudo dnf install -y {packages}"),
            Self::Suse => format!("sudo zypper install -y {packages}"),
            Self::Arch => format!("sudo pacman -S --needed {packages}"),
            Self::Alpine => format!("sudo apk add {packages}"),
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Debian => "Debian, Ubuntu",
            Self::Fedora => "Fedora, RHEL",
            Self::Suse => "openSUSE",
            Self::Arch => "Arch",
            Self::Alpine => "Alpine",
        })
    }
}

/// Makes sure that the build can start: finds what is missing and installs it, or says how to.
/// On `Err` everything has been said and the caller only has to stop.
pub(crate) fn ensure_requirements() -> Result<(), StillMissing> {
    let mut missing = requirements::missing();
    if missing.is_empty() {
        return Ok(());
    }
    describe(&missing);
    match Installer::of_this_machine() {
        Ok(installer) => {
            installer.install(&Family::Debian.packages(&names(&missing)));
            missing = requirements::missing();
            if missing.is_empty() {
                eprintln!("everything the build needs is there now");
                return Ok(());
            }
            eprintln!("\nstill missing after the attempt to install:");
            describe(&missing);
        }
        Err(why) => eprintln!("not installing by itself: {why}"),
    }
    eprintln!(
        "{}\nthen run the same command again",
        instructions(&names(&missing))
    );
    Err(StillMissing)
}

fn names(missing: &[(Requirement, String)]) -> Vec<Requirement> {
    missing
        .iter()
        .map(|(requirement, _)| *requirement)
        .collect()
}

/// The build cannot start on this machine yet.
#[derive(Debug)]
pub(crate) struct StillMissing;

fn describe(missing: &[(Requirement, String)]) {
    for (requirement, problem) in missing {
        eprintln!(
            "missing: {requirement} ({}): {problem}",
            requirement.reason()
        );
    }
}

/// What a person should type on this machine, or on each kind where this one is not known.
pub(crate) fn instructions(requirements: &[Requirement]) -> String {
    if let Some(family) = Family::of_this_machine() {
        return format!("to install:\n  {}", family.command(requirements));
    }
    let lines: Vec<String> = Family::ALL
        .iter()
        .map(|family| format!("  {family}: {}", family.command(requirements)))
        .collect();
    format!("to install, on\n{}", lines.join("\n"))
}

/// How apt-get can be called with the rights there are.
#[derive(Debug)]
enum Installer {
    Root,
    Sudo,
}

impl Installer {
    fn of_this_machine() -> Result<Self, &'static str> {
        if env::var_os("MOBULA_NO_INSTALL").is_some() {
            return Err("MOBULA_NO_INSTALL is set");
        }
        if !succeeds("apt-get", &["--version"]) {
            return Err("there is no apt-get here");
        }
        if is_root() {
            return Ok(Self::Root);
        }
        // `-n` never asks: it fails where a password would be needed.
        if succeeds("sudo", &["-n", "true"]) {
            return Ok(Self::Sudo);
        }
        Err("neither root nor passwordless sudo")
    }

    fn install(&self, packages: &[&str]) {
        // An outdated index is the usual reason why a package is "not found", so it comes first;
        // if it fails (no network), the install may still succeed from what is known.
        let update = ["update", "-q"];
        let mut install = vec![
            "install",
            "-y",
            "-q",
            "--no-install-recommends",
            // Fresh cloud machines hold the lock for their own upgrades: wait two minutes for it.
            "-o",
            "DPkg::Lock::Timeout=120",
        ];
        install.extend(packages);
        for arguments in [&update[..], &install[..]] {
            let mut command = self.apt_get(arguments);
            eprintln!("+ {}", crate::steps::shown(&command));
            match command.status() {
                Ok(status) if status.success() => {}
                Ok(status) => eprintln!("apt-get {} failed: {status}", arguments[0]),
                Err(error) => eprintln!("cannot start apt-get: {error}"),
            }
        }
    }

    fn apt_get(&self, arguments: &[&str]) -> Command {
        let mut command = match self {
            Self::Root => Command::new("env"),
            Self::Sudo => {
                let mut sudo = Command::new("sudo");
                sudo.args(["-n", "env"]);
                sudo
            }
        };
        command
            .args(["DEBIAN_FRONTEND=noninteractive", "apt-get"])
            .args(arguments)
            .stdin(Stdio::null());
        command
    }
}

fn is_root() -> bool {
    Command::new("id")
        .arg("-u")
        .output()
        .is_ok_and(|output| output.stdout.trim_ascii() == b"0")
}

fn succeeds(program: &str, arguments: &[&str]) -> bool {
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// The family that `/etc/os-release` names, by `ID` first and then by `ID_LIKE`.
fn from_os_release(text: &str) -> Option<Family> {
    let value = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .map(|value| value.trim_matches('"').to_owned())
            .unwrap_or_default()
    };
    let names = format!("{} {}", value("ID"), value("ID_LIKE"));
    names.split_whitespace().find_map(|name| match name {
        "debian" | "ubuntu" => Some(Family::Debian),
        "fedora" | "rhel" | "centos" => Some(Family::Fedora),
        "suse" | "opensuse" => Some(Family::Suse),
        "arch" => Some(Family::Arch),
        "alpine" => Some(Family::Alpine),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_system_is_known_by_its_own_name_or_its_parents() {
        for (text, expected) in [
            ("ID=debian\n", Some(Family::Debian)),
            (
                "NAME=\"Pop\"\nID=pop\nID_LIKE=\"ubuntu debian\"\n",
                Some(Family::Debian),
            ),
            (
                "ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n",
                Some(Family::Fedora),
            ),
            (
                "ID=\"opensuse-leap\"\nID_LIKE=\"suse opensuse\"\n",
                Some(Family::Suse),
            ),
            ("ID=manjaro\nID_LIKE=arch\n", Some(Family::Arch)),
            ("ID=alpine\n", Some(Family::Alpine)),
            ("ID=plan9\n", None),
            ("", None),
        ] {
            assert_eq!(from_os_release(text), expected, "{text:?}");
        }
    }

    #[test]
    fn one_command_installs_all_and_names_each_package_once() {
        let command = Family::Debian.command(&Requirement::ALL);
        assert_eq!(
            command,
            "sudo apt-get update && sudo apt-get install -y \
             build-essential libclang-dev protobuf-compiler"
        );
        assert_eq!(
            Family::Fedora.command(&[Requirement::Protoc]),
            "sudo dnf install -y protobuf-compiler"
        );
    }
}
