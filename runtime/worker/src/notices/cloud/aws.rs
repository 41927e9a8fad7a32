//! AWS: the instance metadata service, version 2. A question carries a token, which expires.
//!
//! `spot/instance-action` is not there (404) until the machine is to be taken away, and then says when:
//! `{"action": "terminate", "time": "2017-09-18T08:22:00Z"}`. `events/recommendations/rebalance` is advice
//! that comes earlier, or never.

use std::time::Duration;

use reqwest::{Client, StatusCode};
use serde::Deserialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{Answer, CloudError, POLL, QUESTION_MAX, Said, Service, ask, beginning};

/// How long a token is asked for, in seconds: the longest that there is.
const TOKEN_TTL_S: &str = "21600";

const TOKEN: &str = "/latest/api/token";
const ACTION: &str = "/latest/meta-data/spot/instance-action";
const REBALANCE: &str = "/latest/meta-data/events/recommendations/rebalance";

pub(super) struct Aws {
    client: Client,
    endpoint: String,
    token: Option<String>,
    /// Whether the last answer about advice was that there is some.
    is_advised: bool,
}

#[derive(Deserialize)]
struct Action {
    action: String,
    time: String,
}

impl Aws {
    pub(super) fn new(client: Client, endpoint: String) -> Self {
        Aws {
            client,
            endpoint,
            token: None,
            is_advised: false,
        }
    }

    async fn token(&mut self) -> Result<String, CloudError> {
        if let Some(token) = &self.token {
            return Ok(token.clone());
        }
        let request = self
            .client
            .put(format!("{}{TOKEN}", self.endpoint))
            .header("x-aws-ec2-metadata-token-ttl-seconds", TOKEN_TTL_S);
        let answer = ask(request, QUESTION_MAX).await?;
        let is_token = !answer.text.is_empty() && answer.text.bytes().all(|b| b.is_ascii_graphic());
        if answer.status != StatusCode::OK {
            return Err(CloudError::Status {
                status: answer.status.as_u16(),
                path: TOKEN,
            });
        }
        if !is_token {
            return Err(CloudError::Malformed {
                path: TOKEN,
                reason: format!("`{}` is no token", beginning(&answer.text)),
            });
        }
        self.token = Some(answer.text.clone());
        Ok(answer.text)
    }

    /// What is at `path`; `None` if nothing is. A token that has expired is renewed once.
    async fn get(&mut self, path: &'static str) -> Result<Option<Answer>, CloudError> {
        for _ in 0..2 {
            let token = self.token().await?;
            let request = self
                .client
                .get(format!("{}{path}", self.endpoint))
                .header("x-aws-ec2-metadata-token", token);
            let answer = ask(request, QUESTION_MAX).await?;
            match answer.status {
                StatusCode::OK => return Ok(Some(answer)),
                StatusCode::NOT_FOUND => return Ok(None),
                StatusCode::UNAUTHORIZED => self.token = None,
                status => {
                    let status = status.as_u16();
                    return Err(CloudError::Status { status, path });
                }
            }
        }
        let status = StatusCode::UNAUTHORIZED.as_u16();
        Err(CloudError::Status { status, path })
    }
}

impl Service for Aws {
    async fn ask(&mut self) -> Result<Said, CloudError> {
        if let Some(answer) = self.get(ACTION).await? {
            return leaves(&answer.text);
        }
        // Advice only: that it cannot be had is no failure of what matters, and says nothing new.
        if let Ok(answer) = self.get(REBALANCE).await {
            self.is_advised = answer.is_some();
        }
        Ok(if self.is_advised {
            Said::Advised
        } else {
            Said::Nothing
        })
    }

    fn pause(&self) -> Duration {
        POLL
    }
}

fn leaves(text: &str) -> Result<Said, CloudError> {
    let malformed = |reason: String| CloudError::Malformed {
        path: ACTION,
        reason,
    };
    let action: Action = serde_json::from_str(text)
        .map_err(|error| malformed(format!("`{}`: {error}", beginning(text))))?;
    let time = OffsetDateTime::parse(&action.time, &Rfc3339).map_err(|error| {
        malformed(format!(
            "{} at `{}`: {error}",
            beginning(&action.action),
            beginning(&action.time)
        ))
    })?;
    let deadline_ms = u64::try_from(time.unix_timestamp_nanos() / 1_000_000)
        .map_err(|_| malformed("the time is before 1970".to_owned()))?;
    Ok(Said::Leaves { deadline_ms })
}
