//! Creating actors, and what idle ones take.

use std::time::{Duration, Instant};

use futures::future::{join_all, try_join_all};
use mobula::Result;
use mobula::prelude::*;

use crate::Options;
use crate::actors::{Server, ServerCalls as _};
use crate::memory;
use crate::outcome::{Outcome, Rate};

/// Actors with a process each, created together.
const ISOLATED: usize = 4;

/// With fewer the pages that an allocator takes at a time are too large a part of it.
const IDLE_MIN: usize = 1000;

/// Slots are given back a second after the last task, and a stopped host ends at once.
const HOSTS_END_MAX: Duration = Duration::from_secs(20);

pub(crate) async fn measure(
    cluster: &Cluster,
    options: &Options,
    outcome: &mut Outcome,
) -> Result<()> {
    if options.wants("spawn, isolated process") {
        let mut rates = Vec::new();
        for _ in 0..options.rounds {
            let began = Instant::now();
            let actors = try_join_all(
                (0..ISOLATED).map(|_| cluster.actor(Server::new()).isolated().spawn()),
            )
            .await?;
            try_join_all(actors.iter().map(|actor| actor.small_value().into_future())).await?;
            rates.push(ISOLATED as f64 / began.elapsed().as_secs_f64());
            stop(&actors).await?;
        }
        outcome.rate("spawn, isolated process", &Rate::of(&rates));
    }
    if options.wants("spawn, in a host") {
        idle_actors(cluster, options, outcome).await?;
    }
    Ok(())
}

/// Until each of them has answered a call, which is when it runs.
async fn idle_actors(cluster: &Cluster, options: &Options, outcome: &mut Outcome) -> Result<()> {
    // What earlier rows' actors took and freed, their host would give to these without growing.
    let is_fresh = hosts_have_ended().await;
    let first = cluster.actor(Server::new()).spawn().await?;
    first.small_value().await?;
    let before = memory::hosts();
    let began = Instant::now();
    let spawned =
        join_all((0..options.idle_actors).map(|_| cluster.actor(Server::new()).spawn())).await;
    let mut actors = Vec::new();
    let mut refusal = None;
    for actor in spawned {
        match actor {
            Ok(actor) => actors.push(actor),
            Err(error) => refusal = Some(error.to_string()),
        }
    }
    let created = began.elapsed();
    for chunk in actors.chunks(500) {
        try_join_all(chunk.iter().map(|actor| actor.small_value().into_future())).await?;
    }
    let running = began.elapsed();
    let count = actors.len() as f64;
    outcome.figure("idle actors on this machine", count, "");
    if let Some(refusal) = refusal {
        outcome.absent("more idle actors", &refusal);
    }
    let rates = [count / created.as_secs_f64()];
    outcome.rate("spawn, in a host: accepted by the head", &Rate::of(&rates));
    let rates = [count / running.as_secs_f64()];
    outcome.rate("spawn, in a host: each has answered", &Rate::of(&rates));
    let name = "memory of an idle actor in its host";
    if !is_fresh {
        outcome.absent(name, "a host of earlier rows did not end");
    } else if actors.len() < IDLE_MIN {
        outcome.absent(name, &format!("{IDLE_MIN} actors are needed for it"));
    } else {
        let each_kib = memory::growth_bytes(&before) as f64 / count / 1024.0;
        outcome.figure(name, each_kib, "KiB");
    }
    actors.push(first);
    stop(&actors).await
}

/// Waits until the job has no host but its driver; false if that takes too long.
async fn hosts_have_ended() -> bool {
    let began = Instant::now();
    while !memory::hosts().is_empty() {
        if began.elapsed() > HOSTS_END_MAX {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    true
}

async fn stop(actors: &[ActorRef<Server>]) -> Result<()> {
    for chunk in actors.chunks(500) {
        try_join_all(chunk.iter().map(|actor| actor.stop_actor(Duration::ZERO))).await?;
    }
    Ok(())
}
