//! Where pending actors go: filter the nodes on which an actor fits, score them, take the best.
//!
//! A pass reads the tables and returns one `Assign` command; applying it checks everything again
//! with the same filter, so a decision that was overtaken is skipped, not wrong.
//!
//! Invariants:
//! 1. Equal tables give equal decisions: nodes are visited in order of their ids, and the lowest
//!    id wins a tie.
//! 2. First come, first served: by the time from which an actor may be placed, then by its id. One
//!    that does not fit does not hold up those behind it.
//! 3. Work is bounded: a pass asks nodes [`PASS_CHECKS`] times, and ends after [`PASS_ASSIGNMENTS`]
//!    decisions (a gang is never cut in two, so it may go over by one gang). Of many actors that
//!    want the same in vain one is asked for, so that they do not hide who comes after them.
//! 4. The pending members of a gang get nodes together or not at all.

pub(crate) mod filter;
pub(crate) mod gang;
pub mod gpu;
pub(crate) mod score;

use std::collections::{BTreeMap, BTreeSet};

use mobula_core::codec;
use mobula_core::control::Reader;
use mobula_core::label::Labels;
use mobula_core::mutant::{Mutant, is_planted};
use mobula_core::spec::PlacementPolicy;
use mobula_core::{ActorId, GroupId, Incarnation, JobId, NodeId, Resources};

use crate::command::{Assignment, Command};
use crate::limits::{PASS_ASSIGNMENTS, PASS_CHECKS};
use crate::state::actor::{self, ActorRow, ActorState};
use crate::state::group;
use crate::state::lease::{self, CountedKey, KeyKind};
use crate::state::lifecycle;
use crate::state::node::{self, Notice};
use gpu::GpuShare;

/// What an actor asks of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) actor: ActorId,
    pub(crate) job: JobId,
    pub(crate) resources: Resources,
    pub(crate) placement: PlacementPolicy,
}

impl Request {
    pub(crate) fn of(actor: &ActorRow) -> Self {
        Request {
            actor: actor.id,
            job: actor.job,
            resources: actor.resources.clone(),
            placement: actor.placement.clone(),
        }
    }

    fn affinity(&self) -> Option<CountedKey> {
        let key = self.placement.affinity_key.clone()?;
        Some((KeyKind::Affinity, self.job, key))
    }

    fn spread(&self) -> Option<CountedKey> {
        let key = self.placement.spread_key.as_ref()?.key.clone();
        Some((KeyKind::Spread, self.job, key))
    }

    /// Everything on which it depends whether a node takes this (see [`filter::check`]), as a key:
    /// where one is refused, all that are alike are.
    fn kind(&self) -> Vec<u8> {
        let spread = self.placement.spread_key.as_ref();
        let strict = spread.filter(|spread| spread.strict);
        let apart = strict.map(|spread| (self.job, &spread.key));
        codec::encode_plain(&(&self.resources, &self.placement.selector, apart))
    }
}

/// A node as a pass sees it: what it has left, and who is there.
#[derive(Debug, Clone)]
pub(crate) struct NodeSnapshot {
    pub(crate) id: NodeId,
    pub(crate) name: String,
    pub(crate) incarnation: Incarnation,
    pub(crate) lost: bool,
    pub(crate) notice: Option<Notice>,
    pub(crate) draining: bool,
    pub(crate) labels: Labels,
    pub(crate) capacity: Resources,
    pub(crate) free: Resources,
    /// What is free of each GPU, in thousandths.
    pub(crate) gpu_free_milli: Vec<u64>,
    pub(crate) actor_count: u32,
    by_key: BTreeMap<CountedKey, u32>,
}

impl NodeSnapshot {
    pub(crate) fn load(reader: &dyn Reader, row: node::NodeRow) -> Self {
        let usage = lease::usage(reader, row.id);
        let mut gpu_free_milli = gpu::devices(&row.capacity);
        for (free, used) in gpu_free_milli.iter_mut().zip(&usage.gpu_milli) {
            *free -= used;
        }
        let free = row.capacity.minus(&usage.resources);
        NodeSnapshot {
            id: row.id,
            name: row.name,
            incarnation: row.incarnation,
            lost: row.lost_ms.is_some(),
            notice: row.notice,
            draining: row.draining,
            labels: row.labels,
            gpu_free_milli,
            free: free.expect("what is leased was checked against the capacity"),
            capacity: row.capacity,
            actor_count: usage.actors,
            by_key: lease::usage_by_key(reader, row.id, &usage)
                .into_iter()
                .collect(),
        }
    }

    fn take(
        &mut self,
        resources: &Resources,
        gpus: &[GpuShare],
        keys: impl Iterator<Item = CountedKey>,
    ) {
        self.free = self
            .free
            .minus(resources)
            .expect("what is leased was checked against what was free");
        for share in gpus {
            let device = usize::try_from(share.device).expect("a device number is small");
            self.gpu_free_milli[device] -= u64::from(share.milli);
        }
        self.actor_count += 1;
        for key in keys {
            *self.by_key.entry(key).or_default() += 1;
        }
    }

    /// How many actors here share the request's affinity key.
    pub(crate) fn affinity_count(&self, request: &Request) -> u32 {
        self.count(request.affinity())
    }

    /// How many actors here share the request's spread key.
    pub(crate) fn spread_count(&self, request: &Request) -> u32 {
        self.count(request.spread())
    }

    fn count(&self, key: Option<CountedKey>) -> u32 {
        key.and_then(|key| self.by_key.get(&key).copied())
            .unwrap_or(0)
    }
}

/// The nodes of a pass, with what the pass itself has already given away; reservations can be
/// undone, for gangs that turn out not to fit.
#[derive(Debug, Default)]
pub(crate) struct Nodes {
    nodes: BTreeMap<NodeId, NodeSnapshot>,
    before: Vec<NodeSnapshot>,
}

impl Nodes {
    pub(crate) fn load_all(reader: &dyn Reader) -> Self {
        let nodes = node::all(reader).map(|row| (row.id, NodeSnapshot::load(reader, row)));
        Nodes {
            nodes: nodes.collect(),
            before: Vec::new(),
        }
    }

    pub(crate) fn load(reader: &dyn Reader, ids: impl Iterator<Item = NodeId>) -> Self {
        let ids: BTreeSet<NodeId> = ids.collect();
        let rows = ids.into_iter().filter_map(|id| node::load(reader, id));
        let nodes = rows.map(|row| (row.id, NodeSnapshot::load(reader, row)));
        Nodes {
            nodes: nodes.collect(),
            before: Vec::new(),
        }
    }

    pub(crate) fn count(&self) -> usize {
        self.nodes.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &NodeSnapshot> {
        self.nodes.values()
    }

    /// Remembers the present state for [`Nodes::undo_to`].
    pub(crate) fn mark(&self) -> usize {
        self.before.len()
    }

    /// Takes back every reservation since `mark`.
    pub(crate) fn undo_to(&mut self, mark: usize) {
        for snapshot in self.before.drain(mark..).rev() {
            self.nodes.insert(snapshot.id, snapshot);
        }
    }

    /// Reserves what `request` asks for on one node; says why not otherwise.
    pub(crate) fn reserve(
        &mut self,
        id: NodeId,
        incarnation: Option<Incarnation>,
        request: &Request,
    ) -> Result<Vec<GpuShare>, String> {
        let node = self
            .nodes
            .get_mut(&id)
            .ok_or_else(|| format!("{id} is not known"))?;
        if incarnation.is_some_and(|incarnation| incarnation != node.incarnation) {
            return Err(format!("{id} was started again since"));
        }
        let gpus = filter::check(node, request).map_err(|unfit| format!("{id}: {unfit}"))?;
        self.before.push(node.clone());
        let keys = request.affinity().into_iter().chain(request.spread());
        if !is_planted(Mutant::ResourcesNotTaken) {
            node.take(&request.resources, &gpus, keys);
        }
        Ok(gpus)
    }

    /// The best node for `request`, which is reserved on it.
    pub(crate) fn place(&mut self, request: &Request) -> Option<Assignment> {
        let fitting = self
            .nodes
            .values()
            .filter(|node| filter::check(node, request).is_ok());
        let best = fitting.min_by_key(|node| (score::score(node, request), node.id))?;
        let (node, node_incarnation) = (best.id, best.incarnation);
        self.reserve(node, None, request)
            .expect("the node was just found to take it");
        Some(Assignment {
            actor: request.actor,
            node,
            node_incarnation,
        })
    }
}

/// Decides where pending actors go. `None` when nothing can be placed now; otherwise an `Assign`
/// to propose, after which another pass may find more.
#[must_use]
pub fn placement_pass(reader: &dyn Reader, now_ms: u64) -> Option<Command> {
    let mut due = lifecycle::pending(reader)
        .take_while(|(from_ms, _)| *from_ms <= now_ms)
        .peekable();
    due.peek()?;
    let mut nodes = Nodes::load_all(reader);
    let asked_max = PASS_CHECKS / nodes.count().max(1);
    let mut asked = 0;
    let mut assignments = Vec::new();
    let mut hopeless: BTreeSet<Vec<u8>> = BTreeSet::new();
    let mut groups_seen: BTreeSet<GroupId> = BTreeSet::new();
    for (_, id) in due {
        if assignments.len() >= PASS_ASSIGNMENTS || asked >= asked_max {
            break;
        }
        let actor = actor::load(reader, id).expect("the list of pending actors names rows");
        let members = match actor.group {
            None => vec![actor],
            Some(group) if groups_seen.insert(group) => ready_members(reader, group, now_ms),
            Some(_) => continue,
        };
        let requests: Vec<Request> = members.iter().map(Request::of).collect();
        // Nodes only fill up during a pass, so what did not fit does not fit later in it either.
        if requests.iter().any(|one| hopeless.contains(&one.kind())) {
            continue;
        }
        asked += requests.len();
        match gang::place(&mut nodes, &requests) {
            Ok(placed) => assignments.extend(placed),
            // The first to find no place did so on nodes that others may have filled for nothing.
            Err(no_place) if no_place.placed > 0 => {}
            Err(no_place) => {
                let lacking = requests.iter().find(|one| one.actor == no_place.actor);
                hopeless.extend(lacking.map(Request::kind));
            }
        }
    }
    (!assignments.is_empty()).then_some(Command::Assign { assignments })
}

/// The pending members of a gang; none as long as one of them must wait.
fn ready_members(reader: &dyn Reader, id: GroupId, now_ms: u64) -> Vec<ActorRow> {
    let group = group::load(reader, id).expect("a group is kept as long as one member lives");
    let members = group::pending_members(reader, &group);
    let waits = |actor: &ActorRow| match actor.state {
        ActorState::Pending { not_before_ms, .. } => not_before_ms > now_ms,
        _ => false,
    };
    if members.iter().any(waits) {
        return Vec::new();
    }
    members
}
