//! Calls of actors.

use std::time::{Duration, Instant};

use futures::future::try_join_all;
use hdrhistogram::Histogram;
use mobula::prelude::*;
use mobula::{Actor, Result};

use crate::Options;
use crate::actors::{
    Client, ClientCalls as _, ConcurrentServer, ConcurrentServerCalls as _, Payload, Server,
    ServerCalls as _,
};
use crate::outcome::{Outcome, Rate};

/// Calls in flight where Ray's benchmark has a thousand.
const BATCH: usize = 1000;

/// Calls of each caller where Ray's benchmark has five thousand.
const LARGE_BATCH: usize = 5000;

/// Callers in Ray's n:n rows.
const CALLERS: usize = 4;

/// Room for all calls of all callers: these rows measure calls, not refusals.
const MAILBOX: u32 = 65_536;

/// Calls of one row within a process.
const IN_PROCESS_CALLS: usize = 20_000;

/// Each in a process of its own, as in Ray.
async fn isolated<A: Actor>(
    cluster: &Cluster,
    count: usize,
    init: impl Fn() -> mobula::Init<A>,
) -> Result<Vec<ActorRef<A>>> {
    let spawned = (0..count).map(|_| {
        cluster
            .actor(init())
            .isolated()
            .mailbox_capacity(MAILBOX)
            .spawn()
    });
    try_join_all(spawned).await
}

async fn stop_all<A>(actors: &[ActorRef<A>]) -> Result<()> {
    try_join_all(actors.iter().map(|actor| actor.stop_actor(Duration::ZERO))).await?;
    Ok(())
}

pub(crate) async fn measure(
    cluster: &Cluster,
    options: &Options,
    outcome: &mut Outcome,
) -> Result<()> {
    one_to_one(cluster, options, outcome).await?;
    one_to_one_concurrent(cluster, options, outcome).await?;
    many(cluster, options, outcome).await?;
    in_process(cluster, options, outcome).await
}

async fn one_to_one(cluster: &Cluster, options: &Options, outcome: &mut Outcome) -> Result<()> {
    let servers = isolated(cluster, 1, Server::new).await?;
    let server = &servers[0];
    server.small_value().await?;
    if options.wants("1:1 actor calls sync") {
        let rate = Rate::measure(options, 1, async || server.small_value().await.map(drop)).await?;
        outcome.rate("1:1 actor calls sync", &rate);
        let latencies = closed_loop(server, options).await?;
        outcome.latencies("1:1 actor calls sync, latency", &latencies);
    }
    if options.wants("1:1 actor calls async") {
        let rate = Rate::measure(options, BATCH, async || {
            let calls = (0..BATCH).map(|_| server.small_value().into_future());
            try_join_all(calls).await.map(drop)
        })
        .await?;
        outcome.rate("1:1 actor calls async", &rate);
    }
    if options.wants("open loop") {
        for per_second in [1000, 10_000, 50_000] {
            let latencies = open_loop(server, options, per_second).await?;
            let name = format!("open loop, {per_second} calls/s");
            outcome.latencies(&name, &latencies);
        }
    }
    if options.wants("payload") {
        for (size, name) in [
            (0, "0 B"),
            (1 << 10, "1 KiB"),
            (64 << 10, "64 KiB"),
            (1 << 20, "1 MiB"),
            (7 << 20, "7 MiB"),
        ] {
            payload(server, options, outcome, size, name).await?;
        }
    }
    stop_all(&servers).await
}

async fn closed_loop(server: &ActorRef<Server>, options: &Options) -> Result<Histogram<u64>> {
    let mut latencies = histogram();
    let start = Instant::now();
    while start.elapsed() < options.round {
        let began = Instant::now();
        server.small_value().await?;
        latencies.saturating_record(began.elapsed().as_nanos() as u64);
    }
    Ok(latencies)
}

/// Calls are made when they are due, whether or not earlier ones are answered; a latency counts
/// from the moment when its call was due.
async fn open_loop(
    server: &ActorRef<Server>,
    options: &Options,
    per_second: u32,
) -> Result<Histogram<u64>> {
    let length = options.round * options.rounds;
    let interval = Duration::from_secs(1) / per_second;
    let count = (length.as_secs_f64() * f64::from(per_second)) as u32;
    let (sender, mut due) = tokio::sync::mpsc::channel(count as usize);
    // A thread's sleep is finer than the runtime's timer; what became due meanwhile goes together.
    let pacing = std::thread::spawn(move || {
        let start = Instant::now();
        for made in 0..count {
            let due_at = start + interval * made;
            std::thread::sleep(due_at.saturating_duration_since(Instant::now()));
            if sender.blocking_send(due_at).is_err() {
                return;
            }
        }
    });
    let mut running = tokio::task::JoinSet::new();
    while let Some(due_at) = due.recv().await {
        let server = server.clone();
        running.spawn(async move {
            server.small_value().await?;
            Ok::<_, mobula::Error>(due_at.elapsed())
        });
    }
    let mut latencies = histogram();
    while let Some(done) = running.join_next().await {
        let latency = done.map_err(|error| error.to_string())??;
        latencies.saturating_record(latency.as_nanos() as u64);
    }
    pacing
        .join()
        .map_err(|_| "the pacing thread panicked".to_owned())?;
    Ok(latencies)
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000_000, 3).expect("the bounds are in the allowed range")
}

async fn payload(
    server: &ActorRef<Server>,
    options: &Options,
    outcome: &mut Outcome,
    size: usize,
    name: &str,
) -> Result<()> {
    let payload = Payload(vec![7; size]);
    let mut latencies = histogram();
    let start = Instant::now();
    // At least a few, however long each takes.
    while start.elapsed() < options.round || latencies.len() < 5 {
        let began = Instant::now();
        server.length(payload.clone()).await?;
        latencies.saturating_record(began.elapsed().as_nanos() as u64);
    }
    outcome.latencies(&format!("payload of {name}, one at a time"), &latencies);
    Ok(())
}

async fn one_to_one_concurrent(
    cluster: &Cluster,
    options: &Options,
    outcome: &mut Outcome,
) -> Result<()> {
    let names = [
        "1:1 actor calls concurrent",
        "1:1 async-actor calls sync",
        "1:1 async-actor calls async",
        "1:1 async-actor calls with args async",
    ];
    if !names.iter().any(|name| options.wants(name)) {
        return Ok(());
    }
    let servers = isolated(cluster, 1, ConcurrentServer::new).await?;
    let server = &servers[0];
    server.small_value().await?;
    for name in names {
        if !options.wants(name) {
            continue;
        }
        let rate = match name {
            "1:1 async-actor calls sync" => {
                Rate::measure(options, 1, async || server.small_value().await.map(drop)).await?
            }
            "1:1 async-actor calls with args async" => {
                Rate::measure(options, BATCH, async || {
                    let calls = (0..BATCH).map(|_| server.small_value_arg(7).into_future());
                    try_join_all(calls).await.map(drop)
                })
                .await?
            }
            _ => {
                Rate::measure(options, BATCH, async || {
                    let calls = (0..BATCH).map(|_| server.small_value().into_future());
                    try_join_all(calls).await.map(drop)
                })
                .await?
            }
        };
        outcome.rate(name, &rate);
    }
    stop_all(&servers).await
}

/// As many servers as Ray's benchmark has: half of the CPUs.
fn server_count() -> usize {
    (mobula_benches::results::cpus() / 2).max(1)
}

async fn many(cluster: &Cluster, options: &Options, outcome: &mut Outcome) -> Result<()> {
    let names = [
        "1:n actor calls async",
        "n:n actor calls async",
        "n:n actor calls with arg async",
        "1:n async-actor calls async",
        "n:n async-actor calls async",
    ];
    if !names.iter().any(|name| options.wants(name)) {
        return Ok(());
    }
    let servers = isolated(cluster, server_count(), Server::new).await?;
    let concurrent = isolated(cluster, server_count(), ConcurrentServer::new).await?;
    let clients = isolated(cluster, CALLERS, || {
        Client::new(servers.clone(), concurrent.clone())
    })
    .await?;
    try_join_all(clients.iter().map(|client| client.batch(1).into_future()))
        .await
        .map_err(mobula::Error::from)?;
    for name in names {
        if !options.wants(name) {
            continue;
        }
        let callers = match name.starts_with("1:n") {
            true => &clients[..1],
            false => &clients[..],
        };
        let rate = Rate::measure(options, LARGE_BATCH * callers.len(), async || {
            let batches = callers.iter().map(|client| {
                match (name.contains("async-actor"), name.contains("with arg")) {
                    (true, _) => client.batch_concurrent(LARGE_BATCH),
                    (false, true) => client.batch_arg(LARGE_BATCH),
                    (false, false) => client.batch(LARGE_BATCH),
                }
                .into_future()
            });
            try_join_all(batches)
                .await
                .map(drop)
                .map_err(mobula::Error::from)
        })
        .await?;
        outcome.rate(name, &rate);
    }
    stop_all(&clients).await?;
    stop_all(&servers).await?;
    stop_all(&concurrent).await
}

async fn in_process(cluster: &Cluster, options: &Options, outcome: &mut Outcome) -> Result<()> {
    let names = ["in one process: calls sync", "in one process: calls async"];
    if !names.iter().any(|name| options.wants(name)) {
        return Ok(());
    }
    // Ordinary actors of one job share a host.
    let server = cluster
        .actor(Server::new())
        .mailbox_capacity(MAILBOX)
        .spawn()
        .await?;
    let client = cluster
        .actor(Client::new(vec![server.clone()], Vec::new()))
        .spawn()
        .await?;
    client.one_by_one(100).await.map_err(mobula::Error::from)?;
    let mut rates = Vec::new();
    for _ in 0..options.rounds {
        let took_ns = client
            .one_by_one(IN_PROCESS_CALLS)
            .await
            .map_err(mobula::Error::from)?;
        rates.push(IN_PROCESS_CALLS as f64 / (took_ns as f64 / 1e9));
    }
    outcome.rate(names[0], &Rate::of(&rates));
    let rate = Rate::measure(options, LARGE_BATCH, async || {
        client.batch(LARGE_BATCH).await.map_err(mobula::Error::from)
    })
    .await?;
    outcome.rate(names[1], &rate);
    stop_all(&[client]).await?;
    stop_all(&[server]).await
}
