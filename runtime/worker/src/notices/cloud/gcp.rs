//! GCP: `instance/preempted` says `FALSE`, and `TRUE` when the machine is to be taken away. A question that
//! names the last answer's tag is answered when the value has changed, or after a while unchanged.

use std::time::Duration;

use reqwest::{Client, StatusCode};

use super::{CloudError, QUESTION_MAX, Said, Service, ask, beginning, now_ms};

/// How long the service may keep a question, in seconds.
const WAIT_S: u64 = 60;
/// Between two answers: a service that does not wait must not be asked in a loop without a pause.
const PAUSE: Duration = Duration::from_millis(250);

const PREEMPTED: &str = "/computeMetadata/v1/instance/preempted";

pub(super) struct Gcp {
    client: Client,
    endpoint: String,
    grace_ms: u64,
    etag: Option<String>,
    deadline_ms: Option<u64>,
}

impl Gcp {
    pub(super) fn new(client: Client, endpoint: String, grace_ms: u64) -> Self {
        Gcp {
            client,
            endpoint,
            grace_ms,
            etag: None,
            deadline_ms: None,
        }
    }
}

impl Service for Gcp {
    async fn ask(&mut self) -> Result<Said, CloudError> {
        let mut url = format!("{}{PREEMPTED}", self.endpoint);
        let mut limit = QUESTION_MAX;
        if let Some(etag) = &self.etag {
            url = format!("{url}?wait_for_change=true&timeout_sec={WAIT_S}&last_etag={etag}");
            limit += Duration::from_secs(WAIT_S);
        }
        let request = self.client.get(url).header("metadata-flavor", "Google");
        // Whatever went wrong, the next question is one that is answered at once.
        let etag = self.etag.take();
        let answer = match ask(request, limit).await {
            // Nothing has changed for longer than the service keeps a connection.
            Err(CloudError::Unreachable(_)) if etag.is_some() => {
                let request = self
                    .client
                    .get(format!("{}{PREEMPTED}", self.endpoint))
                    .header("metadata-flavor", "Google");
                ask(request, QUESTION_MAX).await?
            }
            answer => answer?,
        };
        if answer.status != StatusCode::OK {
            return Err(CloudError::Status {
                status: answer.status.as_u16(),
                path: PREEMPTED,
            });
        }
        let said = match answer.text.trim() {
            "FALSE" => {
                self.deadline_ms = None;
                Said::Nothing
            }
            "TRUE" => {
                // It says that, and not when: the grace begins when it is first heard.
                let grace_ms = self.grace_ms;
                let deadline_ms = *self
                    .deadline_ms
                    .get_or_insert_with(|| now_ms().saturating_add(grace_ms));
                Said::Leaves { deadline_ms }
            }
            other => {
                return Err(CloudError::Malformed {
                    path: PREEMPTED,
                    reason: format!("`{}` is neither TRUE nor FALSE", beginning(other)),
                });
            }
        };
        // It becomes part of an address.
        let is_plain = |etag: &String| etag.bytes().all(|b| b.is_ascii_alphanumeric());
        self.etag = answer.etag.filter(is_plain);
        Ok(said)
    }

    fn pause(&self) -> Duration {
        match self.etag {
            Some(_) => PAUSE,
            None => super::POLL,
        }
    }
}
