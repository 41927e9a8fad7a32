//! Rules that send a request to a version because of a header or a parameter that it has.
//!
//! Invariants:
//! 1. The first rule that a request meets decides, if the endpoint answers with its version; one whose version is not
//!    answered with is passed over.
//! 2. Names of headers are compared in lower case, everything else as it stands.
//! 3. Of a rule with a share a key is always on the same side, and stays on the rule's when the share grows. Whom one
//!    rule takes says nothing about another, nor about a rollout.

use std::fmt;

use mobula_core::error::Rejection;
use serde::{Deserialize, Serialize};

use crate::serving::oip::{InferRequest, Parameter};
use crate::serving::rollout::split;

/// The longest name of a header or parameter, in bytes.
const NAME_BYTES_MAX: usize = 64;

/// The longest value, in bytes.
const VALUE_BYTES_MAX: usize = 256;

const HEADER: &str = "header";
const PARAMETER: &str = "parameter";

/// Headers that no rule looks at.
const SECRETS: [&str; 2] = ["authorization", "cookie"];

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
    /// As [`Matcher::Header`], of a share of the keys.
    HeaderShare {
        /// Its name, in lower case.
        name: String,
        /// The value.
        value: String,
        /// The share, in percent: 1 to 99.
        percent: u32,
    },
    /// As [`Matcher::Parameter`], of a share of the keys.
    ParameterShare {
        /// Its name.
        name: String,
        /// The value.
        value: String,
        /// The share, in percent: 1 to 99.
        percent: u32,
    },
}

/// What a matcher looks at, whatever its share.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Looked<'a> {
    what: &'static str,
    name: &'a str,
    value: &'a str,
}

impl fmt::Display for Looked<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Looked { what, name, value } = self;
        write!(f, "{what} {name}={value}")
    }
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

    /// The same for so many percent of the keys; for all if these are 100.
    #[must_use]
    pub fn of_percent(self, percent: u32) -> Self {
        match self {
            Matcher::Header { name, value } | Matcher::HeaderShare { name, value, .. } => {
                match percent {
                    100 => Matcher::Header { name, value },
                    percent => Matcher::HeaderShare {
                        name,
                        value,
                        percent,
                    },
                }
            }
            Matcher::Parameter { name, value } | Matcher::ParameterShare { name, value, .. } => {
                match percent {
                    100 => Matcher::Parameter { name, value },
                    percent => Matcher::ParameterShare {
                        name,
                        value,
                        percent,
                    },
                }
            }
        }
    }

    /// The share of the keys that it is about, in percent.
    #[must_use]
    pub fn percent(&self) -> u32 {
        match self {
            Matcher::Header { .. } | Matcher::Parameter { .. } => 100,
            Matcher::HeaderShare { percent, .. } | Matcher::ParameterShare { percent, .. } => {
                *percent
            }
        }
    }

    fn looked(&self) -> Looked<'_> {
        match self {
            Matcher::Header { name, value } | Matcher::HeaderShare { name, value, .. } => Looked {
                what: HEADER,
                name,
                value,
            },
            Matcher::Parameter { name, value } | Matcher::ParameterShare { name, value, .. } => {
                Looked {
                    what: PARAMETER,
                    name,
                    value,
                }
            }
        }
    }

    fn is_header(&self) -> bool {
        self.looked().what == HEADER
    }

    /// Whether both look at the same, if of other shares: one rule stands for both.
    #[must_use]
    pub fn looks_at_same(&self, other: &Matcher) -> bool {
        self.looked() == other.looked()
    }

    /// Refuses what no request can meet, or what is too long to be kept.
    pub fn check(&self) -> Result<(), Rejection> {
        let Looked { what, name, value } = self.looked();
        let is_name = if self.is_header() {
            name.bytes().all(is_header_byte)
        } else {
            !name.chars().any(char::is_control)
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
        if self.is_header() && SECRETS.contains(&name) {
            return Err(Rejection::invalid(format!(
                "header `{name}` holds a secret, and rules are shown to whoever may see the endpoint: route by \
                 another header"
            )));
        }
        let percent = self.percent();
        if !(1..=100).contains(&percent) {
            return Err(Rejection::invalid(format!(
                "a rule cannot be about {percent} percent of its requests: give 1 to 100, or remove the rule"
            )));
        }
        Ok(())
    }

    /// Whether it is about a request of this key.
    fn meets(&self, request: &InferRequest, key: &str) -> bool {
        let looked @ Looked { name, value, .. } = self.looked();
        let has_value = if self.is_header() {
            request
                .headers
                .get(name)
                .is_some_and(|given| given == value)
        } else {
            let given = request.parameters.get(name);
            given.is_some_and(|given| match given {
                Parameter::String(text) => text == value,
                // As they are written in JSON.
                Parameter::Bool(given) => value.parse() == Ok(*given),
                Parameter::Int(given) => value.parse() == Ok(*given),
                Parameter::Float(given) => value.parse() == Ok(*given),
            })
        };
        let percent = self.percent();
        // The seed does not name the version: another one meets the same keys.
        has_value
            && (percent >= 100
                || split::bucket(&format!("{looked}/"), key) < percent * split::BUCKETS / 100)
    }
}

fn is_header_byte(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.".contains(&byte)
}

impl fmt::Display for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.percent() {
            100 => write!(f, "{}", self.looked()),
            percent => write!(f, "{percent} % of {}", self.looked()),
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

/// The first rule that a request of this key meets among those whose version is answered with.
#[must_use]
pub fn first_met<'a>(
    rules: &'a [Rule],
    request: &InferRequest,
    key: &str,
    is_answered_with: impl Fn(u64) -> bool,
) -> Option<&'a Rule> {
    rules
        .iter()
        .find(|rule| rule.matcher.meets(request, key) && is_answered_with(rule.version))
}

/// The names of the headers that rules look at, each once.
#[must_use]
pub fn headers_of(rules: &[Rule]) -> Vec<String> {
    let matchers = rules.iter().map(|rule| &rule.matcher);
    let names = matchers.filter(|matcher| matcher.is_header());
    let mut names: Vec<String> = names
        .map(|matcher| matcher.looked().name.to_owned())
        .collect();
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
        assert_eq!(first_met(&rules, &request, "", |_| true), None);
        request.headers.insert("x-tier".into(), "beta".into());
        request.parameters.insert("speed".into(), Parameter::Int(7));
        let met = |known: &'static [u64]| {
            first_met(&rules, &request, "", move |version| {
                known.contains(&version)
            })
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
            (parameter("p", "x").of_percent(0), "0 percent"),
            (Matcher::header("a", "x").of_percent(101), "101 percent"),
            (
                Matcher::header("Cookie", "x").of_percent(9),
                "holds a secret",
            ),
        ] {
            let error = matcher.check().unwrap_err();
            assert!(error.message.contains(part), "{matcher:?}: {error}");
        }
    }

    #[test]
    fn a_share_takes_its_keys_and_leaves_the_others_to_the_next_rule() {
        let beta = Matcher::header("x-tier", "beta");
        let rules = |percent: u32| {
            [
                rule(beta.clone().of_percent(percent), 3),
                rule(parameter("speed", "7").of_percent(50), 2),
            ]
        };
        let mut request = InferRequest::default();
        request.headers.insert("x-tier".into(), "beta".into());
        request.parameters.insert("speed".into(), Parameter::Int(7));
        let versions = |percent| -> Vec<u64> {
            let rules = rules(percent);
            let met = |user: u32| first_met(&rules, &request, &format!("user-{user}"), |_| true);
            let version = |user| met(user).map_or(0, |rule| rule.version);
            (0..10_000).map(version).collect()
        };
        let count = |versions: &[u64], wanted| {
            let of = versions.iter().filter(|version| **version == wanted);
            of.count()
        };
        let few = versions(20);
        // Ten standard deviations of binomial counts around 2000, and of half of what is left of them.
        for (version, expected) in [(3, 2_000), (2, 4_000), (0, 4_000)] {
            let count = count(&few, version);
            assert!(count.abs_diff(expected) < 500, "{version}: {count}");
        }
        assert_eq!(versions(20), few);
        let more = versions(40);
        assert!(
            few.iter()
                .zip(&more)
                .all(|(few, more)| *few != 3 || *more == 3)
        );
        assert_eq!(count(&versions(100), 3), 10_000);

        // Who lacks the header is in no share of it.
        request.headers.clear();
        let rules = rules(99);
        assert_eq!(first_met(&rules[..1], &request, "user-1", |_| true), None);
    }

    #[test]
    fn a_share_is_part_of_a_rule_and_not_of_what_it_looks_at() {
        let beta = Matcher::header("X-Tier", "beta");
        let some = beta.clone().of_percent(20);
        assert!(beta.looks_at_same(&some) && some.looks_at_same(&beta));
        assert!(!beta.looks_at_same(&parameter("x-tier", "beta")));
        assert_eq!(some.clone().of_percent(100), beta);
        assert_eq!((some.percent(), beta.percent()), (20, 100));
        assert_eq!(
            rule(some.clone(), 3).to_string(),
            "20 % of header x-tier=beta to version 3"
        );
        assert_eq!(headers_of(&[rule(some, 3), rule(beta, 2)]), ["x-tier"]);
        assert!(parameter("p", "x").of_percent(1).check().is_ok());
    }
}
