//! Small objects. They stay in the process that put them, so these rows touch no shared memory;
//! Ray's rows of the same names go through its store.

use std::time::Duration;

use futures::future::try_join_all;
use mobula::Result;
use mobula::prelude::*;

use crate::Options;
use crate::outcome::{Outcome, Rate};

/// Operations in one measured step: one takes less than reading the clock twice.
const BATCH: usize = 100;

/// Processes that put at the same time, and what each puts in one measured step, as in Ray.
const PUTTERS: usize = 10;
const PUTS: usize = 100;

/// References in one value, as in Ray.
const REFERENCES: usize = 10_000;

/// Puts small values in a process of its own.
pub(crate) struct Putter;

#[mobula::actor]
impl Putter {
    fn new() -> Self {
        Putter
    }

    async fn put(
        &self,
        ctx: &ActorContext,
        count: usize,
    ) -> std::result::Result<(), mobula::Error> {
        for _ in 0..count {
            ctx.cluster().put(0_u64).await?;
        }
        Ok(())
    }

    /// A value that refers to `count` others.
    async fn references(
        &self,
        ctx: &ActorContext,
        count: usize,
    ) -> std::result::Result<ObjectRef<Vec<ObjectRef<u64>>>, mobula::Error> {
        let mut references = Vec::new();
        for _ in 0..count {
            references.push(ctx.cluster().put(1_u64).await?);
        }
        ctx.cluster().put(references).await
    }
}

pub(crate) async fn measure(
    cluster: &Cluster,
    options: &Options,
    outcome: &mut Outcome,
) -> Result<()> {
    let [get, put, wait] = [
        "single client get calls (Plasma Store)",
        "single client put calls (Plasma Store)",
        "wait for 1k values that are there",
    ];
    let value = cluster.put(0_u64).await?;
    if options.wants(get) {
        let rate = Rate::measure(options, BATCH, async || {
            for _ in 0..BATCH {
                value.get().await?;
            }
            Ok::<_, mobula::Error>(())
        })
        .await?;
        outcome.rate(get, &rate);
    }
    if options.wants(put) {
        let rate = Rate::measure(options, BATCH, async || {
            for _ in 0..BATCH {
                cluster.put(0_u64).await?;
            }
            Ok::<_, mobula::Error>(())
        })
        .await?;
        outcome.rate(put, &rate);
    }
    if options.wants(wait) {
        let mut references = Vec::new();
        for n in 0..1000_u64 {
            references.push(cluster.put(n).await?);
        }
        let rate = Rate::measure(options, 1, async || {
            let waited = cluster
                .wait(&references, references.len(), Duration::from_secs(10))
                .await?;
            assert!(waited.pending.is_empty(), "all of them were put");
            Ok::<_, mobula::Error>(())
        })
        .await?;
        outcome.rate(wait, &rate);
    }
    elsewhere(cluster, options, outcome).await
}

/// Rows with other processes.
async fn elsewhere(cluster: &Cluster, options: &Options, outcome: &mut Outcome) -> Result<()> {
    let [many, references] = [
        "multi client put calls (Plasma Store)",
        "single client get object containing 10k refs",
    ];
    if options.wants(many) {
        let putters =
            (0..PUTTERS).map(|_| cluster.actor(Putter::new()).isolated().cpus(0.0).spawn());
        let putters = try_join_all(putters).await?;
        let rate = Rate::measure(options, PUTTERS * PUTS, async || {
            let puts = putters.iter().map(|putter| putter.put(PUTS).into_future());
            try_join_all(puts).await.map(drop)
        })
        .await?;
        outcome.rate(many, &rate);
        for putter in &putters {
            putter.stop_actor(Duration::ZERO).await?;
        }
    }
    if options.wants(references) {
        let putter = cluster.actor(Putter::new()).isolated().spawn().await?;
        let list = putter.references(REFERENCES).await?;
        let rate = Rate::measure(options, 1, async || {
            let references = list.get().await?;
            assert_eq!(references.len(), REFERENCES, "all of them come");
            Ok::<_, mobula::Error>(())
        })
        .await?;
        outcome.rate(references, &rate);
        putter.stop_actor(Duration::ZERO).await?;
    }
    Ok(())
}
