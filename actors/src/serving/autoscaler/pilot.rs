//! The router's end of scaling: it looks at its load, decides, tells the head, and says when replicas that
//! are wanted no more have no request left.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use mobula::Cluster;
use mobula_core::id::Incarnation;

use super::decision::{Answering, Autoscaler, Choice, Figures, Standing};
use super::policy::Policy;
use super::state::{Command, Scaling};
use crate::serving::client;
use crate::serving::guard::traffic::Traffic;
use crate::serving::state::{Routing, Steered};

/// What a router sees of its replicas.
#[derive(Debug, Clone, Copy)]
pub(in crate::serving) struct Replicas {
    /// Those that answer.
    pub(in crate::serving) ready: usize,
    /// The memory in use where it is scarcest, in percent; 0 if none of them said.
    pub(in crate::serving) memory_percent: u8,
    /// Whether no request is left with those that are wanted no more.
    pub(in crate::serving) are_drained: bool,
}

/// Scales one endpoint.
pub(in crate::serving) struct Pilot {
    cluster: Cluster,
    router: Incarnation,
    traffic: Arc<Traffic>,
    autoscaler: Autoscaler,
}

impl Pilot {
    pub(in crate::serving) fn new(
        cluster: Cluster,
        router: Incarnation,
        traffic: Arc<Traffic>,
    ) -> Self {
        Pilot {
            cluster,
            router,
            traffic,
            autoscaler: Autoscaler::default(),
        }
    }

    /// Looks once. Whether the number of replicas was changed, which is to be followed at once.
    pub(in crate::serving) async fn look(&mut self, steered: &Steered, replicas: Replicas) -> bool {
        let Routing {
            endpoint, scaling, ..
        } = &steered.routing;
        self.traffic.limit_rate(scaling.policy.rate_limit);
        if scaling.surplus > endpoint.replicas && !scaling.is_drained && replicas.are_drained {
            self.tell(Command::Drained {
                endpoint: endpoint.name.clone(),
                router: self.router,
                revision: scaling.revision,
            })
            .await;
        }
        let standing = Standing {
            replicas: endpoint.replicas,
            version: endpoint.version,
            changes: &scaling.changes,
            is_rolling_out: steered.is_changing(),
        };
        let answering = Answering {
            ready: u32::try_from(replicas.ready).unwrap_or(u32::MAX),
            memory_percent: replicas.memory_percent,
        };
        let load = self.traffic.load.read();
        let policy = &scaling.policy;
        let decided = self
            .autoscaler
            .decide(policy, standing, answering, load, now_ms());
        let Some(Choice { to, cause, figures }) = decided else {
            self.traffic
                .load
                .alarm_above(alarm(policy, endpoint.replicas));
            return false;
        };
        tracing::info!(
            endpoint = endpoint.name,
            from = endpoint.replicas,
            to,
            ?cause,
            figures = figures.said(),
            "an endpoint is scaled"
        );
        let decide = Command::Decide {
            endpoint: endpoint.name.clone(),
            router: self.router,
            revision: scaling.revision,
            choice: Choice { to, cause, figures },
        };
        self.tell(decide).await.is_some()
    }

    /// What was seen at the last look.
    pub(in crate::serving) fn seen(&self) -> &Figures {
        self.autoscaler.seen()
    }

    async fn tell(&self, command: Command) -> Option<Scaling> {
        let told = client::scale(&self.cluster, command).await;
        // What is still so at the next look is said again.
        told.inspect_err(
            |error| tracing::debug!(%error, "the head did not take a word about scaling"),
        )
        .ok()
    }
}

/// How many requests in flight are worth a look before the next one is due: any where there is no replica,
/// else as many as a burst has.
fn alarm(policy: &Policy, replicas: u32) -> u64 {
    if policy.bounds(now_ms()).1 <= replicas {
        return u64::MAX;
    }
    2 * u64::from(replicas) * u64::from(policy.target_in_flight)
}

fn now_ms() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
    since_epoch.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}
