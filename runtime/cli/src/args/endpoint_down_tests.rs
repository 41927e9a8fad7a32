//! For which endpoints `MobulaEndpointDown` goes off, evaluated as Prometheus evaluates it. What is here knows as much of its
//! language as that rule is written in, and refuses the rest.

use std::collections::BTreeMap;

use super::pages_tests::alerts;

type Labels = BTreeMap<String, String>;

/// A series without its name.
type Sample = (Labels, f64);

/// A series as it was scraped: its name, its labels, its value.
type Series = (&'static str, &'static [(&'static str, &'static str)], f64);

struct Evaluation<'a> {
    /// What is left to read of the expression, the next word last.
    words: Vec<String>,
    scraped: &'a [Series],
}

fn words(expression: &str) -> Vec<String> {
    let mut words = Vec::<String>::new();
    let mut is_in_word = false;
    for c in expression.chars() {
        let is_of_word = c.is_ascii_alphanumeric() || c == '_';
        if is_in_word && is_of_word {
            words.last_mut().unwrap().push(c);
        } else if !c.is_whitespace() {
            words.push(c.to_string());
        }
        is_in_word = is_of_word;
    }
    words
}

/// Those of the labels that have these names.
fn only(labels: &Labels, names: &[String]) -> Labels {
    let labels = labels.iter().filter(|(name, _)| names.contains(name));
    labels
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

impl Evaluation<'_> {
    fn take(&mut self) -> String {
        self.words.pop().expect("the expression goes on")
    }

    fn accept(&mut self, word: &str) -> bool {
        let is_next = self.words.last().is_some_and(|next| next == word);
        if is_next {
            self.words.pop();
        }
        is_next
    }

    fn expect(&mut self, word: &str) {
        let found = self.take();
        assert_eq!(found, word, "before {:?}", self.words);
    }

    /// `(endpoint, model)`.
    fn names(&mut self) -> Vec<String> {
        self.expect("(");
        let mut names = vec![self.take()];
        while self.accept(",") {
            names.push(self.take());
        }
        self.expect(")");
        names
    }

    /// `or` binds the least.
    fn either(&mut self) -> Vec<Sample> {
        let mut found = self.without();
        while self.accept("or") {
            for sample in self.without() {
                if !found.iter().any(|(labels, _)| *labels == sample.0) {
                    found.push(sample);
                }
            }
        }
        found
    }

    fn without(&mut self) -> Vec<Sample> {
        let mut found = self.compared();
        while self.accept("unless") {
            self.expect("on");
            let names = self.names();
            let others = self.compared();
            let others: Vec<Labels> = others
                .iter()
                .map(|(labels, _)| only(labels, &names))
                .collect();
            found.retain(|(labels, _)| !others.contains(&only(labels, &names)));
        }
        found
    }

    fn compared(&mut self) -> Vec<Sample> {
        let mut found = self.vector();
        if self.accept(">") {
            let limit: f64 = self.take().parse().unwrap();
            found.retain(|(_, value)| *value > limit);
        }
        found
    }

    fn vector(&mut self) -> Vec<Sample> {
        if self.accept("(") {
            let found = self.either();
            self.expect(")");
            return found;
        }
        let name = self.take();
        if name == "max" {
            return self.maximum();
        }
        assert!(name.starts_with("mobula_"), "{name} is not known here");
        let series = self.scraped.iter().filter(|series| series.0 == name);
        series
            .map(|(_, labels, value)| {
                let labels = labels.iter();
                let labels = labels.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
                (labels.collect(), *value)
            })
            .collect()
    }

    fn maximum(&mut self) -> Vec<Sample> {
        self.expect("by");
        let names = self.names();
        self.expect("(");
        let within = self.either();
        self.expect(")");
        let mut groups = BTreeMap::<Labels, f64>::new();
        for (labels, value) in within {
            let most = groups.entry(only(&labels, &names)).or_insert(value);
            *most = most.max(value);
        }
        groups.into_iter().collect()
    }
}

/// The endpoints that the alert names.
fn down(scraped: &[Series]) -> Vec<String> {
    let alert = &alerts()["MobulaEndpointDown"];
    let mut words = words(&alert["expr"]);
    words.reverse();
    let mut evaluation = Evaluation { words, scraped };
    let found = evaluation.either();
    assert!(evaluation.words.is_empty(), "{:?}", evaluation.words);
    let named = found.iter().map(|(labels, _)| labels["endpoint"].clone());
    named.collect()
}

/// What two heads say that `digits` shall have.
fn wanted(replicas: f64) -> [Series; 2] {
    let name = "mobula_endpoint_replicas_wanted";
    [
        (
            name,
            &[("endpoint", "digits"), ("instance", "head-1")],
            replicas,
        ),
        (
            name,
            &[("endpoint", "digits"), ("instance", "head-2")],
            replicas,
        ),
    ]
}

/// What the router of `digits` says that it has.
fn answering(replicas: f64) -> [Series; 1] {
    let labels = &[("endpoint", "digits"), ("host", "host-7"), ("job", "job-0")];
    [("mobula_serving_replicas_answering", labels, replicas)]
}

/// Another endpoint, which answers.
const OTHER: [Series; 2] = [
    (
        "mobula_endpoint_replicas_wanted",
        &[("endpoint", "other"), ("instance", "head-1")],
        1.0,
    ),
    (
        "mobula_serving_replicas_answering",
        &[("endpoint", "other"), ("host", "host-8"), ("job", "job-0")],
        1.0,
    ),
];

#[test]
fn an_endpoint_without_its_router_or_a_replica_is_named_and_one_that_sleeps_is_not() {
    let cases: [(&str, Vec<Series>, &[&str]); 7] = [
        (
            "all answer",
            [&wanted(2.0)[..], &answering(2.0)].concat(),
            &[],
        ),
        (
            "one of two answers",
            [&wanted(2.0)[..], &answering(1.0)].concat(),
            &[],
        ),
        (
            "none answers",
            [&wanted(2.0)[..], &answering(0.0)].concat(),
            &["digits"],
        ),
        // Whatever the router said ended with it, and each head says what it wants.
        ("the router is gone", wanted(2.0).to_vec(), &["digits"]),
        ("asleep", [&wanted(0.0)[..], &answering(0.0)].concat(), &[]),
        (
            "asleep, and nothing wakes it",
            wanted(0.0).to_vec(),
            &["digits"],
        ),
        ("being deleted", answering(0.0).to_vec(), &[]),
    ];
    for (case, scraped, expected) in cases {
        let scraped = [&scraped[..], &OTHER].concat();
        assert_eq!(down(&scraped), expected, "{case}");
    }
    let summary = &alerts()["MobulaEndpointDown"]["summary"];
    assert!(summary.contains("{{ $labels.endpoint }}"), "{summary}");
}
