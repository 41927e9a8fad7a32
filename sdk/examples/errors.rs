//! The ways in which a call fails, and what its error says: whether the method ran.
//!
//! Run it on a cluster of its own with `cargo run --example errors`, or on a real one with
//! `mobula submit target/debug/examples/errors`.

use std::fmt;
use std::time::Duration;

use mobula::Error;
use mobula::core::spec::RestartPolicy;
use mobula::prelude::*;
use serde::{Deserialize, Serialize};

struct Fragile;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct TooMuch {
    wanted: u32,
}

impl fmt::Display for TooMuch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is too much", self.wanted)
    }
}

#[mobula::actor]
impl Fragile {
    fn new() -> Self {
        Fragile
    }

    async fn lift(&self, wanted: u32) -> Result<u32, TooMuch> {
        match wanted {
            0..=10 => Ok(wanted),
            _ => Err(TooMuch { wanted }),
        }
    }

    async fn panic(&mut self) {
        panic!("on request")
    }

    async fn exit(&mut self) {
        std::process::exit(7)
    }

    async fn slow(&mut self) {
        tokio::time::sleep(Duration::from_secs(2)).await;
    }

    async fn huge(&self) -> Vec<u8> {
        vec![0; 9 << 20]
    }

    /// Neither awaits nor says that it blocks its thread.
    fn block(&mut self) {
        std::thread::sleep(Duration::from_secs(2));
    }

    /// Ends its process where the actor runs for the first time; which start it is.
    async fn exit_at_first(&self, ctx: &ActorContext, first: u64) -> u64 {
        if ctx.incarnation().0 == first {
            std::process::exit(8);
        }
        ctx.incarnation().0
    }

    async fn start(&self, ctx: &ActorContext) -> u64 {
        ctx.incarnation().0
    }
}

/// What another release of the program might believe a `Fragile` to be.
struct Newer;

#[mobula::actor]
impl Newer {
    fn new() -> Self {
        Newer
    }

    async fn lift(&self, _wanted: String, _how: Vec<String>) {}

    async fn lower(&self) {}
}

fn show(what: &str, error: &Error, executed: Executed) -> mobula::Result<()> {
    println!("{what}: {error} [{executed}]");
    match error.executed() == executed {
        true => Ok(()),
        false => Err(format!("{what}: expected {executed}, got {}", error.executed()).into()),
    }
}

#[mobula::main]
async fn main(cluster: Cluster) -> mobula::Result<()> {
    let patient = Duration::from_secs(60);
    let fragile = cluster
        .actor(Fragile::new())
        .max_restarts(9)
        .spawn()
        .await?;

    // The user's own error arrives as the value that it is.
    let failure = fragile.lift(11).await.expect_err("it is too much");
    assert_eq!(failure.user(), Some(TooMuch { wanted: 11 }));

    // Wrong arguments and unknown methods are refused, and nothing runs.
    let newer = ActorRef::<Newer>::from_id(&cluster, fragile.actor_id());
    let error = newer.lift("11".to_owned(), Vec::new()).await;
    show(
        "wrong arguments",
        &error.expect_err("they differ"),
        Executed::No,
    )?;
    let error = newer.lower().await.expect_err("there is no such method");
    show("unknown method", &error, Executed::No)?;

    // A deadline; a value that fits no message.
    let hurry = Duration::from_millis(200);
    let error = fragile.slow().timeout(hurry).await.expect_err("it is slow");
    show("deadline", &error, Executed::Unknown)?;
    let error = fragile.huge().timeout(patient).await;
    show("huge value", &error.expect_err("it is huge"), Executed::Yes)?;

    // As many calls wait as the actor's mailbox takes; one more is refused.
    let busy = cluster
        .actor(Fragile::new())
        .isolated()
        .mailbox_capacity(2)
        .max_restarts(1)
        .spawn()
        .await?;
    let first = busy.start().await?;
    let calls = futures::future::join_all((0..8).map(|_| busy.slow().into_future())).await;
    let (done, refused): (Vec<_>, Vec<_>) = calls.into_iter().partition(Result::is_ok);
    assert!(done.len() >= 2, "{} ran", done.len());
    let error = refused.into_iter().find_map(Result::err);
    let error = error.ok_or("eight calls found room for two")?;
    assert!(matches!(error, Error::Call(CallError::Overloaded { .. })));
    show("overloaded", &error, Executed::No)?;

    // A method that blocks its thread: its caller need not wait for it, and the actor goes on after it.
    let error = busy.block().timeout(hurry).await.expect_err("it is slow");
    show("blocked", &error, Executed::Unknown)?;
    assert_eq!(busy.start().timeout(patient).await?, first);

    // What may run twice is sent again, if the caller says so: to the actor's next start.
    let second = busy.exit_at_first(first).max_retries(1).await?;
    if second <= first {
        return Err(format!("start {second} comes after start {first}").into());
    }
    println!("sent again: answered by another start");

    // A panic ends the actor, which is started again; the next call meets the new one.
    let error = fragile.panic().await.expect_err("it panics");
    show("panic", &error, Executed::Unknown)?;
    assert_eq!(fragile.lift(1).timeout(patient).await.ok(), Some(1));

    // So does the end of its whole process.
    let policy = RestartPolicy::times(1);
    let isolated = cluster
        .actor(Fragile::new())
        .isolated()
        .restart(policy)
        .spawn()
        .await?;
    let error = isolated.exit().await.expect_err("the process exits");
    show("unavailable", &error, Executed::Unknown)?;
    assert_eq!(isolated.lift(2).timeout(patient).await.ok(), Some(2));
    // The second time was once too often: it is not unavailable now, but dead.
    isolated.exit().await.expect_err("the process exits");
    let error = Error::from(
        isolated
            .lift(3)
            .timeout(patient)
            .await
            .expect_err("it is dead"),
    );
    show("dead", &error, Executed::No)?;
    if !matches!(error, Error::Call(CallError::ActorDied { .. })) {
        return Err(format!("an actor without restarts is dead, not: {error}").into());
    }

    // A stop is an end like any other. While it is under way nobody may know; then it is dead.
    fragile.stop_actor(Duration::from_secs(1)).await?;
    let error = loop {
        match fragile.lift(4).timeout(patient).await.map_err(Error::from) {
            Err(error @ Error::Call(CallError::ActorDied { .. })) => break error,
            Ok(_) | Err(Error::Call(CallError::ActorUnavailable { .. })) => {}
            Err(other) => return Err(other),
        }
    };
    show("stopped", &error, Executed::No)?;
    let nobody = ActorRef::<Fragile>::from_id(&cluster, ActorId(999_999));
    let error = Error::from(nobody.lift(5).await.expect_err("there is none"));
    show("nobody", &error, Executed::No)?;

    cluster
        .set_result(&serde_json::json!({ "shown": 12 }))
        .await?;
    println!("all errors told apart");
    Ok(())
}
