//! An actor with a memory limit: what uses too much is ended, told apart from other ends, and only
//! its own process with it. The job's result is why the greedy actor ended.
//!
//! `mobula submit target/debug/examples/memory_limit --follow`; where the worker may not limit memory
//! (see `memory_limits` among the labels in `mobula nodes list --json`) the actor is refused by itself.

use mobula::prelude::*;

const LIMIT_BYTES: u64 = 96 << 20;

struct Greedy {
    held: Vec<Vec<u8>>,
}

#[mobula::actor]
impl Greedy {
    fn new() -> Self {
        Greedy { held: Vec::new() }
    }

    /// Takes memory and uses it; how much it holds then, in MiB.
    async fn take_mib(&mut self, mib: usize) -> usize {
        for _ in 0..mib {
            self.held.push(vec![1; 1 << 20]);
        }
        self.held.len()
    }
}

#[mobula::main]
async fn main(cluster: Cluster) -> mobula::Result<String> {
    let greedy = cluster
        .actor(Greedy::new())
        .name("greedy")
        .isolated()
        .memory_bytes(LIMIT_BYTES)
        .spawn()
        .await?;
    println!("holds {} MiB", greedy.take_mib(8).await?);
    // Four times what it may have.
    match greedy.take_mib(4 * (LIMIT_BYTES >> 20) as usize).await {
        Ok(mib) => return Ok(format!("nothing limits memory here: it holds {mib} MiB")),
        Err(error) => println!("the call ended: {error} ({})", error.executed()),
    }
    // Why it ended, later calls say.
    match greedy.take_mib(0).await {
        Err(mobula::Error::Call(CallError::OutOfMemory { reason, .. })) => {
            Ok(format!("out of memory: {reason}"))
        }
        other => Err(format!("the greedy actor did not end: {other:?}").into()),
    }
}
