//! Whether an actor may go to a node, and the first reason why not.
//!
//! Invariant: the pass, the command that carries its decisions out, and `explain` all ask here, so
//! they never disagree.

use std::fmt;

use mobula_core::label::{Requirement, first_unmet};
use mobula_core::resource::{Milli, Shortfall};

use super::gpu::{self, GpuShare};
use super::{NodeSnapshot, Request};

/// Why an actor may not go to a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Unfit {
    Lost,
    Draining,
    Noticed {
        deadline_ms: u64,
        source: String,
    },
    Selector(Requirement),
    /// More than the node has when it is empty.
    TooSmall(Vec<Shortfall>),
    /// More than is free now.
    Full(Vec<Shortfall>),
    /// Enough of GPUs in sum, but not in the form asked for.
    GpuFragmented {
        asked_milli: u64,
        free_milli: Vec<u64>,
    },
    Spread {
        key: String,
    },
}

/// How far a node is from taking an actor, nearest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Distance {
    /// Waiting for other actors to end can help.
    MayPass,
    /// Somebody may end the draining.
    Draining,
    /// Its agent may withdraw the notice.
    Noticed,
    /// Not as the node is.
    Never,
}

impl Unfit {
    /// A short stable word for metrics.
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Unfit::Lost => "lost",
            Unfit::Draining => "draining",
            Unfit::Noticed { .. } => "noticed",
            Unfit::Selector(_) => "selector",
            Unfit::TooSmall(_) => "too_small",
            Unfit::Full(_) => "full",
            Unfit::GpuFragmented { .. } => "gpu_fragmented",
            Unfit::Spread { .. } => "spread",
        }
    }

    pub(crate) fn distance(&self) -> Distance {
        match self {
            Unfit::Full(_) | Unfit::GpuFragmented { .. } | Unfit::Spread { .. } => {
                Distance::MayPass
            }
            Unfit::Draining => Distance::Draining,
            Unfit::Noticed { .. } => Distance::Noticed,
            Unfit::Lost | Unfit::Selector(_) | Unfit::TooSmall(_) => Distance::Never,
        }
    }
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unfit::Lost => f.write_str("the node is lost"),
            Unfit::Draining => f.write_str("the node is draining"),
            Unfit::Noticed {
                deadline_ms,
                source,
            } => {
                write!(
                    f,
                    "the node has notice ({source}) to be gone at {deadline_ms} ms"
                )
            }
            Unfit::Selector(requirement) => {
                write!(f, "its labels do not meet the selector `{requirement}`")
            }
            Unfit::TooSmall(shortfalls) => {
                write!(f, "too small even when empty: {}", Listed(shortfalls))
            }
            Unfit::Full(shortfalls) => write!(f, "not enough free: {}", Listed(shortfalls)),
            Unfit::GpuFragmented {
                asked_milli,
                free_milli,
            } => {
                let free: Vec<String> = free_milli
                    .iter()
                    .map(|free| Milli(*free).to_string())
                    .collect();
                write!(
                    f,
                    "gpu: asks {} as {}, free of each device: {}",
                    Milli(*asked_milli),
                    if *asked_milli < gpu::WHOLE_MILLI {
                        "one share"
                    } else {
                        "whole devices"
                    },
                    free.join(", ")
                )
            }
            Unfit::Spread { key } => {
                write!(f, "an actor with spread key `{key}` is there already")
            }
        }
    }
}

struct Listed<'a>(&'a [Shortfall]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, shortfall) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}{shortfall}")?;
        }
        Ok(())
    }
}

/// The GPUs that `request` would get on `node`, or the first reason why it may not go there. What
/// can never change comes first.
pub(crate) fn check(node: &NodeSnapshot, request: &Request) -> Result<Vec<GpuShare>, Unfit> {
    if node.lost {
        return Err(Unfit::Lost);
    }
    if let Some(requirement) = first_unmet(&request.placement.selector, &node.labels) {
        return Err(Unfit::Selector(requirement.clone()));
    }
    let too_small = node.capacity.shortfalls(&request.resources);
    if !too_small.is_empty() {
        return Err(Unfit::TooSmall(too_small));
    }
    if let Some(notice) = &node.notice {
        let (deadline_ms, source) = (notice.deadline_ms, notice.source.clone());
        return Err(Unfit::Noticed {
            deadline_ms,
            source,
        });
    }
    if node.draining {
        return Err(Unfit::Draining);
    }
    if let Some(spread) = &request.placement.spread_key
        && spread.strict
        && node.spread_count(request) > 0
    {
        return Err(Unfit::Spread {
            key: spread.key.clone(),
        });
    }
    let full = node.free.shortfalls(&request.resources);
    if !full.is_empty() {
        return Err(Unfit::Full(full));
    }
    let asked_milli = request.resources.gpu_milli;
    gpu::allocate(&node.gpu_free_milli, asked_milli).ok_or_else(|| Unfit::GpuFragmented {
        asked_milli,
        free_milli: node.gpu_free_milli.clone(),
    })
}
