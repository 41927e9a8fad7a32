//! Which workers have an ingress: those that were told to, by two labels that the command line sets. The actor on each
//! is pinned to its worker by one of them, and asks for the address in the other when it starts, so that a worker that
//! is started again with another address needs nobody to change anything.

use mobula_core::control::{Proposal, Reader};
use mobula_core::label::Requirement;
use mobula_core::resource::Resources;
use mobula_core::spec::ActorSpec;
use mobula_scheduler::{NodeView, Query, QueryResponse};

use super::actor::Ingress;
use crate::serving::controller::{LIGHT_CPU_MILLI, create, living, spec_of, stop};

/// Of a worker with an ingress: where that listens, `ip:port`.
pub const ADDRESS_LABEL: &str = "ingress";

/// Of a worker with an ingress: its own name, so that the ingress can be pinned to it.
pub const NODE_LABEL: &str = "ingress-node";

/// The name of a worker's ingress.
#[must_use]
pub fn ingress_name(node: &str) -> String {
    format!("serving/ingress/{node}")
}

fn nodes(reader: &dyn Reader) -> Vec<NodeView> {
    match mobula_scheduler::answer(reader, 0, Query::ListNodes) {
        Ok(QueryResponse::Nodes(nodes)) => nodes,
        _ => Vec::new(),
    }
}

/// Where the ingress of this worker shall listen, if it shall have one.
pub(in crate::serving) fn address_of(reader: &dyn Reader, node: &str) -> Option<String> {
    let node = nodes(reader).into_iter().find(|known| known.name == node)?;
    wanted_at(&node).map(str::to_owned)
}

fn wanted_at(node: &NodeView) -> Option<&str> {
    let is_named = node.labels.get(NODE_LABEL) == Some(&node.name);
    let address = node.labels.get(ADDRESS_LABEL)?;
    (is_named && node.state != "lost").then_some(address)
}

/// Gives each worker that shall have one its ingress, and ends those of the others.
pub(in crate::serving) fn reconcile(reader: &dyn Reader) -> Vec<Proposal> {
    let (wanted, others): (Vec<NodeView>, Vec<NodeView>) = nodes(reader)
        .into_iter()
        .partition(|node| wanted_at(node).is_some());
    let specs = wanted.iter().map(|node| spec(&node.name)).collect();
    let others: Vec<String> = others.iter().map(|node| ingress_name(&node.name)).collect();
    let mut proposals = create(reader, specs);
    // A lost worker's is ended too: nothing else would forget it if the worker never came back.
    if others.iter().any(|name| living(reader, name).is_some()) {
        proposals.extend(stop(reader, &others));
    }
    proposals
}

fn spec(node: &str) -> ActorSpec {
    let mut spec = spec_of(
        Ingress::new(node.to_owned()),
        ingress_name(node),
        LIGHT_CPU_MILLI,
    );
    // A process of its own: what kills a router must not close the door of all others.
    spec.isolated = true;
    spec.resources = Resources::cpu_milli(LIGHT_CPU_MILLI);
    let is_there = Requirement::In(NODE_LABEL.to_owned(), vec![node.to_owned()]);
    spec.placement.selector = vec![is_there];
    spec
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
