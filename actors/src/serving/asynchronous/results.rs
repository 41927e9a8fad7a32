//! Answers that nobody has come for yet.
//!
//! Invariants:
//! 1. At most [`REQUESTS_MAX`] requests are kept, under way or answered, and [`BYTES_MAX`] of answers, with all
//!    in them that a caller chooses and with the words of errors; past that a request is refused, or its answer is
//!    dropped with a word.
//! 2. A request is forgotten [`TTL`] after it came, fetched or not.
//! 3. They live as long as the process: a caller of a router that was started again sends the request again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::TryRngCore;
use rand::rngs::OsRng;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::Fetched;
use crate::serving::oip::{OipError, Parameter, Parameters, TensorData};

/// Requests that are kept.
pub const REQUESTS_MAX: usize = 1024;

/// Bytes of all answers that are kept: as much as a dozen of the largest.
pub const BYTES_MAX: usize = 64 << 20;

/// How long a request is kept.
pub const TTL: Duration = Duration::from_secs(600);

type Answer = Result<Fetched, OipError>;

/// The requests of one endpoint whose callers do not wait.
#[derive(Default)]
pub struct Results {
    kept: Arc<Mutex<Kept>>,
    /// Aborted when dropped.
    answering: Mutex<JoinSet<()>>,
}

#[derive(Default)]
struct Kept {
    requests: BTreeMap<String, Request>,
    bytes: usize,
}

struct Request {
    forgotten_at: Instant,
    /// With its size; `None` as long as it is under way.
    answer: Option<(Answer, usize)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whole after every single update, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Kept {
    fn forget_old(&mut self) {
        let now = Instant::now();
        let bytes = &mut self.bytes;
        self.requests.retain(|_, request| {
            let is_kept = request.forgotten_at > now;
            if !is_kept {
                *bytes -= request.answer.as_ref().map_or(0, |(_, size)| *size);
            }
            is_kept
        });
    }

    fn finish(&mut self, id: &str, answer: Answer) {
        self.forget_old();
        let Some(request) = self.requests.get_mut(id) else {
            return;
        };
        let size = match &answer {
            Ok(fetched) => size_of(fetched),
            Err(error) => error.to_string().len(),
        };
        request.answer = Some(if self.bytes + size <= BYTES_MAX {
            self.bytes += size;
            (answer, size)
        } else {
            let full = OipError::ResultsFull {
                limit_bytes: BYTES_MAX as u64,
            };
            (Err(full), 0)
        });
    }
}

impl Results {
    /// Has a request answered, and keeps the answer; the id to fetch it with.
    ///
    /// # Errors
    /// [`OipError::Overloaded`] where too many are kept already.
    pub fn begin(
        &self,
        answering: impl Future<Output = Answer> + Send + 'static,
    ) -> Result<String, OipError> {
        let id = new_id()?;
        let mut kept = lock(&self.kept);
        kept.forget_old();
        if kept.requests.len() >= REQUESTS_MAX {
            return Err(OipError::Overloaded {
                queued: REQUESTS_MAX as u64,
                limit: REQUESTS_MAX as u64,
            });
        }
        let request = Request {
            forgotten_at: Instant::now() + TTL,
            answer: None,
        };
        kept.requests.insert(id.clone(), request);
        drop(kept);
        let (kept, own) = (Arc::clone(&self.kept), id.clone());
        let mut tasks = lock(&self.answering);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move {
            let answer = answering.await;
            lock(&kept).finish(&own, answer);
        });
        Ok(id)
    }

    /// The answer to a request; `None` as long as it is under way.
    ///
    /// # Errors
    /// That of the request, or [`OipError::UnknownResult`].
    pub fn fetch(&self, id: &str) -> Result<Option<Fetched>, OipError> {
        let mut kept = lock(&self.kept);
        kept.forget_old();
        let request = kept.requests.get(id);
        let request = request.ok_or_else(|| OipError::UnknownResult {
            id: id.chars().take(64).collect(),
        })?;
        match &request.answer {
            None => Ok(None),
            Some((answer, _)) => answer.clone().map(Some),
        }
    }
}

/// 128 random bits: who has not sent the request does not guess it.
fn new_id() -> Result<String, OipError> {
    let mut bytes = [0; 16];
    let drawn = OsRng.try_fill_bytes(&mut bytes);
    drawn.map_err(|error| OipError::Failed {
        reason: format!("the system gives no random bytes: {error}"),
    })?;
    Ok(format!("{:032x}", u128::from_be_bytes(bytes)))
}

fn size_of(fetched: &Fetched) -> usize {
    let Fetched { response, wanted } = fetched;
    let outputs = response.outputs.iter().map(|output| {
        let data = match output.data() {
            TensorData::Bytes(values) => values.iter().map(|value| value.len() + 4).sum(),
            other => other.len() * other.datatype().size_bytes().unwrap_or(8),
        };
        output.name().len() + data
    });
    let wishes = wanted.outputs.iter();
    let wishes = wishes.map(|output| output.name.len() + size_of_parameters(&output.parameters));
    let ids = [&response.id, &wanted.id].into_iter().flatten();
    let ids: usize = ids.map(String::len).sum();
    ids + size_of_parameters(&response.parameters) + outputs.sum::<usize>() + wishes.sum::<usize>()
}

fn size_of_parameters(parameters: &Parameters) -> usize {
    let sizes = parameters.iter().map(|(name, value)| {
        let value = match value {
            Parameter::String(text) => text.len(),
            Parameter::Bool(_) | Parameter::Int(_) | Parameter::Float(_) => 8,
        };
        name.len() + value
    });
    sizes.sum()
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;
    use crate::serving::oip::{InferRequest, InferResponse, RequestedOutput, Tensor};

    fn response(bytes: usize) -> Fetched {
        let data = TensorData::Uint8(vec![7; bytes]);
        let response = InferResponse {
            outputs: vec![Tensor::new("y", vec![bytes as u64], data).unwrap()],
            ..InferResponse::default()
        };
        Fetched {
            response,
            wanted: InferRequest::default(),
        }
    }

    async fn settled(results: &Results, id: &str) -> Answer {
        loop {
            match results.fetch(id) {
                Ok(None) => tokio::task::yield_now().await,
                Ok(Some(fetched)) => return Ok(fetched),
                Err(error) => return Err(error),
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_is_there_when_it_is_and_forgotten_later() {
        let results = Results::default();
        let (answer, answering) = oneshot::channel::<Answer>();
        let id = results.begin(async { answering.await.unwrap() }).unwrap();
        assert_eq!(results.fetch(&id), Ok(None));
        answer.send(Ok(response(3))).unwrap();
        assert_eq!(settled(&results, &id).await, Ok(response(3)));
        // As often as one likes.
        assert_eq!(results.fetch(&id), Ok(Some(response(3))));
        let failed = results
            .begin(async { Err(OipError::ShuttingDown) })
            .unwrap();
        assert_eq!(
            settled(&results, &failed).await,
            Err(OipError::ShuttingDown)
        );
        tokio::time::advance(TTL).await;
        let error = results.fetch(&id).unwrap_err();
        assert_eq!(error.status(), 404, "{error}");
        assert_eq!(lock(&results.kept).bytes, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_kept_is_bounded() {
        let results = Results::default();
        let half = BYTES_MAX / 2 + 1;
        let first = results.begin(async move { Ok(response(half)) }).unwrap();
        assert!(settled(&results, &first).await.is_ok());
        let second = results.begin(async move { Ok(response(half)) }).unwrap();
        let error = settled(&results, &second).await.unwrap_err();
        assert_eq!(error.status(), 503, "{error}");
        for _ in 2..REQUESTS_MAX {
            results.begin(std::future::pending()).unwrap();
        }
        let error = results.begin(std::future::pending()).unwrap_err();
        assert!(matches!(error, OipError::Overloaded { .. }));
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_caller_wrote_and_what_an_error_says_count_too() {
        let results = Results::default();
        let mut fetched = response(3);
        fetched.response.id = Some("i".repeat(10));
        fetched.wanted.id = Some("i".repeat(10));
        let text = Parameter::String("x".repeat(100));
        fetched.wanted.outputs = vec![RequestedOutput {
            name: "output".to_owned(),
            binary_data: None,
            classes: None,
            parameters: Parameters::from([("key".to_owned(), text)]),
        }];
        // The ids, the wish, its parameter, the output's name and its data.
        assert_eq!(size_of(&fetched), 20 + 6 + 103 + 1 + 3);

        let reason = "r".repeat(BYTES_MAX);
        let failed = results
            .begin(async { Err(OipError::Failed { reason }) })
            .unwrap();
        let error = settled(&results, &failed).await.unwrap_err();
        assert!(matches!(error, OipError::ResultsFull { .. }), "{error}");
        let failed = results
            .begin(async { Err(OipError::ShuttingDown) })
            .unwrap();
        let error = settled(&results, &failed).await.unwrap_err();
        assert_eq!(lock(&results.kept).bytes, error.to_string().len());
    }
}
