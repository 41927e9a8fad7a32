//! A secret reaches the processes of a job, and nobody who looks at the job.
//!
//! `mobula submit target/debug/examples/secret --follow --secret TOKEN=@token.txt`; the driver and an actor in
//! another process compare what they were given, and the job's result says only whether it is the same.

use mobula::prelude::*;

struct Reader;

#[mobula::actor]
impl Reader {
    fn new() -> Self {
        Reader
    }

    /// Whether this process was given the same.
    async fn has(&mut self, token: String) -> bool {
        std::env::var("TOKEN").is_ok_and(|own| own == token)
    }
}

#[mobula::main]
async fn main(cluster: Cluster) -> mobula::Result<bool> {
    let token = std::env::var("TOKEN").map_err(|_| "give it `--secret TOKEN=@FILE`")?;
    println!("the token has {} characters", token.len());
    let reader = cluster.actor(Reader::new()).isolated().spawn().await?;
    reader.has(token).await
}
