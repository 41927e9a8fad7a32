//! The program of the tests of objects: it puts, reads and loses values where the test says, and
//! reports what it saw. `it/objects.rs` starts it, kills what it names, and judges.
//!
//! Arguments: what to do, and a folder that it shares with the test.

mod folder;

use std::path::Path;
use std::time::{Duration, Instant};

use mobula::core::codec;
use mobula::core::label::Requirement;
use mobula::core::object::ObjectError;
use mobula::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use folder::Folder;

type Error = mobula::Error;

const MIB: usize = 1 << 20;

/// What is large enough that no part of the way can hold it as a whole.
const LARGE_BYTES: usize = 96 * MIB;

/// One of many: a quarter of the memory of the worker that the test calls `small`.
const PART_BYTES: usize = 4 * MIB;

/// Below the time after which an owner counts as gone only because it is silent.
const SOON: Duration = Duration::from_secs(10);

/// Bytes that differ from value to value.
fn content(seed: u64, size_bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(size_bytes);
    while bytes.len() < size_bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size_bytes);
    bytes
}

/// The file that is mapped at an address, and where in it that is.
fn memory_behind(address: usize) -> String {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("a process reads its own maps");
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

/// What a process saw of a value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Seen {
    memory: String,
    is_right: bool,
}

/// What became of values that memory has no room for.
#[derive(Debug, Serialize, Deserialize)]
struct Pressed {
    has_waited: bool,
    is_right: bool,
    refused: Option<String>,
}

#[derive(Default)]
struct Probe {
    kept: Vec<(u64, ObjectRef<Vec<u8>>)>,
}

#[mobula::actor]
impl Probe {
    fn new() -> Self {
        Probe::default()
    }

    fn pid(&self) -> u32 {
        std::process::id()
    }

    async fn put(
        &self,
        ctx: &ActorContext,
        seed: u64,
        size_bytes: usize,
    ) -> Result<ObjectRef<Vec<u8>>, Error> {
        ctx.cluster().put(content(seed, size_bytes)).await
    }

    async fn look(&self, value: ObjectRef<Vec<u8>>, seed: u64) -> Result<Seen, Error> {
        let view = value.view().await?;
        Ok(Seen {
            memory: memory_behind(view.as_ptr() as usize),
            is_right: view[..] == content(seed, view.len()),
        })
    }

    /// A reference as bytes, of which this process keeps none: and which object it is.
    async fn refer(&self, ctx: &ActorContext, seed: u64) -> Result<(Vec<u8>, String), Error> {
        let value = ctx.cluster().put(content(seed, 100)).await?;
        let reference = codec::encode(&value).expect("references are encoded in every message");
        Ok((reference, value.id().to_string()))
    }

    /// Writes one value after the other until its process ends.
    async fn write_for_ever(&self, ctx: &ActorContext) -> Result<(), Error> {
        loop {
            ctx.cluster().put(content(1, PART_BYTES)).await?;
        }
    }

    /// Puts `count` values and keeps them, or as many as there is room for: how many, and why not
    /// more.
    async fn keep(&mut self, ctx: &ActorContext, count: u64) -> (usize, Option<ObjectError>) {
        for _ in 0..count {
            let seed = 1000 + self.kept.len() as u64;
            match ctx.cluster().put(content(seed, PART_BYTES)).await {
                Ok(value) => self.kept.push((seed, value)),
                Err(Error::Object(error)) => return (self.kept.len(), Some(error)),
                Err(other) => panic!("not an error of objects: {other}"),
            }
        }
        (self.kept.len(), None)
    }

    /// Reads all that is kept: which came back with other bytes than were put.
    async fn wrong(&self) -> Result<Vec<u64>, Error> {
        let mut wrong = Vec::new();
        for (seed, value) in &self.kept {
            if value.view().await?[..] != content(*seed, PART_BYTES) {
                wrong.push(*seed);
            }
        }
        Ok(wrong)
    }

    fn drop_first(&mut self, count: usize) {
        self.kept.drain(..count);
    }

    /// Holds memory by reading it: a value more waits, gets in when there is room, and is refused
    /// when there is none for long.
    async fn press(&mut self, ctx: &ActorContext) -> Result<Pressed, Error> {
        let cluster = ctx.cluster();
        let mut views = Vec::new();
        for seed in 0..4 {
            let value = cluster.put(content(seed, PART_BYTES - 64)).await?;
            views.push(value.view().await?);
        }
        let one_more = cluster.put(content(9, PART_BYTES - 64));
        tokio::pin!(one_more);
        let early = tokio::time::timeout(Duration::from_secs(1), &mut one_more).await;
        let has_waited = early.is_err();
        // Its value is put under the last reference to the first, which goes with the view.
        views.remove(0);
        let entered = one_more.await?;
        let read = entered.view().await?;
        let is_right = read[..] == content(9, PART_BYTES - 64);
        let refused = cluster.put(content(10, PART_BYTES - 64)).await.err();
        Ok(Pressed {
            has_waited,
            is_right,
            refused: refused.map(|error| error.to_string()),
        })
    }
}

async fn probe_at(cluster: &Cluster, spot: &str) -> mobula::Result<ActorRef<Probe>> {
    let at = Requirement::In("spot".to_owned(), vec![spot.to_owned()]);
    let probe = cluster.actor(Probe::new()).isolated().require(at);
    probe.spawn().await
}

/// Why a value cannot be read, and how long it took to find out. Until its owner's agent has seen the
/// owner's end, it can be.
async fn loss_of(value: &ObjectRef<Vec<u8>>) -> Value {
    let began = Instant::now();
    loop {
        let error = match value.get_timeout(SOON).await {
            Ok(_) if began.elapsed() < SOON => continue,
            Ok(bytes) => return json!({ "read_bytes": bytes.len() }),
            Err(Error::Object(ObjectError::OwnerDied { reason, .. })) => {
                format!("owner died: {reason}")
            }
            Err(other) => other.to_string(),
        };
        return json!({ "error": error, "after_ms": began.elapsed().as_millis() as u64 });
    }
}

/// A value is read in place by its writer and others of its machine, and as a copy on another; then
/// the test kills its owner's process while that writes, or the agent above it.
async fn lose_an_owner(cluster: &Cluster, folder: &Folder) -> mobula::Result<Value> {
    let owner = probe_at(cluster, "a").await?;
    let near = probe_at(cluster, "a").await?;
    let far = probe_at(cluster, "b").await?;
    let large = owner.put(7, LARGE_BYTES).await?;
    let unread = owner.put(8, LARGE_BYTES).await?;
    let small = owner.put(9, 100).await?;
    let views = [
        owner.look(large.clone(), 7).await?,
        near.look(large.clone(), 7).await?,
        far.look(large.clone(), 7).await?,
        far.look(large.clone(), 7).await?,
    ];
    folder.tell("owner.json", &json!({ "pid": owner.pid().await? }))?;
    // It does not answer: its process ends.
    let writing = owner
        .write_for_ever()
        .await
        .map_err(|error| error.to_string());
    folder.wait_for("killed").await;
    // What nobody has read, and what nobody knew of until now.
    let lost = [loss_of(&unread).await, loss_of(&large).await];
    let text = match small.get_timeout(SOON).await {
        Ok(bytes) => json!({ "read_bytes": bytes.len() }),
        Err(error) => json!({ "error": error.to_string() }),
    };
    Ok(json!({
        "views": views,
        "writing": writing.err(),
        "lost": lost,
        "small": text,
    }))
}

/// More than memory holds goes to disk and comes back; what is read keeps its place, and holds up
/// what has none.
async fn run_short(cluster: &Cluster, count: u64) -> mobula::Result<Value> {
    let pressed = probe_at(cluster, "small").await?.press().await?;
    let probe = probe_at(cluster, "small").await?;
    let (kept, refused) = probe.keep(count).await?;
    // With the disk full too there is no room to bring something back, which is an error and no loss.
    let wrong = match probe.wrong().await {
        Ok(wrong) => json!(wrong),
        Err(error) => json!(format!("{error:?}")),
    };
    probe.drop_first(kept / 2).await?;
    let (after, refused_after) = probe.keep(2).await?;
    let wrong_after = probe.wrong().await?;
    Ok(json!({
        "pressed": pressed,
        "kept": kept,
        "refused": refused.map(|error| format!("{error:?}")),
        "wrong": wrong,
        "after": after,
        "refused_after": refused_after.map(|error| error.to_string()),
        "wrong_after": wrong_after,
    }))
}

/// Holds values in memory and on disk until the test ends everything.
async fn hold(cluster: &Cluster, folder: &Folder) -> mobula::Result<Value> {
    let probe = probe_at(cluster, "small").await?;
    let (kept, _) = probe.keep(8).await?;
    folder.tell("held.json", &json!({ "kept": kept }))?;
    folder.wait_for("never").await;
    Ok(Value::Null)
}

fn taken_in(reference: &[u8]) -> mobula::Result<ObjectRef<Vec<u8>>> {
    codec::decode(reference, reference.len()).map_err(|error| error.to_string().into())
}

/// What is read as something else than it is, or is freed: errors, and no garbage.
async fn mistake(cluster: &Cluster) -> mobula::Result<Value> {
    let owner = probe_at(cluster, "small").await?;
    let bytes = owner.put(3, PART_BYTES).await?;
    let as_words = ObjectRef::<Vec<u64>>::from_object(bytes.object().clone());
    let as_text = ObjectRef::<String>::from_object(bytes.object().clone());
    // A reference that was taken in, and dropped, is the last one.
    let (stale, id) = owner.refer(4).await?;
    let fresh = taken_in(&stale)?;
    fresh.get().await?;
    drop(fresh);
    let error_of = |error: Option<Error>| error.map(|error| format!("{error:?}"));
    let freed = loop {
        let again = taken_in(&stale)?;
        if let Err(error) = again.get().await {
            break error;
        }
    };
    Ok(json!({
        "as_words": error_of(as_words.view().await.err()),
        "as_text": error_of(as_text.get().await.err()),
        "stale": id,
        "freed": error_of(Some(freed)),
    }))
}

#[mobula::main]
async fn main(cluster: Cluster, args: Vec<String>) -> mobula::Result<()> {
    let [mode, folder] = args.as_slice() else {
        return Err("say what to do, and in which folder".into());
    };
    let folder = Folder(Path::new(folder).to_owned());
    // From now on the test starts workers, so that this process is on none of those.
    folder.tell("driver.json", &json!({ "mode": mode }))?;
    let result = match mode.as_str() {
        "lose-an-owner" => lose_an_owner(&cluster, &folder).await?,
        "run-short" => run_short(&cluster, 12).await?,
        "mistake" => mistake(&cluster).await?,
        "hold" => hold(&cluster, &folder).await?,
        other => return Err(format!("there is no `{other}`").into()),
    };
    cluster.set_result(&result).await
}
