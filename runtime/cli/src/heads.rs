//! `mobula head members`, `add`, `promote`, `remove`, `transfer`: the group of heads.

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_wire::control::{
    CreateTokenRequest, Head, ListHeadsReply, ListHeadsRequest, PromoteHeadRequest,
    RemoveHeadRequest, TransferLeadershipRequest,
};
use serde_json::json;

use crate::args::{Format, GroupCommand, Target};
use crate::connect::{connect, connect_without_leader, patiently};
use crate::output::{or_dash, print_json, print_table};
use crate::tokens;

/// Times that a token for one head may be used: a reply that was lost must not cost another token.
const TOKEN_USES: u32 = 3;

pub(crate) async fn run(target: &Target, command: GroupCommand) -> anyhow::Result<()> {
    let cluster = match &command {
        // The others change the group, which only a leader can.
        GroupCommand::Members(_) => connect_without_leader(target).await?,
        _ => connect(target).await?,
    };
    match command {
        GroupCommand::Members(format) => members(&cluster, format).await,
        GroupCommand::Add { ttl, format } => add(&cluster, ttl, format).await,
        GroupCommand::Promote { head, format } => {
            let raft_id = find(&cluster, &head).await?;
            cluster
                .control()
                .read("promote a head", |mut client| async move {
                    client.promote_head(PromoteHeadRequest { raft_id }).await
                })
                .await?;
            report(format, raft_id, "votes")
        }
        GroupCommand::Remove { head, format } => {
            let raft_id = find(&cluster, &head).await?;
            cluster
                .control()
                .read("remove a head", |mut client| async move {
                    client.remove_head(RemoveHeadRequest { raft_id }).await
                })
                .await?;
            report(format, raft_id, "is removed")
        }
        GroupCommand::Transfer { head, format } => {
            let raft_id = match head {
                Some(head) => find(&cluster, &head).await?,
                None => 0,
            };
            let reply = cluster
                .control()
                .read("hand leadership over", |mut client| async move {
                    let request = TransferLeadershipRequest { raft_id };
                    client.transfer_leadership(request).await
                })
                .await?;
            report(format, reply.leader, "leads")
        }
    }
}

fn report(format: Format, raft_id: u64, what: &str) -> anyhow::Result<()> {
    if format.json {
        return print_json(&json!({ "raft_id": raft_id }));
    }
    println!("head {raft_id} {what}");
    Ok(())
}

/// What the leader knows; while there is none, what the head knows that answers.
async fn list(cluster: &Cluster) -> anyhow::Result<ListHeadsReply> {
    let ask = async |by_leader| {
        cluster
            .control()
            .read("list the heads", |mut client| async move {
                client.list_heads(ListHeadsRequest { by_leader }).await
            })
            .await
    };
    match ask(true).await {
        Ok(reply) => Ok(reply),
        Err(_) => Ok(ask(false).await?),
    }
}

/// The Raft id of the head that is meant.
async fn find(cluster: &Cluster, text: &str) -> anyhow::Result<u64> {
    let heads = list(cluster).await?.heads;
    let id = text.parse::<u64>().ok();
    let found: Vec<&Head> = heads
        .iter()
        .filter(|head| Some(head.raft_id) == id || head.name == text)
        .collect();
    match found.as_slice() {
        [head] => Ok(head.raft_id),
        [] => {
            let known: Vec<String> = heads
                .iter()
                .map(|head| format!("{} ({})", head.raft_id, head.name))
                .collect();
            bail!("no head is `{text}`: the heads are {}", known.join(", "))
        }
        _ => bail!("several heads are called `{text}`: give the Raft id"),
    }
}

async fn members(cluster: &Cluster, format: Format) -> anyhow::Result<()> {
    let reply = patiently(list(cluster)).await?;
    if format.json {
        return print_json(&reply);
    }
    let rows: Vec<Vec<String>> = reply
        .heads
        .iter()
        .map(|head| {
            let state = match (head.leader, head.active) {
                (true, _) => "leads".to_owned(),
                (false, Some(true)) => "follows".to_owned(),
                (false, Some(false)) => "silent".to_owned(),
                (false, None) => "-".to_owned(),
            };
            let behind = head
                .matched_index
                .map(|index| reply.committed_index.saturating_sub(index).to_string());
            vec![
                head.raft_id.to_string(),
                head.name.clone(),
                head.role.clone(),
                state,
                or_dash(behind),
                compared(head),
                head.api_address.clone(),
                head.cluster_address.clone(),
            ]
        })
        .collect();
    println!(
        "term {}, entry {} is committed",
        reply.term, reply.committed_index
    );
    print_table(
        &[
            "ID", "NAME", "ROLE", "STATE", "BEHIND", "HOLDS", "API", "CLUSTER",
        ],
        &rows,
    );
    Ok(())
}

/// Whether what it holds is what the head that answers holds.
fn compared(head: &Head) -> String {
    match (head.state_differs, head.state_compared_index) {
        (Some(true), Some(index)) => format!("DIFFERS at {index}"),
        (Some(false), _) => "the same".to_owned(),
        _ => "-".to_owned(),
    }
}

async fn add(cluster: &Cluster, ttl_ms: u64, format: Format) -> anyhow::Result<()> {
    let request = CreateTokenRequest {
        stamp: None,
        role: "head".to_owned(),
        ttl_ms,
        uses: TOKEN_USES,
        principal: None,
    };
    let reply = tokens::create(cluster, request).await?;
    let heads = list(cluster).await?.heads;
    let address = heads
        .iter()
        .find(|head| head.leader)
        .or(heads.first())
        .map(|head| head.api_address.clone())
        .context("the cluster names no head")?;
    if format.json {
        return print_json(&json!({
            "token": reply.token,
            "expires_at_ms": reply.expires_at_ms,
            "join": address,
        }));
    }
    // Only the token goes to standard output, so that it can be put into a file at once.
    println!("{}", reply.token);
    eprintln!(
        "put it into a file on the new machine, readable by its owner only, and start there:"
    );
    eprintln!("  mobula head --join {address} --join-token-file FILE --data-dir DIR");
    Ok(())
}
