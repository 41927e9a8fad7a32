//! A cluster whose head does as the test says, seen from inside and from outside.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use mobula::prelude::*;
use mobula_core::error::ErrorCode;
use mobula_core::spec::ActorSpec;
use mobula_host::Registry;
pub(crate) use mobula_testing::JOB;
use mobula_testing::{Actors, Known, ScriptedCluster, ScriptedHead};
use mobula_wire::control as api;
use tokio::sync::watch;
use tonic::Status;

pub(crate) struct Head {
    actors: Actors,
    sessions: AtomicU64,
    /// How many answers to mutations are still to be lost.
    pub(crate) lose_replies: AtomicU32,
    /// How many slots for tasks run at once; more stay pending.
    pub(crate) slots_max: AtomicU32,
    /// Sessions below this one are forgotten.
    pub(crate) first_known_session: AtomicU64,
    /// Whether a lost reply takes its session along.
    pub(crate) forgets_with_reply: AtomicBool,
    /// The stamps of all mutations that arrived.
    pub(crate) stamps: Mutex<Vec<(u64, u64)>>,
    /// The sessions that were closed.
    pub(crate) closed: watch::Sender<Vec<u64>>,
    applied: Mutex<BTreeMap<(u64, u64), Vec<u64>>>,
}

impl Head {
    fn new(actors: Actors) -> Self {
        Head {
            actors,
            sessions: AtomicU64::new(9),
            lose_replies: AtomicU32::new(0),
            slots_max: AtomicU32::new(u32::MAX),
            first_known_session: AtomicU64::new(0),
            forgets_with_reply: AtomicBool::new(false),
            stamps: Mutex::default(),
            closed: watch::Sender::new(Vec::new()),
            applied: Mutex::default(),
        }
    }

    /// Whether an actor that waits may start: a slot for tasks only while fewer than may run live.
    fn has_room_for(&self, id: u64) -> bool {
        let known = self.actors.now();
        let is_slot = |known: &Known| known.spec.kind.is_task_slot();
        if !is_slot(&known[&id]) {
            return true;
        }
        let others = known.values().filter(|other| other.row.id != id);
        let live = others.filter(|other| is_slot(other) && other.is_alive());
        live.count() < self.slots_max.load(Ordering::SeqCst) as usize
    }

    /// Ends everything that runs as a slot for tasks, in the midst of what it does.
    pub(crate) async fn kill_slots(&self) {
        let slots: Vec<u64> = {
            let known = self.actors.now();
            let slots = known.iter().filter(|(_, one)| one.spec.kind.is_task_slot());
            slots.map(|(id, _)| *id).collect()
        };
        for slot in slots {
            self.actors.kill(slot).await;
        }
    }
}

#[tonic::async_trait]
impl ScriptedHead for Head {
    fn actors(&self) -> &Actors {
        &self.actors
    }

    async fn start(&self, id: u64) {
        if self.has_room_for(id) {
            self.actors.start(id).await;
        }
    }

    async fn open_session(&self) -> Result<u64, Status> {
        Ok(self.sessions.fetch_add(1, Ordering::SeqCst))
    }

    async fn close_session(&self, session: u64) -> Result<(), Status> {
        self.closed.send_modify(|closed| closed.push(session));
        Ok(())
    }

    /// Once for each stamp; and the answer may be lost.
    async fn create_actors(&self, request: api::CreateActorsRequest) -> Result<Vec<u64>, Status> {
        let stamp = request.stamp.unwrap();
        let stamp = (stamp.session, stamp.sequence);
        self.stamps.lock().unwrap().push(stamp);
        if stamp.0 < self.first_known_session.load(Ordering::SeqCst) {
            let mut status = Status::failed_precondition("the session is not known");
            let code = ErrorCode::SessionExpired.as_str().parse().unwrap();
            status.metadata_mut().insert("mobula-code", code);
            return Err(status);
        }
        let known = self.applied.lock().unwrap().get(&stamp).cloned();
        let ids = match known {
            Some(ids) => ids,
            None => {
                let mut ids = Vec::new();
                for spec in request.actors {
                    let id = 100 + self.actors.now().len() as u64;
                    self.actors.add(id, ActorSpec::try_from(spec).unwrap());
                    self.start(id).await;
                    ids.push(id);
                }
                self.applied.lock().unwrap().insert(stamp, ids.clone());
                ids
            }
        };
        let lost = self
            .lose_replies
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                left.checked_sub(1)
            })
            .is_ok();
        if lost && self.forgets_with_reply.load(Ordering::SeqCst) {
            self.first_known_session
                .store(stamp.0 + 1, Ordering::SeqCst);
        }
        if lost {
            Err(Status::unavailable("the reply is lost"))
        } else {
            Ok(ids)
        }
    }
}

/// A head, and a host whose actors it starts and restarts.
pub(crate) struct Stage {
    pub(crate) head: Arc<Head>,
    /// The cluster as an actor of the host sees it.
    pub(crate) inside: Cluster,
    /// The cluster as a person's program sees it.
    pub(crate) outside: Cluster,
    /// Its object store goes with it.
    _cluster: ScriptedCluster<Head>,
}

pub(crate) async fn stage() -> Stage {
    let registry = Registry::of_this_program().unwrap();
    let cluster = ScriptedCluster::start(registry, Head::new).await;
    let runtime = Arc::clone(&cluster.runtime);
    let context = ActorContext::new(ActorId(1), Incarnation(1), None, runtime);
    let outside = Cluster::connect(&cluster.api_address, &cluster.token)
        .await
        .unwrap()
        .in_job(JOB);
    Stage {
        head: Arc::clone(&cluster.head),
        inside: context.cluster(),
        outside,
        _cluster: cluster,
    }
}
