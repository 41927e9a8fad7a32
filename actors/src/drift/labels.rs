//! The truth about earlier requests, as clients report it: lines of JSON.
//!
//! ```text
//! {"id": "user-1", "class": 3}
//! {"id": "user-2", "label": "seven"}
//! {"id": "batch-9", "row": 4, "class": 0}
//! ```

use std::time::Duration;

use serde::Deserialize;

use super::vitals::{Label, LabelReply, Truth};
use crate::serving::feed::ROW_ID_BYTES_MAX;

/// Bytes of the labels of one request: some 100 000 lines.
pub const LABELS_BYTES_MAX: usize = 8 << 20;

/// Why a file of labels is refused. None of its labels is taken then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelsError {
    /// A line is not what it should be.
    #[error(
        "line {line}: {reason}; write lines such as {{\"id\": \"user-1\", \"class\": 3}}, or \"label\" with the \
         class's name, and \"row\" if the request had several"
    )]
    Line {
        /// Which line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// There is none.
    #[error("there is no label in it: write a line of JSON for each")]
    Empty,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    id: String,
    #[serde(default)]
    row: u32,
    class: Option<u32>,
    label: Option<String>,
}

/// The labels that some lines spell. Empty lines are left out.
///
/// # Errors
/// [`LabelsError`] names the first line that is wrong.
pub fn parse(text: &[u8]) -> Result<Vec<Label>, LabelsError> {
    let mut labels = Vec::new();
    for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
        if line.trim_ascii().is_empty() {
            continue;
        }
        let label = label_of(line).map_err(|reason| LabelsError::Line {
            line: index + 1,
            reason,
        })?;
        labels.push(label);
    }
    if labels.is_empty() {
        return Err(LabelsError::Empty);
    }
    Ok(labels)
}

fn label_of(line: &[u8]) -> Result<Label, String> {
    let Line {
        id,
        row,
        class,
        label,
    } = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    if id.is_empty() || id.len() > ROW_ID_BYTES_MAX {
        return Err(format!(
            "its id has {} bytes, and those of requests that can be joined have 1 to {ROW_ID_BYTES_MAX}",
            id.len()
        ));
    }
    let truth = match (class, label) {
        (Some(class), None) => Truth::Class(class),
        (None, Some(name)) => Truth::Name(name),
        _ => return Err("it has not exactly one of class and label".to_owned()),
    };
    Ok(Label { id, row, truth })
}

/// Bytes of lines in one request of [`send`].
const PART_BYTES: usize = 4 << 20;

/// How long an endpoint may take for them.
const PART_TIMEOUT: Duration = Duration::from_secs(60);

/// Why labels could not be reported.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// They are none.
    #[error(transparent)]
    Labels(#[from] LabelsError),
    /// The endpoint could not be asked.
    #[error("the endpoint at {url} cannot be reached: {source}")]
    Unreachable {
        /// Where.
        url: String,
        /// Why.
        source: reqwest::Error,
    },
    /// The endpoint did not take them.
    #[error("the endpoint says {status}: {text}")]
    Refused {
        /// The status.
        status: u16,
        /// Its words.
        text: String,
    },
}

/// Reports lines of labels to an endpoint, in parts; what became of them. All lines are checked before the first is sent.
///
/// # Errors
/// [`SendError`]; parts before the one that failed were taken.
pub async fn send(
    address: &str,
    endpoint: &str,
    token: &str,
    text: &[u8],
) -> Result<LabelReply, SendError> {
    parse(text)?;
    let url = format!("http://{address}/v2/models/{endpoint}/labels");
    let unreachable = |source| SendError::Unreachable {
        url: url.clone(),
        source,
    };
    let http = reqwest::Client::builder()
        .timeout(PART_TIMEOUT)
        .build()
        .map_err(unreachable)?;
    let mut reply = LabelReply::default();
    for part in parts(text) {
        let request = http.post(&url).bearer_auth(token).body(part.to_vec());
        let answer = request.send().await.map_err(unreachable)?;
        let status = answer.status();
        let body = answer.bytes().await.map_err(unreachable)?;
        let taken = serde_json::from_slice(&body)
            .ok()
            .filter(|_| status.is_success());
        reply.add(taken.ok_or_else(|| SendError::Refused {
            status: status.as_u16(),
            text: String::from_utf8_lossy(&body).into_owned(),
        })?);
    }
    Ok(reply)
}

/// Whole lines, in parts of no more than [`PART_BYTES`] where lines allow it, none of them blank.
fn parts(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = if rest.len() <= PART_BYTES {
            rest.len()
        } else {
            let is_end = |byte: &u8| *byte == b'\n';
            let within = rest[..PART_BYTES].iter().rposition(is_end);
            within
                .or_else(|| rest.iter().position(is_end))
                .map_or(rest.len(), |at| at + 1)
        };
        let (part, later) = rest.split_at(end);
        rest = later;
        Some(part)
    })
    .filter(|part| !part.trim_ascii().is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_name_requests_rows_and_classes() {
        let text =
            b"{\"id\": \"a\", \"class\": 3}\n\n{\"id\":\"b\",\"row\":2,\"label\":\"seven\"}\r\n";
        let label = |id: &str, row, truth| Label {
            id: id.to_owned(),
            row,
            truth,
        };
        assert_eq!(
            parse(text).unwrap(),
            [
                label("a", 0, Truth::Class(3)),
                label("b", 2, Truth::Name("seven".to_owned()))
            ]
        );
    }

    #[test]
    fn a_wrong_line_is_named_and_nothing_is_taken() {
        let long = format!(
            "{{\"id\": \"{}\", \"class\": 1}}",
            "x".repeat(ROW_ID_BYTES_MAX + 1)
        );
        for (line, why) in [
            ("{\"id\": \"a\"}", "exactly one of class and label"),
            (
                "{\"id\": \"a\", \"class\": 1, \"label\": \"x\"}",
                "exactly one",
            ),
            ("{\"class\": 1}", "missing field `id`"),
            ("{\"id\": \"a\", \"class\": -1}", "invalid value"),
            ("{\"id\": \"a\", \"clas\": 1}", "unknown field `clas`"),
            ("{\"id\": \"\", \"class\": 1}", "its id has 0 bytes"),
            (long.as_str(), "its id has 129 bytes"),
            ("a,1", "expected value"),
        ] {
            let text = format!("{{\"id\": \"fine\", \"class\": 0}}\n{line}\n");
            let error = parse(text.as_bytes()).unwrap_err().to_string();
            assert!(
                error.starts_with("line 2: ") && error.contains(why),
                "{error}"
            );
        }
        assert_eq!(parse(b"\n \n"), Err(LabelsError::Empty));
    }

    #[test]
    fn a_long_file_is_sent_in_parts_of_whole_lines() {
        let line = "{\"id\": \"a\", \"class\": 1}\n";
        let count = 3 * PART_BYTES / line.len();
        let text = line.repeat(count);
        let sent: Vec<&[u8]> = parts(text.as_bytes()).collect();
        assert!(sent.len() >= 3, "{}", sent.len());
        assert!(sent.iter().all(|part| part.len() <= PART_BYTES));
        let labels: usize = sent.iter().map(|part| parse(part).unwrap().len()).sum();
        assert_eq!(labels, count);
        let blank = format!("{line}{}", "\n".repeat(2 * PART_BYTES));
        assert_eq!(parts(blank.as_bytes()).count(), 1);
    }
}
