//! The saver over stores that fail, in virtual time.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use mobula_core::JobId;
use mobula_storage::blob::fault::{Fault, FaultStore};
use mobula_storage::blob::{BlobStore, RetryPolicy, S3Options};
use mobula_storage::checkpoint::{CHUNK_BYTES_DEFAULT, CheckpointSource};

use super::*;
use crate::checkpoint::ledger::Ledger;
use crate::checkpoint::ledger::memory::MemoryLedger;

const JOB: JobId = JobId(3);
const STEP: Duration = Duration::from_millis(100);
const EVERY_STEPS: u64 = 10;

/// A state that counts how many like it are held.
struct Counted {
    bytes: Bytes,
    open: Arc<AtomicUsize>,
}

impl CheckpointSource for Counted {
    fn length_bytes(&self) -> u64 {
        self.bytes.length_bytes()
    }

    fn read(&self, range: Range<u64>) -> Bytes {
        self.bytes.read(range)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.open.fetch_sub(1, Ordering::SeqCst);
    }
}

struct World {
    faults: FaultStore,
    through: BlobStore,
    ledger: Arc<MemoryLedger>,
    open: Arc<AtomicUsize>,
}

impl World {
    fn new() -> Self {
        let store = BlobStore::open("memory://", &S3Options::default()).unwrap();
        let (faults, through) = store.with_faults(RetryPolicy::STANDARD);
        World {
            faults,
            through,
            ledger: Arc::default(),
            open: Arc::default(),
        }
    }

    fn saver(&self) -> Saver {
        self.limited_saver(None)
    }

    fn limited_saver(&self, bytes_per_second: Option<u64>) -> Saver {
        let blobs = self.through.clone();
        let open = move || Ok(blobs.clone());
        let checkpointer = Checkpointer::new(open, self.ledger.clone(), JOB, bytes_per_second);
        Saver::over(checkpointer, bytes_per_second, JobLog::Silent)
    }

    fn order(&self, step: u64) -> SaveOrder {
        self.order_of(step, Bytes::from(format!("the state after step {step}")))
    }

    /// One of four chunks, for which there is much time.
    fn spread_order(&self, step: u64) -> SaveOrder {
        let mut bytes = vec![0; 4 * CHUNK_BYTES_DEFAULT];
        for chunk in 0..4 {
            bytes[chunk * CHUNK_BYTES_DEFAULT] = step as u8 * 4 + chunk as u8;
        }
        SaveOrder {
            spread: Spread::over(Duration::from_secs(1000)),
            ..self.order_of(step, Bytes::from(bytes))
        }
    }

    fn order_of(&self, step: u64, bytes: Bytes) -> SaveOrder {
        self.open.fetch_add(1, Ordering::SeqCst);
        SaveOrder {
            step,
            incarnation: Incarnation(1),
            weights_blake3: blake3::hash(&bytes).to_hex().to_string(),
            state: Arc::new(Counted {
                bytes,
                open: Arc::clone(&self.open),
            }),
            sections: Vec::new(),
            metric: None,
            metadata: BTreeMap::new(),
            helpers: Vec::new(),
            spread: Spread::default(),
        }
    }

    async fn committed_steps(&self) -> Vec<u64> {
        let known = self.ledger.list(JOB).await.unwrap();
        known
            .checkpoints
            .iter()
            .map(|one| one.checkpoint.step)
            .collect()
    }
}

/// Trains for `steps` steps, and saves as a driver does. Each step takes what it takes and no more.
async fn train(world: &World, saver: &mut Saver, steps: Range<u64>) {
    for step in steps {
        let begun = Instant::now();
        tokio::time::sleep(STEP).await;
        saver.poll().unwrap();
        if step.is_multiple_of(EVERY_STEPS) && !saver.is_busy() {
            saver.offer(world.order(step));
        }
        let held = world.open.load(Ordering::SeqCst);
        assert!(held <= 1, "{held} snapshots are held at step {step}");
        assert_eq!(begun.elapsed(), STEP, "step {step} waited");
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_is_away_for_five_minutes_costs_nothing_but_age() {
    let stalled = Fault::Stalled(Duration::from_secs(60));
    for fault in [
        Fault::BeforeStore,
        Fault::ServerError,
        Fault::NoSpace,
        stalled,
    ] {
        let world = World::new();
        let mut saver = world.saver();
        train(&world, &mut saver, 1..101).await;
        assert_eq!(world.committed_steps().await[..2], [90, 80], "{fault:?}");
        world.faults.stand(Some(fault));
        // Five minutes.
        train(&world, &mut saver, 101..3101).await;
        if fault != stalled {
            // The last one before it may have been on its way.
            assert!(saver.committed_step() <= Some(100), "{fault:?}");
            assert!(saver.is_busy());
        }
        world.faults.stand(None);
        // The next attempt comes within the longest pause and what the last one still takes.
        train(&world, &mut saver, 3101..4001).await;
        assert!(saver.committed_step() >= Some(3900), "{fault:?}");
        saver.offer(world.order(4001));
        assert!(saver.flush(None).await.unwrap());
        assert_eq!(saver.committed_step(), Some(4001));
        assert_eq!(
            world.open.load(Ordering::SeqCst),
            0,
            "nothing is held any more"
        );
        let found = world.saver().restore(Incarnation(2)).await.unwrap();
        assert_eq!(found.restored.unwrap().state, "the state after step 4001");
        assert!(found.rejected.is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn a_head_that_is_away_is_waited_for_as_well() {
    let world = World::new();
    let mut saver = world.saver();
    *world.ledger.is_away.lock() = true;
    train(&world, &mut saver, 1..601).await;
    assert_eq!(saver.committed_step(), None);
    *world.ledger.is_away.lock() = false;
    // The next attempt comes within the longest pause, of 150 steps.
    train(&world, &mut saver, 601..771).await;
    assert!(saver.committed_step() >= Some(700));
    let committed = world.committed_steps().await;
    assert!(
        committed.contains(&10),
        "the one that waited: {committed:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_deadline_ends_the_wait_and_not_the_save() {
    let world = World::new();
    let mut saver = world.saver();
    let stalled = Fault::Stalled(Duration::from_secs(10));
    world.faults.plan(0, stalled);
    saver.offer(world.order(1));
    let deadline = Instant::now() + Duration::from_secs(3);
    assert!(!saver.flush(Some(deadline)).await.unwrap());
    assert_eq!(Instant::now(), deadline);
    assert!(saver.flush(None).await.unwrap());
    assert_eq!(saver.committed_step(), Some(1));
    assert!(saver.expected_time(1) >= Duration::from_secs(10));
}

#[tokio::test(start_paused = true)]
async fn a_driver_that_was_replaced_hears_of_it() {
    let world = World::new();
    let mut old = world.saver();
    world.saver().restore(Incarnation(2)).await.unwrap();
    old.offer(world.order(1));
    let error = old.flush(None).await.unwrap_err();
    assert!(matches!(error, CheckpointError::Fenced(_)), "{error}");
    assert!(world.committed_steps().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_is_held_back_for_training_counts_for_no_estimate_and_ends_with_a_notice() {
    let world = World::new();
    let mut saver = world.saver();
    saver.offer(world.spread_order(1));
    while saver.is_busy() {
        tokio::time::sleep(STEP).await;
        saver.poll().unwrap();
    }
    assert!(saver.expected_time(1) >= Duration::from_secs(750));
    // A store in memory takes no time.
    assert!(saver.bytes_per_second(1_000_000) >= 1_000_000);
    saver.offer(world.spread_order(2));
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert!(saver.expected_left() > Some(Duration::from_secs(700)));
    saver.hurry();
    assert!(saver.expected_left() < Some(Duration::from_secs(1)));
    let hurried = Instant::now();
    assert!(saver.flush(None).await.unwrap());
    assert!(hurried.elapsed() < Duration::from_secs(1));
    assert_eq!(world.committed_steps().await, [2, 1]);
}

#[tokio::test(start_paused = true)]
async fn before_a_save_was_measured_its_bytes_and_the_limit_say_what_it_takes() {
    let world = World::new();
    let secs = Duration::from_secs;
    let expected = |limit, size_bytes| {
        let saver = world.limited_saver(limit);
        (
            saver.bytes_per_second(size_bytes),
            saver.expected_time(size_bytes),
        )
    };
    assert_eq!(expected(None, 80_000_000), (40_000_000, secs(3)));
    let limit = Some(1_000_000);
    assert_eq!(expected(limit, 13_000_000), (1_000_000, secs(14)));
    // A limit that allows more makes no store faster.
    let limit = Some(1_000_000_000);
    assert_eq!(expected(limit, 80_000_000), (40_000_000, secs(3)));

    let mut saver = world.limited_saver(Some(1_000_000));
    assert_eq!(saver.overhead(), USUAL_OVERHEAD);
    saver.offer(world.order_of(1, Bytes::from(vec![0; 2_000_000])));
    assert_eq!(saver.expected_left(), Some(secs(3)));
    assert!(saver.flush(None).await.unwrap());
    // It is measured now, with all that it took. A store in memory takes no time, and a single chunk waits for no other.
    assert!(saver.expected_time(2_000_000) < secs(1));
    assert!(saver.bytes_per_second(2_000_000) > 1_000_000);
    assert_eq!(saver.overhead(), Duration::ZERO);
}
