//! What an answer can say about itself beside the protocol: where it comes from and where its time went.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A request's header by which it asks for an explanation: `true`.
pub const EXPLAIN: &str = "x-mobula-explain";

/// The version that answered.
const VERSION: &str = "x-mobula-version";
/// BLAKE3 of that version's file, in hex.
const DIGEST: &str = "x-mobula-digest";
/// The keys that signed the version's latest change of stage; left out where none has.
const SIGNERS: &str = "x-mobula-signers";
/// The rule that sent the request to the version; left out where none did.
const RULE: &str = "x-mobula-rule";
/// The nodes of a graph, each with its microseconds; left out for other models.
const NODES: &str = "x-mobula-nodes-us";
/// Microseconds by part.
const TIMES: &str = "x-mobula-times-us";

/// Whether the answer was kept from an earlier request: `hit` or `miss`; left out where nothing is kept.
const CACHE: &str = "x-mobula-cache";

/// Where an answer comes from and where its time went.
#[derive(Clone, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Explanation {
    /// BLAKE3 of the version's file; `None` as long as the router has not learnt it.
    pub digest: Option<String>,
    /// The keys that signed the version's latest change of stage.
    pub signers: Vec<String>,
    /// Reading and checking the request, and making rows of it.
    pub assemble: Duration,
    /// Waiting for its batch.
    pub queue: Duration,
    /// The model, on the batch.
    pub compute: Duration,
    /// Taking this request's outputs out of the batch's.
    pub split: Duration,
    /// The rule that sent the request to the version, as people read it; `None` where none did.
    pub rule: Option<String>,
    /// Of a graph, what became of each node.
    pub nodes: Vec<String>,
    /// Whether it was known from an earlier request; `None` where answers are not kept.
    pub cached: Option<bool>,
    /// The batch's way from the router to the replica and back.
    pub hop: Duration,
}

impl Explanation {
    /// The headers that say it, of an answer of `version` whose message took `serialize` to write.
    #[must_use]
    pub fn headers(&self, version: &str, serialize: Duration) -> Vec<(&'static str, String)> {
        let parts = [
            ("queue", self.queue),
            ("assemble", self.assemble),
            ("hop", self.hop),
            ("compute", self.compute),
            ("split", self.split),
            ("serialize", serialize),
        ];
        let times = parts.map(|(part, time)| format!("{part}={}", time.as_micros()));
        let mut headers = vec![(VERSION, version.to_owned()), (TIMES, times.join(", "))];
        headers.extend(self.digest.clone().map(|digest| (DIGEST, digest)));
        if !self.nodes.is_empty() {
            headers.push((NODES, self.nodes.join(", ")));
        }
        headers.extend(self.rule.clone().map(|rule| (RULE, rule)));
        headers.extend(self.cached.map(|known| {
            let said = if known { "hit" } else { "miss" };
            (CACHE, said.to_owned())
        }));
        if !self.signers.is_empty() {
            headers.push((SIGNERS, self.signers.join(", ")));
        }
        headers
    }
}

/// Whether the value of [`EXPLAIN`] asks for an explanation.
#[must_use]
pub fn is_asked(value: Option<&[u8]>) -> bool {
    value.is_some_and(|value| value.eq_ignore_ascii_case(b"true"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_explanation_names_each_part_and_leaves_out_what_is_not_known() {
        let mut explanation = Explanation {
            queue: Duration::from_micros(7),
            compute: Duration::from_millis(2),
            hop: Duration::from_micros(90),
            ..Explanation::default()
        };
        let headers = explanation.headers("3", Duration::from_nanos(1_999));
        assert_eq!(
            headers,
            [
                (VERSION, "3".to_owned()),
                (
                    TIMES,
                    "queue=7, assemble=0, hop=90, compute=2000, split=0, serialize=1".to_owned()
                ),
            ]
        );
        explanation.digest = Some("ab".to_owned());
        explanation.cached = Some(true);
        explanation.signers = vec!["alice".to_owned(), "bob".to_owned()];
        explanation.rule = Some("header x-tier=beta to version 3".to_owned());
        let headers = explanation.headers("3", Duration::ZERO);
        assert!(headers.contains(&(DIGEST, "ab".to_owned())), "{headers:?}");
        assert!(headers.contains(&(SIGNERS, "alice, bob".to_owned())));
        assert!(headers.contains(&(RULE, "header x-tier=beta to version 3".to_owned())));
        assert!(headers.contains(&(CACHE, "hit".to_owned())));
        assert!(is_asked(Some(b"True")) && !is_asked(Some(b"no")) && !is_asked(None));
    }
}
