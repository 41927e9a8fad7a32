//! What answers in the place of a process that was killed.
//!
//! UDP has no hang-up: who talks to a killed process over QUIC hears nothing, and waits until its
//! connection idles out, or its handshake gives up. Whoever has seen the process end and holds its
//! credentials can answer at its address instead: connections of before with a stateless reset (its
//! key comes from the private key), new ones with a refusal.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use crate::endpoint::EndpointError;
use crate::identity::Credentials;
use crate::transport::{IDLE_TIMEOUT_MAX, LaneClass, endpoint_config, server_config};

/// A dead process's address, taken over. Dropping it gives the address back.
#[derive(Debug)]
pub struct Tombstone {
    quinn: quinn::Endpoint,
}

impl Tombstone {
    /// For this long somebody may believe in a connection to the dead.
    pub const TIME: Duration = IDLE_TIMEOUT_MAX;

    /// Takes over `address` from the process whose `credentials` these are. Fails while that process
    /// lives, and when another has taken its port since.
    pub fn raise(address: SocketAddr, credentials: &Credentials) -> Result<Self, EndpointError> {
        let failed = |source| EndpointError::Bind { address, source };
        let quinn = quinn::Endpoint::new(
            endpoint_config(credentials),
            // Only the first packet is read of a handshake that is refused, and it is sealed alike
            // for both classes.
            Some(server_config(LaneClass::Control, credentials)?),
            UdpSocket::bind(address).map_err(failed)?,
            Arc::new(quinn::TokioRuntime),
        )
        .map_err(failed)?;
        Ok(Tombstone { quinn })
    }

    /// Answers until nobody can believe in the process any more.
    pub async fn stand(self) {
        let answer = async {
            while let Some(incoming) = self.quinn.accept().await {
                incoming.refuse();
            }
        };
        // That it ends by the time is what it is for.
        let _ = tokio::time::timeout(Tombstone::TIME, answer).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::endpoint::{ConnectError, ConnectionLost, Endpoint};
    use crate::identity::{ClusterCa, Role};
    use crate::testing::{credentials, loopback};

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap()
    }

    #[test]
    fn who_talked_to_a_killed_process_and_who_wants_to_are_told_at_once() {
        let ca = ClusterCa::create("demo").unwrap();
        let its_credentials = credentials(&ca, Role::Host);
        let (ours, its) = (runtime(), runtime());
        let host = its.block_on(async { Endpoint::bind(loopback(), &its_credentials).unwrap() });
        let address = host.local_address();
        its.spawn(async move {
            let mut connections = Vec::new();
            while let Some(connection) = host.accept().await {
                connections.push(connection);
            }
        });
        ours.block_on(async {
            let client = Endpoint::bind_client(loopback(), &credentials(&ca, Role::Host)).unwrap();
            let classes = [LaneClass::Control, LaneClass::Bulk];
            let mut connections = Vec::new();
            for class in classes {
                connections.push(client.connect(address, class, Role::Host).await.unwrap());
            }
            Tombstone::raise(address, &its_credentials).expect_err("it lives");
            // It dies without a word: a runtime that stops polls nothing more.
            its.shutdown_background();
            let tombstone = loop {
                match Tombstone::raise(address, &its_credentials) {
                    Ok(tombstone) => break tombstone,
                    Err(_) => tokio::task::yield_now().await,
                }
            };
            let standing = tokio::spawn(tombstone.stand());
            for connection in connections {
                // An idle one says nothing by itself before its keep-alive is due.
                let said = connection.open(mobula_wire::hello::Lane::Call).await;
                drop(said);
                assert_eq!(connection.closed().await, ConnectionLost::PeerEnded);
            }
            for class in classes {
                let error = client
                    .connect(address, class, Role::Host)
                    .await
                    .unwrap_err();
                assert!(matches!(&error, ConnectError::Failed { .. }), "{error}");
                assert!(error.is_retryable());
            }
            standing.abort();
        });
    }
}
