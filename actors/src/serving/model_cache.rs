//! The models that a process holds: replicas of one version share one, and the last used stay for a while when none has them
//! any more, so that an endpoint that comes back from zero, or a rollback, finds its model loaded.
//!
//! Invariants:
//! 1. A model is known by the digest of its verified file; it never changes.
//! 2. What no replica uses takes no more than the bound, and the least recently used goes first. What is used is never
//!    counted against it: it has to be there anyway.
//! 3. Who asks for a model while it is loaded waits for that one; a load that fails is tried again by the next who asks.

use std::collections::BTreeMap;
use std::future::Future;
use std::ops::Deref;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use mobula::metrics::{Counter, Gauge, counter, gauge};
use tokio::sync::OnceCell;

use super::predictor::Predictor;

/// What models that no replica uses may take: a few of the largest, next to what a host's actors need.
const UNUSED_BYTES_MAX: u64 = 1 << 30;

/// The models of this process.
pub(super) static MODELS: LazyLock<ModelCache<Predictor>> =
    LazyLock::new(|| ModelCache::new(UNUSED_BYTES_MAX));

/// Loaded models, by digest.
pub(super) struct ModelCache<M> {
    unused_bytes_max: u64,
    inner: Mutex<Inner<M>>,
    meters: Option<Meters>,
}

struct Inner<M> {
    models: BTreeMap<String, Held<M>>,
    clock: u64,
}

struct Held<M> {
    model: Arc<OnceCell<Arc<M>>>,
    size_bytes: u64,
    used: u64,
}

/// What this process says about its models.
struct Meters {
    loads: Counter,
    shared: Counter,
    evicted: Counter,
    held_bytes: Gauge,
}

impl Meters {
    fn new() -> Option<Self> {
        Some(Meters {
            loads: counter("mobula_serving_model_loads", &[]).ok()?,
            shared: counter("mobula_serving_model_cache_hits", &[]).ok()?,
            evicted: counter("mobula_serving_model_evictions", &[]).ok()?,
            held_bytes: gauge("mobula_serving_model_bytes", &[]).ok()?,
        })
    }
}

impl<M> ModelCache<M> {
    pub(super) fn new(unused_bytes_max: u64) -> Self {
        ModelCache {
            unused_bytes_max,
            inner: Mutex::new(Inner {
                models: BTreeMap::new(),
                clock: 0,
            }),
            meters: Meters::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner<M>> {
        // The map is whole between any two statements that could panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The model of this digest, loaded if it is not here.
    pub(super) async fn get<E>(
        &self,
        digest: &str,
        size_bytes: u64,
        load: impl Future<Output = Result<M, E>>,
    ) -> Result<Used<'_, M>, E> {
        let cell = self.cell(digest, size_bytes);
        let mut was_loaded = false;
        let loading = async {
            was_loaded = true;
            load.await.map(Arc::new)
        };
        let model = cell.get_or_try_init(|| loading).await.cloned();
        if let Some(meters) = &self.meters {
            match was_loaded {
                true => meters.loads.add(1.0),
                false => meters.shared.add(1.0),
            }
        }
        // Only now, with this one in use, is it known what is not.
        drop(cell);
        self.evict();
        Ok(Used {
            model: Some(model?),
            cache: self,
        })
    }

    fn cell(&self, digest: &str, size_bytes: u64) -> Arc<OnceCell<Arc<M>>> {
        let mut inner = self.lock();
        inner.clock += 1;
        let used = inner.clock;
        let held = inner
            .models
            .entry(digest.to_owned())
            .or_insert_with(|| Held {
                model: Arc::default(),
                size_bytes,
                used,
            });
        held.used = used;
        Arc::clone(&held.model)
    }

    /// Lets models go that nobody uses, until the rest of those takes no more than the bound.
    fn evict(&self) {
        let mut inner = self.lock();
        let mut gone = 0u32;
        loop {
            let unused = inner.models.iter().filter(|(_, held)| held.is_unused());
            let bytes: u64 = unused.clone().map(|(_, held)| held.loaded_bytes()).sum();
            let failed = unused.clone().find(|(_, held)| held.loaded_bytes() == 0);
            let oldest = unused.min_by_key(|(_, held)| held.used);
            let next = match (failed, oldest) {
                (Some(failed), _) => failed,
                (None, Some(oldest)) if bytes > self.unused_bytes_max => oldest,
                _ => break,
            };
            let (digest, was_loaded) = (next.0.clone(), next.1.loaded_bytes() > 0);
            inner.models.remove(&digest);
            gone += u32::from(was_loaded);
        }
        if let Some(meters) = &self.meters {
            meters.evicted.add(f64::from(gone));
            let held: u64 = inner.models.values().map(Held::loaded_bytes).sum();
            meters.held_bytes.set(held as f64);
        }
    }
}

/// A model in use.
pub(super) struct Used<'a, M> {
    /// There until it is dropped.
    model: Option<Arc<M>>,
    cache: &'a ModelCache<M>,
}

impl<M> Deref for Used<'_, M> {
    type Target = M;

    fn deref(&self) -> &M {
        self.model
            .as_ref()
            .expect("it is there until it is dropped")
    }
}

impl<M> Drop for Used<'_, M> {
    fn drop(&mut self) {
        self.model = None;
        self.cache.evict();
    }
}

impl<M> Held<M> {
    /// Whether nobody has it, loads it, or waits for it.
    fn is_unused(&self) -> bool {
        let is_held = self
            .model
            .get()
            .is_some_and(|model| Arc::strong_count(model) > 1);
        Arc::strong_count(&self.model) == 1 && !is_held
    }

    /// What it takes; nothing before it is loaded, or if that failed.
    fn loaded_bytes(&self) -> u64 {
        match self.model.initialized() {
            true => self.size_bytes.max(1),
            false => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    async fn get<'a>(
        cache: &'a ModelCache<String>,
        digest: &str,
        loads: &AtomicUsize,
    ) -> Used<'a, String> {
        let load = async {
            loads.fetch_add(1, Ordering::Relaxed);
            // Others come meanwhile.
            tokio::task::yield_now().await;
            Ok::<_, Infallible>(digest.to_owned())
        };
        cache.get(digest, 10, load).await.unwrap()
    }

    fn held(cache: &ModelCache<String>) -> Vec<String> {
        cache.lock().models.keys().cloned().collect()
    }

    #[tokio::test]
    async fn replicas_share_a_model_that_is_loaded_once() {
        let (cache, loads) = (ModelCache::new(100), AtomicUsize::new(0));
        let (one, other) = tokio::join!(get(&cache, "a", &loads), get(&cache, "a", &loads));
        assert!(std::ptr::eq(&*one, &*other));
        assert_eq!(loads.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn the_least_recently_used_of_the_unused_goes_first() {
        let (cache, loads) = (ModelCache::new(20), AtomicUsize::new(0));
        let used = get(&cache, "used", &loads).await;
        for digest in ["a", "b", "a", "c"] {
            get(&cache, digest, &loads).await;
        }
        // Two fit beside the one in use, and `a` was used after `b`.
        assert_eq!(held(&cache), ["a", "c", "used"]);
        drop(used);
        assert_eq!(held(&cache), ["a", "c"]);
        assert_eq!(loads.load(Ordering::Relaxed), 4);
        get(&cache, "c", &loads).await;
        assert_eq!(loads.load(Ordering::Relaxed), 4);
        get(&cache, "b", &loads).await;
        assert_eq!(loads.load(Ordering::Relaxed), 5);
        assert_eq!(held(&cache), ["b", "c"]);
    }

    #[tokio::test]
    async fn a_load_that_failed_is_tried_again_and_leaves_nothing() {
        let (cache, loads) = (ModelCache::new(20), AtomicUsize::new(0));
        let failing = async { Err::<String, _>("no such file") };
        assert_eq!(
            cache.get("a", 10, failing).await.err(),
            Some("no such file")
        );
        assert_eq!(held(&cache), Vec::<String>::new());
        assert_eq!(*get(&cache, "a", &loads).await, "a");
    }
}
