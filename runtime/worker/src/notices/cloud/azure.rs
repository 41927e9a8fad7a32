//! Azure: Scheduled Events, a list of what will be done to machines, and when.
//!
//! The first question turns the service on and may take two minutes, so it is asked from the start. A
//! machine of a group hears of events of the whole group: only those that name it count, where its name is
//! known. Events name machines as the metadata document does: `vm-7`, or `group_7` in a scale set. No part of
//! such a name is another machine's, and upper and lower case do not tell two apart.

use std::time::Duration;

use reqwest::{Client, StatusCode};
use serde::Deserialize;
use time::format_description::well_known::Rfc2822;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{CloudError, POLL, QUESTION_MAX, Said, Service, ask, beginning, now_ms};

/// The first answer may take two minutes.
const FIRST_MAX: Duration = Duration::from_secs(150);

const EVENTS: &str = "/metadata/scheduledevents?api-version=2020-07-01";
const NAME: &str = "/metadata/instance/compute/name?api-version=2021-02-01&format=text";

/// What ends the processes of a machine; a freeze does not.
const ENDING: [&str; 4] = ["Preempt", "Terminate", "Redeploy", "Reboot"];

pub(super) struct Azure {
    client: Client,
    endpoint: String,
    grace_ms: u64,
    name: Option<String>,
    has_answered: bool,
    /// The event that has begun without saying when, and the deadline that it was given here.
    begun: Option<(String, u64)>,
}

#[derive(Deserialize)]
struct Document {
    #[serde(rename = "Events")]
    events: Vec<Event>,
}

#[derive(Deserialize)]
struct Event {
    #[serde(rename = "EventId")]
    id: String,
    #[serde(rename = "EventType")]
    kind: String,
    #[serde(rename = "Resources", default)]
    resources: Vec<String>,
    #[serde(rename = "NotBefore", default)]
    not_before: String,
}

impl Azure {
    pub(super) fn new(client: Client, endpoint: String, grace_ms: u64) -> Self {
        Azure {
            client,
            endpoint,
            grace_ms,
            name: None,
            has_answered: false,
            begun: None,
        }
    }

    async fn get(&self, path: &'static str, limit: Duration) -> Result<String, CloudError> {
        let request = self
            .client
            .get(format!("{}{path}", self.endpoint))
            .header("metadata", "true");
        let answer = ask(request, limit).await?;
        if answer.status != StatusCode::OK {
            return Err(CloudError::Status {
                status: answer.status.as_u16(),
                path,
            });
        }
        Ok(answer.text)
    }

    fn concerns_us(&self, event: &Event) -> bool {
        let is_named = match &self.name {
            Some(name) => event
                .resources
                .iter()
                .any(|one| one.trim().eq_ignore_ascii_case(name)),
            // Better a notice that is another machine's than none.
            None => true,
        };
        is_named && ENDING.contains(&event.kind.as_str())
    }

    /// When an event begins. One that has begun already says nothing: it gets the usual grace, once.
    fn deadline_ms(&mut self, event: &Event) -> Result<u64, CloudError> {
        let text = event.not_before.trim();
        if text.is_empty() {
            if let Some((id, deadline_ms)) = &self.begun
                && *id == event.id
            {
                return Ok(*deadline_ms);
            }
            let deadline_ms = now_ms().saturating_add(self.grace_ms);
            self.begun = Some((event.id.clone(), deadline_ms));
            return Ok(deadline_ms);
        }
        let time = OffsetDateTime::parse(&text.replace("GMT", "+0000"), &Rfc2822)
            .or_else(|_| OffsetDateTime::parse(text, &Rfc3339))
            .map_err(|error| CloudError::Malformed {
                path: EVENTS,
                reason: format!("{} not before `{}`: {error}", event.kind, beginning(text)),
            })?;
        u64::try_from(time.unix_timestamp_nanos() / 1_000_000).map_err(|_| CloudError::Malformed {
            path: EVENTS,
            reason: "the time is before 1970".to_owned(),
        })
    }
}

impl Service for Azure {
    async fn ask(&mut self) -> Result<Said, CloudError> {
        if self.name.is_none() {
            let name = self.get(NAME, QUESTION_MAX).await.ok();
            self.name = name
                .map(|name| name.trim().to_owned())
                .filter(|name| !name.is_empty());
        }
        let limit = if self.has_answered {
            QUESTION_MAX
        } else {
            FIRST_MAX
        };
        let text = self.get(EVENTS, limit).await?;
        let document: Document =
            serde_json::from_str(&text).map_err(|error| CloudError::Malformed {
                path: EVENTS,
                reason: format!("`{}`: {error}", beginning(&text)),
            })?;
        self.has_answered = true;
        let ours: Vec<&Event> = document
            .events
            .iter()
            .filter(|event| self.concerns_us(event))
            .collect();
        let mut earliest = None;
        for event in ours {
            let deadline_ms = self.deadline_ms(event)?;
            earliest = Some(earliest.map_or(deadline_ms, |known: u64| known.min(deadline_ms)));
        }
        Ok(earliest.map_or(Said::Nothing, |deadline_ms| Said::Leaves { deadline_ms }))
    }

    fn pause(&self) -> Duration {
        POLL
    }
}
