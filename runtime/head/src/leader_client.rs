//! Requests of one head to the leader's control API: whichever head is asked, it answers or names
//! the leader.

use std::net::SocketAddr;
use std::time::Duration;

use mobula_net::tcp::{ClientTls, connect_channel};
use mobula_wire::control::control_client::ControlClient;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::api::LEADER_KEY;

/// A leader that takes longer for one request is as good as none.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(10);

/// Names that are followed in one round: heads may name each other in turn during an election.
const NAMES_MAX: u32 = 2;

/// Between rounds over all addresses.
const PAUSE: Duration = Duration::from_millis(100);

/// Addresses that are tried, the one that answered last first.
pub(crate) struct LeaderClient {
    addresses: Vec<SocketAddr>,
}

impl LeaderClient {
    pub(crate) fn new(addresses: Vec<SocketAddr>) -> Self {
        LeaderClient { addresses }
    }

    /// Asks until a head answers or refuses on purpose, at most for `limit`.
    pub(crate) async fn ask<T, Fut>(
        &mut self,
        tls: impl Fn() -> ClientTls,
        limit: Duration,
        ask: impl Fn(ControlClient<Channel>) -> Fut,
    ) -> Result<T, Status>
    where
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let deadline = Instant::now() + limit;
        let mut last = Status::unavailable("no address of a head is known");
        loop {
            let (mut position, mut strangers, mut followed) = (0, 0, 0);
            while position < self.addresses.len() {
                let address = self.addresses[position];
                position += 1;
                let attempt = async {
                    let channel = connect_channel(address, tls())
                        .await
                        .map_err(|error| (error.is_retryable(), error.to_string()))?;
                    Ok(ask(ControlClient::new(channel)).await)
                };
                let status = match tokio::time::timeout(ATTEMPT_TIMEOUT, attempt).await {
                    Ok(Ok(Ok(response))) => {
                        self.prefer(address);
                        return Ok(response.into_inner());
                    }
                    Ok(Ok(Err(status))) => status,
                    Ok(Err((is_retryable, reason))) => {
                        strangers += usize::from(!is_retryable);
                        Status::unavailable(reason)
                    }
                    Err(_) => Status::unavailable(format!("{address} does not answer")),
                };
                if !matches!(
                    status.code(),
                    Code::Unavailable | Code::Unknown | Code::Cancelled
                ) {
                    return Err(status);
                }
                if let Some(leader) = named_leader(&status)
                    && leader != address
                    && followed < NAMES_MAX
                    && self.prefer(leader)
                {
                    followed += 1;
                    position = 0;
                }
                last = status;
            }
            // Nothing changes by waiting where nobody, or nobody of this cluster, can be asked.
            if strangers == self.addresses.len() || Instant::now() >= deadline {
                return Err(last);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Puts an address first; whether it was not there already.
    fn prefer(&mut self, address: SocketAddr) -> bool {
        if self.addresses.first() == Some(&address) {
            return false;
        }
        self.addresses.retain(|known| *known != address);
        self.addresses.insert(0, address);
        true
    }
}

fn named_leader(status: &Status) -> Option<SocketAddr> {
    status
        .metadata()
        .get(LEADER_KEY)?
        .to_str()
        .ok()?
        .parse()
        .ok()
}
