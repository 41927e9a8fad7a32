//! The program of the tests of kept objects: its actors keep values and are killed where the test says,
//! and it reports what it reads under their names. `it/kept.rs` starts it, kills, and judges.
//!
//! Arguments: `keep`, or `intrude` with the number of a job to look into; and a folder that it shares
//! with the test.

mod folder;

use std::path::Path;
use std::time::Duration;

use mobula::core::label::Requirement;
use mobula::core::object::ObjectError;
use mobula::core::{ErrorCode, JobId};
use mobula::prelude::*;
use serde_json::{Value, json};

use folder::Folder;

type Error = mobula::Error;

/// More than one chunk.
const LARGE: usize = (9 << 20) / 4;

fn numbers(seed: u32) -> Vec<f32> {
    (0..LARGE).map(|n| (n as u32 ^ seed) as f32).collect()
}

fn text(seed: u32) -> String {
    format!("small {seed}")
}

struct Keeper;

#[mobula::actor]
impl Keeper {
    fn new() -> Self {
        Keeper
    }

    fn pid(&self) -> u32 {
        std::process::id()
    }

    async fn keep(&self, ctx: &ActorContext, seed: u32) -> Result<ObjectRef<Vec<f32>>, Error> {
        let cluster = ctx.cluster();
        let large = cluster.put(numbers(seed)).await?;
        cluster.keep(&format!("large-{seed}"), &large).await?;
        let small = cluster.put(text(seed)).await?;
        cluster.keep(&format!("small-{seed}"), &small).await?;
        Ok(large)
    }

    /// Whether this process reads what was kept.
    async fn is_right(&self, ctx: &ActorContext, seed: u32) -> Result<bool, Error> {
        is_right(&ctx.cluster(), seed).await
    }
}

async fn is_right(cluster: &Cluster, seed: u32) -> mobula::Result<bool> {
    let large = cluster.kept::<Vec<f32>>(&format!("large-{seed}")).await?;
    let small = cluster.kept::<String>(&format!("small-{seed}")).await?;
    let (Some(large), Some(small)) = (large, small) else {
        return Ok(false);
    };
    Ok(large.view().await?[..] == numbers(seed) && small.get().await? == text(seed))
}

async fn keeper_at(cluster: &Cluster, spot: &str) -> mobula::Result<ActorRef<Keeper>> {
    let at = Requirement::In("spot".to_owned(), vec![spot.to_owned()]);
    let keeper = cluster.actor(Keeper::new()).isolated().require(at);
    keeper.spawn().await
}

/// Waits until the owner of a value, which nobody has read, has ended, and the value with it.
async fn lost(owner: &ActorRef<Keeper>, value: &ObjectRef<Vec<f32>>) -> mobula::Result<()> {
    loop {
        match owner.pid().await {
            Err(error) if error.actor_has_ended() => break,
            _ => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
    match value.get_timeout(Duration::from_secs(60)).await {
        Err(Error::Object(ObjectError::OwnerDied { .. } | ObjectError::Lost { .. })) => Ok(()),
        Ok(_) => Err("the value is there without its owner".into()),
        Err(other) => Err(other),
    }
}

/// The process of one owner is killed, then the worker of another, then everything.
async fn keep(cluster: &Cluster, folder: &Folder) -> mobula::Result<Value> {
    if cluster.kept_objects().await?.is_empty() {
        let (first, second) = (
            keeper_at(cluster, "a").await?,
            keeper_at(cluster, "a").await?,
        );
        let values = [first.keep(1).await?, second.keep(2).await?];
        folder.tell("kept.json", &json!({ "pid": first.pid().await? }))?;
        lost(&first, &values[0]).await?;
        let after_process = second.is_right(1).await?;
        folder.tell("lost-process.json", &json!({ "is_right": after_process }))?;
        lost(&second, &values[1]).await?;
        let is_right = is_right(cluster, 1).await? && is_right(cluster, 2).await?;
        folder.tell("lost-worker.json", &json!({ "is_right": is_right }))?;
        folder.wait_for("never").await;
    }
    // Everything was killed, this process too.
    let is_right = is_right(cluster, 1).await? && is_right(cluster, 2).await?;
    let all = cluster.kept_objects().await?;
    let names: Vec<&str> = all.iter().map(|kept| kept.name.as_str()).collect();
    folder.tell(
        "again.json",
        &json!({ "is_right": is_right, "names": names }),
    )?;
    folder.wait_for("looked-into").await;
    let still = cluster.kept_objects().await?.len();
    Ok(json!({ "still": still }))
}

/// Tries to read, overwrite and drop what another job keeps.
async fn intrude(cluster: &Cluster, job: JobId) -> mobula::Result<Value> {
    let code = |result: mobula::Result<()>| -> Option<ErrorCode> { result.err()?.code() };
    let other = cluster.in_job(job);
    let mine = cluster.put(1u64).await?;
    let codes = [
        code(other.kept::<String>("small-1").await.map(drop)),
        code(other.kept_objects().await.map(drop)),
        code(other.keep("small-3", &mine).await),
        code(other.drop_kept("small-1").await.map(drop)),
    ];
    let codes = codes.map(|code| code.map(ErrorCode::as_str));
    let own = cluster.kept::<String>("small-1").await?.is_some();
    Ok(json!({ "codes": codes, "own": own }))
}

#[mobula::main]
async fn main(cluster: Cluster, args: Vec<String>) -> mobula::Result<()> {
    let [mode, rest @ .., folder] = args.as_slice() else {
        return Err("say what to do, and in which folder".into());
    };
    let folder = Folder(Path::new(folder).to_owned());
    let result = match (mode.as_str(), rest) {
        ("keep", []) => {
            // From now on the test starts workers, so that this process is on none of those.
            folder.tell("driver.json", &json!({}))?;
            keep(&cluster, &folder).await?
        }
        ("intrude", [job]) => intrude(&cluster, JobId(job.parse()?)).await?,
        _ => return Err(format!("there is no `{mode}`").into()),
    };
    cluster.set_result(&result).await
}
