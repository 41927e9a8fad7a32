//! Where a request's time went, as its answer says.

use super::*;

/// How long a batch takes.
const TAKES: Duration = Duration::from_millis(40);

/// When the second request comes, in the middle of the first one's batch.
const COMES: Duration = Duration::from_millis(15);

/// What of that is the model's time; the rest is the way to it and back.
const COMPUTES: Duration = Duration::from_millis(30);

/// Answers as `Three` does, after [`TAKES`].
#[derive(Clone)]
struct Slow;

impl Backend for Slow {
    async fn infer(&self, rows: Batch) -> Result<Inference, BackendFailure> {
        tokio::time::sleep(TAKES).await;
        Ok(Inference {
            computed_ns: COMPUTES.as_nanos() as u64,
            ..Three.infer(rows).await?
        })
    }
}

#[tokio::test(start_paused = true)]
async fn an_explanation_says_what_waiting_and_the_model_took() {
    let (active, _reader) = arm(4);
    open(&active, Slow);
    let service = service_of(Routes {
        active: Arc::clone(&active),
        tried: None,
        compared: None,
        shadowed: None,
    });
    let explained = async || {
        let asked = InferRequest {
            explain: true,
            ..request(1, 0.5)
        };
        let answer = service.infer("digits", None, asked).await.unwrap();
        answer.explanation.unwrap()
    };
    let second = async {
        tokio::time::sleep(COMES).await;
        explained().await
    };
    let (first, second) = tokio::join!(explained(), second);
    // The clock stands while anything is computed here: what is no waiting takes no time.
    for (found, queue) in [(&first, Duration::ZERO), (&second, TAKES - COMES)] {
        assert_eq!(
            (found.assemble, found.queue, found.compute, found.split),
            (Duration::ZERO, queue, COMPUTES, Duration::ZERO)
        );
        assert_eq!(found.hop, TAKES - COMPUTES);
    }
    let headers = second.headers("4", Duration::from_micros(3));
    let times = headers
        .iter()
        .find(|(name, _)| *name == "x-mobula-times-us");
    assert_eq!(
        times.unwrap().1,
        "queue=25000, assemble=0, hop=10000, compute=30000, split=0, serialize=3"
    );
    // The endpoint's sums are those of its requests.
    let statistics = active.statistics();
    let sum = |parts: [Duration; 2]| parts.iter().sum::<Duration>().as_nanos();
    assert_eq!(
        (statistics.queue.count, u128::from(statistics.queue.ns)),
        (2, sum([first.queue, second.queue]))
    );
    assert_eq!(u128::from(statistics.compute_infer.ns), sum([TAKES, TAKES]));
}
