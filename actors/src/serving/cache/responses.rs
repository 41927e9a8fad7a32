//! Answers of one version, kept to be given again.
//!
//! Invariants:
//! 1. An answer is given again only to the same inputs, bit by bit, of the version that gave it, and not after its time.
//! 2. What is kept takes no more than its bound, and the least recently asked for goes first.
//! 3. Equal requests at one time are computed once: the others wait for the first. When that one fails or goes away, one of
//!    them takes its place, so a failure is nobody's but the caller's who had it.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::CacheSetting;
use crate::serving::oip::tensor_bytes;
use crate::serving::rows::Row;

/// What names a request: BLAKE3 of its inputs.
pub type Key = [u8; 32];

/// What an answer takes besides its elements: its key, twice, and its place in both maps.
const ENTRY_BYTES: u64 = 256;

/// What each of its cells takes besides its elements.
const CELL_BYTES: u64 = 96;

/// An answer that takes more than this part of all room would push too many others out.
const LARGEST_SHARE: u64 = 4;

/// Requests that are computed at one time and may be waited for; more are computed each for itself.
const FLIGHTS_MAX: usize = 4_096;

/// The outputs of a request's rows.
pub type Outputs = Arc<Vec<Row>>;

/// What is kept, and what is being computed.
#[derive(Debug, Default)]
pub struct Responses {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    setting: Option<CacheSetting>,
    entries: HashMap<Key, Entry>,
    /// By when they were last asked for, the longest ago first.
    order: BTreeMap<u64, Key>,
    bytes: u64,
    clock: u64,
    flights: HashMap<Key, watch::Receiver<Option<Outputs>>>,
}

#[derive(Debug)]
struct Entry {
    outputs: Outputs,
    bytes: u64,
    until: Instant,
    used: u64,
}

/// What is known of a request.
#[derive(Debug)]
pub enum Lookup<'a> {
    /// Nothing is kept here.
    Off,
    /// The answer.
    Hit(Outputs),
    /// Somebody computes it: the answer, or nothing if they failed.
    Underway(watch::Receiver<Option<Outputs>>),
    /// Whoever asked has to compute it.
    Missing(Flight<'a>),
}

/// A request that is being computed. Dropped without an answer, it is somebody else's.
#[derive(Debug)]
pub struct Flight<'a> {
    responses: &'a Responses,
    key: Key,
    /// None where too many are under way for others to wait for this one.
    landed: Option<watch::Sender<Option<Outputs>>>,
}

/// The name of a request of these rows.
#[must_use]
pub fn key_of(rows: &[Row]) -> Key {
    let mut hasher = blake3::Hasher::new();
    let mut number = |value: u64| {
        hasher.update(&value.to_le_bytes());
    };
    number(rows.len() as u64);
    for row in rows {
        number(row.cells.len() as u64);
        for cell in &row.cells {
            number(cell.data.datatype() as u64);
            number(cell.shape.len() as u64);
            cell.shape.iter().for_each(|size| number(*size));
        }
    }
    for cell in rows.iter().flat_map(|row| &row.cells) {
        hasher.update(&tensor_bytes(&cell.data));
    }
    *hasher.finalize().as_bytes()
}

impl Responses {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Both maps are whole between any two statements that could panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps answers like this from now on. What does not fit any more goes.
    pub fn set(&self, setting: Option<CacheSetting>) {
        let mut inner = self.lock();
        if inner.setting == setting {
            return;
        }
        inner.setting = setting;
        let limit = setting.map_or(0, |setting| setting.bytes);
        inner.shrink(limit);
    }

    /// Whether anything is kept.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.lock().setting.is_some()
    }

    /// How many answers are kept, and what they take.
    #[must_use]
    pub fn size(&self) -> (usize, u64) {
        let inner = self.lock();
        (inner.entries.len(), inner.bytes)
    }

    /// What is known of a request.
    pub fn look(&self, key: Key) -> Lookup<'_> {
        let mut inner = self.lock();
        if inner.setting.is_none() {
            return Lookup::Off;
        }
        if let Some(outputs) = inner.find(&key) {
            return Lookup::Hit(outputs);
        }
        if let Some(flight) = inner.flights.get(&key) {
            return Lookup::Underway(flight.clone());
        }
        let landed = (inner.flights.len() < FLIGHTS_MAX).then(|| {
            let (landed, receiver) = watch::channel(None);
            inner.flights.insert(key, receiver);
            landed
        });
        Lookup::Missing(Flight {
            responses: self,
            key,
            landed,
        })
    }
}

impl Inner {
    fn find(&mut self, key: &Key) -> Option<Outputs> {
        let entry = self.entries.get_mut(key)?;
        if entry.until <= Instant::now() {
            self.remove(key);
            return None;
        }
        self.clock += 1;
        self.order.remove(&entry.used);
        entry.used = self.clock;
        self.order.insert(self.clock, *key);
        Some(Arc::clone(&entry.outputs))
    }

    fn remove(&mut self, key: &Key) {
        if let Some(entry) = self.entries.remove(key) {
            self.order.remove(&entry.used);
            self.bytes -= entry.bytes;
        }
    }

    /// Removes what was asked for the longest ago, until the rest takes no more than `limit`.
    fn shrink(&mut self, limit: u64) {
        while self.bytes > limit {
            let Some((_, oldest)) = self.order.first_key_value() else {
                return;
            };
            let oldest = *oldest;
            self.remove(&oldest);
        }
    }

    fn keep(&mut self, key: Key, outputs: Outputs) {
        let Some(setting) = self.setting else {
            return;
        };
        let cells = || outputs.iter().flat_map(|row| &row.cells);
        let data: u64 = cells().map(|cell| cell.data.size_bytes() as u64).sum();
        let bytes = ENTRY_BYTES + data + CELL_BYTES * cells().count() as u64;
        if bytes > setting.bytes / LARGEST_SHARE {
            return;
        }
        self.remove(&key);
        self.shrink(setting.bytes - bytes);
        self.clock += 1;
        self.order.insert(self.clock, key);
        self.bytes += bytes;
        let entry = Entry {
            outputs,
            bytes,
            until: Instant::now() + Duration::from_millis(setting.ttl_ms),
            used: self.clock,
        };
        self.entries.insert(key, entry);
    }
}

impl Flight<'_> {
    /// Keeps the answer, and gives it to those who wait for it.
    pub fn land(mut self, outputs: &[Row]) {
        let outputs: Outputs = Arc::new(outputs.to_vec());
        self.responses.lock().keep(self.key, Arc::clone(&outputs));
        if let Some(landed) = self.landed.take() {
            self.responses.lock().flights.remove(&self.key);
            landed.send_replace(Some(outputs));
        }
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        // The sender goes with it, which wakes those who wait.
        if self.landed.is_some() {
            self.responses.lock().flights.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::serving::oip::TensorData;
    use crate::serving::rows::Cell;

    fn rows(value: f32, count: usize) -> Vec<Row> {
        vec![Row::numbers(vec![value; count], 8)]
    }

    fn on(bytes: u64, ttl_ms: u64) -> Responses {
        let responses = Responses::default();
        responses.set(Some(CacheSetting { bytes, ttl_ms }));
        responses
    }

    fn put(responses: &Responses, key: Key, outputs: &[Row]) {
        match responses.look(key) {
            Lookup::Missing(flight) => flight.land(outputs),
            other => panic!("{other:?}"),
        }
    }

    fn hit(responses: &Responses, key: Key) -> Option<Outputs> {
        match responses.look(key) {
            Lookup::Hit(outputs) => Some(outputs),
            Lookup::Missing(_) => None,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_given_again_until_its_time_is_over() {
        let responses = on(1 << 20, 1_000);
        let key = key_of(&rows(1.0, 3));
        assert!(hit(&responses, key).is_none());
        put(&responses, key, &rows(2.0, 5));
        assert_eq!(*hit(&responses, key).unwrap(), rows(2.0, 5));
        tokio::time::advance(Duration::from_millis(999)).await;
        assert!(hit(&responses, key).is_some());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(hit(&responses, key).is_none());
        assert_eq!(responses.size(), (0, 0));
        put(&responses, key, &rows(2.0, 5));
        responses.set(None);
        assert_eq!(responses.size(), (0, 0));
        assert!(matches!(responses.look(key), Lookup::Off));
    }

    #[test]
    fn requests_that_differ_in_anything_have_other_names() {
        let cell = |shape: &[u64], data| Cell {
            shape: shape.to_vec(),
            data,
        };
        let row = |cells: Vec<Cell>| Row {
            cells,
            batch_rows_max: None,
            energy: None,
        };
        let text = |text: &str| TensorData::Bytes(vec![text.into()]);
        let requests = [
            rows(1.0, 2),
            rows(1.0, 3),
            rows(-0.0, 2),
            rows(0.0, 2),
            [rows(1.0, 2), rows(1.0, 2)].concat(),
            vec![row(vec![cell(&[1, 2], TensorData::Fp32(vec![1.0; 2]))])],
            vec![row(vec![cell(
                &[2],
                TensorData::Int32(vec![0x3f80_0000; 2]),
            )])],
            vec![row(vec![cell(&[1], text("ab")), cell(&[1], text("c"))])],
            vec![row(vec![cell(&[1], text("a")), cell(&[1], text("bc"))])],
        ];
        let keys: std::collections::BTreeSet<Key> =
            requests.iter().map(|rows| key_of(rows)).collect();
        assert_eq!(keys.len(), requests.len());
        // How many rows may join it is no part of a request.
        let mut other = rows(1.0, 2);
        other[0].batch_rows_max = Some(1);
        assert_eq!(key_of(&other), key_of(&requests[0]));
    }

    #[tokio::test]
    async fn those_who_ask_the_same_wait_for_the_first_and_take_its_place_if_it_fails() {
        let responses = on(1 << 20, 60_000);
        let key = key_of(&rows(1.0, 3));
        let Lookup::Missing(first) = responses.look(key) else {
            panic!("nothing is kept yet")
        };
        let Lookup::Underway(mut second) = responses.look(key) else {
            panic!("the first is under way")
        };
        drop(first);
        assert!(second.wait_for(Option::is_some).await.is_err());
        let Lookup::Missing(third) = responses.look(key) else {
            panic!("the first has failed")
        };
        let Lookup::Underway(mut fourth) = responses.look(key) else {
            panic!("the third is under way")
        };
        third.land(&rows(5.0, 1));
        let answer = fourth.wait_for(Option::is_some).await.unwrap().clone();
        assert_eq!(*answer.unwrap(), rows(5.0, 1));
        assert!(hit(&responses, key).is_some());
    }

    #[test]
    fn the_least_recently_asked_for_goes_first_and_nothing_takes_more_than_its_share() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let _entered = runtime.enter();
        let one = ENTRY_BYTES + CELL_BYTES + 4;
        let responses = on(8 * one, 60_000);
        let key = |number: u8| [number; 32];
        for number in 0..8 {
            put(&responses, key(number), &rows(1.0, 1));
        }
        assert_eq!(responses.size(), (8, 8 * one));
        assert!(hit(&responses, key(0)).is_some());
        put(&responses, key(8), &rows(1.0, 1));
        assert!(hit(&responses, key(1)).is_none());
        assert!(hit(&responses, key(0)).is_some());
        put(&responses, key(9), &rows(1.0, 1_000));
        assert!(hit(&responses, key(9)).is_none());
        responses.set(Some(CacheSetting {
            bytes: 2 * one,
            ttl_ms: 9,
        }));
        assert_eq!(responses.size().0, 2);
        assert!(hit(&responses, key(0)).is_some());
    }

    proptest! {
        #[test]
        fn what_is_kept_is_what_was_put_and_within_the_bound(
            steps in proptest::collection::vec((0u8..24, 0usize..40, any::<bool>()), 1..200),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            let _entered = runtime.enter();
            let limit = 4_000;
            let responses = on(limit, 60_000);
            let mut put_last = BTreeMap::new();
            for (number, size, asks) in steps {
                let key = [number; 32];
                match responses.look(key) {
                    Lookup::Hit(outputs) => prop_assert_eq!(Some(&*outputs), put_last.get(&number)),
                    Lookup::Missing(flight) if !asks => {
                        flight.land(&rows(f32::from(number), size));
                        put_last.insert(number, rows(f32::from(number), size));
                    }
                    Lookup::Missing(flight) => drop(flight),
                    other => prop_assert!(false, "{:?}", other),
                }
                let (count, bytes) = responses.size();
                prop_assert!(bytes <= limit && count as u64 * ENTRY_BYTES <= bytes);
                let inner = responses.lock();
                prop_assert_eq!(inner.order.len(), inner.entries.len());
                prop_assert!(inner.flights.is_empty());
            }
        }
    }
}
