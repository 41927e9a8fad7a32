//! The model repository extension: which models there are, in which state.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::error::DecodeError;

/// What a version of a model can do now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ModelState {
    /// It answers.
    Ready,
    /// It does not, for now.
    Unavailable,
}

impl ModelState {
    /// The name on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "READY",
            Self::Unavailable => "UNAVAILABLE",
        }
    }
}

/// A version of a model in the repository's index.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryEntry {
    /// The model.
    pub name: String,
    /// Its version.
    pub version: String,
    /// What it can do.
    pub state: ModelState,
    /// Why it is in that state; empty when it is ready.
    pub reason: String,
}

impl RepositoryEntry {
    /// The entry in an answer; a reason that is empty is left out, as Triton does.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut entry =
            json!({"name": self.name, "version": self.version, "state": self.state.name()});
        if !self.reason.is_empty() {
            entry["reason"] = Value::from(self.reason.as_str());
        }
        entry
    }
}

/// What is asked of the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Deserialize)]
pub struct IndexRequest {
    /// Whether only what is ready is wanted.
    #[serde(default)]
    pub ready: bool,
}

impl IndexRequest {
    /// Reads a body, which may be empty.
    ///
    /// # Errors
    /// [`DecodeError::Json`] for a body that is not such a request.
    pub fn decode(body: &[u8]) -> Result<Self, DecodeError> {
        if body.is_empty() {
            return Ok(Self::default());
        }
        serde_json::from_slice(body).map_err(|error| DecodeError::Json {
            reason: error.to_string(),
        })
    }

    /// Whether an entry is wanted.
    #[must_use]
    pub fn wants(self, entry: &RepositoryEntry) -> bool {
        !self.ready || entry.state == ModelState::Ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_request_may_be_empty_and_chooses() {
        let entry = |state| RepositoryEntry {
            name: "m".to_owned(),
            version: "1".to_owned(),
            state,
            reason: String::new(),
        };
        for (body, wants_all) in [("", true), ("{}", true), (r#"{"ready":true}"#, false)] {
            let asked = IndexRequest::decode(body.as_bytes()).unwrap();
            assert!(asked.wants(&entry(ModelState::Ready)), "{body}");
            assert_eq!(
                asked.wants(&entry(ModelState::Unavailable)),
                wants_all,
                "{body}"
            );
        }
        for body in ["hello", r#"{"ready":"yes"}"#, "[1]"] {
            assert!(IndexRequest::decode(body.as_bytes()).is_err(), "{body}");
        }
    }

    #[test]
    fn a_reason_is_there_when_there_is_one() {
        let mut entry = RepositoryEntry {
            name: "m".to_owned(),
            version: "2".to_owned(),
            state: ModelState::Unavailable,
            reason: "no replica answers yet".to_owned(),
        };
        assert_eq!(entry.to_json()["reason"], "no replica answers yet");
        assert_eq!(entry.to_json()["state"], "UNAVAILABLE");
        entry.reason.clear();
        assert_eq!(entry.to_json().get("reason"), None);
    }
}
