//! Values that are put once and read by reference: in place by every process of the machine, as a
//! copy on others; and what happens when the process that put one ends.
//!
//! Run it on a cluster of its own with `cargo run --example objects`, or on a real one with
//! `mobula submit target/debug/examples/objects`.

use std::collections::BTreeMap;
use std::time::Duration;

use mobula::core::object::ObjectError;
use mobula::prelude::*;
use serde::{Deserialize, Serialize};

/// 16 MiB of numbers.
const COUNT: usize = 1 << 22;

struct Reader;

/// What a reader saw.
#[derive(Debug, Serialize, Deserialize)]
struct Seen {
    node: String,
    /// The file in memory that it read, and at which offset.
    memory: String,
    sum: f64,
}

#[mobula::actor]
impl Reader {
    fn new() -> Self {
        Reader
    }

    /// Reads in place: nothing is decoded or copied.
    async fn sum(
        &self,
        ctx: &ActorContext,
        numbers: ObjectRef<Vec<f32>>,
    ) -> Result<Seen, mobula::Error> {
        let view = numbers.view().await?;
        Ok(Seen {
            node: ctx.node_name().to_owned(),
            memory: memory_behind(view.as_ptr() as usize),
            sum: view.iter().map(|number| f64::from(*number)).sum(),
        })
    }

    /// Puts a value; it ends with this actor's process.
    async fn make(&self, ctx: &ActorContext, text: String) -> Result<ObjectRef<String>, Error> {
        ctx.cluster().put(text).await
    }

    fn crash(&self) {
        std::process::abort();
    }
}

type Error = mobula::Error;

/// Which file is mapped at an address, and where in it that is.
fn memory_behind(address: usize) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let hexadecimal = |text: &str| usize::from_str_radix(text, 16).unwrap_or_default();
    for line in maps.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [range, _, offset, _, inode, ..] = fields[..] else {
            continue;
        };
        let (start, end) = range.split_once('-').unwrap_or_default();
        let (start, end) = (hexadecimal(start), hexadecimal(end));
        if (start..end).contains(&address) {
            return format!("{inode}+{}", hexadecimal(offset) + address - start);
        }
    }
    "unknown".to_owned()
}

#[mobula::main]
async fn main(cluster: Cluster) -> mobula::Result<()> {
    let numbers: Vec<f32> = (0..COUNT).map(|n| (n % 8) as f32).collect();
    let expected: f64 = numbers.iter().map(|number| f64::from(*number)).sum();
    let big = cluster.put(numbers).await?;

    // In processes of their own, on as many nodes as there are.
    let mut readers = Vec::new();
    for _ in 0..4 {
        let reader = cluster.actor(Reader::new()).isolated().spread("readers");
        readers.push(reader.spawn().await?);
    }
    let mut memory_of: BTreeMap<String, String> = BTreeMap::new();
    for reader in &readers {
        let seen = reader.sum(big.clone()).await.map_err(Error::from)?;
        assert_eq!(seen.sum, expected);
        let memory = memory_of
            .entry(seen.node.clone())
            .or_insert(seen.memory.clone());
        assert_eq!(*memory, seen.memory, "one copy on {}", seen.node);
    }
    println!(
        "4 processes read the same memory on each of {} nodes",
        memory_of.len()
    );

    // References travel inside values, and are waited for together.
    let parts = vec![cluster.put(1u64).await?, cluster.put(2).await?];
    let waited = cluster.wait(&parts, 2, Duration::from_secs(1)).await?;
    assert_eq!((waited.ready.len(), waited.pending.len()), (2, 0));
    let list = cluster.put(parts).await?;
    let mut total = 0;
    for part in list.get().await? {
        total += part.get().await?;
    }
    println!("the parts sum up to {total}");

    // Reading as another type, or a vector of other numbers, is an error and not garbage.
    let wrong = ObjectRef::<Vec<u16>>::from_object(big.object().clone());
    println!(
        "as other numbers: {}",
        wrong
            .view()
            .await
            .expect_err("bytes are not read as other numbers")
    );

    // Values of the actor's process: a small one and a large one that are read, and a large one
    // that nobody has read when the process ends.
    let maker = &readers[0];
    let small = made(maker, "small").await?;
    let large = made(maker, &"large".repeat(100_000)).await?;
    let unread = made(maker, &"unread".repeat(100_000)).await?;
    assert_eq!(small.get().await?, "small");
    assert_eq!(large.get().await?.len(), 500_000);
    // The actor does not live to answer.
    let _ = maker.crash().await;
    ended(&cluster, maker).await?;
    match unread.get_timeout(Duration::from_secs(60)).await {
        Err(Error::Object(error @ ObjectError::OwnerDied { .. })) => {
            println!("an object ends with its owner: {error}");
        }
        other => panic!("the owner of {unread} is gone, and it is {other:?}"),
    }
    Ok(())
}

async fn made(maker: &ActorRef<Reader>, text: &str) -> mobula::Result<ObjectRef<String>> {
    maker.make(text.to_owned()).await.map_err(Error::from)
}

/// Waits until the cluster knows that an actor has ended.
async fn ended(cluster: &Cluster, actor: &ActorRef<Reader>) -> mobula::Result<()> {
    loop {
        let actors = cluster.list_actors(None).await?;
        let id = actor.actor_id().0;
        if actors
            .iter()
            .any(|other| other.id == id && other.state == "ended")
        {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
