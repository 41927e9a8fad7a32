//! Two jobs on one cluster cannot reach into each other, whatever one of them knows of the other.
//!
//! `mobula submit target/debug/examples/neighbours -- keep` starts a job with an actor and an object and prints what
//! somebody would have to know to reach them. `mobula submit target/debug/examples/neighbours --follow -- try
//! '<that line>'` is the somebody: its result says how each attempt ended.

use std::collections::BTreeMap;
use std::time::Duration;

use mobula::core::codec;
use mobula::prelude::*;
use serde::{Deserialize, Serialize};

struct Vault {
    gold: u64,
}

#[mobula::actor]
impl Vault {
    fn new(gold: u64) -> Self {
        Vault { gold }
    }

    async fn take(&mut self) -> u64 {
        std::mem::take(&mut self.gold)
    }
}

/// What one job tells of itself.
#[derive(Serialize, Deserialize)]
struct Known {
    job: u64,
    actor: u64,
    incarnation: u64,
    /// An encoded reference to an object.
    object: Vec<u8>,
}

#[mobula::main]
async fn main(cluster: Cluster) -> mobula::Result<BTreeMap<String, String>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["keep"] => keep(&cluster).await,
        ["try", known] => {
            let known = serde_json::from_str(known)?;
            Ok(reach_for(&cluster, &known).await)
        }
        _ => Err("say `keep`, or `try` and the line that the other job printed".into()),
    }
}

/// Has something to take, and waits until the job is stopped.
async fn keep(cluster: &Cluster) -> mobula::Result<BTreeMap<String, String>> {
    let vault = cluster.actor(Vault::new(7)).name("vault").spawn().await?;
    // Large enough to lie in the node's shared memory.
    let letters = cluster.put("the letters ".repeat(100_000)).await?;
    let object = codec::encode(&letters).map_err(|error| error.to_string())?;
    let start = cluster
        .resolve_actor(vault.actor_id(), Incarnation(0), Duration::from_secs(30))
        .await?;
    let known = Known {
        job: cluster.job().map_or(0, |job| job.0),
        actor: vault.actor_id().0,
        incarnation: start.incarnation.unwrap_or_default(),
        object,
    };
    println!("{}", serde_json::to_string(&known)?);
    let mut stop = cluster.stop_requested();
    // Ends with the process at the latest.
    let _ = stop.wait_for(|stop| *stop).await;
    Ok(BTreeMap::new())
}

/// Tries everything that its credentials might allow; how each attempt ended.
async fn reach_for(cluster: &Cluster, known: &Known) -> BTreeMap<String, String> {
    let job = JobId(known.job);
    let actor = ActorId(known.actor);
    let theirs = cluster.in_job(job);
    let vault: ActorRef<Vault> = ActorRef::from_id(cluster, actor);
    let handle = cluster.job_handle(job);
    let soon = Duration::from_secs(20);
    let mut tried = BTreeMap::new();
    let mut note = |what: &str, end: String| tried.insert(what.to_owned(), end);

    note("call its actor", end_of(vault.take().await));
    note(
        "find its actor",
        end_of(theirs.get_actor::<Vault>("vault").await),
    );
    note("resolve its actor", {
        end_of(cluster.resolve_actor(actor, Incarnation(0), soon).await)
    });
    note(
        "stop its actor",
        end_of(cluster.stop_actor(actor, soon).await),
    );
    note("move its actor", {
        end_of(
            cluster
                .yield_actor(actor, Incarnation(known.incarnation))
                .await,
        )
    });
    note("start an actor in it", {
        end_of(theirs.actor(Vault::new(1)).name("fake").spawn().await)
    });
    note(
        "list its actors",
        end_of(cluster.list_actors(Some(job)).await),
    );
    note("show it", end_of(handle.status().await));
    note("read its log", end_of(handle.logs(false).await));
    note("read its timeline", end_of(handle.timeline().await));
    note("stop it", end_of(handle.stop().await));
    let object = codec::decode::<ObjectRef<String>>(&known.object, known.object.len());
    note(
        "read its object",
        match object {
            Ok(object) => end_of(object.get_timeout(soon).await),
            Err(error) => error.to_string(),
        },
    );
    tried
}

fn end_of<T>(result: mobula::Result<T>) -> String {
    match result {
        Ok(_) => "allowed".to_owned(),
        Err(error) => match error.code() {
            Some(code) => code.as_str().to_owned(),
            None => error.to_string(),
        },
    }
}
