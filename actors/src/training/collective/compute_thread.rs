//! The thread on which a replica computes and updates: what is ordered, in its order, without a pause
//! between two shards of a step.
//!
//! Invariants:
//! 1. One order is carried out at a time.
//! 2. Once an update is ordered, shards of its step that were not begun are not computed any more.
//! 3. The thread ends when its handle is dropped, after what it is at.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::panics::caught;
use crate::training::messages::{Held, TrainerError};
use crate::training::reduction::Partial;
use crate::training::replica::Replica;

/// Outcomes that wait to be taken. The thread waits for their taker beyond that.
const OUTCOMES_MAX: usize = 16;

/// What became of an order.
pub(super) enum Outcome {
    /// A shard of this step.
    Computed(u64, Result<Partial, TrainerError>),
    /// The step was over before the shard's turn came.
    Superseded(u64, u32),
    /// The update; what the replica holds now, how long it waited for samples, and how long it computed.
    Applied(Result<(Held, (Duration, Duration)), TrainerError>),
}

enum Order {
    Compute { step: u64, shard: u32 },
    Apply { root: Arc<Partial> },
}

/// The way to the thread.
pub(super) struct ComputeThread {
    // The member orders few shards at once, and one update.
    orders: std::sync::mpsc::Sender<Order>,
    outcomes: mpsc::Receiver<Outcome>,
    /// Steps below this one need no more shards.
    over: Arc<AtomicU64>,
}

impl ComputeThread {
    /// Starts the thread for `replica`. What that reads ahead goes by way of the present runtime.
    pub(super) fn start(replica: Arc<Mutex<Replica>>) -> Self {
        let (orders, ordered) = std::sync::mpsc::channel();
        let (done, outcomes) = mpsc::channel(OUTCOMES_MAX);
        let over = Arc::new(AtomicU64::new(0));
        let runtime = Handle::current();
        let is_over = Arc::clone(&over);
        std::thread::Builder::new()
            .name("train".to_owned())
            .spawn(move || {
                let _runtime = runtime.enter();
                for order in ordered {
                    let outcome = carry_out(&replica, &is_over, order);
                    if done.blocking_send(outcome).is_err() {
                        return;
                    }
                }
            })
            .expect("a process may start one more thread");
        ComputeThread {
            orders,
            outcomes,
            over,
        }
    }

    /// Orders a shard.
    pub(super) fn compute(&self, step: u64, shard: u32) {
        self.order(Order::Compute { step, shard });
    }

    /// Orders the update with the sums of the whole `step`.
    pub(super) fn apply(&self, step: u64, root: Arc<Partial>) {
        self.over.fetch_max(step + 1, Ordering::Relaxed);
        self.order(Order::Apply { root });
    }

    fn order(&self, order: Order) {
        // The thread listens for as long as this handle lives.
        let _ = self.orders.send(order);
    }

    /// The next outcome, if something was ordered; waits for ever otherwise.
    pub(super) async fn outcome(&mut self) -> Outcome {
        let outcome = self.outcomes.recv().await;
        outcome.expect(
            "the thread ends after this handle, and passes a panic of the replica on as an error",
        )
    }
}

/// A model of the user's own may panic on some samples: the job ends with its words, as it does with its errors.
fn panicked(text: &str) -> TrainerError {
    TrainerError::Unfit(format!("the model panicked: {text}"))
}

fn carry_out(replica: &Mutex<Replica>, over: &AtomicU64, order: Order) -> Outcome {
    match order {
        Order::Compute { step, shard } if over.load(Ordering::Relaxed) > step => {
            Outcome::Superseded(step, shard)
        }
        Order::Compute { step, shard } => {
            let computed = caught(|| replica.lock().compute(step, shard));
            Outcome::Computed(step, computed.unwrap_or_else(|text| Err(panicked(&text))))
        }
        Order::Apply { root } => {
            let applied = caught(|| {
                let mut replica = replica.lock();
                let outcome = replica.apply(&root);
                outcome.map(|(_, held)| (held, replica.take_spent()))
            });
            Outcome::Applied(applied.unwrap_or_else(|text| Err(panicked(&text))))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::spec::{TrainSpec, WorkerRange};

    #[tokio::test]
    async fn shards_of_a_step_that_is_over_are_not_computed() {
        let spec = TrainSpec {
            virtual_shards: 1,
            global_batch: 8,
            workers: WorkerRange { min: 1, max: 1 },
            ..TrainSpec::digits_mlp("a")
        };
        let replica = Arc::new(Mutex::new(Replica::new(spec)));
        replica.lock().prepare(None).unwrap();
        let mut thread = ComputeThread::start(Arc::clone(&replica));
        thread.compute(0, 0);
        let Outcome::Computed(0, Ok(sums)) = thread.outcome().await else {
            panic!("the first shard is computed");
        };
        // The thread waits for the replica while more is ordered.
        let busy = replica.lock();
        thread.apply(0, Arc::new(sums));
        thread.compute(0, 0);
        thread.compute(1, 0);
        drop(busy);
        let Outcome::Applied(Ok((held, _))) = thread.outcome().await else {
            panic!("the sums of the whole step are applied");
        };
        assert_eq!(held.step, 1);
        assert!(matches!(thread.outcome().await, Outcome::Superseded(0, 0)));
        assert!(matches!(
            thread.outcome().await,
            Outcome::Computed(1, Ok(_))
        ));
    }

    #[tokio::test]
    async fn a_panic_of_the_replica_is_an_error_with_its_words_and_the_thread_goes_on() {
        let replica = Arc::new(Mutex::new(Replica::new(TrainSpec::digits_mlp("a"))));
        replica.lock().prepare(None).unwrap();
        replica.lock().spoil_next_update(usize::MAX);
        let mut thread = ComputeThread::start(replica);
        let sums = Partial {
            subtree: crate::training::reduction::Subtree { level: 4, index: 0 },
            loss_sum: 1.0,
            count: 128,
            grads: vec![0.0; 17_226],
        };
        thread.apply(0, Arc::new(sums));
        let Outcome::Applied(Err(TrainerError::Unfit(reason))) = thread.outcome().await else {
            panic!("the update fails");
        };
        assert!(reason.contains("the model panicked: "), "{reason}");
        assert!(reason.contains("out of bounds"), "{reason}");
        thread.compute(1, 0);
        assert!(matches!(thread.outcome().await, Outcome::Computed(1, _)));
    }
}
