//! A future that is woken while it is polled is polled again at once.
//!
//! hyper wakes the task of a connection from within it, for each request with a body: who reads the body says so by waking who
//! feeds it, and both are that task. A runtime takes this for a task that gives way to others: it goes to the end of the line, and
//! another thread is woken to take it off this one's hands, for nothing, at the time at which the request goes on to a replica.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures::task::AtomicWaker;

/// It is polled now.
const POLLED: u8 = 1;

/// It was woken since its last poll began.
const WOKEN: u8 = 2;

/// Polls in a row. What wants more has its turn after others.
const POLLS_MAX: u32 = 4;

/// See the module.
pub(super) struct AtOnce<F> {
    future: F,
    bell: Arc<Bell>,
    /// Rings it.
    waker: Waker,
}

/// Where the future's wakers ring.
struct Bell {
    /// [`POLLED`] and [`WOKEN`].
    state: AtomicU8,
    task: AtomicWaker,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let before = self.state.fetch_or(WOKEN, Ordering::AcqRel);
        if before & POLLED == 0 {
            self.task.wake();
        }
    }
}

impl<F> AtOnce<F> {
    pub(super) fn new(future: F) -> Self {
        let bell = Arc::new(Bell {
            state: AtomicU8::new(0),
            task: AtomicWaker::new(),
        });
        let waker = Waker::from(Arc::clone(&bell));
        AtOnce {
            future,
            bell,
            waker,
        }
    }
}

impl<F: Future + Unpin> Future for AtOnce<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let AtOnce {
            future,
            bell,
            waker,
        } = self.get_mut();
        bell.task.register(context.waker());
        let mut within = Context::from_waker(waker);
        for _ in 0..POLLS_MAX {
            bell.state.store(POLLED, Ordering::Release);
            if let Poll::Ready(output) = Pin::new(&mut *future).poll(&mut within) {
                return Poll::Ready(output);
            }
            // From here on whoever wakes it wakes the task.
            if bell.state.swap(0, Ordering::AcqRel) & WOKEN == 0 {
                return Poll::Pending;
            }
        }
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[derive(Default)]
    struct Counted(AtomicU32);

    impl Wake for Counted {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A future that wakes itself in each of its first polls, and how often its task was woken.
    fn waking(times: u32) -> (impl Future<Output = u32> + Unpin, Arc<Counted>) {
        let mut polls = 0;
        let future = poll_fn(move |context| {
            polls += 1;
            if polls > times {
                return Poll::Ready(polls);
            }
            context.waker().wake_by_ref();
            Poll::Pending
        });
        (AtOnce::new(future), Arc::default())
    }

    #[test]
    fn what_wakes_itself_is_polled_again_and_its_task_not_woken() {
        let (mut future, task) = waking(POLLS_MAX - 1);
        let waker = Waker::from(Arc::clone(&task));
        let polled = Pin::new(&mut future).poll(&mut Context::from_waker(&waker));
        assert_eq!(polled, Poll::Ready(POLLS_MAX));
        assert_eq!(task.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_always_wakes_itself_gives_way() {
        let (mut future, task) = waking(POLLS_MAX);
        let waker = Waker::from(Arc::clone(&task));
        let mut context = Context::from_waker(&waker);
        assert_eq!(Pin::new(&mut future).poll(&mut context), Poll::Pending);
        assert_eq!(task.0.load(Ordering::Relaxed), 1);
        let polled = Pin::new(&mut future).poll(&mut context);
        assert_eq!(polled, Poll::Ready(POLLS_MAX + 1));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn others_wake_it() {
        let (send, mut receive) = tokio::sync::mpsc::channel(1);
        let reading = tokio::spawn(AtOnce::new(Box::pin(async move {
            let mut sum = 0_u64;
            while let Some(number) = receive.recv().await {
                sum += number;
            }
            sum
        })));
        for number in 0..10_000 {
            send.send(number).await.unwrap();
        }
        drop(send);
        assert_eq!(reading.await.unwrap(), 10_000 * 9_999 / 2);
    }
}
