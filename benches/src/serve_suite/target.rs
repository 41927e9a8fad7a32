//! What a request says and where it goes.

use std::sync::Arc;
use std::time::Duration;

use crate::endpoint::IDENTITY_MODEL;

/// Where an endpoint is, and what lets in.
pub(crate) struct Address {
    pub(crate) address: String,
    pub(crate) token: String,
}

/// Where requests go, and what is sent: the same bytes each time.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) address: String,
    pub(crate) request: Arc<[u8]>,
    /// The same, asking for an explanation.
    pub(crate) explained: Arc<[u8]>,
    /// What both say; absent of a server that has no part of the protocol.
    question: Option<Arc<Question>>,
}

/// A request of one row as binary data, answered in kind.
#[derive(Debug)]
struct Question {
    host: String,
    token: String,
    model: String,
    /// Of the input its name, shape and type.
    input: [String; 3],
    row: Vec<u8>,
}

impl Question {
    /// As it is sent, with these further lines of the head, to be answered within this time.
    fn to_request(&self, more: &str, limit: Option<Duration>) -> Arc<[u8]> {
        let Question {
            host,
            token,
            model,
            input: [input, shape, datatype],
            row,
        } = self;
        let timeout = limit.map_or(String::new(), |limit| {
            format!(",\"timeout\":{}", limit.as_micros())
        });
        let json = format!(
            "{{\"parameters\":{{\"binary_data_output\":true{timeout}}},\"inputs\":[{{\"name\":\"{input}\",\"shape\":{shape},\
             \"datatype\":\"{datatype}\",\"parameters\":{{\"binary_data_size\":{}}}}}]}}",
            row.len()
        );
        let head = format!(
            "POST /v2/models/{model}/infer HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n\
             Inference-Header-Content-Length: {}\r\nContent-Length: {}\r\n{more}\r\n",
            json.len(),
            json.len() + row.len()
        );
        [head.as_bytes(), json.as_bytes(), row].concat().into()
    }
}

impl Target {
    /// A request of one row of numbers.
    pub(crate) fn numbers(at: &Address, model: &str, input: &str, values: usize) -> Self {
        let row: Vec<u8> = (0..values)
            .flat_map(|value| (value as f32 / 64.0).to_le_bytes())
            .collect();
        Target::new(at, model, [input, &format!("[1,{values}]"), "FP32"], &row)
    }

    /// A request of one text.
    pub(crate) fn text(at: &Address, model: &str, text: &str) -> Self {
        let element = [&(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
        Target::new(at, model, ["text", "[1]", "BYTES"], &element)
    }

    fn new(at: &Address, model: &str, input: [&str; 3], row: &[u8]) -> Self {
        let question = Question {
            host: at.address.clone(),
            token: at.token.clone(),
            model: model.to_owned(),
            input: input.map(str::to_owned),
            row: row.to_vec(),
        };
        Target {
            address: at.address.clone(),
            request: question.to_request("", None),
            explained: question.to_request("X-Mobula-Explain: true\r\n", None),
            question: Some(Arc::new(question)),
        }
    }

    /// The same for callers who wait no longer than this.
    pub(crate) fn within(&self, limit: Duration) -> Self {
        let question = self.question.as_ref();
        let hurried = question.map(|question| question.to_request("", Some(limit)));
        Target {
            request: hurried.unwrap_or_else(|| Arc::clone(&self.request)),
            ..self.clone()
        }
    }

    /// A server that has no part of the protocol, and answers with the bytes that it is sent: as many as the row has.
    pub(crate) fn echo(address: &str) -> Self {
        let row = [0; 16 * 4];
        let head = format!(
            "POST / HTTP/1.1\r\nHost: {address}\r\nContent-Type: application/octet-stream\r\nContent-Length: {}\r\n\r\n",
            row.len()
        );
        let request: Arc<[u8]> = [head.as_bytes(), &row].concat().into();
        Target {
            address: address.to_owned(),
            explained: Arc::clone(&request),
            request,
            question: None,
        }
    }

    /// The model `identity` of the conformance test: FP32 of 16.
    pub(crate) fn identity(address: &str, token: &str) -> Self {
        Target::of_identity(&Address {
            address: address.to_owned(),
            token: token.to_owned(),
        })
    }

    /// The same, by way of an ingress.
    pub(crate) fn through(&self, ingress: &str) -> Self {
        Target {
            address: ingress.to_owned(),
            ..self.clone()
        }
    }

    pub(crate) fn of_identity(at: &Address) -> Self {
        Target::numbers(at, IDENTITY_MODEL, "INPUT0", 16)
    }
}
