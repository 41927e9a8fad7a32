//! What pins the data of a job: BLAKE3 of its files, and of them all with how they are read.

use std::io::{self, Read};

use super::DataSpec;
use super::error::DataError;
use super::opened::{Bytes, data_error};

/// The digests of a data set, as its files are read.
pub(super) struct Digests {
    whole: blake3::Hasher,
    files: Vec<blake3::Hash>,
}

impl Digests {
    pub(super) fn of(spec: &DataSpec) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"mobula.training.data.v1");
        let how = serde_json::to_vec(&spec.without_files())
            .expect("plain numbers and strings always encode");
        hasher.update(&(how.len() as u64).to_le_bytes());
        hasher.update(&how);
        Digests {
            whole: hasher,
            files: Vec::new(),
        }
    }

    /// Hashes what a file holds, before it is read in any order. `file` is how errors name it.
    pub(super) fn add(&mut self, file: &str, bytes: &Bytes) -> Result<(), DataError> {
        self.add_rest(file, Hashed::new(bytes.reader(file, 0)))
    }

    /// Hashes what was not read yet of a file that was read from its beginning, and adds the whole.
    pub(super) fn add_rest(
        &mut self,
        file: &str,
        mut read: Hashed<impl Read>,
    ) -> Result<(), DataError> {
        read.hasher
            .update_reader(&mut read.inner)
            .map_err(|error| data_error(file, error))?;
        let digest = read.hasher.finalize();
        self.whole.update(digest.as_bytes());
        self.files.push(digest);
        Ok(())
    }

    /// That of the whole, and those of its files, in hex.
    pub(super) fn finish(self) -> (String, Vec<String>) {
        let files = self.files.iter().map(|file| file.to_hex().to_string());
        (self.whole.finalize().to_hex().to_string(), files.collect())
    }
}

/// Hashes what is read through it.
pub(super) struct Hashed<R> {
    inner: R,
    hasher: blake3::Hasher,
}

impl<R: Read> Hashed<R> {
    pub(super) fn new(inner: R) -> Self {
        Hashed {
            inner,
            hasher: blake3::Hasher::new(),
        }
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}
