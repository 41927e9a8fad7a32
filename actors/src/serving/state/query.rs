//! What is asked of the endpoints' tables, and the answers.

use mobula_core::codec;
use mobula_core::control::Reader;
use mobula_core::error::Rejection;
use serde::{Deserialize, Serialize};

use super::{Endpoint, endpoints, find};
use crate::serving::access::state as access;
use crate::serving::autoscaler::{Scaling, state as scaling};
use crate::serving::cache::{CacheSetting, setting as cache};
use crate::serving::experiment::{Experiment, state as experiment};
use crate::serving::graph::state as graph;
use crate::serving::ingress::plan::address_of;
use crate::serving::rollout::plan::Cleanup;
use crate::serving::rollout::{Rollout, state as rollout};
use crate::serving::sentinels::state as sentinels;
use crate::serving::shadow;

/// A question. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Query {
    /// All endpoints, by name. Answer: `Vec<Endpoint>`.
    List,
    /// One endpoint. Answer: [`Endpoint`].
    Endpoint {
        /// Its name.
        endpoint: String,
    },
    /// What an endpoint's router must do. Answer: [`Routing`].
    Routing {
        /// Its name.
        endpoint: String,
    },
    /// The rollouts of an endpoint that are kept, oldest first. Answer: `Vec<Rollout>`.
    Rollouts {
        /// Its name.
        endpoint: String,
    },
    /// All that an endpoint's router goes by. Answer: [`Steered`].
    Steered {
        /// Its name.
        endpoint: String,
    },
    /// The experiments of an endpoint that are kept, oldest first. Answer: `Vec<Experiment>`.
    Experiments {
        /// Its name.
        endpoint: String,
    },
    /// Who may ask an endpoint, and its rules. Answer: [`access::Access`].
    Access {
        /// Its name.
        endpoint: String,
    },
    /// What the doors of the cluster must know. Answer: [`access::Doors`].
    Doors {
        /// The revision that the asker knows; 0 if none.
        known: u64,
    },
    /// All graphs, by name. Answer: `Vec<graph::Graph>`.
    Graphs,
    /// Where the ingress of a worker shall listen. Answer: `Option<String>`, as the worker was told.
    Ingress {
        /// The worker's name.
        node: String,
    },
    /// How the candidates of an endpoint's rollouts are shadowed, by the rollout's number. Answer:
    /// `Vec<(u64, shadow::Plan)>`.
    Shadows {
        /// Its name.
        endpoint: String,
    },
    /// What was counted of the step that an endpoint's newest rollout is at. Answer: `Option<Progress>`.
    Progress {
        /// Its name.
        endpoint: String,
    },
    /// How far the sentinels are answered of the version beside the active one, while there is one. Answer:
    /// `Option<sentinels::Asked>`.
    Sentinels {
        /// Its name.
        endpoint: String,
    },
}

/// An endpoint with its newest rollout, how it is scaled, and how it keeps answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Routing {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// Its newest rollout, if it had one.
    pub rollout: Option<Rollout>,
    /// How it is scaled.
    pub scaling: Scaling,
    /// How it keeps answers; none if it keeps none.
    pub cache: Option<CacheSetting>,
}

/// All that a router goes by.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Steered {
    /// The endpoint, its newest rollout, and how it is scaled.
    pub routing: Routing,
    /// Its newest experiment, if it had one.
    pub experiment: Option<Experiment>,
    /// How the candidate of the rollout is shadowed at its first step, if it is.
    pub shadow: Option<shadow::Plan>,
}

impl Steered {
    /// Whether another version than the active one answers, or its replicas have not ended.
    #[must_use]
    pub fn is_changing(&self) -> bool {
        let rollout = self.routing.rollout.as_ref();
        let experiment = self.experiment.as_ref();
        rollout.is_some_and(|rollout| rollout.cleanup != Cleanup::Done)
            || experiment.is_some_and(|experiment| experiment.cleanup != Cleanup::Done)
    }
}

fn routing(reader: &dyn Reader, name: &str) -> Result<Routing, Rejection> {
    let endpoint = find(reader, name)?;
    Ok(Routing {
        rollout: rollout::newest(reader, &endpoint.name),
        scaling: scaling::find(reader, &endpoint),
        cache: cache::find(reader, &endpoint.name),
        endpoint,
    })
}

/// Answers a question from the tables.
pub(super) fn answer(reader: &dyn Reader, query: Query) -> Result<Vec<u8>, Rejection> {
    Ok(match query {
        Query::List => codec::encode_plain(&endpoints(reader)),
        Query::Endpoint { endpoint } => codec::encode_plain(&find(reader, &endpoint)?),
        Query::Routing { endpoint } => codec::encode_plain(&routing(reader, &endpoint)?),
        Query::Rollouts { endpoint } => {
            find(reader, &endpoint)?;
            codec::encode_plain(&rollout::history(reader, &endpoint))
        }
        Query::Steered { endpoint } => {
            let routing = routing(reader, &endpoint)?;
            let rollout = routing.rollout.as_ref();
            codec::encode_plain(&Steered {
                shadow: rollout.and_then(|rollout| rollout::shadow_of(reader, rollout)),
                experiment: experiment::newest(reader, &endpoint),
                routing,
            })
        }
        Query::Shadows { endpoint } => {
            find(reader, &endpoint)?;
            codec::encode_plain(&rollout::shadows(reader, &endpoint))
        }
        Query::Progress { endpoint } => {
            find(reader, &endpoint)?;
            let newest = rollout::newest(reader, &endpoint);
            let progress = newest.and_then(|newest| rollout::progress_of(reader, &newest));
            codec::encode_plain(&progress)
        }
        Query::Sentinels { endpoint } => {
            find(reader, &endpoint)?;
            codec::encode_plain(&sentinels::find(reader, &endpoint))
        }
        Query::Experiments { endpoint } => {
            find(reader, &endpoint)?;
            codec::encode_plain(&experiment::history(reader, &endpoint))
        }
        Query::Access { endpoint } => codec::encode_plain(&access::of(reader, &endpoint)?),
        Query::Doors { known } => codec::encode_plain(&access::doors(reader, known)),
        Query::Graphs => codec::encode_plain(&graph::graphs(reader)),
        Query::Ingress { node } => codec::encode_plain(&address_of(reader, &node)),
    })
}
