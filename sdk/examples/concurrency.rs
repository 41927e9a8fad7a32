//! A cache that answers many readers at once: the order of calls, `max_concurrency`, a group with a
//! limit of its own, and a method that blocks its thread.
//!
//! Run it on a cluster of its own with `cargo run --example concurrency`, or on a real one with
//! `mobula submit target/debug/examples/concurrency`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures::future::try_join_all;
use mobula::prelude::*;

struct Cache {
    entries: BTreeMap<String, u64>,
    /// Which calls of `note` came, in the order in which they ran.
    notes: Vec<u32>,
    reading: Gauge,
    loading: Gauge,
}

/// How many are inside now, and how many there were at most.
#[derive(Default)]
struct Gauge {
    now: AtomicU32,
    most: AtomicU32,
}

impl Gauge {
    fn enter(&self) {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
    }

    fn leave(&self) {
        self.now.fetch_sub(1, Ordering::SeqCst);
    }
}

#[mobula::actor(max_concurrency = 8, groups(disk = 2))]
impl Cache {
    fn new() -> Self {
        Cache {
            entries: BTreeMap::new(),
            notes: Vec::new(),
            reading: Gauge::default(),
            loading: Gauge::default(),
        }
    }

    /// Runs alone: nothing reads while it writes.
    async fn insert(&mut self, key: String, value: u64) {
        self.entries.insert(key, value);
    }

    async fn note(&mut self, number: u32) {
        self.notes.push(number);
    }

    async fn notes(&self) -> Vec<u32> {
        self.notes.clone()
    }

    /// Up to eight of these run at once.
    async fn get(&self, key: String) -> Option<u64> {
        self.reading.enter();
        tokio::time::sleep(Duration::from_millis(50)).await;
        self.reading.leave();
        self.entries.get(&key).copied()
    }

    /// Up to two of these, beside all readers. It blocks its thread, and says so, so that the
    /// process's other actors go on meanwhile.
    #[mobula(group = "disk", blocking)]
    fn load(&self, blocks: u64) -> u64 {
        self.loading.enter();
        std::thread::sleep(Duration::from_millis(50));
        self.loading.leave();
        blocks * 4096
    }

    /// How many readers and loaders ran at once, at most.
    async fn most(&self) -> (u32, u32) {
        (
            self.reading.most.load(Ordering::SeqCst),
            self.loading.most.load(Ordering::SeqCst),
        )
    }
}

#[mobula::main]
async fn main(cluster: Cluster) -> mobula::Result<()> {
    let cache = cluster.actor(Cache::new()).spawn().await?;
    cache.insert("answer".to_owned(), 42).await?;

    // These begin at once: calls reach the actor in the order in which they were made, and the
    // readers do not wait for each other.
    let reads = try_join_all((0..16).map(|_| cache.get("answer".to_owned()).into_future()));
    let loads = try_join_all((0..6).map(|blocks| cache.load(blocks).into_future()));
    let (reads, loads) = futures::future::try_join(reads, loads).await?;
    assert!(reads.iter().all(|value| *value == Some(42)));
    assert_eq!(loads, [0, 4096, 8192, 12288, 16384, 20480]);

    // Nobody waits for the call before, and still they run in the order in which they were made.
    try_join_all((0..500).map(|number| cache.note(number).into_future())).await?;
    if cache.notes().await? != (0..500).collect::<Vec<_>>() {
        return Err("calls overtook each other".into());
    }

    let (readers, loaders) = cache.most().await?;
    println!("at most {readers} readers and {loaders} loaders at once");
    if !(2..=8).contains(&readers) || loaders > 2 {
        return Err("the limits were not kept".into());
    }
    cluster
        .set_result(&serde_json::json!({ "readers": readers, "loaders": loaders }))
        .await
}
