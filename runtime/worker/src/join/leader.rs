//! Where the leader takes QUIC connections, as the heads say.
//!
//! All are asked at once: a head that is stopped, or whose machine is cut off, answers neither yes nor no, and
//! most often it is the one that led.

use std::time::Duration;

use mobula_net::identity::Credentials;
use mobula_net::tcp::ClientTls;
use mobula_wire::control::{StatusReply, StatusRequest};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::{Joiner, RPC_TIMEOUT};
use crate::error::JoinError;

/// How long the other heads may still answer after the first that names a leader: one that led and comes back
/// names itself until it has heard of its successor.
const OTHERS_WAIT: Duration = Duration::from_millis(200);

impl Joiner {
    /// Where the leader takes QUIC connections; of what several heads say, that of the highest term.
    pub(crate) async fn cluster_address(
        &self,
        credentials: &Credentials,
    ) -> Result<String, JoinError> {
        let mut asked = JoinSet::new();
        for address in self.head_api() {
            let (joiner, credentials) = (self.clone(), credentials.clone());
            asked.spawn(async move { joiner.status(&address, credentials).await });
        }
        let mut newest: Option<StatusReply> = None;
        let mut refusal = None;
        let mut enough_at = None;
        loop {
            let next = match enough_at {
                None => asked.join_next().await,
                Some(at) => timeout_at(at, asked.join_next()).await.ok().flatten(),
            };
            match next {
                Some(Ok(Ok(reply))) => {
                    self.learn(&reply.api_addresses);
                    if newest
                        .as_ref()
                        .is_none_or(|newest| newest.term < reply.term)
                    {
                        newest = Some(reply);
                    }
                    enough_at.get_or_insert_with(|| Instant::now() + OTHERS_WAIT);
                }
                // That the heads are of another cluster is worth more than that one is away.
                Some(Ok(Err(error))) => match refusal {
                    Some(JoinError::OtherCluster { .. }) => {}
                    _ => refusal = Some(error),
                },
                Some(Err(ended)) => {
                    refusal = Some(self.unreachable(&format!("asking a head failed: {ended}")));
                }
                None => break,
            }
        }
        match (newest, refusal) {
            (Some(newest), _) => Ok(newest.leader_cluster_address),
            (None, Some(refusal)) => Err(refusal),
            (None, None) => Err(self.unreachable("no address is given")),
        }
    }

    /// What the head at `address` says, which is an error where it knows of no leader.
    async fn status(
        &self,
        address: &str,
        credentials: Credentials,
    ) -> Result<StatusReply, JoinError> {
        let mut client = self
            .connect(address, &ClientTls::Mutual(credentials))
            .await?;
        let mut request = tonic::Request::new(StatusRequest {});
        request.set_timeout(RPC_TIMEOUT);
        let reply = client.status(request).await.map_err(|status| {
            match self.refusal(address, &status) {
                // No token is at stake here.
                JoinError::TokenRefused { reason } => JoinError::Refused {
                    name: self.name.clone(),
                    reason,
                },
                other => other,
            }
        })?;
        let reply = reply.into_inner();
        if reply.leader_cluster_address.is_empty() {
            self.learn(&reply.api_addresses);
            return Err(self.unreachable(&format!("{address} knows of no leader")));
        }
        Ok(reply)
    }
}
