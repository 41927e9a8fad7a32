//! How a new head gets its identity: from the group, with a token, once.
//!
//! ```text
//! new head ──token, certificate request──► leader: uses the token up, gives out a Raft id
//!          ◄──certificate for that id, the heads──
//!          ──by that certificate: a public key──► leader
//!          ◄──the CA's private key, sealed for it──
//! ```
//!
//! Invariants:
//! 1. The token goes only to a head whose CA has the key that the token names.
//! 2. The CA's key goes only to a certificate of a head, over TLS with both sides' certificates, and
//!    sealed besides; it is never in the log, in an argument, in the environment or in a message
//!    that could be printed.
//! 3. What was joined is stored whole before the head starts. A join that broke off begins anew,
//!    under a new Raft id: the old one is never used.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use mobula_net::identity::{ClusterCa, Credentials, PrivateKey, Role, SecretReader, Token};
use mobula_net::tcp::ClientTls;
use mobula_wire::control as api;

use crate::bootstrap::{HeadIdentity, HeadRecord};
use crate::error::HeadError;
use crate::leader_client::LeaderClient;
use crate::raft::Member;

/// How long to look for the leader: a group that is just electing one has it much sooner.
const JOIN_TIMEOUT: Duration = Duration::from_secs(20);

/// How a new head finds its group.
#[derive(Clone)]
pub struct JoinOptions {
    /// Control APIs of heads; any will do.
    pub addresses: Vec<SocketAddr>,
    /// A head token. A secret.
    pub token: String,
}

impl std::fmt::Debug for JoinOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JoinOptions")
            .field("addresses", &self.addresses)
            .finish_non_exhaustive()
    }
}

/// Joins, and stores the identity in `data_dir`.
pub(crate) async fn join(
    data_dir: &Path,
    name: &str,
    options: &JoinOptions,
) -> Result<(), HeadError> {
    let address = options
        .addresses
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    let failed = |error: &dyn std::fmt::Display| HeadError::Join {
        address: address.clone(),
        reason: error.to_string(),
    };
    let token = Token::parse(&options.token).map_err(|error| failed(&error))?;
    if token.role() != Role::Head {
        return Err(failed(&format!(
            "the token is for a {}: make one with `mobula head add`",
            token.role()
        )));
    }
    let key = PrivateKey::generate().map_err(|error| failed(&error))?;
    let request = api::JoinRequest {
        token: token.to_text(),
        csr_pem: key.certificate_request().map_err(|error| failed(&error))?,
        name: name.to_owned(),
    };
    let mut client = LeaderClient::new(options.addresses.clone());
    let reply = client
        .ask(
            || ClientTls::Pinned(token.ca_key_hash()),
            JOIN_TIMEOUT,
            |mut api| {
                let request = request.clone();
                async move { api.join(request).await }
            },
        )
        .await
        .map_err(|status| failed(&status.message()))?;
    let credentials = Credentials::new(&reply.certificate_pem, key, &reply.ca_pem)
        .map_err(|error| failed(&error))?;

    let ca = fetch_ca(&mut client, &credentials, &reply.ca_pem)
        .await
        .map_err(|reason| failed(&reason))?;
    if ca.key_hash() != token.ca_key_hash() {
        return Err(failed(&"the key that came is not the one of the token"));
    }
    let record = HeadRecord {
        raft_id: reply.raft_id,
        name: name.to_owned(),
        joined: true,
        has_log: false,
        heads: reply.heads.into_iter().map(member_of).collect(),
    };
    HeadIdentity::store_joined(data_dir, &ca, &credentials, &record)?;
    tracing::info!(raft_id = record.raft_id, name, "joined the group");
    Ok(())
}

async fn fetch_ca(
    client: &mut LeaderClient,
    credentials: &Credentials,
    ca_pem: &str,
) -> Result<ClusterCa, String> {
    let reader = SecretReader::new();
    let public_key = reader.public_key().to_vec();
    let reply = client
        .ask(
            || ClientTls::Mutual(credentials.clone()),
            JOIN_TIMEOUT,
            |mut api| {
                let public_key = public_key.clone();
                async move { api.head_key(api::HeadKeyRequest { public_key }).await }
            },
        )
        .await
        .map_err(|status| status.message().to_owned())?;
    let key = reader
        .open(&reply.public_key, &reply.sealed_key)
        .map_err(|error| error.to_string())?;
    let key = String::from_utf8(key).map_err(|_| "the CA's key is no text")?;
    ClusterCa::from_pem(ca_pem, &key).map_err(|error| error.to_string())
}

pub(crate) fn member_of(head: api::Head) -> Member {
    Member {
        raft_id: head.raft_id,
        name: head.name,
        api_address: head.api_address,
        cluster_address: head.cluster_address,
    }
}
