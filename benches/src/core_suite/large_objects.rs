//! Large objects: through the node's shared memory, between processes and between workers. Beside
//! them what it takes to copy as much once, between buffers whose pages are there, in the same run.

use std::time::{Duration, Instant};

use futures::future::try_join_all;
use mobula::Result;
use mobula::prelude::*;
use serde::{Deserialize, Serialize};

use crate::Options;
use crate::outcome::{Outcome, Rate};

/// What Ray's rows of gigabytes put at a time is 800 MB and 80 MB; less will do to be far above
/// every cache, and leaves memory to others on the machine.
const PUT_BYTES: usize = 256 << 20;
const CLIENT_PUT_BYTES: usize = 80 << 20;

/// Processes that put gigabytes at the same time, as in Ray.
const CLIENTS: usize = 4;

/// What is read in place and sent between workers.
const READ_BYTES: usize = 64 << 20;

const PAYLOADS: [(usize, &str); 4] = [
    (1 << 20, "1 MiB"),
    (4 << 20, "4 MiB"),
    (16 << 20, "16 MiB"),
    (64 << 20, "64 MiB"),
];

/// What the processes of these rows do.
pub(crate) struct Holder {
    numbers: Vec<u64>,
}

/// Where a process is, and how long it took for what it was asked, in seconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Took {
    seconds: f64,
    sum: u64,
}

#[mobula::actor]
impl Holder {
    fn new() -> Self {
        Holder {
            numbers: Vec::new(),
        }
    }

    fn node(&self, ctx: &ActorContext) -> String {
        ctx.node_name().to_owned()
    }

    /// Copies numbers into shared memory, and lets go of them.
    async fn put(
        &mut self,
        ctx: &ActorContext,
        size_bytes: usize,
    ) -> std::result::Result<(), mobula::Error> {
        self.numbers.resize(size_bytes / 8, 7);
        ctx.cluster().put_slice(&self.numbers).await.map(drop)
    }

    /// The same, keeping them for others.
    async fn hold(
        &mut self,
        ctx: &ActorContext,
        size_bytes: usize,
    ) -> std::result::Result<ObjectRef<Vec<u64>>, mobula::Error> {
        self.numbers.resize(size_bytes / 8, 7);
        ctx.cluster().put_slice(&self.numbers).await
    }

    /// Opens and closes a value in place, again and again.
    async fn open(
        &self,
        value: ObjectRef<Vec<u64>>,
        count: u32,
    ) -> std::result::Result<Took, mobula::Error> {
        let began = Instant::now();
        let mut sum = 0;
        for _ in 0..count {
            sum += value.view().await?[0];
        }
        let seconds = began.elapsed().as_secs_f64();
        Ok(Took { seconds, sum })
    }

    /// Opens a value in place and reads all of it once.
    async fn sum(&self, value: ObjectRef<Vec<u64>>) -> std::result::Result<Took, mobula::Error> {
        let began = Instant::now();
        let sum = value
            .view()
            .await?
            .iter()
            .fold(0, |sum: u64, number| sum.wrapping_add(*number));
        let seconds = began.elapsed().as_secs_f64();
        Ok(Took { seconds, sum })
    }

    /// Opens a value in place and looks at both of its ends.
    async fn ends(&self, value: ObjectRef<Vec<u64>>) -> std::result::Result<u64, mobula::Error> {
        let view = value.view().await?;
        Ok(view[0] + view[view.len() - 1])
    }
}

pub(crate) async fn measure(
    cluster: &Cluster,
    options: &Options,
    outcome: &mut Outcome,
) -> Result<()> {
    gigabytes(cluster, options, outcome).await?;
    in_place(cluster, options, outcome).await?;
    between_workers(cluster, options, outcome).await?;
    payloads(cluster, options, outcome).await
}

async fn gigabytes(cluster: &Cluster, options: &Options, outcome: &mut Outcome) -> Result<()> {
    let [single, several] = ["single client put gigabytes", "multi client put gigabytes"];
    if options.wants(single) {
        let numbers = vec![7_u64; PUT_BYTES / 8];
        let put = async || cluster.put_slice(&numbers).await.map(drop);
        let rate = Rate::measure(options, 1, put).await?;
        let put = rate.times(PUT_BYTES as f64 / 1e9);
        outcome.rate(single, &put);
        let copied = memcpy(options, PUT_BYTES);
        outcome.figure("  memcpy of as much beside it", copied, "GB/s");
    }
    if options.wants(several) {
        let clients =
            (0..CLIENTS).map(|_| cluster.actor(Holder::new()).isolated().cpus(0.0).spawn());
        let clients = try_join_all(clients).await?;
        let rate = Rate::measure(options, CLIENTS, async || {
            let puts = clients
                .iter()
                .map(|client| client.put(CLIENT_PUT_BYTES).into_future());
            try_join_all(puts).await.map(drop)
        })
        .await?;
        outcome.rate(several, &rate.times(CLIENT_PUT_BYTES as f64 / 1e9));
        stop(&clients).await?;
    }
    Ok(())
}

/// Two holders on the driver's node, and one on another, if there is one.
async fn holders(cluster: &Cluster) -> Result<(Vec<ActorRef<Holder>>, Vec<ActorRef<Holder>>)> {
    let spawned = (0..4).map(|_| {
        let holder = cluster.actor(Holder::new()).isolated().cpus(0.0);
        holder.spread("holders").spawn()
    });
    let holders = try_join_all(spawned).await?;
    let mut first_node = None;
    let (mut here, mut there) = (Vec::new(), Vec::new());
    for holder in holders {
        let node = holder.node().await?;
        match *first_node.get_or_insert(node.clone()) == node {
            true => here.push(holder),
            false => there.push(holder),
        }
    }
    Ok((here, there))
}

async fn stop(holders: &[ActorRef<Holder>]) -> Result<()> {
    for holder in holders {
        holder.stop_actor(Duration::ZERO).await?;
    }
    Ok(())
}

async fn in_place(cluster: &Cluster, options: &Options, outcome: &mut Outcome) -> Result<()> {
    let [open, read] = [
        "get 64 MiB in another process, in place",
        "read 64 MiB of another process, in place",
    ];
    if !options.wants(open) && !options.wants(read) {
        return Ok(());
    }
    let (here, there) = holders(cluster).await?;
    if let [writer, reader, ..] = &here[..] {
        let value = writer.hold(READ_BYTES).await?;
        if options.wants(open) {
            const OPENS: u32 = 100;
            let rate = Rate::measure(options, OPENS as usize, async || {
                let took = reader.open(value.clone(), OPENS).await?;
                assert_eq!(took.sum, 7 * u64::from(OPENS));
                Ok::<_, mobula::Error>(())
            })
            .await?;
            outcome.rate(open, &rate);
        }
        if options.wants(read) {
            let first = reader.sum(value.clone()).await?;
            outcome.figure(
                "read 64 MiB for the first time",
                bytes_rate(first.seconds),
                "GB/s",
            );
            let again = reader.sum(value.clone()).await?;
            outcome.figure(read, bytes_rate(again.seconds), "GB/s");
        }
    } else {
        outcome.absent(open, "two processes on one worker are needed");
    }
    stop(&here).await?;
    stop(&there).await
}

fn bytes_rate(seconds: f64) -> f64 {
    READ_BYTES as f64 / seconds / 1e9
}

/// Every value is sent once: its first reader on another worker waits for all of it.
async fn between_workers(
    cluster: &Cluster,
    options: &Options,
    outcome: &mut Outcome,
) -> Result<()> {
    let name = "transfer of 64 MiB between workers";
    if !options.wants(name) {
        return Ok(());
    }
    let (here, there) = holders(cluster).await?;
    match (here.first(), there.first()) {
        (Some(writer), Some(reader)) => {
            let mut rates = Vec::new();
            for _ in 0..=options.rounds {
                let value = writer.hold(READ_BYTES).await?;
                let took = reader.open(value, 1).await?;
                rates.push(bytes_rate(took.seconds));
            }
            // The first one connects the workers.
            let rate = Rate::of(&rates[1..]);
            outcome.rate(&format!("{name}, GB"), &rate);
        }
        _ => outcome.absent(name, "one worker only"),
    }
    stop(&here).await?;
    stop(&there).await
}

/// A value that is put, sent by reference to another process of the node, and looked at there.
async fn payloads(cluster: &Cluster, options: &Options, outcome: &mut Outcome) -> Result<()> {
    if !options.wants("payload") {
        return Ok(());
    }
    let reader = cluster.actor(Holder::new()).isolated().spawn().await?;
    for (size_bytes, size) in PAYLOADS {
        let numbers = vec![7_u64; size_bytes / 8];
        let rate = Rate::measure(options, 1, async || {
            let value = cluster.put_slice(&numbers).await?;
            assert_eq!(reader.ends(value).await?, 14);
            Ok::<_, mobula::Error>(())
        })
        .await?;
        outcome.rate(&format!("payload of {size} by reference"), &rate);
        let copies = memcpy(options, size_bytes) * 1e9 / size_bytes as f64;
        outcome.figure("  memcpy of as much beside it", copies, "/s");
    }
    stop(&[reader]).await
}

/// Between two buffers that are mapped already, in GB/s.
fn memcpy(options: &Options, size_bytes: usize) -> f64 {
    let source = vec![1_u8; size_bytes];
    let mut target = vec![2_u8; size_bytes];
    let began = Instant::now();
    let mut count = 0_u32;
    loop {
        target.copy_from_slice(std::hint::black_box(&source));
        std::hint::black_box(&mut target);
        count += 1;
        let elapsed = began.elapsed();
        if elapsed >= options.round {
            return f64::from(count) * size_bytes as f64 / elapsed.as_secs_f64() / 1e9;
        }
    }
}
