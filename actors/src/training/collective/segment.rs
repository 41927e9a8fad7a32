//! Memory that one trainer writes and other processes of its machine read: a ring of sums.
//!
//! Invariants:
//! 1. Only its owner writes. It never waits for a reader and never grows: the oldest values are written over.
//! 2. Nothing is believed for having been read: a reader copies values, and whoever uses the copy compares its
//!    digest. So values that were written over meanwhile are seen like values that were damaged on the way.
//! 3. A reader takes memory for the owner's only if it cannot shrink and holds the owner's random key: another
//!    machine, another container, another process with the same number lead to memory without that key.
//! 4. Every word is read and written atomically, so that no race is undefined.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use parking_lot::Mutex;
use rand::RngCore;
use rustix::fs::{MemfdFlags, OFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use serde::{Deserialize, Serialize};

/// Bytes of the word in which values lie.
const WORD_BYTES: usize = size_of::<u64>();
/// Values in a word.
const WORD_VALUES: usize = WORD_BYTES / size_of::<f32>();
/// The key stands before the ring.
const KEY_BYTES: usize = 16;
/// What a segment must not do behind its readers' backs: memory that shrinks kills who reads it.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// Where a segment is found, by processes of the same machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SegmentName {
    process: u32,
    descriptor: i32,
    key: [u8; KEY_BYTES],
}

/// Where values lie in a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// The first word, counted on from the segment's beginning of use, not from the ring's.
    word: u64,
    /// How many values.
    values: u32,
}

/// The owner's side.
#[derive(Debug)]
pub struct Segment {
    name: SegmentName,
    words: Words,
    /// The word that is written next, counted as in [`Span::word`].
    next: Mutex<u64>,
    /// Keeps the descriptor by which readers open it.
    _file: File,
}

/// A reader's side.
#[derive(Debug)]
pub struct Window(Words);

/// Why another's segment cannot be read here.
#[derive(Debug, thiserror::Error)]
pub enum NotHere {
    /// There is none, or we may not open it: it is on another machine, or its process has ended.
    #[error("it cannot be opened: {0}")]
    Closed(#[from] io::Error),
    /// What is there is something else.
    #[error("what stands in its place is another's")]
    Another,
}

impl Segment {
    /// Memory for a ring of `length_bytes` at least. It takes as much of the machine's memory as was written.
    pub fn create(length_bytes: usize) -> io::Result<Self> {
        let descriptor = memfd_create(
            "mobula-sums",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        )?;
        let file = File::from(descriptor);
        let words = length_bytes.div_ceil(WORD_BYTES).max(1);
        file.set_len((KEY_BYTES + words * WORD_BYTES) as u64)?;
        fcntl_add_seals(&file, SEALS | SealFlags::SEAL)?;
        let map = MmapOptions::new().map_raw(&file)?;
        let mut key = [0; KEY_BYTES];
        rand::rng().fill_bytes(&mut key);
        let words = Words(map);
        for (word, bytes) in words.all().iter().zip(key.as_chunks().0) {
            word.store(u64::from_ne_bytes(*bytes), Ordering::Relaxed);
        }
        let name = SegmentName {
            process: std::process::id(),
            descriptor: std::os::fd::AsRawFd::as_raw_fd(&file),
            key,
        };
        Ok(Segment {
            name,
            words,
            next: Mutex::new(0),
            _file: file,
        })
    }

    /// Where others find it.
    #[must_use]
    pub fn name(&self) -> SegmentName {
        self.name
    }

    /// Writes values over the oldest; where they are. `None` if they are more than it has room for.
    pub fn write(&self, values: &[f32]) -> Option<Span> {
        let ring = self.words.ring();
        let length = values.len().div_ceil(WORD_VALUES);
        let word = {
            let mut next = self.next.lock();
            let place = (*next % ring.len() as u64) as usize;
            let rest = ring.len() - place;
            if length > ring.len() {
                return None;
            }
            // Values lie in one piece: what is left at the ring's end stays unused.
            let skipped = if length > rest { rest as u64 } else { 0 };
            let word = *next + skipped;
            *next = word + length as u64;
            word
        };
        let place = (word % ring.len() as u64) as usize;
        let (pairs, rest) = values.as_chunks::<WORD_VALUES>();
        for (word, pair) in ring[place..].iter().zip(pairs) {
            word.store(word_of(*pair), Ordering::Relaxed);
        }
        if let [value] = rest {
            ring[place + pairs.len()].store(word_of([*value, 0.0]), Ordering::Relaxed);
        }
        Some(Span {
            word,
            values: u32::try_from(values.len()).ok()?,
        })
    }

    /// Whether nothing was written over these values yet.
    #[must_use]
    pub fn holds(&self, span: Span) -> bool {
        *self.next.lock() - span.word <= self.words.ring().len() as u64
    }
}

impl Window {
    /// Opens the segment that another process of this machine has named.
    pub fn open(name: SegmentName) -> Result<Self, NotHere> {
        let path = format!("/proc/{}/fd/{}", name.process, name.descriptor);
        // Whatever is there instead, say a pipe, must not make us wait.
        let flags = (OFlags::NONBLOCK | OFlags::CLOEXEC).bits() as i32;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(flags)
            .open(path)?;
        let is_sealed = fcntl_get_seals(&file).is_ok_and(|seals| seals.contains(SEALS));
        let length = file.metadata()?.len() as usize;
        if !is_sealed || length < KEY_BYTES + WORD_BYTES {
            return Err(NotHere::Another);
        }
        let words = Words(MmapOptions::new().map_raw_read_only(&file)?);
        let key = words.all().iter().zip(name.key.as_chunks().0);
        let mut differences =
            key.filter(|(word, bytes)| word.load(Ordering::Relaxed) != u64::from_ne_bytes(**bytes));
        match differences.next() {
            None => Ok(Window(words)),
            Some(_) => Err(NotHere::Another),
        }
    }

    /// A copy of what lies there now; `None` where such values cannot lie.
    #[must_use]
    pub fn read(&self, span: Span) -> Option<Vec<f32>> {
        let ring = self.0.ring();
        let count = span.values as usize;
        let place = (span.word % ring.len() as u64) as usize;
        let words = ring[place..].get(..count.div_ceil(WORD_VALUES))?;
        let mut values = vec![0.0; count];
        let (pairs, rest) = values.as_chunks_mut::<WORD_VALUES>();
        for (pair, word) in pairs.iter_mut().zip(words) {
            *pair = values_of(word.load(Ordering::Relaxed));
        }
        if let ([value], Some(word)) = (rest, words.last()) {
            *value = values_of(word.load(Ordering::Relaxed))[0];
        }
        Some(values)
    }
}

/// Mapped memory as words: the key, then the ring.
#[derive(Debug)]
struct Words(MmapRaw);

impl Words {
    fn all(&self) -> &[AtomicU64] {
        // SAFETY: the mapping begins at a page, lives as long as `self` and cannot shrink (its file is sealed), so
        // that many words are there and aligned. Other processes write to it, which is why they are atomic. Where
        // it is mapped for reading only, nothing here stores: `Window` only loads.
        unsafe {
            std::slice::from_raw_parts(
                self.0.as_ptr().cast::<AtomicU64>(),
                self.0.len() / WORD_BYTES,
            )
        }
    }

    fn ring(&self) -> &[AtomicU64] {
        &self.all()[KEY_BYTES / WORD_BYTES..]
    }
}

fn word_of(pair: [f32; WORD_VALUES]) -> u64 {
    u64::from(pair[0].to_bits()) | u64::from(pair[1].to_bits()) << 32
}

fn values_of(word: u64) -> [f32; WORD_VALUES] {
    [
        f32::from_bits(word as u32),
        f32::from_bits((word >> 32) as u32),
    ]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn a_reader_finds_the_owners_memory_and_nothing_elses() {
        let segment = Segment::create(64).unwrap();
        let window = Window::open(segment.name()).unwrap();
        let span = segment.write(&[1.0, f32::NAN, -0.0]).unwrap();
        assert_eq!(
            bits(&window.read(span).unwrap()),
            bits(&[1.0, f32::NAN, -0.0])
        );
        let other_key = SegmentName {
            key: [7; KEY_BYTES],
            ..segment.name()
        };
        assert!(matches!(Window::open(other_key), Err(NotHere::Another)));
        // Standard input is no sealed memory, whatever it is; the process that follows the last there can be is none.
        let no_memory = SegmentName {
            descriptor: 0,
            ..segment.name()
        };
        assert!(Window::open(no_memory).is_err());
        let nobody = SegmentName {
            process: u32::MAX,
            ..segment.name()
        };
        assert!(matches!(Window::open(nobody), Err(NotHere::Closed(_))));
        let name = segment.name();
        drop(segment);
        assert!(Window::open(name).is_err(), "the owner has ended");
        assert!(window.read(span).is_some(), "a reader's view stays");
    }

    #[test]
    fn values_that_cannot_lie_there_are_refused() {
        let segment = Segment::create(32).unwrap();
        let window = Window::open(segment.name()).unwrap();
        assert_eq!(segment.write(&[0.0; 9]), None, "a ring of 8 values");
        assert!(segment.write(&[0.0; 8]).is_some());
        for (word, values) in [(0, 9), (3, 4), (u64::MAX, 3), (1, u32::MAX)] {
            assert_eq!(window.read(Span { word, values }), None, "{values}@{word}");
        }
    }

    proptest! {
        /// What the owner says it still holds is what a reader reads, for any sequence of lengths.
        #[test]
        fn what_is_held_is_what_was_written(lengths in prop::collection::vec(0_usize..40, 1..60)) {
            let segment = Segment::create(40 * 4).unwrap();
            let window = Window::open(segment.name()).unwrap();
            let mut written: Vec<(Span, Vec<f32>)> = Vec::new();
            for (number, length) in lengths.into_iter().enumerate() {
                let values: Vec<f32> = (0..length).map(|i| (number * 64 + i) as f32).collect();
                let span = segment.write(&values).unwrap();
                written.push((span, values));
                prop_assert!(segment.holds(span), "the newest is always held");
                for (span, values) in &written {
                    if segment.holds(*span) {
                        prop_assert_eq!(&window.read(*span).unwrap(), values);
                    }
                }
            }
        }
    }
}
