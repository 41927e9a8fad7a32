//! Puts the drawn faults onto a real cluster, and heals them.
//!
//! Invariants:
//! 1. Every fault is healed when its time is over, also when healing something else failed.
//! 2. Two faults never handle one process at a time: the later one is left out, and counted so.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use mobula::core::id::JobId;
use mobula_wire::control::RemoveHeadRequest;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::task::block_in_place;

use super::cluster::RealCluster;
use super::fault_plan::{FaultKind, FaultPlan, Peers, Victim};
use super::leaks::is_of_run;
use super::node::Node;
use super::notices::Taken;
use super::router::Disturbance;
use super::silences::SilencedDriver;
use super::takeovers::LostDriver;
use super::timeline::Planned;
use crate::faults::Target;

/// How often is looked whether a process ended by itself.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);

/// A job's process may just have been killed and not be there yet.
const JOB_PROCESS_MAX: Duration = Duration::from_secs(5);

/// A change of the group is asked for so often: the head that is asked may be about to go.
const REMOVE_ATTEMPTS: u32 = 5;

/// A fault that was done.
#[derive(Debug, Clone, Serialize)]
pub struct Done {
    /// What it was.
    pub kind: FaultKind,
    /// Whom it hit.
    pub node: String,
    /// Whether that one led then.
    pub was_leader: bool,
    /// When it began, in milliseconds since the workload did.
    pub at_ms: u64,
    /// When it was healed.
    pub healed_ms: u64,
    /// Where all heads were away: how long after their start one led and every worker answered through it.
    pub reconciled_ms: Option<u64>,
    /// Where machines of a job that trains were taken away with notice: what of it ran there.
    pub taken: Option<Taken>,
    /// When it began, by the machine's clock.
    #[serde(skip)]
    pub wall: SystemTime,
}

/// What became of the faults.
#[derive(Debug, Default)]
pub(super) struct Record {
    pub(super) done: Vec<Done>,
    /// Of those the kills of drivers.
    pub(super) killed_drivers: Vec<LostDriver>,
    /// Of those the cuts of machines on which drivers ran.
    pub(super) silenced_drivers: Vec<SilencedDriver>,
    /// Faults that were left out, and why.
    pub(super) left_out: Vec<String>,
    /// Processes that ended without being asked to.
    pub(super) ended: Vec<String>,
}

/// A process of a job.
struct Found {
    name: String,
    target: Target,
    /// Where it is a driver: of which job, and the incarnation of its start.
    driver: Option<(JobId, u64)>,
}

/// What faults are put onto.
pub(super) struct Injector {
    pub(super) cluster: Arc<RealCluster>,
    pub(super) plans: Vec<FaultPlan>,
    pub(super) record: Mutex<Record>,
    pub(super) began: Instant,
    /// The workload's counter, once it is submitted.
    pub(super) counter: Option<JobId>,
    /// The job that trains, while one does.
    pub(super) training_job: Box<dyn Fn() -> Option<JobId> + Send + Sync>,
}

impl Injector {
    /// Does one fault, from its beginning to its end.
    pub(super) async fn inject(&self, planned: &Planned) {
        let outcome = match planned.kind {
            _ if planned.target.is_of_job() => self.hit_job(planned).await,
            _ if planned.target == Victim::Heads => self.black_out(planned).await,
            _ if planned.target == Victim::DriverWorker => self.hit_driver_worker(planned).await,
            FaultKind::RollingRestart => self.rolling_restart(planned).await,
            FaultKind::Notice => self.take_away(planned).await,
            kind => match self.victim(planned).await {
                Some((node, was_leader)) => {
                    let at = self.began.elapsed();
                    let wall = SystemTime::now();
                    self.put(planned, &node)
                        .await
                        .map(|()| self.done(kind, node.name(), was_leader, at, wall))
                }
                None => Err("nobody to hit".to_owned()),
            },
        };
        if let Err(reason) = outcome {
            let line = format!("{planned}: {reason}");
            self.record.lock().left_out.push(line);
        }
    }

    pub(super) fn done(
        &self,
        kind: FaultKind,
        node: &str,
        was_leader: bool,
        at: Duration,
        wall: SystemTime,
    ) {
        self.record.lock().done.push(Done {
            kind,
            node: node.to_owned(),
            was_leader,
            at_ms: millis(at),
            healed_ms: millis(self.began.elapsed()),
            reconciled_ms: None,
            taken: None,
            wall,
        });
    }

    /// A notice, of which it is known what it took where it was given for a job's sake.
    pub(super) fn done_with_notice(
        &self,
        node: &str,
        taken: Option<Taken>,
        at: Duration,
        wall: SystemTime,
    ) {
        self.record.lock().done.push(Done {
            kind: FaultKind::Notice,
            node: node.to_owned(),
            was_leader: false,
            at_ms: millis(at),
            healed_ms: millis(self.began.elapsed()),
            reconciled_ms: None,
            taken,
            wall,
        });
    }

    /// A fault of all heads at once is no loss of a leader: nobody could take over.
    pub(super) fn done_with_all(
        &self,
        kind: FaultKind,
        at: Duration,
        wall: SystemTime,
        reconciled: Duration,
    ) {
        self.record.lock().done.push(Done {
            kind,
            node: "all heads".to_owned(),
            was_leader: false,
            at_ms: millis(at),
            healed_ms: millis(self.began.elapsed()),
            reconciled_ms: Some(millis(reconciled)),
            taken: None,
            wall,
        });
    }

    /// Whom a fault hits, and whether that one leads.
    pub(super) async fn victim(&self, planned: &Planned) -> Option<(Arc<Node>, bool)> {
        let drawn = |nodes: &[Arc<Node>]| {
            let count = u32::try_from(nodes.len()).ok()?;
            let position = planned.pick.checked_rem(count)?;
            nodes.get(position as usize).cloned()
        };
        if planned.target == Victim::Worker {
            return Some((drawn(self.cluster.workers())?, false));
        }
        let leader = self.cluster.leader().await;
        let node = match planned.target {
            // While nobody leads, somebody is hit all the same.
            Victim::Leader => leader.clone().or_else(|| drawn(self.cluster.heads())),
            _ => drawn(self.cluster.heads()),
        }?;
        let was_leader = leader.is_some_and(|leader| leader.name() == node.name());
        Some((node, was_leader))
    }

    /// Does a fault to one machine, from its beginning to its end.
    pub(super) async fn put(&self, planned: &Planned, node: &Arc<Node>) -> Result<(), String> {
        match planned.kind {
            FaultKind::Kill => {
                let _turn = turn(node)?;
                block_in_place(|| node.kill()).map_err(text)?;
                tokio::time::sleep(planned.lasts).await;
                self.start(node).await
            }
            FaultKind::Pause => {
                let _turn = turn(node)?;
                let target = node.target().ok_or("it has no process")?;
                let paused = Target::pause_held(target).map_err(text)?;
                tokio::time::sleep(planned.lasts).await;
                paused.resume();
                Ok(())
            }
            FaultKind::Cut | FaultKind::CutOneWay | FaultKind::Disturb => {
                self.hurt_network(planned, node).await
            }
            FaultKind::FillDisk => {
                let disk = node.disk().ok_or("it has no disk of its own")?;
                block_in_place(|| disk.fill(node.machine())).map_err(text)?;
                tokio::time::sleep(planned.lasts).await;
                block_in_place(|| disk.free(node.machine())).map_err(text)
            }
            FaultKind::FreezeDisk => {
                let disk = node.disk().ok_or("it has no disk of its own")?;
                block_in_place(|| disk.freeze(node.machine(), planned.lasts)).map_err(text)
            }
            FaultKind::ReplaceHead => self.replace(planned, node).await,
            FaultKind::RollingRestart | FaultKind::Notice => {
                unreachable!("has no single victim")
            }
        }
    }

    async fn start(&self, node: &Arc<Node>) -> Result<(), String> {
        node.start().map_err(text)?;
        match node.role() {
            super::node::Role::Head => node.wait_ready().await.map_err(text),
            super::node::Role::Worker => Ok(()),
        }
    }

    /// Both directions between `node` and those that the fault is about.
    fn ways(&self, planned: &Planned, node: &Node) -> Vec<(Ipv4Addr, Ipv4Addr)> {
        let own = node.address();
        let heads = self.cluster.heads().iter();
        let mut peers: Vec<Ipv4Addr> = match planned.peers {
            Peers::Heads => heads.map(|head| head.address()).collect(),
            Peers::Everyone | Peers::Drawn => {
                let nodes = self.cluster.nodes().map(|node| node.address());
                nodes.chain([self.cluster.client_address()]).collect()
            }
        };
        peers.retain(|peer| *peer != own);
        let in_and_out = peers.iter().flat_map(|peer| [(own, *peer), (*peer, own)]);
        let is_out = planned.pick & 0x8000_0000 == 0;
        in_and_out
            .filter(|(source, _)| match planned.kind {
                FaultKind::CutOneWay => (*source == own) == is_out,
                _ => true,
            })
            .collect()
    }

    async fn hurt_network(&self, planned: &Planned, node: &Node) -> Result<(), String> {
        let router = self
            .cluster
            .router()
            .ok_or("there is no network of its own")?;
        let plan = &self.plans[planned.entry];
        let ways = self.ways(planned, node);
        let disturbance = Disturbance {
            loss: plan.loss_percent / 100.0,
            duplicate: plan.duplicate_percent / 100.0,
            delay_ms: plan.delay_ms,
        };
        for (source, target) in &ways {
            match planned.kind {
                FaultKind::Disturb => router.disturb(*source, *target, Some(disturbance.clone())),
                _ => router.cut(*source, *target),
            }
        }
        tokio::time::sleep(planned.lasts).await;
        for (source, target) in &ways {
            match planned.kind {
                FaultKind::Disturb => router.disturb(*source, *target, None),
                _ => router.heal(*source, *target),
            }
        }
        Ok(())
    }

    /// Ends and starts one machine after the other; the next one waits until the group is whole.
    async fn rolling_restart(&self, planned: &Planned) -> Result<(), String> {
        let nodes = match planned.target {
            Victim::Worker => self.cluster.workers(),
            _ => self.cluster.heads(),
        };
        for node in nodes {
            let leader = self.cluster.leader().await;
            let was_leader = leader.is_some_and(|leader| leader.name() == node.name());
            let (at, wall) = (self.began.elapsed(), SystemTime::now());
            {
                let _turn = turn(node)?;
                block_in_place(|| node.end()).map_err(text)?;
                tokio::time::sleep(planned.lasts).await;
                self.start(node).await?;
            }
            self.done(planned.kind, node.name(), was_leader, at, wall);
            self.cluster.wait_for_voters().await.map_err(text)?;
            self.cluster.wait_for_workers().await.map_err(text)?;
        }
        Ok(())
    }

    /// Takes a head out of the group, and lets it come back with nothing.
    async fn replace(&self, planned: &Planned, node: &Arc<Node>) -> Result<(), String> {
        let _turn = turn(node)?;
        let members = self.cluster.members().await.ok_or("nobody leads")?;
        let member = members.heads.iter().find(|head| head.name == node.name());
        let raft_id = member.ok_or("it is no member")?.raft_id;
        let mut attempt = 0;
        loop {
            attempt += 1;
            let asked = self
                .cluster
                .admin()
                .control()
                .read("remove a head", |mut api| async move {
                    api.remove_head(RemoveHeadRequest { raft_id }).await
                });
            match asked.await {
                Ok(_) => break,
                Err(error) if attempt == REMOVE_ATTEMPTS => return Err(error.to_string()),
                Err(_) => {}
            }
        }
        // A head that was removed ends by itself.
        block_in_place(|| node.wait_for_end()).map_err(text)?;
        tokio::time::sleep(planned.lasts).await;
        block_in_place(|| node.wipe()).map_err(text)?;
        let config = self.cluster.config_file();
        let joined = self.cluster.join_head(node, config.as_deref()).await;
        joined.map_err(text)?;
        self.cluster.wait_for_voters().await.map_err(text)
    }

    /// Kills or stops a process of a job, wherever that is now. The platform starts it again.
    async fn hit_job(&self, planned: &Planned) -> Result<(), String> {
        let found = found(|| self.job_process(planned));
        let Found {
            name,
            target,
            driver,
        } = found.await.ok_or("it does not run")?;
        let (at, wall) = (self.began.elapsed(), SystemTime::now());
        if planned.kind == FaultKind::Pause {
            let paused = Target::pause_held(Arc::new(target)).map_err(text)?;
            tokio::time::sleep(planned.lasts).await;
            paused.resume();
        } else {
            target.kill().map_err(text)?;
            let killed = driver.map(|(job, incarnation)| LostDriver {
                job,
                incarnation,
                at_ms: millis(at),
                wall,
            });
            self.record.lock().killed_drivers.extend(killed);
        }
        self.done(planned.kind, &name, false, at, wall);
        Ok(())
    }

    async fn job_process(&self, planned: &Planned) -> Option<Found> {
        let (job, type_name) = match planned.target {
            Victim::Trainer => ((self.training_job)()?, "mobula.trainer"),
            Victim::Driver => ((self.training_job)()?, "driver"),
            _ => (self.counter?, ""),
        };
        let mut actors = self.cluster.admin().list_actors(Some(job)).await.ok()?;
        actors.retain(|actor| {
            let is_meant = match planned.target {
                Victim::Counter => actor.name == "counter",
                _ => actor.type_name == type_name,
            };
            is_meant && actor.state == "running"
        });
        let position = planned
            .pick
            .checked_rem(u32::try_from(actors.len()).ok()?)?;
        let actor = actors.get(position as usize)?;
        let target = Target::running(actor.pid?).ok()?;
        let (name, driver) = match planned.target {
            Victim::Driver => ("driver".to_owned(), Some((job, actor.incarnation?))),
            _ => (actor.name.clone(), None),
        };
        // A number may have been given to somebody else meanwhile: only a process of this run is hit.
        is_of_run(target.pid(), self.cluster.dir()).then_some(Found {
            name,
            target,
            driver,
        })
    }

    /// Starts again whoever ended without being asked to, as a machine's supervisor does.
    pub(super) async fn supervise(&self) {
        loop {
            for node in self.cluster.nodes() {
                let Ok(_turn) = turn(node) else { continue };
                if let Some(status) = node.ended() {
                    let line = format!(
                        "{} ended by itself ({status}): {}",
                        node.name(),
                        node.last_lines()
                    );
                    self.record.lock().ended.push(line);
                }
                if !node.is_alive() {
                    // It may fail again, say on a full disk: the next look tries once more.
                    let _ = self.start(node).await;
                }
            }
            tokio::time::sleep(WATCH_INTERVAL).await;
        }
    }
}

/// The right to handle a node's process; refused while another fault has it.
pub(super) fn turn(node: &Node) -> Result<tokio::sync::OwnedMutexGuard<()>, String> {
    Arc::clone(&node.turn)
        .try_lock_owned()
        .map_err(|_| format!("{} is being handled by another fault", node.name()))
}

/// What is looked for of a job, as soon as it is there; `None` if it does not come.
pub(super) async fn found<T, F>(look: impl Fn() -> F) -> Option<T>
where
    F: Future<Output = Option<T>>,
{
    let looking = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(WATCH_INTERVAL).await;
        }
    };
    tokio::time::timeout(JOB_PROCESS_MAX, looking).await.ok()
}

pub(super) fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
