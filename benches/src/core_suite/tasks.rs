//! Tasks: functions pushed into slots, whose processes are not the caller's. The batches are those of
//! Ray's rows of the same names.

use std::time::Duration;

use futures::future::try_join_all;
use mobula::Result;
use mobula::prelude::*;

use crate::Options;
use crate::outcome::{Outcome, Rate};

/// Tasks in one batch.
const BATCH: usize = 1000;

/// Tasks of one batch of each caller, where there are several callers.
const LARGE_BATCH: usize = 10_000;

/// Callers in the row that has several.
const CALLERS: usize = 4;

const SYNC: &str = "single client tasks sync";
const ASYNC: &str = "single client tasks async";
const MULTI: &str = "multi client tasks async";
const GET_BATCH: &str = "single client tasks and get batch";
const WAIT: &str = "single client wait 1k refs";

#[mobula::task]
async fn small_value() -> [u8; 2] {
    *b"ok"
}

/// Submits tasks from a process of its own.
struct Submitter;

#[mobula::actor]
impl Submitter {
    fn new() -> Self {
        Submitter
    }

    async fn batch(
        &mut self,
        ctx: &ActorContext,
        count: usize,
    ) -> std::result::Result<(), mobula::Error> {
        run_batch(&ctx.cluster(), count).await
    }
}

/// So many tasks at once, and all of their values.
async fn run_batch(cluster: &Cluster, count: usize) -> Result<()> {
    let values: Vec<_> = (0..count)
        .map(|_| cluster.task(small_value()).submit())
        .collect();
    for value in values {
        value.get().await?;
    }
    Ok(())
}

/// So many tasks at once, then a wait for each that is ready next, with what is left.
async fn wait_one_by_one(cluster: &Cluster) -> Result<()> {
    let mut pending: Vec<_> = (0..BATCH)
        .map(|_| cluster.task(small_value()).submit())
        .collect();
    while !pending.is_empty() {
        let waited = cluster.wait(&pending, 1, Duration::from_secs(60)).await?;
        // As Ray's `wait`, which answers one even where more are ready.
        let ready = waited.ready.into_iter().skip(1);
        pending = ready.chain(waited.pending).collect();
    }
    Ok(())
}

pub(crate) async fn measure(
    cluster: &Cluster,
    options: &Options,
    outcome: &mut Outcome,
) -> Result<()> {
    if options.wants(SYNC) {
        let rate = Rate::measure(options, 1, async || {
            cluster.task(small_value()).submit().get().await.map(drop)
        })
        .await?;
        outcome.rate(SYNC, &rate);
    }
    if options.wants(ASYNC) {
        let rate = Rate::measure(options, BATCH, async || run_batch(cluster, BATCH).await).await?;
        outcome.rate(ASYNC, &rate);
    }
    if options.wants(MULTI) {
        let callers =
            try_join_all((0..CALLERS).map(|_| cluster.actor(Submitter::new()).isolated().spawn()))
                .await?;
        let rate = Rate::measure(options, LARGE_BATCH * CALLERS, async || {
            let batches = callers
                .iter()
                .map(|caller| caller.batch(LARGE_BATCH).into_future());
            try_join_all(batches)
                .await
                .map(drop)
                .map_err(mobula::Error::from)
        })
        .await?;
        outcome.rate(MULTI, &rate);
        try_join_all(
            callers
                .iter()
                .map(|caller| caller.stop_actor(Duration::ZERO)),
        )
        .await?;
    }
    if options.wants(GET_BATCH) {
        // Ray counts batches here, not tasks.
        let rate = Rate::measure(options, 1, async || run_batch(cluster, BATCH).await).await?;
        outcome.rate(GET_BATCH, &rate);
    }
    if options.wants(WAIT) {
        let rate = Rate::measure(options, 1, async || wait_one_by_one(cluster).await).await?;
        outcome.rate(WAIT, &rate);
    }
    Ok(())
}
