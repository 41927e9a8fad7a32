//! Labels on nodes, and selectors over them.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// Labels of a node: key to value.
pub type Labels = BTreeMap<String, String>;

/// One requirement on a node's labels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Requirement {
    /// The label exists and has one of these values.
    In(String, Vec<String>),
    /// The label is absent, or has none of these values.
    NotIn(String, Vec<String>),
    /// The label exists.
    Exists(String),
}

impl Requirement {
    /// Whether `labels` meet this requirement.
    #[must_use]
    pub fn matches(&self, labels: &Labels) -> bool {
        match self {
            Requirement::In(key, values) => labels.get(key).is_some_and(|v| values.contains(v)),
            Requirement::NotIn(key, values) => !labels.get(key).is_some_and(|v| values.contains(v)),
            Requirement::Exists(key) => labels.contains_key(key),
        }
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Requirement::In(key, values) => write!(f, "{key} in [{}]", values.join(", ")),
            Requirement::NotIn(key, values) => write!(f, "{key} not in [{}]", values.join(", ")),
            Requirement::Exists(key) => write!(f, "{key} exists"),
        }
    }
}

/// The first requirement that `labels` do not meet.
#[must_use]
pub fn first_unmet<'a>(selector: &'a [Requirement], labels: &Labels) -> Option<&'a Requirement> {
    selector
        .iter()
        .find(|requirement| !requirement.matches(labels))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requirements_match_as_they_read() {
        let labels = Labels::from([("zone".to_owned(), "a".to_owned())]);
        let values = |v: &[&str]| v.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        assert!(Requirement::In("zone".into(), values(&["a", "b"])).matches(&labels));
        assert!(!Requirement::In("zone".into(), values(&["b"])).matches(&labels));
        assert!(Requirement::NotIn("disk".into(), values(&["ssd"])).matches(&labels));
        assert!(!Requirement::NotIn("zone".into(), values(&["a"])).matches(&labels));
        let missing = [Requirement::Exists("gpu".into())];
        assert_eq!(
            first_unmet(&missing, &labels).unwrap().to_string(),
            "gpu exists"
        );
    }
}
