//! A save that several share, over a store in memory and in virtual time.

use std::collections::BTreeSet;

use bytes::Bytes;
use mobula_core::{Incarnation, JobId};
use mobula_storage::blob::{BlobStore, S3Options};
use mobula_storage::checkpoint::{CheckpointReader, SaveRequest};
use parking_lot::Mutex;

use super::*;

const STEP: u64 = 40;
const CHUNK_BYTES: usize = 8;
const CHUNKS: usize = 24;

/// What becomes of a helper when it is asked for something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Lives,
    Dies,
    IsSilent,
}

struct Fake {
    name: &'static str,
    writer: CheckpointWriter,
    state: Arc<dyn CheckpointSource>,
    fate: Fate,
    asked: Mutex<usize>,
    stored: Mutex<BTreeSet<u64>>,
    released: Mutex<Option<u64>>,
}

impl Helper for Fake {
    fn name(&self) -> String {
        self.name.to_owned()
    }

    fn upload(&self, step: u64, pieces: Vec<Piece>) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(async move {
            assert_eq!(step, STEP);
            *self.asked.lock() += 1;
            // As a link does, over which others answer meanwhile.
            tokio::time::sleep(Duration::from_millis(5)).await;
            match self.fate {
                Fate::Lives => {}
                Fate::Dies => return Err("its process has ended".to_owned()),
                Fate::IsSilent => std::future::pending().await,
            }
            let sent = self.writer.upload(Arc::clone(&self.state), &pieces).await;
            sent.map_err(|error| error.to_string())?;
            self.stored
                .lock()
                .extend(pieces.iter().map(|piece| piece.offset));
            Ok(())
        })
    }

    fn release(&self, step: u64) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            *self.released.lock() = Some(step);
        })
    }
}

struct World {
    blobs: BlobStore,
    state: Arc<dyn CheckpointSource>,
}

impl World {
    fn new() -> Self {
        let bytes: Vec<u8> = (0..CHUNKS * CHUNK_BYTES).map(|byte| byte as u8).collect();
        World {
            blobs: BlobStore::open("memory://", &S3Options::default()).unwrap(),
            state: Arc::new(Bytes::from(bytes)),
        }
    }

    fn writer(&self) -> CheckpointWriter {
        CheckpointWriter::new(self.blobs.clone()).with_chunk_bytes(CHUNK_BYTES)
    }

    fn helper(&self, name: &'static str, fate: Fate) -> Arc<Fake> {
        Arc::new(Fake {
            name,
            writer: self.writer(),
            state: Arc::clone(&self.state),
            fate,
            asked: Mutex::default(),
            stored: Mutex::default(),
            released: Mutex::default(),
        })
    }

    /// Saves with `helpers`, reads everything back, and says what they did.
    async fn save(&self, helpers: &[Arc<Fake>]) -> Vec<Share> {
        let writer = self.writer();
        let request = SaveRequest {
            job: JobId(1),
            step: STEP,
            incarnation: Incarnation(1),
            parent: None,
            sections: Vec::new(),
            metadata: Default::default(),
        };
        let prepared = writer
            .prepare(request, Arc::clone(&self.state))
            .await
            .unwrap();
        assert_eq!(prepared.missing().len(), CHUNKS);
        let all: Vec<Arc<dyn Helper>> = helpers
            .iter()
            .map(|helper| Arc::clone(helper) as Arc<dyn Helper>)
            .collect();
        let shares = upload(&writer, &self.state, STEP, prepared.missing(), &all)
            .await
            .unwrap();
        let saved = writer.finish(prepared).await.unwrap();
        let reader = CheckpointReader::new(self.blobs.clone(), 1 << 20);
        let read = reader.load(&saved.handle.reference).await.unwrap();
        assert_eq!(read.bytes, self.state.read(0..self.state.length_bytes()));
        for helper in helpers {
            assert_eq!(*helper.released.lock(), Some(STEP), "{}", helper.name);
        }
        shares
    }
}

#[tokio::test(start_paused = true)]
async fn everybody_stores_a_share_and_the_whole_verifies() {
    let world = World::new();
    let helpers = [
        world.helper("a", Fate::Lives),
        world.helper("b", Fate::Lives),
    ];
    let shares = world.save(&helpers).await;
    for (share, helper) in shares.iter().zip(&helpers) {
        let stored = helper.stored.lock().len() as u64;
        assert_eq!(share.bytes, stored * CHUNK_BYTES as u64, "{share}");
        assert!(stored >= 1 && share.failed.is_none(), "{share}");
    }
    assert_eq!(world.save(&[]).await, [], "and alone it goes as well");
}

#[tokio::test(start_paused = true)]
async fn what_a_helper_had_that_dies_is_stored_by_the_others() {
    let world = World::new();
    let helpers = [
        world.helper("dies", Fate::Dies),
        world.helper("b", Fate::Lives),
    ];
    let shares = world.save(&helpers).await;
    assert_eq!(shares[0].bytes, 0, "what it had counts for the others");
    assert_eq!(shares[0].failed.as_deref(), Some("its process has ended"));
    assert_eq!(*helpers[0].asked.lock(), 1, "it is asked no more");
    assert!(shares[1].failed.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_helper_that_says_nothing_is_waited_for_no_longer_than_a_bound() {
    let world = World::new();
    let begun = Instant::now();
    let shares = world.save(&[world.helper("silent", Fate::IsSilent)]).await;
    let reason = shares[0].failed.as_deref().unwrap();
    assert!(reason.contains("nothing was heard"), "{reason}");
    assert!(begun.elapsed() < PATIENCE_MIN * 2, "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn who_holds_other_bytes_stores_nothing() {
    let world = World::new();
    let other = World {
        blobs: world.blobs.clone(),
        state: Arc::new(Bytes::from(vec![7; CHUNKS * CHUNK_BYTES])),
    };
    let helper = other.helper("other", Fate::Lives);
    let shares = world.save(&[Arc::clone(&helper)]).await;
    let reason = shares[0].failed.as_deref().unwrap();
    assert!(
        reason.contains("this copy of the state differs"),
        "{reason}"
    );
    assert!(helper.stored.lock().is_empty());
}
