//! What the tests of several modules need.

use std::net::SocketAddr;
use std::time::Duration;

use crate::endpoint::Endpoint;
use crate::identity::{ClusterCa, Credentials, Identity, Role, Validity};

/// Any free port of this machine.
pub(crate) fn loopback() -> SocketAddr {
    ([127, 0, 0, 1], 0).into()
}

/// Good for an hour.
pub(crate) fn credentials(ca: &ClusterCa, role: Role) -> Credentials {
    let identity = Identity::new(ca.cluster_id(), role, format!("{role}-1"), 1);
    ca.issue_with_new_key(&identity, Validity::for_ttl(Duration::from_secs(3600)))
        .unwrap()
}

/// Good until an hour ago.
pub(crate) fn expired_credentials(ca: &ClusterCa, role: Role) -> Credentials {
    let identity = Identity::new(ca.cluster_id(), role, format!("{role}-1"), 1);
    let now = std::time::SystemTime::now();
    let hour = Duration::from_secs(3600);
    let validity = Validity {
        not_before: now - 2 * hour,
        not_after: now - hour,
    };
    ca.issue_with_new_key(&identity, validity).unwrap()
}

/// Binds again to an address whose last owner is being torn down by its background tasks.
pub(crate) async fn rebind(address: SocketAddr, credentials: &Credentials) -> Endpoint {
    let binding = async {
        loop {
            match Endpoint::bind(address, credentials) {
                Ok(endpoint) => return endpoint,
                Err(_) => tokio::task::yield_now().await,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), binding)
        .await
        .unwrap()
}
