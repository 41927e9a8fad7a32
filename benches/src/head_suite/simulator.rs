//! How many seeds of the simulator one core runs in an hour.

use mobula_benches::results::Results;
use mobula_chaos::sim::{Campaign, EVENTS_MAX, run_many};
use serde_json::json;

use crate::Options;

pub(crate) fn measure(options: &Options, results: &mut Results) {
    let campaign = Campaign {
        first_seed: 1,
        seeds: Some(options.seeds),
        time_max: None,
        events_max: EVENTS_MAX,
        threads: 1,
        stops_at_failure: false,
    };
    let summary = run_many(&campaign, || {}, |_| {});
    let rate = summary.seeds_per_core_hour(campaign.threads);
    let name = "simulator, one thread";
    results.row(
        &format!(
            "{name:<60} {rate:>12.0} seeds an hour ({} of {} failed)",
            summary.failed, summary.seeds
        ),
        json!({
            "name": name, "unit": "1/h", "mean": rate, "seeds": summary.seeds,
            "failed": summary.failed,
        }),
    );
}
