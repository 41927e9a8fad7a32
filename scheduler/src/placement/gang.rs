//! Placing several actors all or nothing.
//!
//! The largest member chooses first, which finds a place for all in most cases where there is one;
//! finding it in all cases is bin packing. A gang that does not fit leaves no reservation behind.

use std::cmp::Reverse;

use mobula_core::ActorId;

use super::{Nodes, Request};
use crate::command::Assignment;

/// The member of a gang for which there was no node left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NoPlace {
    pub(crate) actor: ActorId,
    /// How many members had one before it.
    pub(crate) placed: usize,
}

/// Decides for all of `requests`, and reserves; or changes nothing.
pub(crate) fn place(nodes: &mut Nodes, requests: &[Request]) -> Result<Vec<Assignment>, NoPlace> {
    let mark = nodes.mark();
    let mut assignments = Vec::with_capacity(requests.len());
    for request in largest_first(requests) {
        let Some(assignment) = nodes.place(request) else {
            nodes.undo_to(mark);
            return Err(NoPlace {
                actor: request.actor,
                placed: assignments.len(),
            });
        };
        assignments.push(assignment);
    }
    Ok(assignments)
}

fn largest_first(requests: &[Request]) -> Vec<&Request> {
    let mut order: Vec<&Request> = requests.iter().collect();
    order.sort_by_key(|request| {
        let resources = &request.resources;
        let size = (
            resources.gpu_milli,
            resources.cpu_milli,
            resources.memory_bytes,
        );
        (Reverse(size), request.actor)
    });
    order
}
