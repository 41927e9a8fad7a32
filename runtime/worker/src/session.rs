//! The session with the leader: one stream on the control lane, made again whenever it breaks. What is said on
//! it is in `conversation`.
//!
//! Invariants:
//! 1. What an older leader says is dropped and counted: nothing below the highest term seen counts.
//! 2. An event is sent again in every session, and once in a while within one, until it is
//!    acknowledged.
//! 3. Between two attempts there is a pause that grows to 3 s, with jitter so that a fleet does not
//!    come back at once. The worker never gives up, and its hosts run on.
//! 4. When the leader owes an answer for [`SILENCE_MAX`], the other heads are asked who leads: a
//!    worker finds a new leader before its transport notices that the old one is gone.
//! 5. A session without an acknowledged renewal for four fifths of the lease is over (see
//!    [`crate::lease`]); the worker looks for a leader that answers.

mod conversation;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mobula_core::id::Term;
use mobula_net::endpoint::{Endpoint, LaneClass};
use mobula_net::identity::Role;
use mobula_net::lane::FramedStream;
use mobula_wire::hello::Lane;
use mobula_wire::session::WorkerHello;
use rand::Rng;
use tokio::sync::{mpsc, watch};

use crate::agent::Input;
use crate::join::{Joiner, Membership, resolve};
use crate::session_handle::{Command, SessionHandle, Signing};
use crate::worker::WorkerStatus;

/// A leader that is there answers a hello at once.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);

/// A leader that owes an answer for so long may have been replaced: the others are asked. Longer
/// than an election, and short enough that a worker finds a new leader well within its lease.
const SILENCE_MAX: Duration = Duration::from_millis(2_500);

/// How long the others may take to say so.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

const BACKOFF_INITIAL: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(3);

/// While no head says who leads, they are asked this often at least: that costs a refused connection,
/// where to dial a leader who is not there costs seconds.
const LOOK_INTERVAL_MAX: Duration = Duration::from_secs(1);

/// After so many looks the last leader is dialled all the same: its other port may be out of reach.
const LOOKS_MAX: u32 = 8;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionEnd {
    #[error("{0}")]
    Connect(String),
    #[error("the head refuses this worker: {0}")]
    Refused(String),
    #[error("the head at term {found} is not the leader any more: term {newest} has begun")]
    Stale { found: u64, newest: u64 },
    #[error("the head did not answer the hello with a welcome within {WELCOME_TIMEOUT:?}")]
    NoWelcome,
    #[error("the head sent something else than a welcome first")]
    Protocol,
    #[error("no renewal of the lease was acknowledged for too long")]
    LeaseLost,
    #[error("the leader fell silent, and {found} leads now")]
    OtherLeader { found: String },
    #[error("the head ended the session")]
    Finished,
    #[error("the stream broke: {0}")]
    Broken(String),
    #[error("the certificate was renewed")]
    CertificateRenewed,
    #[error("the agent asked for a new session")]
    Restarted,
    #[error("the agent has ended")]
    AgentEnded,
}

/// The session's own state, over all its connections.
pub(crate) struct Session {
    endpoint: Endpoint,
    hello: WorkerHello,
    joiner: Joiner,
    membership: watch::Receiver<Membership>,
    cluster_address: String,
    handle: SessionHandle,
    commands: mpsc::Receiver<Command>,
    inputs: mpsc::Sender<Input>,
    status: watch::Sender<WorkerStatus>,
    highest_term: Term,
    number: u64,
    signings: BTreeMap<u64, Signing>,
    last_signing: u64,
}

impl Session {
    pub(crate) fn new(
        endpoint: Endpoint,
        hello: WorkerHello,
        joiner: Joiner,
        membership: watch::Receiver<Membership>,
        inputs: mpsc::Sender<Input>,
        status: watch::Sender<WorkerStatus>,
    ) -> (Session, SessionHandle) {
        let (handle, commands) = SessionHandle::new();
        let cluster_address = membership.borrow().cluster_address.clone();
        let session = Session {
            endpoint,
            hello,
            joiner,
            membership,
            cluster_address,
            handle: handle.clone(),
            commands,
            inputs,
            status,
            highest_term: Term(0),
            number: 0,
            signings: BTreeMap::new(),
            last_signing: 0,
        };
        (session, handle)
    }

    /// Keeps a session for as long as the agent lives.
    pub(crate) async fn run(mut self) {
        let mut delay = BACKOFF_INITIAL;
        loop {
            let began = Instant::now();
            let end = match self.connect().await {
                Ok(stream) => match self.converse(stream).await {
                    Ok(never) => match never {},
                    Err(end) => end,
                },
                Err(end) => end,
            };
            let was_connected = self.status.borrow().connected;
            self.status.send_modify(|status| {
                status.connected = false;
                status.problem = Some(end.to_string());
            });
            match end {
                SessionEnd::AgentEnded => return,
                SessionEnd::CertificateRenewed | SessionEnd::Restarted => {
                    tracing::info!(reason = %end, "beginning a new session");
                    // Both are rare, but a leader that refuses must not be asked in a tight loop.
                    delay = BACKOFF_INITIAL;
                }
                _ => {
                    tracing::warn!(reason = %end, "no session with the leader; hosts run on");
                    if self.look_for_the_leader().await {
                        delay = BACKOFF_INITIAL;
                    }
                }
            }
            if was_connected && began.elapsed() > BACKOFF_MAX {
                delay = BACKOFF_INITIAL;
            }
            tokio::time::sleep(jittered(delay)).await;
            delay = (delay * 2).min(BACKOFF_MAX);
        }
    }

    /// The head may have moved: any head that answers says where to go. Returns when one has, or when
    /// none does for long; true if what it said is news: another leads, or one leads again.
    async fn look_for_the_leader(&mut self) -> bool {
        let mut delay = BACKOFF_INITIAL;
        for looks in 0..LOOKS_MAX {
            let credentials = self.membership.borrow().credentials.clone();
            match self.joiner.cluster_address(&credentials).await {
                Ok(address) => {
                    let is_another = address != self.cluster_address;
                    self.cluster_address = address;
                    return is_another || looks > 0;
                }
                Err(error) => tracing::debug!(%error, "no head says where the leader is"),
            }
            tokio::time::sleep(jittered(delay)).await;
            delay = (delay * 2).min(LOOK_INTERVAL_MAX);
        }
        false
    }

    /// Ends the session if another head leads. A leader that is only slow keeps it.
    async fn check_who_leads(&self) -> Result<(), SessionEnd> {
        let credentials = self.membership.borrow().credentials.clone();
        let asking = self.joiner.cluster_address(&credentials);
        match tokio::time::timeout(ASK_TIMEOUT, asking).await {
            Ok(Ok(found)) if found != self.cluster_address => {
                Err(SessionEnd::OtherLeader { found })
            }
            _ => Ok(()),
        }
    }

    async fn connect(&mut self) -> Result<FramedStream, SessionEnd> {
        self.membership.mark_unchanged();
        let failed = |error: &dyn std::fmt::Display| SessionEnd::Connect(error.to_string());
        let address = resolve(&self.cluster_address)
            .await
            .map_err(|reason| failed(&reason))?;
        let connection = self
            .endpoint
            .connect(address, LaneClass::Control, Role::Head)
            .await
            .map_err(|error| failed(&error))?;
        connection
            .open(Lane::Control)
            .await
            .map_err(|error| failed(&error))
    }
}

/// Between half and all of `delay`.
fn jittered(delay: Duration) -> Duration {
    delay.mul_f64(rand::rng().random_range(0.5..=1.0))
}

/// A number that no other start of any agent has.
pub(crate) fn new_boot_id() -> String {
    format!("{:032x}", rand::rng().random::<u128>())
}
