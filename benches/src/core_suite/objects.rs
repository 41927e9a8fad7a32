//! Objects. Small values stay in the process that put them, so these rows touch no shared memory;
//! Ray's rows of the same names go through its store.

use std::time::Duration;

use mobula::Result;
use mobula::prelude::*;

use crate::Options;
use crate::outcome::{Outcome, Rate};

/// Operations in one measured step: one takes less than reading the clock twice.
const BATCH: usize = 100;

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
    Ok(())
}
