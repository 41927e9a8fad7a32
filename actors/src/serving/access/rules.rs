//! Rules that send a request to a version because of a header or a parameter that it has.
//!
//! Invariants:
//! 1. The first rule that a request meets decides, if the endpoint answers with its version; one whose version is not
//!    answered with is passed over.
//! 2. Names of headers are compared in lower case, everything else as it stands.

use std::fmt;

use mobula_core::error::Rejection;
use serde::{Deserialize, Serialize};

use crate::serving::oip::{InferRequest, Parameter};

/// The longest name of a header or parameter, in bytes.
const NAME_BYTES_MAX: usize = 64;

/// The longest value, in bytes.
const VALUE_BYTES_MAX: usize = 256;

/// What of a request is looked at. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Matcher {
    /// A header of HTTP, or of gRPC's metadata, has this value.
    Header {
        /// Its name, in lower case.
        name: String,
        /// The value.
        value: String,
    },
    /// A parameter of the request has this value, written as text.
    Parameter {
        /// Its name.
        name: String,
        /// The value.
        value: String,
    },
}

impl Matcher {
    /// That a header has this value.
    #[must_use]
    pub fn header(name: &str, value: &str) -> Self {
        Matcher::Header {
            name: name.to_ascii_lowercase(),
            value: value.to_owned(),
        }
    }

    /// Refuses what no request can meet, or what is too long to be kept.
    pub fn check(&self) -> Result<(), Rejection> {
        let (what, name, value) = match self {
            Matcher::Header { name, value } => ("header", name, value),
            Matcher::Parameter { name, value } => ("parameter", name, value),
        };
        let is_name = match self {
            Matcher::Header { .. } => name.bytes().all(is_header_byte),
            Matcher::Parameter { .. } => !name.chars().any(char::is_control),
        };
        if !is_name || !(1..=NAME_BYTES_MAX).contains(&name.len()) {
            let shown: String = name.chars().take(NAME_BYTES_MAX).collect();
            return Err(Rejection::invalid(format!(
                "`{}` cannot be the name of a {what}: use 1 to {NAME_BYTES_MAX} bytes, for a header letters, digits, \
                 `-`, `_` and `.`",
                shown.escape_debug()
            )));
        }
        if value.len() > VALUE_BYTES_MAX || value.chars().any(char::is_control) {
            return Err(Rejection::invalid(format!(
                "the value of {what} `{name}` has {} bytes or holds control characters: the limit is \
                 {VALUE_BYTES_MAX} bytes of text",
                value.len()
            )));
        }
        if self.is_secret() {
            return Err(Rejection::invalid(format!(
                "header `{name}` holds a secret, and rules are shown to whoever may see the endpoint: route by \
                 another header"
            )));
        }
        Ok(())
    }

    fn is_secret(&self) -> bool {
        matches!(self, Matcher::Header { name, .. } if ["authorization", "cookie"].contains(&name.as_str()))
    }

    fn meets(&self, request: &InferRequest) -> bool {
        match self {
            Matcher::Header { name, value } => request.headers.get(name) == Some(value),
            Matcher::Parameter { name, value } => {
                request
                    .parameters
                    .get(name)
                    .is_some_and(|given| match given {
                        Parameter::String(text) => text == value,
                        // As they are written in JSON.
                        Parameter::Bool(given) => value.parse() == Ok(*given),
                        Parameter::Int(given) => value.parse() == Ok(*given),
                        Parameter::Float(given) => value.parse() == Ok(*given),
                    })
            }
        }
    }
}

fn is_header_byte(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.".contains(&byte)
}

impl fmt::Display for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Matcher::Header { name, value } => write!(f, "header {name}={value}"),
            Matcher::Parameter { name, value } => write!(f, "parameter {name}={value}"),
        }
    }
}

/// Where requests go that have something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// What they have.
    pub matcher: Matcher,
    /// The version that answers them.
    pub version: u64,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to version {}", self.matcher, self.version)
    }
}

/// The first rule that a request meets among those whose version is answered with.
#[must_use]
pub fn first_met<'a>(
    rules: &'a [Rule],
    request: &InferRequest,
    is_answered_with: impl Fn(u64) -> bool,
) -> Option<&'a Rule> {
    rules
        .iter()
        .find(|rule| rule.matcher.meets(request) && is_answered_with(rule.version))
}

/// The names of the headers that rules look at, each once.
#[must_use]
pub fn headers_of(rules: &[Rule]) -> Vec<String> {
    let names = rules.iter().filter_map(|rule| match &rule.matcher {
        Matcher::Header { name, .. } => Some(name.clone()),
        Matcher::Parameter { .. } => None,
    });
    let mut names: Vec<String> = names.collect();
    names.sort();
    names.dedup();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(matcher: Matcher, version: u64) -> Rule {
        Rule { matcher, version }
    }

    fn parameter(name: &str, value: &str) -> Matcher {
        Matcher::Parameter {
            name: name.into(),
            value: value.into(),
        }
    }

    #[test]
    fn the_first_rule_decides_whose_version_answers() {
        let rules = [
            rule(Matcher::header("X-Tier", "beta"), 3),
            rule(Matcher::header("x-tier", "beta"), 2),
            rule(parameter("speed", "7"), 1),
        ];
        let mut request = InferRequest::default();
        assert_eq!(first_met(&rules, &request, |_| true), None);
        request.headers.insert("x-tier".into(), "beta".into());
        request.parameters.insert("speed".into(), Parameter::Int(7));
        let met = |known: &'static [u64]| {
            first_met(&rules, &request, move |version| known.contains(&version))
                .map(|rule| rule.version)
        };
        assert_eq!(met(&[1, 2, 3]), Some(3));
        assert_eq!(met(&[1, 2]), Some(2));
        assert_eq!(met(&[1]), Some(1));
        assert_eq!(met(&[4]), None);
        assert_eq!(headers_of(&rules), ["x-tier"]);
    }

    #[test]
    fn what_no_request_meets_or_nobody_should_see_is_refused() {
        assert!(Matcher::header("X-Tier", "beta").check().is_ok());
        assert!(parameter("Speed", "").check().is_ok());
        for (matcher, part) in [
            (Matcher::header("", "x"), "cannot be the name of a header"),
            (
                Matcher::header("a b", "x"),
                "cannot be the name of a header",
            ),
            (Matcher::header("a", &"x".repeat(257)), "257 bytes"),
            (Matcher::header("a", "x\n"), "control characters"),
            (Matcher::header("Authorization", "x"), "holds a secret"),
            (parameter(&"p".repeat(65), "x"), "name of a parameter"),
        ] {
            let error = matcher.check().unwrap_err();
            assert!(error.message.contains(part), "{matcher:?}: {error}");
        }
    }
}
