//! What a loop wants of the object store, loaded beside the loop: a store that hangs holds none.
//!
//! Invariants:
//! 1. Nothing here waits. A loop asks each round whether the result is there.
//! 2. One load is under way at the most. It ends with its owner, and when something else is wanted.
//! 3. A result is given once, and only to who asks for just that. Who asks again, say after an error, has it loaded again.

use tokio::task::JoinSet;

/// Loads one thing at a time; `K` says which.
pub(super) struct Loading<K, T> {
    /// Aborted when dropped.
    under_way: Option<(K, JoinSet<T>)>,
}

impl<K: PartialEq, T: Send + 'static> Loading<K, T> {
    pub(super) fn new() -> Self {
        Loading { under_way: None }
    }

    /// What was loaded for `key`, if it is there by now. It is begun where it is not under way; what is under way for
    /// another key is dropped, as nobody wants that any more.
    pub(super) fn hear<F>(&mut self, endpoint: &str, key: K, load: impl FnOnce() -> F) -> Option<T>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let known = self.under_way.as_mut();
        let Some((_, task)) = known.filter(|(known, _)| *known == key) else {
            let mut task = JoinSet::new();
            task.spawn(load());
            self.under_way = Some((key, task));
            return None;
        };
        let ended = task.try_join_next()?;
        self.under_way = None;
        ended
            .inspect_err(|error| {
                tracing::error!(endpoint, %error, "what an endpoint needs was not loaded; it is tried again");
            })
            .ok()
    }

    /// Drops what is under way.
    pub(super) fn forget(&mut self) {
        self.under_way = None;
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::*;

    /// How often a task of this thread is let run, which needs a few times.
    const TURNS: u32 = 1_000;

    /// Asks until there is a result, as the rounds of a loop do.
    pub(in crate::serving) async fn loaded<T>(mut ask: impl FnMut() -> Option<T>) -> T {
        for _ in 0..TURNS {
            if let Some(found) = ask() {
                return found;
            }
            tokio::task::yield_now().await;
        }
        panic!("nothing is loaded after {TURNS} turns");
    }

    #[tokio::test]
    async fn who_asks_does_not_wait_and_gets_a_result_once() {
        let mut loading = Loading::new();
        let (answer, answered) = oneshot::channel::<u32>();
        assert_eq!(loading.hear("digits", 1, || answered), None);
        let again = || -> oneshot::Receiver<u32> { unreachable!("it is under way") };
        assert_eq!(loading.hear("digits", 1, again), None);
        answer.send(7).unwrap();
        let found = loaded(|| loading.hear("digits", 1, again)).await;
        assert_eq!(found, Ok(7));
        let (answer, answered) = oneshot::channel::<u32>();
        assert_eq!(loading.hear("digits", 1, || answered), None);
        assert!(!answer.is_closed(), "it is loaded once more");
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_wanted_any_more_is_dropped() {
        let mut loading = Loading::new();
        let (mut first, answered) = oneshot::channel::<u32>();
        assert_eq!(loading.hear("digits", 1, || answered), None);
        let (mut second, answered) = oneshot::channel::<u32>();
        assert_eq!(loading.hear("digits", 2, || answered), None);
        let bound = Duration::from_secs(60);
        tokio::time::timeout(bound, first.closed()).await.unwrap();
        assert!(!second.is_closed());
        loading.forget();
        tokio::time::timeout(bound, second.closed()).await.unwrap();
    }

    #[tokio::test]
    async fn a_load_that_panics_is_begun_again() {
        let mut loading: Loading<u32, u32> = Loading::new();
        let mut begun = 0;
        let found = loaded(|| {
            loading.hear("digits", 1, || {
                begun += 1;
                let is_first = begun == 1;
                async move {
                    assert!(!is_first, "planned");
                    7
                }
            })
        });
        assert_eq!(found.await, 7);
        assert_eq!(begun, 2);
    }
}
