//! Killed hosts, at whose addresses the agent answers for a while: their callers on other machines
//! would wait for a timeout otherwise.

use std::net::SocketAddr;

use mobula_core::id::HostId;
use mobula_net::identity::Credentials;
use mobula_net::tombstone::Tombstone;
use tokio::task::JoinSet;

/// A socket each. Callers of more hosts that are killed within [`Tombstone::TIME`] find out by
/// their timeouts.
const GRAVES_MAX: usize = 256;

/// The addresses that are answered for.
#[derive(Debug, Default)]
pub(crate) struct Graves {
    standing: JoinSet<()>,
}

impl Graves {
    /// Answers from now on at `address`, where the dead `host` took calls with `credentials`. If
    /// that cannot be, callers find out by their timeouts.
    pub(crate) fn raise(&mut self, host: HostId, address: &str, credentials: &Credentials) {
        let Ok(address) = address.parse::<SocketAddr>() else {
            return;
        };
        if self.standing.len() >= GRAVES_MAX {
            tracing::debug!(%host, limit = GRAVES_MAX, "too many killed hosts to answer for");
            return;
        }
        match Tombstone::raise(address, credentials) {
            Ok(tombstone) => {
                self.standing.spawn(tombstone.stand());
            }
            Err(error) => tracing::debug!(%host, %error, "cannot answer for a killed host"),
        }
    }

    /// Lets go of those whose time is over; never returns while nothing changes. Cancel safe.
    pub(crate) async fn tended(&mut self) {
        if self.standing.join_next().await.is_none() {
            std::future::pending().await
        }
    }
}
