use std::sync::Arc;

use super::*;
use crate::serving::fleet::BackendFailure;
use crate::serving::replica::Inference;
use crate::serving::rollout::fixture::{self, in_a_word};
use crate::serving::rollout::plan::Strategy;
use crate::serving::rollout::plan::tests::begun;
use crate::serving::rows::Batch;

/// A replica that nobody asks.
#[derive(Clone)]
struct Idle;

impl Backend for Idle {
    async fn infer(&self, _rows: Batch) -> Result<Inference, BackendFailure> {
        std::future::pending().await
    }
}

/// The candidate, of whose two replicas so many answer.
fn candidate(answering: usize) -> Arc<Arm<Idle>> {
    fixture::arm(2, vec![Idle; answering])
}

fn tried(answering: usize, weight_percent: u32, requests: usize) -> Routes<Idle> {
    fixture::tried(candidate(answering), weight_percent, requests)
}

fn shadowed(answering: usize, copies: usize) -> Routes<Idle> {
    fixture::shadowed(candidate(answering), copies)
}

#[tokio::test]
async fn a_step_waits_where_the_candidate_lacks_replicas_and_says_so() {
    let rollout = begun(Strategy::Canary, &[0, 100]);
    assert!(look(&fixture::routes::<Idle>(), &rollout).is_none());
    for (routes, what, why) in [
        (tried(0, 0, 0), "waits", "0 of 2 replicas answer"),
        (tried(1, 0, 0), "waits", "1 of 2 replicas answer"),
        (tried(2, 0, 0), "pass", "2 of 2 replicas answer"),
        (
            tried(0, 5, 3),
            "waits",
            "no replica of the candidate answers; 3 of 10 requests",
        ),
        // Requests are waited for as long as it takes, and one replica can answer them.
        (tried(1, 5, 3), "hold", "3 of 10 requests"),
        (tried(0, 5, 10), "pass", "10 requests within the guardrails"),
        (
            shadowed(0, 3),
            "waits",
            "no replica of the candidate answers; 3 of 20 comparisons",
        ),
        (shadowed(1, 3), "hold", "3 of 20 comparisons"),
        (shadowed(1, 20), "waits", "1 of 2 replicas answer"),
        (
            shadowed(2, 20),
            "pass",
            "as a shadow, within the guardrails",
        ),
    ] {
        let (found, Evidence { reason, .. }) = in_a_word(look(&routes, &rollout).unwrap());
        assert_eq!(found, what, "{reason}");
        assert!(reason.starts_with(why), "{reason}");
    }
}
