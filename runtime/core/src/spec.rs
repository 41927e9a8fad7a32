//! What users ask for: jobs, actors, groups.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::label::Requirement;
use crate::namespace::NamespaceEntry;
use crate::resource::Resources;
use crate::secret::Secret;

/// Which program a host process runs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Program {
    /// The `mobula` binary itself, for built-in actors.
    Builtin,
    /// A user's binary, shipped by content hash.
    Artifact {
        /// BLAKE3 of the binary, in lower-case hexadecimal.
        blake3: String,
        /// Its size, in bytes.
        size_bytes: u64,
    },
}

/// What an actor is to its host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActorKind {
    /// The job's own `main`: a process of its own, whose end is the job's end.
    Driver,
    /// An actor of a type that the program registers under this name.
    Actor {
        /// The registered name of the type.
        type_name: String,
    },
}

/// The built-in type of the slots that tasks run in. Every program has it.
pub const TASK_SLOT_TYPE: &str = "mobula.task-slot";

impl ActorKind {
    /// Whether it is a slot for tasks.
    #[must_use]
    pub fn is_task_slot(&self) -> bool {
        matches!(self, ActorKind::Actor { type_name } if type_name == TASK_SLOT_TYPE)
    }
}

/// When an actor that ended without being asked to is started again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartPolicy {
    /// How often at most; ends for which the infrastructure is to blame do not count.
    pub max_restarts: u32,
    /// The delay before the second restart in a row, in milliseconds; the first one comes at once. It doubles each time. The
    /// row ends with a start that ran for as long as the largest delay.
    pub backoff_initial_ms: u64,
    /// The largest delay, in milliseconds.
    pub backoff_max_ms: u64,
}

impl RestartPolicy {
    /// Never again.
    pub const NEVER: RestartPolicy = RestartPolicy {
        max_restarts: 0,
        backoff_initial_ms: 0,
        backoff_max_ms: 0,
    };

    /// At most `max_restarts` times: at once after the first end, 100 ms after the next, at most 5 s after later ones.
    #[must_use]
    pub const fn times(max_restarts: u32) -> Self {
        RestartPolicy {
            max_restarts,
            backoff_initial_ms: 100,
            backoff_max_ms: 5_000,
        }
    }

    /// The delay before restart number `restart` of a row (counted from 1), in milliseconds.
    #[must_use]
    pub fn backoff_ms(&self, restart: u32) -> u64 {
        // An end that is the first says nothing of the next start, and whoever waits for the actor waits for this.
        let Some(doublings) = restart.checked_sub(2) else {
            return 0;
        };
        self.backoff_initial_ms
            .saturating_mul(1 << doublings.min(32))
            .min(self.backoff_max_ms)
    }
}

/// Where an actor may and should run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PlacementPolicy {
    /// Labels the node must have.
    pub selector: Vec<Requirement>,
    /// How to choose among the nodes that fit.
    pub strategy: Strategy,
    /// Actors with the same key are kept on the same node where that fits (affinity).
    pub affinity_key: Option<String>,
    /// Actors with the same key are kept on different nodes. `strict`: or not placed at all.
    pub spread_key: Option<SpreadKey>,
}

/// Keeps actors apart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpreadKey {
    /// Actors that share this key avoid each other.
    pub key: String,
    /// Whether sharing a node is forbidden rather than only avoided.
    pub strict: bool,
}

/// How to choose among nodes that fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Strategy {
    /// The fullest node on which it fits, so that whole nodes stay free.
    #[default]
    Pack,
    /// The emptiest node.
    Spread,
}

/// One actor, as asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ActorSpec {
    /// Driver, or an actor of some type.
    pub kind: ActorKind,
    /// A name by which others find it: unique within the job, or within the job's namespace.
    pub name: Option<String>,
    /// The encoded arguments of its constructor (at most [`INIT_LIMIT_BYTES`]).
    pub init: Vec<u8>,
    /// What it needs while it runs.
    pub resources: Resources,
    /// Where it may and should run.
    pub placement: PlacementPolicy,
    /// When it is started again.
    pub restart: RestartPolicy,
    /// Whether it gets a host process of its own.
    pub isolated: bool,
    /// How many calls may wait in front of it; past that, callers get `Overloaded`.
    pub mailbox_capacity: u32,
    /// Whether it lives on when the job that made it ends: it belongs to its namespace then, and
    /// needs a name there.
    pub detached: bool,
}

impl ActorSpec {
    /// An actor of this kind as it is where nobody asks for more: no name, no arguments, no resources,
    /// anywhere, not started again, in a shared process, with [`DEFAULT_MAILBOX_CAPACITY`].
    #[must_use]
    pub fn new(kind: ActorKind) -> Self {
        ActorSpec {
            kind,
            name: None,
            init: Vec::new(),
            resources: Resources::default(),
            placement: PlacementPolicy::default(),
            restart: RestartPolicy::NEVER,
            isolated: false,
            mailbox_capacity: DEFAULT_MAILBOX_CAPACITY,
            detached: false,
        }
    }

    /// The same for an actor of the type with this name.
    #[must_use]
    pub fn of_type(type_name: impl Into<String>) -> Self {
        let type_name = type_name.into();
        ActorSpec::new(ActorKind::Actor { type_name })
    }
}

/// The largest constructor argument: specs are replicated, and bulk bytes never pass through Raft.
pub const INIT_LIMIT_BYTES: usize = 256 * 1024;

/// The default bound on waiting calls: at 1 KiB a call, 1 MiB of memory an actor at the most.
pub const DEFAULT_MAILBOX_CAPACITY: u32 = 1024;

/// A job, as asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobSpec {
    /// A name for people; need not be unique.
    pub name: String,
    /// The program of its driver and hosts.
    pub program: Program,
    /// Arguments of the driver.
    pub args: Vec<String>,
    /// Environment of the driver and hosts.
    pub env: BTreeMap<String, String>,
    /// What the driver itself needs.
    pub resources: Resources,
    /// Where the driver may run.
    pub placement: PlacementPolicy,
    /// When the driver is started again.
    pub restart: RestartPolicy,
    /// A second submission with the same key returns the same job.
    pub idempotency_key: Option<String>,
    /// Files that lie in the working directory of its processes.
    pub files: Vec<JobFile>,
    /// Whether the driver is also started again when its `main` returned an error of its own.
    pub retry_errors: bool,
    /// More environment of the driver and hosts, which is shown nowhere. In the tables each value is
    /// sealed, and gone when the job is over.
    pub secrets: BTreeMap<String, Secret>,
    /// The namespace that it enters; `None` for a job that shares its actors with no other.
    pub namespace: Option<NamespaceEntry>,
}

/// A file of a job, shipped by content hash.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct JobFile {
    /// Where it lies, relative to the working directory: parts joined by `/`.
    pub name: String,
    /// BLAKE3 of its bytes, in lower-case hexadecimal.
    pub blake3: String,
    /// Its size, in bytes.
    pub size_bytes: u64,
}

/// Files of one job: each is fetched by every worker that runs a process of the job.
pub const JOB_FILES_MAX: usize = 64;

/// Bytes of all files of one job together: they are copied to each worker's disk.
pub const JOB_FILES_BYTES_MAX: u64 = 8 << 30;

/// The longest name of a file: what common file systems take.
const FILE_NAME_BYTES_MAX: usize = 255;

/// Checks number, size and names of a job's files; the error is for people. Names become paths on
/// workers, so they must stay inside the working directory and not contradict each other.
pub fn check_files(files: &[JobFile]) -> Result<(), String> {
    if files.len() > JOB_FILES_MAX {
        return Err(format!(
            "{} files, the limit is {JOB_FILES_MAX}: pack them into an archive",
            files.len()
        ));
    }
    let total_bytes = files
        .iter()
        .fold(0u64, |sum, file| sum.saturating_add(file.size_bytes));
    if total_bytes > JOB_FILES_BYTES_MAX {
        return Err(format!(
            "the files have {total_bytes} bytes, the limit is {JOB_FILES_BYTES_MAX}: put bulk data \
             into the object store"
        ));
    }
    let mut taken = std::collections::BTreeSet::new();
    for file in files {
        let name = &file.name;
        let is_plain = |part: &str| {
            !matches!(part, "" | "." | "..")
                && !part.contains(|c: char| c.is_control() || c == '\\')
        };
        if name.len() > FILE_NAME_BYTES_MAX || !name.split('/').all(is_plain) {
            return Err(format!(
                "`{}` cannot be the name of a file: use a relative path of at most \
                 {FILE_NAME_BYTES_MAX} bytes without `.` and `..`",
                name.escape_debug()
            ));
        }
        if !taken.insert(name.as_str()) {
            return Err(format!(
                "two files are called `{name}`: name one of them differently"
            ));
        }
    }
    // In order, a name that is also a folder stands before what would lie in it.
    for name in &taken {
        let folder = format!("{name}/");
        if taken
            .range(folder.as_str()..)
            .next()
            .is_some_and(|next| next.starts_with(&folder))
        {
            return Err(format!("`{name}` is both a file and the folder of another"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_stay_inside_the_working_directory() {
        let check = |names: &[&str]| {
            let file = |name: &&str| JobFile {
                name: (*name).to_owned(),
                blake3: String::new(),
                size_bytes: 1,
            };
            check_files(&names.iter().map(file).collect::<Vec<_>>())
        };
        assert_eq!(check(&["a", "b/c.txt", "b/d", "b-c"]), Ok(()));
        for bad in [
            "",
            "/etc/passwd",
            "../x",
            "a/../b",
            "a//b",
            "a/",
            "./a",
            "a\nb",
        ] {
            let error = check(&[bad]).unwrap_err();
            assert!(error.contains("cannot be the name"), "{bad:?}: {error}");
        }
        assert!(check(&["a", "a"]).unwrap_err().contains("two files"));
        let both = check(&["a/b", "a-x", "a"]).unwrap_err();
        assert!(both.contains("both a file and the folder"), "{both}");
        let many = vec!["x"; JOB_FILES_MAX + 1];
        assert!(check(&many).unwrap_err().contains("the limit is 64"));
    }

    #[test]
    fn backoff_doubles_up_to_its_cap() {
        let policy = RestartPolicy::times(10);
        assert_eq!(
            [1, 2, 3, 20, 99].map(|n| policy.backoff_ms(n)),
            [0, 100, 200, 5000, 5000]
        );
        assert_eq!(RestartPolicy::NEVER.backoff_ms(1), 0);
    }
}
