//! Notices from the cloud's own metadata service.
//!
//! | cloud | what is asked | grace | withdrawn when |
//! |---|---|---|---|
//! | AWS | `spot/instance-action` by IMDSv2, each [`POLL`]; `rebalance` is advice | 120 s | it is not there any more |
//! | GCP | `instance/preempted`, which answers when it changes | 30 s | it says `FALSE` again |
//! | Azure | Scheduled Events, each [`POLL`] | 30 s or more, as it says | the event is not there any more |
//!
//! Invariants:
//! 1. A service that is slow, away or talks nonsense changes nothing: a notice that stands goes on standing,
//!    and none is made up.
//! 2. Each answer is read up to [`ANSWER_BYTES_MAX`] and each question has a time limit.
//! 3. A failure is logged when it begins and when it ends, not each time.

mod aws;
mod azure;
mod gcp;

#[cfg(test)]
mod tests;

use std::fmt;
use std::future::Future;
use std::str::FromStr;
use std::time::Duration;

use reqwest::{Client, RequestBuilder, StatusCode};
use tokio::sync::mpsc;

use super::{AdviceChange, NoticeChange, NoticeSource, now_ms};
use crate::agent::Input;

/// How often a service is asked that does not answer by itself when something changes: what AWS advises.
const POLL: Duration = Duration::from_secs(5);
/// The pause after a failure, doubled up to the longest.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// How long one question may take: the services are on the machine's own link.
const QUESTION_MAX: Duration = Duration::from_secs(5);
/// No answer needs more: Azure's list of events is the longest.
const ANSWER_BYTES_MAX: usize = 256 * 1024;

/// Whose machine it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cloud {
    /// Amazon's.
    Aws,
    /// Google's.
    Gcp,
    /// Microsoft's.
    Azure,
}

impl Cloud {
    /// Where its metadata service answers.
    #[must_use]
    pub fn endpoint(self) -> &'static str {
        match self {
            Cloud::Aws | Cloud::Azure => "http://169.254.169.254",
            Cloud::Gcp => "http://metadata.google.internal",
        }
    }

    fn source(self) -> NoticeSource {
        match self {
            Cloud::Aws => NoticeSource::Aws,
            Cloud::Gcp => NoticeSource::Gcp,
            Cloud::Azure => NoticeSource::Azure,
        }
    }
}

/// A name that is no cloud's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no cloud whose notices are known: use aws, gcp or azure, or a notice file")]
pub struct UnknownCloud(String);

impl FromStr for Cloud {
    type Err = UnknownCloud;

    fn from_str(name: &str) -> Result<Self, UnknownCloud> {
        match name {
            "aws" => Ok(Cloud::Aws),
            "gcp" => Ok(Cloud::Gcp),
            "azure" => Ok(Cloud::Azure),
            _ => Err(UnknownCloud(name.to_owned())),
        }
    }
}

impl fmt::Display for Cloud {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.source().as_str())
    }
}

/// What a service says of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Said {
    /// It stays.
    Nothing,
    /// It may be taken away; there is no deadline yet.
    Advised,
    /// It is taken away then, in milliseconds since the Unix epoch.
    Leaves { deadline_ms: u64 },
}

/// Why a question brought nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CloudError {
    #[error("the metadata service cannot be asked: {0}")]
    Unreachable(String),
    #[error("the metadata service answers {status} to {path}")]
    Status { status: u16, path: &'static str },
    #[error("the metadata service's answer to {path} is not understood: {reason}")]
    Malformed { path: &'static str, reason: String },
}

/// A metadata service.
pub(crate) trait Service: Send {
    /// Asks once. Some services answer only when something has changed, or after a minute.
    fn ask(&mut self) -> impl Future<Output = Result<Said, CloudError>> + Send;

    /// The pause before the next question.
    fn pause(&self) -> Duration;
}

/// An answer.
struct Answer {
    status: StatusCode,
    etag: Option<String>,
    text: String,
}

/// Asks one question.
async fn ask(request: RequestBuilder, limit: Duration) -> Result<Answer, CloudError> {
    let failed = |error: reqwest::Error| {
        // The outer text says only that it failed; the cause says why.
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        CloudError::Unreachable(cause.unwrap_or_else(|| error.to_string()))
    };
    let mut response = request.timeout(limit).send().await.map_err(failed)?;
    let etag = response
        .headers()
        .get("etag")
        .and_then(|value| value.to_str().ok())
        .map(str::to_owned);
    let mut bytes = Vec::new();
    while let Some(part) = response.chunk().await.map_err(failed)? {
        if bytes.len() + part.len() > ANSWER_BYTES_MAX {
            let reason = format!("its answer is longer than {ANSWER_BYTES_MAX} bytes");
            return Err(CloudError::Unreachable(reason));
        }
        bytes.extend_from_slice(&part);
    }
    Ok(Answer {
        status: response.status(),
        etag,
        text: String::from_utf8_lossy(&bytes).into_owned(),
    })
}

/// The beginning of a text, for messages.
fn beginning(text: &str) -> String {
    text.chars().take(80).collect()
}

/// A client for metadata services: they are never behind a proxy, and never redirect.
fn client() -> reqwest::Result<Client> {
    Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(QUESTION_MAX)
        .build()
}

/// Watches `cloud`'s metadata service at `endpoint` until the agent ends.
pub(crate) async fn watch_cloud(
    cloud: Cloud,
    endpoint: String,
    default_grace_ms: u64,
    inputs: mpsc::Sender<Input>,
) {
    let client = match client() {
        Ok(client) => client,
        Err(error) => {
            tracing::error!(%cloud, %error, "its notices are not watched");
            return;
        }
    };
    let source = cloud.source();
    match cloud {
        Cloud::Aws => watch(aws::Aws::new(client, endpoint), source, inputs).await,
        Cloud::Gcp => {
            let service = gcp::Gcp::new(client, endpoint, default_grace_ms);
            watch(service, source, inputs).await;
        }
        Cloud::Azure => {
            let service = azure::Azure::new(client, endpoint, default_grace_ms);
            watch(service, source, inputs).await;
        }
    }
}

async fn watch(mut service: impl Service, source: NoticeSource, inputs: mpsc::Sender<Input>) {
    let mut known = Said::Nothing;
    let mut problem: Option<CloudError> = None;
    let mut pause = PAUSE_FIRST;
    loop {
        match service.ask().await {
            Ok(said) => {
                if problem.take().is_some() {
                    tracing::info!(
                        cloud = source.as_str(),
                        "the metadata service answers again"
                    );
                }
                pause = PAUSE_FIRST;
                if said != known {
                    if !tell(source, known, said, &inputs).await {
                        return;
                    }
                    known = said;
                }
                tokio::time::sleep(service.pause()).await;
            }
            Err(error) => {
                if problem.as_ref() != Some(&error) {
                    tracing::warn!(cloud = source.as_str(), %error, "no news of this machine");
                    problem = Some(error);
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}

/// Tells the agent what has changed; false if nobody listens any more. A deadline goes before the advice that
/// it takes the place of.
async fn tell(source: NoticeSource, before: Said, now: Said, inputs: &mpsc::Sender<Input>) -> bool {
    let deadline_of = |said| match said {
        Said::Leaves { deadline_ms } => Some(deadline_ms),
        Said::Nothing | Said::Advised => None,
    };
    let mut told = true;
    let deadline_ms = deadline_of(now);
    if deadline_ms != deadline_of(before) {
        let change = NoticeChange {
            source,
            deadline_ms,
        };
        told = inputs.send(Input::Notice(change)).await.is_ok();
    }
    let stands = now == Said::Advised;
    if stands != (before == Said::Advised) {
        let change = AdviceChange { source, stands };
        told = inputs.send(Input::Advice(change)).await.is_ok();
    }
    told
}
