//! One slot: a thread of its own that runs the tasks which are pushed into it.
//!
//! Why a thread: a task may compute for minutes without awaiting, and on a thread of the runtime
//! it would hold up the connections of the whole process. Handing each task to a pool of blocking
//! threads would cost more than a small task takes; this thread polls tasks itself, one after
//! another, and sleeps only when there is none.
//!
//! Invariants:
//! 1. At most `capacity` tasks wait; beyond that callers are told `Overloaded`.
//! 2. A task begins only when none is running that is not waiting for an object.
//! 3. Each call is answered once: by its task's end, by its cancellation or deadline, or, when the
//!    slot ends first, with what is known.
//! 4. A thread that does not let go of a task whose end is forced is left behind, and the slot
//!    gets another one.
//! 5. What a task brings after it was given up, or when its caller is gone, is let go at once.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use futures::task::AtomicWaker;
use mobula_core::codec;
use mobula_core::error::{CallError, Executed};
use mobula_core::exit::ExitReason;
use mobula_core::resource::Resources;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::context::ActorContext;
use crate::mailbox::{IncomingCall, overloaded};
use crate::reply::{CallResult, CancelLevel, Reply, unavailable};
use crate::shell::{panic_text, shortened};
use crate::tasks::context::TaskContext;
use crate::tasks::execution::Drive;
use crate::tasks::outcome;
use crate::tasks::registry::TaskRegistry;

/// The actor type of slots.
pub const SLOT_TYPE: &str = mobula_core::spec::TASK_SLOT_TYPE;

/// Method of a slot: gives it back. It ends when the tasks that it has are over.
pub const END_METHOD: &str = "mobula.end";

/// Method of a slot: answered when every task that it has begun waits for an object, and no other
/// is there that could begin. Its holder may push one beyond what it would push otherwise.
pub const WATCH_METHOD: &str = "mobula.watch";

/// Method of a slot: gives up tasks that have not begun, the latest ones, as many as its argument (an
/// encoded `u32`) says. Their callers are told `Overloaded`, and push them elsewhere.
pub const RETURN_METHOD: &str = "mobula.return";

/// Holders that watch one slot: one is enough, and it may have to ask again.
const WATCHERS_MAX: usize = 4;

/// How often a slot is looked after.
const LOOK_INTERVAL: Duration = Duration::from_millis(250);

/// After so many looks in a row without a task the slot ends: 30 s. Its holder gives it back much
/// sooner; this is for holders that died.
const IDLE_LOOKS_MAX: u32 = 120;

/// Threads of one process that were left behind with a task that does not end. Each may take a
/// core; with so many the process is better ended, which a task with a host of its own allows.
const LEFT_BEHIND_MAX: usize = 32;

static LEFT_BEHIND: AtomicUsize = AtomicUsize::new(0);

/// How many of a thread's tasks run, without those that only wait.
#[derive(Debug, Default)]
pub(crate) struct Activity(AtomicUsize);

impl Activity {
    pub(crate) fn enter(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn leave(&self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.0.load(Ordering::Acquire) > 0
    }
}

pub(crate) struct Calls {
    pub(crate) waiting: VecDeque<IncomingCall>,
    /// The answers that are due for what runs, by number. A handful: the one that runs, and those
    /// that wait for objects.
    running: Vec<(u64, Reply, TaskContext)>,
    next_number: u64,
    /// Those who want to know when everything waits.
    watchers: Vec<Reply>,
    /// Which thread works for the slot.
    generation: u64,
    /// Why no more calls are taken, once that is so.
    closed: Option<&'static str>,
    killed: bool,
    /// The thread has ended.
    ended: bool,
}

/// What a slot's thread and its host share.
pub(crate) struct Shared {
    pub(crate) context: ActorContext,
    pub(crate) resources: Arc<Resources>,
    pub(crate) tasks: TaskRegistry,
    capacity: u32,
    pub(crate) calls: Mutex<Calls>,
    /// Wakes the thread.
    pub(crate) waker: AtomicWaker,
    /// Told when the thread has ended.
    ended: Notify,
    runtime: tokio::runtime::Handle,
}

/// A slot, seen from its host.
pub(crate) struct SlotRunner(Arc<Shared>);

impl SlotRunner {
    /// Starts the slot's thread. Must be called on the runtime whose timers and sockets tasks use.
    pub(crate) fn start(
        context: ActorContext,
        resources: Resources,
        tasks: TaskRegistry,
        capacity: u32,
    ) -> std::io::Result<Arc<Self>> {
        let shared = Arc::new(Shared {
            context,
            resources: Arc::new(resources),
            tasks,
            capacity,
            calls: Mutex::new(Calls {
                waiting: VecDeque::new(),
                running: Vec::new(),
                next_number: 0,
                watchers: Vec::new(),
                generation: 0,
                closed: None,
                killed: false,
                ended: false,
            }),
            waker: AtomicWaker::new(),
            ended: Notify::new(),
            runtime: tokio::runtime::Handle::current(),
        });
        shared.start_thread(0)?;
        // Ends with the slot.
        tokio::spawn(look_after(Arc::downgrade(&shared)));
        Ok(Arc::new(SlotRunner(shared)))
    }

    /// Takes a call, or answers it with why not.
    pub(crate) fn admit(&self, call: IncomingCall) {
        match &*call.method {
            END_METHOD => {
                self.shut("the slot was given back");
                return call.reply.send(Ok(Bytes::new()));
            }
            WATCH_METHOD => return self.watch(call.reply),
            RETURN_METHOD => return self.return_waiting(&call.arguments, call.reply),
            _ => {}
        }
        let refusal = {
            let mut calls = self.0.calls.lock();
            if let Some(reason) = calls.closed {
                unavailable(self.0.context.actor(), reason, Executed::No)
            } else if calls.waiting.len() >= self.0.capacity as usize {
                overloaded(self.0.context.actor(), self.0.capacity)
            } else {
                calls.waiting.push_back(call);
                drop(calls);
                return self.0.waker.wake();
            }
        };
        call.reply.send(Err(refusal));
    }

    /// The latest first: those in front may begin at any moment.
    fn return_waiting(&self, count: &[u8], reply: Reply) {
        let count = match codec::decode::<u32>(count, count.len()) {
            Ok(count) => count as usize,
            Err(error) => return reply.send(Err(CallError::BadCall(error.to_string()))),
        };
        let returned = {
            let mut calls = self.0.calls.lock();
            let kept = calls.waiting.len().saturating_sub(count);
            calls.waiting.split_off(kept)
        };
        let refusal = overloaded(self.0.context.actor(), self.0.capacity);
        for call in returned {
            call.reply.send(Err(refusal.clone()));
        }
        reply.send(Ok(Bytes::new()));
    }

    fn watch(&self, reply: Reply) {
        let mut calls = self.0.calls.lock();
        if calls.closed.is_some() || calls.watchers.len() >= WATCHERS_MAX {
            drop(calls);
            let error = unavailable(self.0.context.actor(), "nobody may watch it", Executed::No);
            return reply.send(Err(error));
        }
        calls.watchers.push(reply);
        drop(calls);
        self.0.waker.wake();
    }

    /// Takes no more calls, answers those that wait, and ends once what runs is over.
    pub(crate) fn shut(&self, reason: &'static str) {
        self.0.shut(reason);
    }

    /// Takes no more calls, and waits until what runs is over, or the slot is killed.
    pub(crate) async fn stopped(&self) {
        self.shut("the slot was stopped");
        self.until(|calls| calls.ended || calls.killed).await;
    }

    /// Waits until the thread has ended.
    pub(crate) async fn ended(&self) {
        self.until(|calls| calls.ended).await;
    }

    async fn until(&self, reached: impl Fn(&Calls) -> bool) {
        loop {
            let ended = self.0.ended.notified();
            tokio::pin!(ended);
            // Registered before the look, so that no end is missed in between.
            ended.as_mut().enable();
            if reached(&self.0.calls.lock()) {
                return;
            }
            ended.await;
        }
    }

    /// Ends what runs at its next await. A task that never awaits goes on without a listener.
    pub(crate) fn kill(&self) {
        self.shut("the slot was stopped");
        let running = {
            let mut calls = self.0.calls.lock();
            calls.killed = true;
            std::mem::take(&mut calls.running)
        };
        // Dropping an answer says that the task was under way.
        drop(running);
        self.0.waker.wake();
        self.0.ended.notify_waiters();
    }
}

impl Shared {
    fn start_thread(self: &Arc<Self>, generation: u64) -> std::io::Result<()> {
        let shared = Arc::clone(self);
        // Owned by the slot: it ends when the slot is closed, and `ended` waits for that.
        std::thread::Builder::new()
            .name("mobula-slot".to_owned())
            .spawn(move || {
                let ended = catch_unwind(AssertUnwindSafe(|| {
                    let drive = Drive::new(Arc::clone(&shared), generation);
                    shared.runtime.block_on(drive);
                }));
                shared.thread_ended(generation, ended.err());
            })
            .map(drop)
    }

    fn thread_ended(&self, generation: u64, panic: Option<Box<dyn std::any::Any + Send>>) {
        {
            let calls = self.calls.lock();
            if calls.generation != generation {
                LEFT_BEHIND.fetch_sub(1, Ordering::AcqRel);
                return;
            }
        }
        self.shut("the slot has ended");
        let running = {
            let mut calls = self.calls.lock();
            calls.ended = true;
            std::mem::take(&mut calls.running)
        };
        // Dropping an answer says that the task was under way.
        drop(running);
        // Only a destructor of a task's future can panic out here.
        let reason = panic.map_or(ExitReason::Completed, |panic| {
            ExitReason::Panicked(shortened(panic_text(panic.as_ref())))
        });
        self.context.end(reason);
        self.ended.notify_waiters();
    }

    fn shut(&self, reason: &'static str) {
        let (waiting, watchers) = {
            let mut calls = self.calls.lock();
            calls.closed.get_or_insert(reason);
            let waiting = std::mem::take(&mut calls.waiting);
            (waiting, std::mem::take(&mut calls.watchers))
        };
        // Dropping their answers says that there is nothing to watch any more.
        drop(watchers);
        for call in waiting {
            let error = unavailable(self.context.actor(), reason, Executed::No);
            call.reply.send(Err(error));
        }
        self.waker.wake();
    }

    /// Whether the thread of this generation is to end at once.
    pub(crate) fn is_over(&self, generation: u64) -> bool {
        let calls = self.calls.lock();
        calls.is_over(generation)
    }

    /// Whether no more calls come.
    pub(crate) fn is_closed(&self) -> bool {
        self.calls.lock().closed.is_some()
    }

    /// Tells those who watch that everything waits.
    pub(crate) fn all_wait(&self) {
        let watchers = std::mem::take(&mut self.calls.lock().watchers);
        for reply in watchers {
            reply.send(Ok(Bytes::new()));
        }
    }

    pub(crate) fn finish(&self, number: u64, result: CallResult) {
        let reply = {
            let mut calls = self.calls.lock();
            let place = calls.running.iter().position(|(held, ..)| *held == number);
            place.map(|place| calls.running.swap_remove(place).1)
        };
        let unheard = match reply {
            Some(reply) => reply.try_send(result),
            // It was answered when its thread was left behind, or the slot killed.
            None => Some(result),
        };
        if let Some(Ok(value)) = unheard {
            outcome::discard(self.context.runtime().objects(), &value);
        }
    }

    /// The slot goes on with another thread; what the present one has is answered as cancelled if
    /// that was asked for, and otherwise as lost.
    fn leave_thread_behind(self: &Arc<Self>) {
        let (generation, running) = {
            let mut calls = self.calls.lock();
            calls.generation += 1;
            (calls.generation, std::mem::take(&mut calls.running))
        };
        for (_, reply, task) in running {
            if reply.cancellation().level() == CancelLevel::Forced {
                task.cancel_children();
                reply.send(Err(CallError::Cancelled {
                    actor: self.context.actor().to_string(),
                    executed: Executed::Unknown,
                }));
            }
        }
        tracing::warn!(slot = %self.context.actor(), "left a thread behind whose task does not end");
        let is_too_much = LEFT_BEHIND.fetch_add(1, Ordering::AcqRel) >= LEFT_BEHIND_MAX;
        if is_too_much || self.start_thread(generation).is_err() {
            self.thread_ended(generation, None);
        }
    }
}

impl Calls {
    /// Whether the thread of this generation is to end at once.
    pub(super) fn is_over(&self, generation: u64) -> bool {
        self.killed || self.generation != generation
    }

    /// A task begins; its answer is due.
    pub(crate) fn enter(&mut self, reply: Reply, task: TaskContext) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        self.running.push((number, reply, task));
        number
    }
}

/// Ends a slot that nobody uses, and frees one from a task whose end is forced in vain.
async fn look_after(slot: Weak<Shared>) {
    let mut looks_without_task = 0;
    let mut seen_number = 0;
    let mut seen_forced = None;
    loop {
        tokio::time::sleep(LOOK_INTERVAL).await;
        let Some(slot) = slot.upgrade() else { return };
        let (forced, is_used) = {
            let calls = slot.calls.lock();
            if calls.ended {
                return;
            }
            let is_forced = |(number, reply, _): &(u64, Reply, TaskContext)| {
                (reply.cancellation().level() == CancelLevel::Forced).then_some(*number)
            };
            let forced = calls.running.iter().find_map(is_forced);
            let is_used = calls.next_number != seen_number
                || !calls.running.is_empty()
                || !calls.waiting.is_empty();
            seen_number = calls.next_number;
            (forced, is_used)
        };
        // Seen twice: a task that awaits is dropped long before.
        if forced.is_some() && forced == seen_forced {
            slot.leave_thread_behind();
        }
        seen_forced = forced;
        looks_without_task = if is_used { 0 } else { looks_without_task + 1 };
        if looks_without_task >= IDLE_LOOKS_MAX {
            slot.shut("the slot ended because nobody used it");
        }
    }
}
