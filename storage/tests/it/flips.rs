//! One flipped bit, anywhere in what is stored of a checkpoint: always found, and the one before is used.
//!
//! The long form takes minutes: `cargo nextest run -p mobula-storage --run-ignored all -E
//! 'test(a_hundred_thousand_flipped_bits)'`, for which the environment variable `MOBULA_FLIPS` can name
//! another number.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bytes::Bytes;
use mobula_core::id::{Incarnation, JobId};
use mobula_storage::blob::{BlobStore, S3Options};
use mobula_storage::checkpoint::{
    CheckpointHandle, CheckpointReader, CheckpointWriter, SaveRequest, Section,
};

const CHUNK_BYTES: usize = 1024;
const STATE_BYTES: usize = 10 * CHUNK_BYTES - 100;

fn state(step: u64) -> Bytes {
    let mut bytes = vec![0; STATE_BYTES];
    blake3::Hasher::new()
        .update(&step.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes.into()
}

/// Numbers from a seed, without a generator whose stream could change with a version.
struct Draws {
    stream: blake3::OutputReader,
}

impl Draws {
    fn new(seed: u64) -> Self {
        let stream = blake3::Hasher::new()
            .update(&seed.to_le_bytes())
            .finalize_xof();
        Draws { stream }
    }

    fn below(&mut self, limit: usize) -> usize {
        let mut bytes = [0; 8];
        self.stream.fill(&mut bytes);
        usize::try_from(u64::from_le_bytes(bytes) % limit as u64).unwrap()
    }
}

struct Store {
    _dir: tempfile::TempDir,
    reader: CheckpointReader,
    old: CheckpointHandle,
    new: CheckpointHandle,
    /// The files of the newer checkpoint, with their lengths.
    files: Vec<(PathBuf, usize)>,
}

async fn store() -> Store {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("file://{}", dir.path().display());
    let blobs = BlobStore::open(&url, &S3Options::default()).unwrap();
    let writer = CheckpointWriter::new(blobs.clone()).with_chunk_bytes(CHUNK_BYTES);
    let save = async |step: u64, parent: Option<CheckpointHandle>| {
        let request = SaveRequest {
            job: JobId(1),
            step,
            incarnation: Incarnation(2),
            parent,
            sections: vec![Section {
                name: "weights".to_owned(),
                offset: 0,
                length: STATE_BYTES as u64,
            }],
            metadata: BTreeMap::from([("seed".to_owned(), "42".to_owned())]),
        };
        writer.save(request, state(step)).await.unwrap().handle
    };
    let old = save(1, None).await;
    let new = save(2, Some(old.clone())).await;
    let mut names: Vec<String> = new.manifest.chunks.iter().map(|c| c.path()).collect();
    names.push(new.reference.path.clone());
    let files = names
        .into_iter()
        .map(|name| {
            let path = dir.path().join(name);
            let length = usize::try_from(path.metadata().unwrap().len()).unwrap();
            (path, length)
        })
        .collect();
    Store {
        _dir: dir,
        reader: CheckpointReader::new(blobs, 1 << 20),
        old,
        new,
        files,
    }
}

/// Flips `count` bits, one at a time, drawn evenly from all stored bytes of the newer checkpoint.
async fn flip(count: usize, seed: u64) {
    let store = store().await;
    let references = [store.new.reference.clone(), store.old.reference.clone()];
    let total: usize = store.files.iter().map(|(_, length)| length).sum();
    let mut draws = Draws::new(seed);
    for number in 0..count {
        let bit = draws.below(total * 8);
        let mut at = bit / 8;
        let (path, _) = store
            .files
            .iter()
            .find(|(_, length)| {
                let is_here = at < *length;
                if !is_here {
                    at -= length;
                }
                is_here
            })
            .expect("it is below the sum of all lengths");
        let intact = std::fs::read(path).unwrap();
        let mut flipped = intact.clone();
        flipped[at] ^= 1 << (bit % 8);
        std::fs::write(path, &flipped).unwrap();
        let restored = store.reader.load_newest(&references).await.unwrap();
        let case = format!(
            "seed {seed}, flip {number}: bit {} of byte {at} of {}",
            bit % 8,
            path.display()
        );
        assert_eq!(restored.checkpoint.bytes, state(1), "{case}");
        assert_eq!(restored.rejected.len(), 1, "{case}");
        assert!(restored.rejected[0].reason.contains("is damaged"), "{case}");
        std::fs::write(path, &intact).unwrap();
    }
    let restored = store.reader.load_newest(&references).await.unwrap();
    assert_eq!(restored.checkpoint.bytes, state(2), "all flips were undone");
}

#[tokio::test]
async fn two_thousand_flipped_bits_are_all_found_and_the_older_checkpoint_is_used() {
    flip(2_000, 1).await;
}

#[tokio::test]
#[ignore = "takes minutes; see this file's beginning"]
async fn a_hundred_thousand_flipped_bits_are_all_found_and_the_older_checkpoint_is_used() {
    let count = std::env::var("MOBULA_FLIPS").map_or(100_000, |count| count.parse().unwrap());
    flip(count, 2).await;
    println!("{count} flips, all found");
}
