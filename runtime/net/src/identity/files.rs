//! Reading and writing identity files: whole or not at all, and secrets for their owner only.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// No certificate or key comes near this size, in bytes; it bounds what a wrong path can cost.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Why an identity file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file system said no.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
    },
    /// A private key that others can read is no longer private.
    #[error(
        "{path} holds a private key but has mode {mode:o}; set it to 600 and replace the key if \
         others may have read it"
    )]
    ExposedKey {
        /// The key file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Too large to be what it should be.
    #[error("{path} is larger than {FILE_BYTES_MAX} bytes, which no certificate or key is")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
}

impl FileError {
    /// Whether the file is simply not there.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        matches!(self, FileError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

fn failure<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> FileError + 'a {
    move |source| FileError::Io {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Makes sure that `directory` exists and is its owner's alone if it was made here.
pub(super) fn create_directory(directory: &Path) -> Result<(), FileError> {
    use std::os::unix::fs::DirBuilderExt;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(failure("create", directory))
}

/// Writes `text`, for its owner only, so that after a crash the file holds the old or the new text, whole.
pub(super) fn write_secret(path: &Path, text: &str) -> Result<(), FileError> {
    let temporary = path.with_extension("tmp");
    // What an earlier crash left could have another mode or owner; `create_new` makes a fresh file.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failure("remove", &temporary)(error));
        }
        _ => {}
    }
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(failure("create", &temporary))?;
    file.write_all(text.as_bytes())
        .map_err(failure("write", &temporary))?;
    file.sync_all().map_err(failure("sync", &temporary))?;
    fs::rename(&temporary, path).map_err(failure("replace", path))?;
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(failure("sync", directory))
}

/// Reads a file that nobody but its owner may be able to read.
pub(super) fn read_secret(path: &Path) -> Result<String, FileError> {
    let file = fs::File::open(path).map_err(failure("read", path))?;
    let mode = file
        .metadata()
        .map_err(failure("inspect", path))?
        .permissions()
        .mode()
        & 0o777;
    if mode & 0o077 != 0 {
        return Err(FileError::ExposedKey {
            path: path.to_owned(),
            mode,
        });
    }
    let mut text = String::new();
    file.take(FILE_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .map_err(failure("read", path))?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(FileError::TooLarge {
            path: path.to_owned(),
        });
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exposed_keys_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key.pem");
        write_secret(&path, "secret").unwrap();
        assert_eq!(read_secret(&path).unwrap(), "secret");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert!(matches!(
            read_secret(&path),
            Err(FileError::ExposedKey { mode: 0o640, .. })
        ));
    }

    #[test]
    fn files_are_replaced_whole_and_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("certificate.pem");
        write_secret(&path, "one").unwrap();
        write_secret(&path, "two").unwrap();
        assert_eq!(read_secret(&path).unwrap(), "two");
        write_secret(&path, &"x".repeat(FILE_BYTES_MAX as usize + 1)).unwrap();
        assert!(matches!(
            read_secret(&path),
            Err(FileError::TooLarge { .. })
        ));
        assert!(
            read_secret(&directory.path().join("none"))
                .unwrap_err()
                .is_not_found()
        );
    }
}
