//! Keeps a router up to date on who may ask its endpoint. It goes on with what it knows while the head is away.

use std::sync::Arc;
use std::time::Duration;

use mobula::Cluster;
use mobula_core::control::ModuleId;
use tokio::sync::watch;

use super::state::Access;
use crate::serving::client;

/// How long one question to the head waits for a change.
const WAIT: Duration = Duration::from_secs(10);

/// The pause between two looks: a revocation takes effect this much later than it could, and a head is asked no more
/// often.
const PAUSE: Duration = Duration::from_millis(250);

/// Waits until something in serving has changed, for the next look; what was seen then.
pub(in crate::serving) async fn next_change(cluster: &Cluster, seen: u64) -> u64 {
    tokio::time::sleep(PAUSE).await;
    match cluster.wait_module(ModuleId::SERVING, seen, WAIT).await {
        Ok(revision) => revision.max(seen),
        Err(error) => {
            tracing::debug!(%error, "the head does not say whether anything has changed");
            seen
        }
    }
}

/// Follows one endpoint until nobody listens.
pub(in crate::serving) async fn follow(
    cluster: Cluster,
    endpoint: String,
    access: watch::Sender<Arc<Access>>,
) {
    let mut seen = 0;
    while !access.is_closed() {
        match client::access(&cluster, &endpoint).await {
            Ok(now) => {
                access.send_if_modified(|known| {
                    let is_other = **known != now;
                    if is_other {
                        *known = Arc::new(now);
                    }
                    is_other
                });
            }
            Err(error) => {
                tracing::debug!(endpoint, %error, "the head does not say who may ask");
            }
        }
        seen = next_change(&cluster, seen).await;
    }
}
