//! A head's own place in the group: it says where it is, becomes a learner if it is new, and asks to
//! be promoted once it has caught up. A head that was removed ends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mobula_core::control::ModuleId;
use mobula_core::id::SessionId;
use mobula_net::identity::Credentials;
use mobula_net::tcp::ClientTls;
use mobula_wire::control as api;
use tokio::sync::watch;
use tonic::Code;

use crate::context::HeadContext;
use crate::leader_client::LeaderClient;
use crate::raft::{HeadCommand, Member};

/// How often it is looked whether something is to be said.
const INTERVAL: Duration = Duration::from_millis(200);

/// How long one request may look for the leader.
const ASK_LIMIT: Duration = Duration::from_secs(5);

/// How a head takes its place.
pub(crate) struct Place {
    pub(crate) context: Arc<HeadContext>,
    pub(crate) own: Member,
    /// The heads that it knew when it joined.
    pub(crate) seeds: Vec<Member>,
    /// Whether it wants to vote.
    pub(crate) wants_to_vote: bool,
    pub(crate) credentials: watch::Receiver<Credentials>,
}

/// Keeps this head's place until it is removed from the group.
pub(crate) async fn run(place: Place) {
    let mut leadership = place.context.raft.leadership();
    let mut group = place.context.raft.group();
    loop {
        let view = group.borrow_and_update().clone();
        let leads = leadership.borrow_and_update().is_leader;
        let is_known = view.member(place.own.raft_id) == Some(&place.own);
        let votes = view.voters.contains(&place.own.raft_id);
        let result = if leads && !is_known {
            place.set_own_row().await
        } else if leads {
            Ok(())
        } else if !is_known || !view.contains(place.own.raft_id) {
            place.announce().await
        } else if !votes && place.wants_to_vote {
            place.ask_for_promotion().await
        } else {
            Ok(())
        };
        match result {
            Ok(()) => {}
            Err(Refused::Removed(reason)) => {
                tracing::error!(reason, "this head is not wanted in its group");
                return;
            }
            Err(Refused::ForNow(reason)) => tracing::debug!(reason, "not yet in place"),
        }
        let settled = is_known && (votes || !place.wants_to_vote);
        tokio::select! {
            () = tokio::time::sleep(INTERVAL), if !settled => {}
            changed = group.changed() => if changed.is_err() { return },
            changed = leadership.changed() => if changed.is_err() { return },
        }
    }
}

enum Refused {
    Removed(String),
    ForNow(String),
}

impl Place {
    /// The leader writes its own row itself.
    async fn set_own_row(&self) -> Result<(), Refused> {
        let command = HeadCommand::SetAddress(self.own.clone());
        self.context
            .propose(SessionId::INTERNAL, 0, ModuleId::HEADS, command.encode())
            .await
            .map(|_| ())
            .map_err(|error| Refused::ForNow(error.to_string()))
    }

    fn client(&self) -> LeaderClient {
        let view = self.context.raft.group().borrow().clone();
        let leader = self.context.leader();
        let others = view
            .members
            .iter()
            .chain(&self.seeds)
            .filter(|member| member.raft_id != self.own.raft_id);
        let mut addresses: Vec<SocketAddr> = Vec::new();
        for member in leader.iter().chain(others) {
            if let Ok(address) = member.api_address.parse()
                && !addresses.contains(&address)
            {
                addresses.push(address);
            }
        }
        LeaderClient::new(addresses)
    }

    async fn announce(&self) -> Result<(), Refused> {
        let request = api::AnnounceHeadRequest {
            name: self.own.name.clone(),
            api_address: self.own.api_address.clone(),
            cluster_address: self.own.cluster_address.clone(),
        };
        let tls = || ClientTls::Mutual(self.credentials.borrow().clone());
        let mut client = self.client();
        let announced = client.ask(tls, ASK_LIMIT, |mut api| {
            let request = request.clone();
            async move { api.announce_head(request).await }
        });
        match announced.await {
            Ok(api::Empty {}) => Ok(()),
            Err(status) if status.code() == Code::FailedPrecondition => {
                Err(Refused::Removed(status.message().to_owned()))
            }
            Err(status) => Err(Refused::ForNow(status.message().to_owned())),
        }
    }

    async fn ask_for_promotion(&self) -> Result<(), Refused> {
        let raft_id = self.own.raft_id;
        let tls = || ClientTls::Mutual(self.credentials.borrow().clone());
        let mut client = self.client();
        let promoted = client.ask(tls, ASK_LIMIT, |mut api| async move {
            api.promote_head(api::PromoteHeadRequest { raft_id }).await
        });
        promoted
            .await
            .map(|_| ())
            .map_err(|status| Refused::ForNow(status.message().to_owned()))
    }
}
