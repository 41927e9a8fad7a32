//! What only the leader does: placement passes, lease expiry, controllers, the first tokens, and
//! sweeping the object store.
//! The tasks start when leadership begins and are ended when it ends.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use mobula_core::config::TokensConfig;
use mobula_core::control::Controller;
use mobula_core::id::SessionId;
use parking_lot::Mutex;
use tokio::task::{JoinError, JoinSet};

use crate::context::HeadContext;
use crate::dispatcher::Nudges;
use crate::sweep::SweepOptions;
use crate::{health, sweep, tokens};

/// How long placement sleeps at the most. It is woken by what makes a pass worth while, and wakes
/// by itself when a back-off is over; this only bounds what a defect in either costs.
const PLACEMENT_PAUSE_MAX: Duration = Duration::from_secs(5);

/// The pause after a pass that could not read or propose, or after many in a row.
const PLACEMENT_RETRY: Duration = Duration::from_millis(200);

/// How long controllers sleep at the most.
const CONTROLLER_INTERVAL: Duration = Duration::from_millis(500);

/// How often a placement pass may follow another without a pause; more only means that other work
/// waits, for the next nudge goes on where this one ended.
const PASSES_IN_A_ROW_MAX: usize = 64;

/// Everything that leading needs.
pub(crate) struct LeaderDuties {
    pub(crate) context: Arc<HeadContext>,
    pub(crate) nudges: Arc<Nudges>,
    pub(crate) controllers: Arc<Mutex<Vec<Box<dyn Controller>>>>,
    pub(crate) data_dir: PathBuf,
    pub(crate) tokens: TokensConfig,
    pub(crate) sweep: Option<SweepOptions>,
}

/// Follows leadership until the driver ends. The error is the panic of a duty.
pub(crate) async fn run(duties: LeaderDuties) -> Result<(), JoinError> {
    let mut leadership = duties.context.raft.leadership();
    loop {
        if leadership.wait_for(|l| l.is_leader).await.is_err() {
            return Ok(());
        }
        let term = leadership.borrow().term;
        tracing::info!(term, "leading");
        let mut tasks = duties.start();
        let over = tokio::select! {
            changed = leadership.wait_for(|l| !l.is_leader || l.term != term) => {
                changed.is_err().then_some(Ok(()))
            }
            panic = first_panic(&mut tasks) => Some(Err(panic)),
        };
        tasks.shutdown().await;
        duties.context.sessions.clear();
        tracing::info!(term, "leading no more");
        // With the driver gone, or a duty that panicked, this head must not seem to lead.
        if let Some(over) = over {
            return over;
        }
    }
}

/// Waits for a task that panicked; those that are done do not count.
async fn first_panic(tasks: &mut JoinSet<()>) -> JoinError {
    while let Some(ended) = tasks.join_next().await {
        if let Err(panic) = ended {
            return panic;
        }
    }
    std::future::pending().await
}

impl LeaderDuties {
    fn start(&self) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        tasks.spawn(place(self.context.clone(), self.nudges.clone()));
        tasks.spawn(health::run(self.context.clone()));
        tasks.spawn(control(
            self.context.clone(),
            self.nudges.clone(),
            self.controllers.clone(),
        ));
        tasks.spawn(tokens::ensure(
            self.context.clone(),
            self.data_dir.clone(),
            self.tokens.clone(),
        ));
        if let Some(options) = &self.sweep {
            tasks.spawn(sweep::run(self.context.clone(), options.clone()));
        }
        tasks
    }
}

async fn place(context: Arc<HeadContext>, nudges: Arc<Nudges>) {
    let mut pause = Duration::ZERO;
    loop {
        // Whichever comes first: a nudge, or the time.
        let _ = tokio::time::timeout(pause, nudges.place.notified()).await;
        pause = PLACEMENT_RETRY;
        for _ in 0..PASSES_IN_A_ROW_MAX {
            let began = std::time::Instant::now();
            let passed = place_once(&context).await;
            let kind = match &passed {
                Ok(Pass::Placed) => "placed",
                Ok(Pass::NothingFor(_)) => "idle",
                Err(_) => "failed",
            };
            context.metrics.placed(kind, began.elapsed());
            match passed {
                Ok(Pass::Placed) => {}
                Ok(Pass::NothingFor(idle)) => {
                    pause = idle;
                    break;
                }
                Err(reason) => {
                    tracing::warn!(%reason, "placement pass failed");
                    break;
                }
            }
        }
    }
}

/// What a placement pass came to.
enum Pass {
    /// It placed something; another may find more.
    Placed,
    /// Nothing can be placed for this long, unless something changes.
    NothingFor(Duration),
}

async fn place_once(context: &HeadContext) -> Result<Pass, String> {
    let reader = context
        .raft
        .read()
        .await
        .map_err(|error| error.to_string())?;
    let now_ms = context.raft.now_ms();
    let Some(command) = mobula_scheduler::placement_pass(&reader, now_ms) else {
        let wakeup_ms = mobula_scheduler::next_wakeup_ms(&reader, now_ms);
        let idle = wakeup_ms.map_or(PLACEMENT_PAUSE_MAX, |at_ms| {
            Duration::from_millis(at_ms.saturating_sub(now_ms))
        });
        return Ok(Pass::NothingFor(idle.min(PLACEMENT_PAUSE_MAX)));
    };
    drop(reader);
    context
        .propose_scheduler(SessionId::INTERNAL, 0, &command)
        .await
        .map_err(|error| error.to_string())?;
    Ok(Pass::Placed)
}

async fn control(
    context: Arc<HeadContext>,
    nudges: Arc<Nudges>,
    controllers: Arc<Mutex<Vec<Box<dyn Controller>>>>,
) {
    loop {
        let _ = tokio::time::timeout(CONTROLLER_INTERVAL, nudges.controllers.notified()).await;
        let reader = match context.raft.read().await {
            Ok(reader) => reader,
            Err(error) => {
                tracing::warn!(%error, "controllers cannot read the tables");
                continue;
            }
        };
        let now_ms = context.raft.now_ms();
        let proposals: Vec<_> = controllers
            .lock()
            .iter_mut()
            .flat_map(|controller| {
                let name = controller.name().to_owned();
                controller
                    .reconcile(&reader, now_ms)
                    .into_iter()
                    .map(move |proposal| (name.clone(), proposal))
            })
            .collect();
        drop(reader);
        for (controller, proposal) in proposals {
            let proposed = context
                .propose(SessionId::INTERNAL, 0, proposal.module, proposal.payload)
                .await;
            if let Err(error) = proposed {
                tracing::warn!(controller, %error, "a controller's command was refused");
            }
        }
    }
}
