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
    released: Mutex<bool>,
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

    fn release(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            *self.released.lock() = true;
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

    /// Saves with `helpers` as fast as it goes, reads everything back, and says what they did.
    async fn save(&self, helpers: &[Arc<Fake>]) -> Vec<Share> {
        let uploaded = self.save_spread(helpers, &Spread::default()).await;
        uploaded.shares
    }

    /// The same over a time.
    async fn save_spread(&self, helpers: &[Arc<Fake>], spread: &Spread) -> Uploaded {
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
        let missing = prepared.missing();
        let uploaded = upload(&writer, &self.state, STEP, missing, &all, spread)
            .await
            .unwrap();
        let saved = writer.finish(prepared).await.unwrap();
        let reader = CheckpointReader::new(self.blobs.clone(), 1 << 20);
        let read = reader.load(&saved.handle.reference).await.unwrap();
        assert_eq!(read.bytes, self.state.read(0..self.state.length_bytes()));
        for helper in helpers {
            assert!(*helper.released.lock(), "{}", helper.name);
        }
        uploaded
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

#[tokio::test(start_paused = true)]
async fn a_save_that_has_time_takes_it_and_everybody_sends_the_same() {
    let world = World::new();
    let helpers = [
        world.helper("a", Fate::Lives),
        world.helper("b", Fate::Lives),
    ];
    let begun = Instant::now();
    let spread = Spread::over(Duration::from_secs(12));
    let uploaded = world.save_spread(&helpers, &spread).await;
    // Twelve batches of two pieces: the last one begins when eleven have had their second.
    let took = begun.elapsed();
    assert!(
        took >= Duration::from_secs(11) && took < Duration::from_secs(12),
        "{took:?}"
    );
    // The eight batches of the others, over a link.
    assert_eq!(uploaded.sending, Duration::from_millis(8 * 5));
    assert_eq!(uploaded.took, took);
    let each = (CHUNKS * CHUNK_BYTES / 3) as u64;
    for share in uploaded.shares {
        assert_eq!((share.bytes, share.failed), (each, None), "{}", share.name);
    }
}

#[tokio::test(start_paused = true)]
async fn a_helper_that_dies_does_not_make_a_spread_save_longer() {
    let world = World::new();
    let helpers = [world.helper("dies", Fate::Dies)];
    let begun = Instant::now();
    let spread = Spread::over(Duration::from_secs(12));
    let uploaded = world.save_spread(&helpers, &spread).await;
    assert!(uploaded.shares[0].failed.is_some());
    assert!(begun.elapsed() <= Duration::from_secs(12));
}

#[tokio::test(start_paused = true)]
async fn a_spread_save_ends_at_once_when_somebody_is_in_a_hurry() {
    let world = World::new();
    // Said before it begins, too.
    let hurried = Spread::over(Duration::from_secs(3600));
    hurried.hurry();
    let begun = Instant::now();
    world.save_spread(&[], &hurried).await;
    assert_eq!(begun.elapsed(), Duration::ZERO);
    let spread = Spread::over(Duration::from_secs(3600));
    let said = async {
        tokio::time::sleep(Duration::from_secs(4)).await;
        spread.hurry();
    };
    let (uploaded, ()) = tokio::join!(world.save_spread(&[], &spread), said);
    assert_eq!(begun.elapsed(), Duration::from_secs(4));
    assert_eq!(
        uploaded.sending,
        Duration::ZERO,
        "a store in memory takes no time"
    );
}
