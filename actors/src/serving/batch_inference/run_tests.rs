use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::*;

/// An endpoint that has room for a few requests only, and answers with what it is asked.
#[derive(Default)]
struct Endpoint {
    under_way: AtomicUsize,
    /// Whether there were more requests under way than there is room for.
    crowded: watch::Sender<bool>,
    answered: AtomicUsize,
    /// After so many answers every request is refused; 0 for never.
    closes_after: AtomicUsize,
}

const ROOM: usize = 3;

/// How long a request waits for others: far longer than it takes to send them.
const CROWD_LIMIT: Duration = Duration::from_secs(5);

async fn infer(
    State(endpoint): State<Arc<Endpoint>>,
    headers: HeaderMap,
    body: String,
) -> Response {
    let refuse = |status: u16, reason: &str| {
        let status = StatusCode::from_u16(status).unwrap();
        (status, axum::Json(json!({"error": reason}))).into_response()
    };
    assert_eq!(headers[PRIORITY], LOW_PRIORITY);
    let closes_after = endpoint.closes_after.load(Ordering::SeqCst);
    if closes_after > 0 && endpoint.answered.load(Ordering::SeqCst) >= closes_after {
        return refuse(401, "missing or wrong token");
    }
    let under_way = endpoint.under_way.fetch_add(1, Ordering::SeqCst) + 1;
    endpoint.crowded.send_if_modified(|is_crowded| {
        let is_news = under_way > ROOM && !*is_crowded;
        *is_crowded |= is_news;
        is_news
    });
    // The first ones wait for one more than there is room for; where so many never come, the test fails for that.
    let mut crowded = endpoint.crowded.subscribe();
    let crowded = crowded.wait_for(|is_crowded| *is_crowded);
    let _ = tokio::time::timeout(CROWD_LIMIT, crowded).await;
    endpoint.under_way.fetch_sub(1, Ordering::SeqCst);
    if under_way > ROOM {
        return refuse(503, "overloaded");
    }
    let asked: Value = serde_json::from_str(&body).unwrap();
    if asked["number"] == 7 {
        return refuse(400, "seven is wrong");
    }
    if asked["number"] == 8 {
        return refuse(500, "eight fails");
    }
    endpoint.answered.fetch_add(1, Ordering::SeqCst);
    axum::Json(json!({"answer": asked["number"]})).into_response()
}

struct At(String);

impl Locate for At {
    async fn locate(&self) -> Result<String, String> {
        Ok(self.0.clone())
    }
}

async fn serve(endpoint: Arc<Endpoint>) -> (At, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = At(format!("http://{}", listener.local_addr().unwrap()));
    let router = Router::new()
        .route("/v2/models/{model}/infer", post(infer))
        .with_state(endpoint);
    let mut server = JoinSet::new();
    server.spawn(async move { axum::serve(listener, router).await.unwrap() });
    (at, server)
}

fn batch(dir: &Path, rows: usize) -> Batch {
    let input = dir.join("in.jsonl");
    let lines = (0..rows).map(|number| format!("{{\"number\": {number}}}\n"));
    std::fs::write(&input, lines.collect::<String>()).unwrap();
    Batch {
        endpoint: "digits".into(),
        token: "t".into(),
        input,
        output: dir.join("out.jsonl"),
        in_flight: 16,
    }
}

fn lines(batch: &Batch) -> Vec<Value> {
    let text = std::fs::read_to_string(&batch.output).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn assert_whole(batch: &Batch, rows: usize) {
    let lines = lines(batch);
    assert_eq!(lines.len(), rows);
    for (row, line) in lines.iter().enumerate() {
        assert_eq!(line["row"], row, "{line}");
        match row {
            7 => assert_eq!(
                (&line["status"], &line["error"]),
                (&json!(400), &json!("seven is wrong"))
            ),
            8 => assert_eq!(
                (&line["status"], &line["error"]),
                (&json!(500), &json!("eight fails"))
            ),
            _ => assert_eq!(line["answer"], row, "{line}"),
        }
    }
}

#[tokio::test]
async fn each_row_has_its_line_and_no_more_are_sent_than_there_is_room_for() {
    let dir = tempfile::tempdir().unwrap();
    let batch = batch(dir.path(), 60);
    let endpoint = Arc::<Endpoint>::default();
    let (at, _server) = serve(Arc::clone(&endpoint)).await;
    let mut seen = Vec::new();
    let progress = run(&batch, &at, |progress| seen.push(progress))
        .await
        .unwrap();
    assert_whole(&batch, 60);
    assert_eq!(
        (progress.before, progress.answered, progress.failed),
        (0, 60, 2)
    );
    assert_eq!(seen.len(), 61);
    assert!(progress.refused > 0, "it has room for {ROOM} only");
    assert!(*endpoint.crowded.borrow());

    let again = run(&batch, &at, |_| {}).await.unwrap();
    assert_eq!((again.before, again.answered), (60, 0));
    assert_whole(&batch, 60);
}

#[tokio::test]
async fn a_run_that_ended_early_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let batch = batch(dir.path(), 40);
    let endpoint = Arc::<Endpoint>::default();
    endpoint.closes_after.store(20, Ordering::SeqCst);
    let (at, _server) = serve(Arc::clone(&endpoint)).await;
    let error = run(&batch, &at, |_| {}).await.unwrap_err();
    assert!(
        matches!(error, BatchError::Refused { status: 401, .. }),
        "{error}"
    );
    let before = lines(&batch).len() as u64;
    assert!(before < 40);

    endpoint.closes_after.store(0, Ordering::SeqCst);
    let progress = run(&batch, &at, |_| {}).await.unwrap();
    assert_eq!((progress.before, progress.answered), (before, 40 - before));
    assert_whole(&batch, 40);
}

#[tokio::test]
async fn rows_that_are_none_have_lines_that_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let batch = batch(dir.path(), 1);
    std::fs::write(&batch.input, "{\"number\": 0}\n{\n[]\n").unwrap();
    let endpoint = Endpoint {
        // One row alone waits for no other.
        crowded: watch::Sender::new(true),
        ..Endpoint::default()
    };
    let (at, _server) = serve(Arc::new(endpoint)).await;
    let progress = run(&batch, &at, |_| {}).await.unwrap();
    assert_eq!((progress.answered, progress.failed), (3, 2));
    let lines = lines(&batch);
    assert!(
        lines[1]["error"].as_str().unwrap().contains("no JSON"),
        "{lines:?}"
    );
    assert_eq!(lines[2]["row"], 2);
}
