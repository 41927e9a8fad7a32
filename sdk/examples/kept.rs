//! Values that outlive the process that put them: the job keeps them by name, until it drops them or is
//! over.
//!
//! Run it on a cluster of its own with `cargo run --example kept`, or on a real one with
//! `mobula submit target/debug/examples/kept`.

use std::time::Duration;

use mobula::core::ErrorCode;
use mobula::core::kept::KeptError;
use mobula::core::object::ObjectError;
use mobula::prelude::*;

/// 4 MiB of numbers.
const COUNT: usize = 1 << 20;

type Error = mobula::Error;

fn table() -> Vec<f32> {
    (0..COUNT).map(|n| (n as f32).sqrt()).collect()
}

struct Maker;

#[mobula::actor]
impl Maker {
    fn new() -> Self {
        Maker
    }

    /// Computes what costs something to compute, and keeps it.
    async fn make(&self, ctx: &ActorContext) -> Result<ObjectRef<Vec<f32>>, Error> {
        let cluster = ctx.cluster();
        let numbers = cluster.put(table()).await?;
        cluster.keep("table", &numbers).await?;
        let unit = cluster.put("metres".to_owned()).await?;
        cluster.keep("unit", &unit).await?;
        Ok(numbers)
    }

    fn crash(&self) {
        std::process::abort();
    }
}

#[mobula::main]
async fn main(cluster: Cluster) -> mobula::Result<()> {
    // A driver that is started again finds what an earlier start of it has kept.
    if cluster.kept::<Vec<f32>>("table").await?.is_none() {
        let maker = cluster.actor(Maker::new()).isolated().spawn().await?;
        let numbers = maker.make().await.map_err(Error::from)?;
        ended(&maker).await;
        match numbers.get_timeout(Duration::from_secs(60)).await {
            Err(Error::Object(error @ ObjectError::OwnerDied { .. })) => println!("{error}"),
            other => panic!("the owner of {numbers} is gone, and it is {other:?}"),
        }
    }

    let numbers = cluster.kept::<Vec<f32>>("table").await?;
    let numbers = numbers.ok_or("nobody has dropped it")?;
    // An object like any other: read in place, passed on, waited for.
    assert_eq!(numbers.view().await?[..], table());
    let unit = cluster.kept::<String>("unit").await?;
    let unit = unit.ok_or("nobody has dropped it")?.get().await?;
    for kept in cluster.kept_objects().await? {
        println!("{} is kept: {} bytes", kept.name, kept.value.size_bytes);
    }

    // A name has one value.
    cluster.keep("table", &numbers).await?;
    let other = cluster.put(vec![1f32]).await?;
    let refused = cluster.keep("table", &other).await;
    match refused {
        Err(error) if error.code() == Some(ErrorCode::AlreadyExists) => println!("{error}"),
        other => panic!("another value under a name that is taken: {other:?}"),
    }
    // And depends on nobody.
    let list = cluster.put(vec![other.clone()]).await?;
    match cluster.keep("list", &list).await {
        Err(Error::Kept(error @ KeptError::HoldsReferences { .. })) => println!("{error}"),
        other => panic!("references that are kept: {other:?}"),
    }
    assert!(cluster.drop_kept("table").await?);
    assert!(!cluster.drop_kept("table").await?);
    cluster.keep("table", &other).await?;
    println!("{COUNT} numbers survived in {unit}");
    Ok(())
}

/// Ends an actor's process, and waits until the cluster knows.
async fn ended(maker: &ActorRef<Maker>) {
    loop {
        match maker.crash().await {
            Err(error) if error.actor_has_ended() => return,
            _ => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}
