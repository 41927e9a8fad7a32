//! Sends the rows of a batch, and writes what comes back.
//!
//! Invariants:
//! 1. Each row has one line in the output, in the order of the rows, whatever happens to the run: what was answered and
//!    not yet written is asked again, and inference changes nothing.
//! 2. What may pass (no room, no router, a connection that is lost) is tried again until [`GIVE_UP`] has passed without
//!    an answer to any row; what will not pass is the row's answer.
//! 3. Requests say that they are of low priority, and are fewer when the endpoint has no room.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use futures::StreamExt;
use reqwest::StatusCode;
use reqwest::header::{CONTENT_TYPE, RETRY_AFTER};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::input::{Format, Line, Rows};
use super::output::{Output, OutputError, describe};
use super::pace::Pace;
use crate::serving::http::{LOW_PRIORITY, PRIORITY};

/// Requests that may be under way at once, at the most: as many as fill a replica's batch.
pub const IN_FLIGHT_MAX: usize = 128;

/// How long a run goes on without an answer to any row.
pub const GIVE_UP: Duration = Duration::from_secs(600);

/// How long one request may take, the start of a first replica included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(60);

/// The first pause before a row is tried again, and the longest.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// How often a row is tried on which the model fails.
const FAILURES_MAX: u32 = 3;

/// How long a token that is refused may be one that the endpoint has not heard of yet.
const NEW_TOKEN_WAIT: Duration = Duration::from_secs(5);

/// What a batch is.
#[derive(Debug, Clone)]
pub struct Batch {
    /// The endpoint or graph.
    pub endpoint: String,
    /// Its callers' token.
    pub token: String,
    /// The file of requests.
    pub input: PathBuf,
    /// The file of answers.
    pub output: PathBuf,
    /// Requests that may be under way at once.
    pub in_flight: usize,
}

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Rows that earlier runs have answered.
    pub before: u64,
    /// Rows that this one has answered.
    pub answered: u64,
    /// Of these, rows whose line says why they have no answer.
    pub failed: u64,
    /// How often the endpoint had no room.
    pub refused: u64,
}

/// Why a run ended before its input. It goes on where it was when it is started again.
#[derive(Debug, thiserror::Error)]
pub enum BatchError {
    /// The input or the output.
    #[error(transparent)]
    Output(#[from] OutputError),
    /// The input cannot be read.
    #[error("{}: {source}", path.display())]
    Input {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// There are fewer rows than were answered: the input has changed behind its digest.
    #[error("{} ends before row {rows}, which is answered already", path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// Rows in the output.
        rows: u64,
    },
    /// The model cannot take the file as CSV, or does not say what it takes.
    #[error("{0}")]
    Format(String),
    /// No row would be answered.
    #[error("endpoint `{endpoint}` refuses the batch with status {status}: {reason}")]
    Refused {
        /// The endpoint.
        endpoint: String,
        /// What it says by number.
        status: u16,
        /// What it says.
        reason: String,
    },
    /// Nothing was answered for too long.
    #[error(
        "no row was answered within {} s, the last try: {reason}; start the same command again to go on", GIVE_UP.as_secs()
    )]
    GivenUp {
        /// What the last try brought.
        reason: String,
    },
}

/// Finds the URL of the server that answers, `http://ip:port`.
pub trait Locate: Send + Sync {
    /// Where it answers now, or why that is not known.
    fn locate(&self) -> impl Future<Output = Result<String, String>> + Send;
}

/// Answers the rows of a file that are not answered yet; `watch` sees how far it is.
pub async fn run(
    batch: &Batch,
    locate: &impl Locate,
    mut watch: impl FnMut(Progress),
) -> Result<Progress, BatchError> {
    let sender = Sender::new(batch, locate)?;
    let input = batch.input.clone();
    let record = describe(&batch.endpoint, &input)?;
    let mut output = Output::open(&batch.output, &record)?;
    let is_csv = input
        .extension()
        .is_some_and(|extension| extension == "csv");
    let format = match is_csv {
        true => sender.csv_format().await?,
        false => Format::JsonLines,
    };
    let mut progress = Progress {
        before: output.rows(),
        ..Progress::default()
    };
    watch(progress);
    let (lines, mut reader) = read_rows(&input, format.clone(), output.rows());
    let rows = tokio_stream_of(lines);
    let answers = rows.map(|line| sender.answer(&format, line));
    let mut answers = std::pin::pin!(answers.buffered(batch.in_flight.clamp(1, IN_FLIGHT_MAX)));
    while let Some(answer) = answers.next().await {
        let Answer { line, is_error } = answer?;
        output.write(line)?;
        progress.answered += 1;
        progress.failed += u64::from(is_error);
        progress.refused = sender.refused();
        watch(progress);
    }
    if let Some(ended) = reader.join_next().await {
        ended.map_err(|error| BatchError::Format(error.to_string()))??;
    }
    output.finish()?;
    Ok(progress)
}

/// The rows from `skip` on, read on a thread that may block. A read error ends them, and is the thread's result.
fn read_rows(
    path: &Path,
    format: Format,
    skip: u64,
) -> (
    mpsc::Receiver<Line>,
    tokio::task::JoinSet<Result<(), BatchError>>,
) {
    // The stream of requests holds as many again.
    let (sender, receiver) = mpsc::channel(IN_FLIGHT_MAX);
    let path = path.to_owned();
    let mut reader = tokio::task::JoinSet::new();
    reader.spawn_blocking(move || {
        let failed = |source| BatchError::Input {
            path: path.clone(),
            source,
        };
        let file = File::open(&path).map_err(failed)?;
        let mut rows = Rows::new(BufReader::new(file), format);
        for _ in 0..skip {
            if rows.next_row().map_err(failed)?.is_none() {
                return Err(BatchError::Short {
                    path: path.clone(),
                    rows: skip,
                });
            }
        }
        while let Some(line) = rows.next_row().map_err(failed)? {
            // Nobody listens where the run has ended early.
            if sender.blocking_send(line).is_err() {
                break;
            }
        }
        Ok(())
    });
    (receiver, reader)
}

fn tokio_stream_of<T>(receiver: mpsc::Receiver<T>) -> impl futures::Stream<Item = T> {
    futures::stream::unfold(receiver, |mut receiver| async {
        let item = receiver.recv().await?;
        Some((item, receiver))
    })
}

/// The line of a row.
struct Answer {
    line: Map<String, Value>,
    is_error: bool,
}

impl Answer {
    fn error(status: u16, reason: &str) -> Self {
        let line = json!({"error": reason, "status": status});
        let Value::Object(line) = line else {
            unreachable!("it was written as an object")
        };
        Answer {
            line,
            is_error: true,
        }
    }
}

/// What one try brought.
enum Tried {
    Answered(Map<String, Value>),
    /// The endpoint has no room, and says when it may have.
    NoRoom(Option<Duration>, String),
    /// Nobody answered.
    Lost(String),
    /// The model failed.
    Failed(u16, String),
    /// The row is wrong.
    Wrong(u16, String),
    /// Every row would be refused.
    Hopeless(u16, String),
}

struct Sender<'a, L> {
    batch: &'a Batch,
    locate: &'a L,
    http: reqwest::Client,
    pace: Pace,
    began: Instant,
    state: Mutex<SenderState>,
}

struct SenderState {
    url: Option<String>,
    last_answer: Instant,
    refused: u64,
}

impl<'a, L: Locate> Sender<'a, L> {
    fn new(batch: &'a Batch, locate: &'a L) -> Result<Self, BatchError> {
        let http = reqwest::Client::builder().timeout(REQUEST_TIMEOUT).build();
        let http = http.map_err(|error| BatchError::Format(format!("no HTTP client: {error}")))?;
        Ok(Sender {
            batch,
            locate,
            http,
            pace: Pace::new(batch.in_flight.clamp(1, IN_FLIGHT_MAX)),
            began: Instant::now(),
            state: Mutex::new(SenderState {
                url: None,
                last_answer: Instant::now(),
                refused: 0,
            }),
        })
    }

    fn state<T>(&self, change: impl FnOnce(&mut SenderState) -> T) -> T {
        // Whole after every single update, so a panic elsewhere does not spoil it.
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn refused(&self) -> u64 {
        self.state(|state| state.refused)
    }

    async fn csv_format(&self) -> Result<Format, BatchError> {
        let url = self.url().await.map_err(BatchError::Format)?;
        let url = format!("{url}/v2/models/{}", self.batch.endpoint);
        let asked = self.http.get(url).bearer_auth(&self.batch.token).send();
        let failed = |error: reqwest::Error| BatchError::Format(error.to_string());
        let response = asked.await.map_err(failed)?;
        let status = response.status();
        let body: Value = response.json().await.map_err(failed)?;
        if !status.is_success() {
            return Err(BatchError::Refused {
                endpoint: self.batch.endpoint.clone(),
                status: status.as_u16(),
                reason: reason_of(&body),
            });
        }
        Format::csv(&self.batch.endpoint, &body).map_err(BatchError::Format)
    }

    async fn url(&self) -> Result<String, String> {
        if let Some(url) = self.state(|state| state.url.clone()) {
            return Ok(url);
        }
        let url = self.locate.locate().await?;
        self.state(|state| state.url = Some(url.clone()));
        Ok(url)
    }

    /// The line of a row, however often it takes.
    async fn answer(&self, format: &Format, line: Line) -> Result<Answer, BatchError> {
        let request = line.and_then(|line| format.request(&line));
        let request = match request {
            Ok(request) => request.to_string(),
            Err(reason) => return Ok(Answer::error(400, &reason)),
        };
        let mut pause = PAUSE_MIN;
        let mut failures = 0;
        loop {
            let tried = {
                let _under_way = self.pace.enter().await;
                self.try_once(&request).await
            };
            let (reason, wait) = match tried {
                Tried::Answered(line) => {
                    self.pace.answered();
                    self.state(|state| state.last_answer = Instant::now());
                    return Ok(Answer {
                        line,
                        is_error: false,
                    });
                }
                Tried::Wrong(status, reason) => {
                    self.state(|state| state.last_answer = Instant::now());
                    return Ok(Answer::error(status, &reason));
                }
                Tried::Hopeless(401, reason) if self.began.elapsed() < NEW_TOKEN_WAIT => {
                    (reason, None)
                }
                Tried::Hopeless(status, reason) => {
                    return Err(BatchError::Refused {
                        endpoint: self.batch.endpoint.clone(),
                        status,
                        reason,
                    });
                }
                Tried::Failed(status, reason) => {
                    failures += 1;
                    if failures == FAILURES_MAX {
                        return Ok(Answer::error(status, &reason));
                    }
                    (reason, None)
                }
                Tried::NoRoom(wait, reason) => {
                    self.pace.refused();
                    self.state(|state| state.refused += 1);
                    (reason, wait)
                }
                Tried::Lost(reason) => {
                    self.state(|state| state.url = None);
                    (reason, None)
                }
            };
            if self.state(|state| state.last_answer.elapsed()) >= GIVE_UP {
                return Err(BatchError::GivenUp { reason });
            }
            tracing::debug!(reason, "a row is tried again");
            // Apart, so that those that were refused together do not come back together.
            let apart = rand::random_range(0.5..1.5);
            tokio::time::sleep(wait.unwrap_or(pause).min(PAUSE_MAX).mul_f64(apart)).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    async fn try_once(&self, request: &str) -> Tried {
        let url = match self.url().await {
            Ok(url) => url,
            Err(reason) => return Tried::Lost(reason),
        };
        let sent = self
            .http
            .post(format!("{url}/v2/models/{}/infer", self.batch.endpoint))
            .bearer_auth(&self.batch.token)
            .header(PRIORITY, LOW_PRIORITY)
            .body(request.to_owned())
            .send()
            .await;
        let response = match sent {
            Ok(response) => response,
            Err(error) => return Tried::Lost(error.to_string()),
        };
        let status = response.status();
        let wait = response.headers().get(RETRY_AFTER).and_then(|seconds| {
            let seconds = seconds.to_str().ok()?.parse().ok()?;
            Some(Duration::from_secs(seconds))
        });
        let is_json = response
            .headers()
            .get(CONTENT_TYPE)
            .is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
        let body = match response.bytes().await {
            Ok(body) => body,
            Err(error) => return Tried::Lost(error.to_string()),
        };
        if status.is_success() && !is_json {
            let reason = "the row asks for binary outputs, which a line of JSON cannot hold";
            return Tried::Wrong(400, reason.to_owned());
        }
        let body: Value = match serde_json::from_slice(&body) {
            Ok(body) => body,
            Err(error) => return Tried::Lost(format!("an answer that is no JSON: {error}")),
        };
        let reason = reason_of(&body);
        match (status, body) {
            (StatusCode::OK, Value::Object(line)) => Tried::Answered(line),
            (StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS, _) => {
                Tried::NoRoom(wait, reason)
            }
            (StatusCode::UNAUTHORIZED | StatusCode::NOT_FOUND, _) => {
                Tried::Hopeless(status.as_u16(), reason)
            }
            (status, _) if status.is_client_error() => Tried::Wrong(status.as_u16(), reason),
            (status, _) => Tried::Failed(status.as_u16(), reason),
        }
    }
}

fn reason_of(body: &Value) -> String {
    let error = body["error"].as_str();
    error.map_or_else(|| body.to_string(), str::to_owned)
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
