//! Roles: what a program's process can be started for besides taking part in a cluster.
//!
//! A crate that is linked into a program registers one. Whoever starts the program by [`command`] asks for it: then the
//! user's `main` does not run, no cluster is needed, and what the role works with lies in a folder.
//!
//! Invariants:
//! 1. A program that does not have the role ends without running the user's `main`, also one whose SDK is from before there
//!    were roles: it is told that an agent left it an order, finds none, and takes that for an error.
//! 2. An agent's order goes before: nothing that a job's environment says starts a role.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use mobula_host::inventory;
use mobula_wire::host::BOOTSTRAP_ENV;

use crate::error::{Error, Result};
use crate::process::LOG_ENV;

/// The environment variable that names the role.
const ROLE_ENV: &str = "MOBULA_ROLE";

/// The environment variable that names the folder that the role works with.
const FOLDER_ENV: &str = "MOBULA_ROLE_FOLDER";

/// A file that never is: where the process of a role would look for an agent's order.
const NO_BOOTSTRAP: &str = "no-bootstrap";

/// What the process of a role inherits: where programs, libraries and temporary files are, language and time zone, and how
/// much to log. No token of a cluster and no key of an object store.
const INHERITED: [&str; 12] = [
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "LD_LIBRARY_PATH",
    "RUST_LOG",
    "RUST_BACKTRACE",
    "NO_COLOR",
    LOG_ENV,
];

/// A role that a crate of the program brings with it, registered by `inventory::submit!`.
#[derive(Debug, Clone, Copy)]
pub struct Role {
    /// Its name, unique in a program.
    pub name: &'static str,
    /// Plays it with the folder that was prepared for it, on a thread that may wait. The error is for people.
    pub play: fn(&Path) -> std::result::Result<(), String>,
}

inventory::collect!(Role);

/// How `program` is started to play the role `name` with what lies in `folder`. Its working directory is that of this
/// process.
#[must_use]
pub fn command(program: &Path, name: &str, folder: &Path) -> Command {
    let inherited = INHERITED
        .iter()
        .filter_map(|name| Some((name, std::env::var_os(name)?)));
    let mut command = Command::new(program);
    command
        .env_clear()
        .envs(inherited)
        .env(ROLE_ENV, name)
        .env(FOLDER_ENV, folder)
        .env(BOOTSTRAP_ENV, folder.join(NO_BOOTSTRAP));
    command
}

/// The role that a process was started for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asked {
    name: String,
    folder: PathBuf,
}

/// The role that the environment asks for, whose variables `variable` reads.
pub(crate) fn asked(variable: impl Fn(&str) -> Option<OsString>) -> Option<Asked> {
    let name = variable(ROLE_ENV)?;
    let folder = PathBuf::from(variable(FOLDER_ENV)?);
    let bootstrap = PathBuf::from(variable(BOOTSTRAP_ENV)?);
    (bootstrap == folder.join(NO_BOOTSTRAP)).then(|| Asked {
        name: name.to_string_lossy().into_owned(),
        folder,
    })
}

/// Plays the role.
pub(crate) async fn play(asked: Asked) -> Result<ExitCode> {
    let Asked { name, folder } = asked;
    let failed = |reason: String| Error::setup(format!("role `{name}`"), reason);
    let mut roles = inventory::iter::<Role>.into_iter();
    let Some(role) = roles.find(|role| role.name == name) else {
        return Err(failed(
            "this program has no such role: the crate that brings it is not linked into it, or is older"
                .to_owned(),
        ));
    };
    let play = role.play;
    tokio::task::spawn_blocking(move || play(&folder))
        .await
        .map_err(|error| failed(error.to_string()))?
        .map_err(failed)?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn echo(folder: &Path) -> std::result::Result<(), String> {
        Err(format!("played with {}", folder.display()))
    }

    inventory::submit! {
        Role { name: "echo", play: echo }
    }

    fn environment(command: &Command) -> BTreeMap<String, OsString> {
        command
            .get_envs()
            .filter_map(|(name, value)| Some((name.to_str()?.to_owned(), value?.to_owned())))
            .collect()
    }

    #[test]
    fn what_a_command_asks_for_is_heard_and_nothing_else_is_inherited_than_what_is_listed() {
        let command = command(Path::new("/bin/p"), "echo", Path::new("/f"));
        let set = environment(&command);
        let expected = Asked {
            name: "echo".into(),
            folder: "/f".into(),
        };
        assert_eq!(asked(|name| set.get(name).cloned()), Some(expected));
        let ours = [ROLE_ENV, FOLDER_ENV, BOOTSTRAP_ENV];
        let is_listed = |name: &str| ours.contains(&name) || INHERITED.contains(&name);
        assert!(set.keys().all(|name| is_listed(name)), "{set:?}");
    }

    #[test]
    fn a_jobs_environment_starts_no_role() {
        let command = command(Path::new("/bin/p"), "echo", Path::new("/f"));
        let mut set = environment(&command);
        // What an agent sets stands there, whatever the job's environment says.
        set.insert(BOOTSTRAP_ENV.to_owned(), "/run/host-1.json".into());
        assert_eq!(asked(|name| set.get(name).cloned()), None);
        set.remove(BOOTSTRAP_ENV);
        assert_eq!(asked(|name| set.get(name).cloned()), None);
    }

    #[tokio::test]
    async fn a_role_is_found_by_its_name() {
        let of = |name: &str| Asked {
            name: name.to_owned(),
            folder: "/f".into(),
        };
        let error = play(of("echo")).await.unwrap_err().to_string();
        assert!(error.contains("played with /f"), "{error}");
        let error = play(of("nobody")).await.unwrap_err().to_string();
        assert!(error.contains("role `nobody`"), "{error}");
        assert!(error.contains("no such role"), "{error}");
    }
}
