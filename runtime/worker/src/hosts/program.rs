//! Where a program's file is: the `mobula` binary itself, or a user's, fetched by content hash.

use std::path::PathBuf;

use mobula_core::spec::Program;
use mobula_wire::session::StorageLocation;

/// The programs of one worker.
#[derive(Debug)]
pub(crate) struct Programs {
    builtin: PathBuf,
    cache_dir: PathBuf,
}

impl Programs {
    pub(crate) fn new(builtin: PathBuf, cache_dir: PathBuf) -> Programs {
        Programs { builtin, cache_dir }
    }

    /// The file to run; the error is for people.
    pub(crate) async fn path(
        &self,
        program: &Program,
        storage: &StorageLocation,
    ) -> Result<PathBuf, String> {
        match program {
            Program::Builtin => Ok(self.builtin.clone()),
            Program::Artifact { blake3, .. } => {
                let path = self.cache_dir.join(blake3);
                Err(format!("{} {}", path.display(), storage.url))
            }
        }
    }
}
