//! The numbers of a table, row by row: in memory while they are few, in a file when they are many.
//!
//! Invariant: the same numbers come out, bit by bit, wherever they are.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;

use super::error::DataError;
use super::rows::Features;
use super::scratch::{Held, Room};

/// Bytes of a number, in memory and in a file.
const NUMBER_BYTES: u64 = 4;

/// Bytes that are written at once.
const WRITE_BYTES: usize = 1 << 20;

/// Numbers that become more.
#[derive(Debug)]
pub(super) enum Growing {
    Memory(Vec<f32>),
    Disk(Writing),
}

/// Numbers on their way to a file.
#[derive(Debug)]
pub(super) struct Writing {
    file: BufWriter<File>,
    numbers: u64,
    held: Held,
}

impl Writing {
    fn push(&mut self, value: f32) -> io::Result<()> {
        self.file.write_all(&value.to_le_bytes())?;
        self.numbers += 1;
        Ok(())
    }
}

impl Growing {
    pub(super) fn new() -> Self {
        Growing::Memory(Vec::new())
    }

    /// Bytes of the numbers, wherever they are.
    pub(super) fn size_bytes(&self) -> u64 {
        NUMBER_BYTES
            * match self {
                Growing::Memory(values) => values.len() as u64,
                Growing::Disk(writing) => writing.numbers,
            }
    }

    /// Bytes of the numbers that are in memory.
    pub(super) fn memory_bytes(&self) -> u64 {
        match self {
            Growing::Memory(_) => self.size_bytes(),
            Growing::Disk(_) => 0,
        }
    }

    /// Makes sure that there is room for so many more; says whether there is.
    #[must_use]
    pub(super) fn reserve(&mut self, numbers: usize) -> bool {
        match self {
            Growing::Memory(_) => true,
            Growing::Disk(writing) => writing.held.grow(numbers as u64 * NUMBER_BYTES),
        }
    }

    pub(super) fn push(&mut self, value: f32) -> io::Result<()> {
        match self {
            Growing::Memory(values) => {
                values.push(value);
                Ok(())
            }
            Growing::Disk(writing) => writing.push(value),
        }
    }

    /// Moves the numbers to a file, and with them all that come. `file` is what holds the newest.
    pub(super) fn spill(&mut self, file: &str, room: &Room) -> Result<(), DataError> {
        let size_bytes = self.size_bytes();
        let Growing::Memory(values) = self else {
            return Ok(());
        };
        let mut held = room.disk();
        if !held.grow(size_bytes) {
            return Err(room.too_large(file));
        }
        let mut writing = Writing {
            file: BufWriter::with_capacity(WRITE_BYTES, room.file(file)?),
            numbers: 0,
            held,
        };
        for value in values.iter() {
            writing
                .push(*value)
                .map_err(|source| room.failed(file, size_bytes, source))?;
        }
        *self = Growing::Disk(writing);
        Ok(())
    }

    /// The numbers, to be read. `source` is how errors name what they are of.
    pub(super) fn finish(self, source: &str, room: &Room) -> Result<Features, DataError> {
        let size_bytes = self.size_bytes();
        match self {
            Growing::Memory(values) => Ok(Features::Memory(values)),
            Growing::Disk(writing) => {
                let file = writing
                    .file
                    .into_inner()
                    .map_err(|error| room.failed(source, size_bytes, error.into_error()))?;
                Ok(Features::Disk(OnDisk {
                    file,
                    numbers: writing.numbers,
                    source: source.to_owned(),
                    room: room.clone(),
                    _held: writing.held,
                }))
            }
        }
    }
}

/// Numbers in a file of their own, which nobody else can open: they are what was written.
#[derive(Debug)]
pub(super) struct OnDisk {
    file: File,
    numbers: u64,
    source: String,
    room: Room,
    /// What they take of the disk, until the file is closed.
    _held: Held,
}

impl OnDisk {
    /// How many there are.
    pub(super) fn len(&self) -> u64 {
        self.numbers
    }

    /// The numbers of a row of `width`, behind those that are in `values`.
    pub(super) fn read_row(
        &self,
        row: u64,
        width: usize,
        values: &mut Vec<f32>,
    ) -> Result<(), DataError> {
        let mut buffer = vec![0; width * NUMBER_BYTES as usize];
        self.file
            .read_exact_at(&mut buffer, row * width as u64 * NUMBER_BYTES)
            .map_err(|source| {
                let size_bytes = self.numbers * NUMBER_BYTES;
                self.room.failed(&self.source, size_bytes, source)
            })?;
        let numbers = buffer.as_chunks::<4>().0.iter();
        values.extend(numbers.map(|bytes| f32::from_le_bytes(*bytes)));
        Ok(())
    }
}
