//! Machines that the cloud takes away after a notice, and gives back.
//!
//! Invariant: a notice that is given for a job's sake comes while the job trains and every worker is there, so that
//! it hits something and there is somewhere to go.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use mobula_wire::control::{Actor, ListNodesRequest, PreemptNodeRequest};
use serde::Serialize;
use tokio::task::block_in_place;
use tokio::time::Instant;

use super::fault_plan::Victim;
use super::injector::{Injector, millis, text, turn};
use super::node::Node;
use super::timeline::Planned;

/// How long it may take until a job trains: one may just have ended, or have lost all its machines.
const TRAINS_MAX: Duration = Duration::from_secs(60);

/// How often is looked whether one does.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);

/// The type of a trainer, as the head lists it.
const TRAINER: &str = "mobula.trainer";

/// What of the job that trains ran on machines whose end was announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Taken {
    /// How many machines.
    pub machines: usize,
    /// How many of its trainers ran there.
    pub trainers: usize,
    /// How many ran elsewhere.
    pub trainers_elsewhere: usize,
    /// Whether its driver ran there.
    pub driver: bool,
}

/// What of a job runs on one machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Share {
    trainers: usize,
    driver: bool,
}

/// What of a job runs where, by the workers' names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Aboard(BTreeMap<String, Share>);

impl Aboard {
    /// Of the actors those that run and train or drive, on nodes of these names.
    fn of(actors: &[Actor], names: &BTreeMap<u64, String>) -> Self {
        let mut aboard = Aboard::default();
        for actor in actors.iter().filter(|actor| actor.state == "running") {
            let Some(name) = actor.node.and_then(|node| names.get(&node)) else {
                continue;
            };
            let (trains, drives) = (actor.type_name == TRAINER, actor.type_name == "driver");
            if trains || drives {
                let share = aboard.0.entry(name.clone()).or_default();
                share.trainers += usize::from(trains);
                share.driver |= drives;
            }
        }
        aboard
    }

    fn trains(&self) -> bool {
        self.0.values().any(|share| share.trainers > 0)
    }

    /// The machine that a draw means.
    fn drawn(&self, pick: u32) -> Option<&str> {
        let position = pick.checked_rem(u32::try_from(self.0.len()).ok()?)?;
        self.0.keys().nth(position as usize).map(String::as_str)
    }

    fn drives(&self, name: &str) -> bool {
        self.0.get(name).is_some_and(|share| share.driver)
    }

    /// What is taken with these machines.
    fn taken(&self, names: &[&str]) -> Taken {
        let shares = names.iter().filter_map(|name| self.0.get(*name));
        let trainers = shares.map(|share| share.trainers).sum();
        let all: usize = self.0.values().map(|share| share.trainers).sum();
        Taken {
            machines: names.len(),
            trainers,
            trainers_elsewhere: all - trainers,
            driver: names.iter().any(|name| self.drives(name)),
        }
    }
}

impl Injector {
    /// Announces that machines will be taken away, takes them when the time is over, and gives them back.
    pub(super) async fn take_away(&self, planned: &Planned) -> Result<(), String> {
        let (nodes, taken) = self.doomed(planned).await?;
        let turns: Result<Vec<_>, _> = nodes.iter().map(|node| turn(node)).collect();
        let turns = turns?;
        let (at, wall) = (self.began.elapsed(), SystemTime::now());
        let end = Instant::now() + planned.lasts;
        let announced = tokio::time::timeout_at(end, self.announce(&nodes, end)).await;
        // Where nobody leads the cloud takes the machines all the same.
        let mut outcome = announced.unwrap_or_else(|_| Err("nobody heard of it".into()));
        tokio::time::sleep_until(end).await;
        let mut gone = Vec::new();
        for node in &nodes {
            match block_in_place(|| node.kill()) {
                Ok(()) => gone.push(node),
                Err(error) => outcome = outcome.and(Err(text(error))),
            }
        }
        for node in gone {
            outcome = outcome.and(node.start().map_err(text));
        }
        drop(turns);
        outcome?;
        let is_of_a_job = taken.is_some();
        let name = match nodes.as_slice() {
            [node] => node.name(),
            _ => "all workers",
        };
        self.done_with_notice(name, taken, at, wall);
        if is_of_a_job {
            // The next notice finds a cluster that is whole again.
            self.cluster.wait_for_workers().await.map_err(text)?;
        }
        Ok(())
    }

    /// Whose machines go, the driver's last, and what of the job that trains they take along where they are chosen
    /// by it.
    async fn doomed(&self, planned: &Planned) -> Result<(Vec<Arc<Node>>, Option<Taken>), String> {
        if planned.target == Victim::Worker {
            let (node, _) = self.victim(planned).await.ok_or("nobody to hit")?;
            return Ok((vec![node], None));
        }
        let aboard = tokio::time::timeout(TRAINS_MAX, async {
            loop {
                match self.aboard().await {
                    Some(aboard) if aboard.trains() => return aboard,
                    _ => tokio::time::sleep(LOOK_INTERVAL).await,
                }
            }
        });
        let aboard = aboard.await.map_err(|_| "nothing trains")?;
        let workers = self.cluster.workers().iter();
        let drawn = aboard.drawn(planned.pick);
        let is_meant =
            |node: &&Arc<Node>| planned.target == Victim::Workers || drawn == Some(node.name());
        let mut nodes: Vec<Arc<Node>> = workers.filter(is_meant).cloned().collect();
        // A trainer of which its driver does not know that it goes as well would be left the job.
        nodes.sort_by_key(|node| aboard.drives(node.name()));
        let names: Vec<&str> = nodes.iter().map(|node| node.name()).collect();
        let taken = aboard.taken(&names);
        Ok((nodes, Some(taken)))
    }

    /// What runs where of the job under way; `None` while there is none, or nobody says.
    async fn aboard(&self) -> Option<Aboard> {
        let job = (self.training_job)()?;
        let names = self.node_names().await?;
        let actors = self.cluster.admin().list_actors(Some(job)).await.ok()?;
        Some(Aboard::of(&actors, &names))
    }

    /// The workers' names, by the ids of their nodes; `None` where nobody says.
    pub(super) async fn node_names(&self) -> Option<BTreeMap<u64, String>> {
        let control = self.cluster.admin().control();
        let nodes = control.read("list nodes", |mut api| async move {
            api.list_nodes(ListNodesRequest {}).await
        });
        let nodes = nodes.await.ok()?.nodes.into_iter();
        Some(nodes.map(|node| (node.id, node.name)).collect())
    }

    /// Tells the cluster of each of these nodes that its machine will be taken away at `end`.
    async fn announce(&self, nodes: &[Arc<Node>], end: Instant) -> Result<(), String> {
        let control = self.cluster.admin().control();
        let mut outcome = Ok(());
        for node in nodes {
            let grace_ms = millis(end.saturating_duration_since(Instant::now()));
            let announced = control.mutate("announce a preemption", |mut api, stamp| {
                let request = PreemptNodeRequest {
                    stamp: Some(stamp),
                    node: 0,
                    name: node.name().to_owned(),
                    grace_ms,
                };
                async move { api.preempt_node(request).await }
            });
            outcome = outcome.and(announced.await.map(|_| ()).map_err(text));
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn actor(type_name: &str, state: &str, node: Option<u64>) -> Actor {
        Actor {
            type_name: type_name.to_owned(),
            state: state.to_owned(),
            node,
            ..Actor::default()
        }
    }

    #[test]
    fn what_a_notice_takes_is_what_runs_there() {
        let name = |id: u64| (id, format!("worker-{id}"));
        let names: BTreeMap<u64, String> = [1, 2, 3].map(name).into();
        let actors = [
            actor("driver", "running", Some(2)),
            actor(TRAINER, "running", Some(2)),
            actor(TRAINER, "running", Some(3)),
            actor(TRAINER, "pending", None),
            actor(TRAINER, "stopping", Some(1)),
            actor("another", "running", Some(1)),
            // Of a node that is forgotten.
            actor(TRAINER, "running", Some(9)),
        ];
        let aboard = Aboard::of(&actors, &names);
        assert!(aboard.trains());
        let taken = |machines, trainers, trainers_elsewhere, driver| Taken {
            machines,
            trainers,
            trainers_elsewhere,
            driver,
        };
        assert_eq!(aboard.taken(&["worker-1"]), taken(1, 0, 2, false));
        assert_eq!(aboard.taken(&["worker-2"]), taken(1, 1, 1, true));
        assert_eq!(aboard.taken(&["worker-3"]), taken(1, 1, 1, false));
        let all = ["worker-1", "worker-2", "worker-3"];
        assert_eq!(aboard.taken(&all), taken(3, 2, 0, true));
        // Only machines on which something of the job runs are drawn.
        let drawn: Vec<_> = (0..4).map(|pick| aboard.drawn(pick).unwrap()).collect();
        assert_eq!(drawn, ["worker-2", "worker-3", "worker-2", "worker-3"]);
        let nothing = Aboard::of(&actors[3..6], &names);
        assert!(!nothing.trains() && nothing.drawn(0).is_none());
    }
}
