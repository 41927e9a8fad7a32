use super::*;

const TWO: &str = r#"
[outputs]
class = ["expert.class", "triage.class"]

[[nodes]]
name = "expert"
endpoint = "large"
inputs = { image = "request.image" }
when = { output = "triage.probabilities", is = "below", value = 0.9, elements = "all" }

[[nodes]]
name = "triage"
endpoint = "small"
inputs = { image = "request.image" }
"#;

#[test]
fn a_file_is_read_and_its_nodes_are_ordered() {
    let spec = GraphSpec::from_toml(TWO).unwrap();
    let names: Vec<&str> = spec.nodes.iter().map(|node| node.name.as_str()).collect();
    assert_eq!(names, ["triage", "expert"]);
    assert_eq!(spec.nodes[1].waits_for(), BTreeSet::from(["triage"]));
    let sources = spec.outputs[0].sources.iter().map(ToString::to_string);
    assert_eq!(
        sources.collect::<Vec<_>>(),
        ["expert.class", "triage.class"]
    );
    let bytes = mobula_core::codec::encode_plain(&spec);
    let read: GraphSpec = mobula_core::codec::decode(&bytes, bytes.len()).unwrap();
    assert_eq!(read, spec);
}

/// A graph whose nodes wait as `edges` say; each waits for the request as well.
fn graph(nodes: usize, edges: &[(usize, usize)]) -> GraphSpec {
    let node = |number: usize| {
        let wire = |name: String, source: &str| Wire {
            name,
            sources: vec![Source::parse(source).unwrap()],
        };
        let waits = edges.iter().filter(|(from, _)| *from == number);
        let waits = waits.map(|(_, to)| wire(format!("x{to}"), &format!("n{to}.y")));
        Node {
            name: format!("n{number}"),
            endpoint: "e".to_owned(),
            inputs: [wire("x".to_owned(), "request.x")]
                .into_iter()
                .chain(waits)
                .collect(),
            when: None,
        }
    };
    let output = |number: usize| Wire {
        name: format!("y{number}"),
        sources: vec![Source::parse(&format!("n{number}.y")).unwrap()],
    };
    GraphSpec {
        nodes: (0..nodes).map(node).collect(),
        outputs: (0..nodes).map(output).collect(),
    }
}

#[test]
fn a_cycle_is_refused_and_named() {
    let refused =
        |nodes, edges: &[(usize, usize)]| graph(nodes, edges).checked().unwrap_err().message;
    assert_eq!(
        refused(3, &[(0, 1), (1, 2), (2, 1)]),
        "the graph has a cycle: n1 -> n2 -> n1"
    );
    assert_eq!(refused(1, &[(0, 0)]), "the graph has a cycle: n0 -> n0");
    let text = refused(4, &[(0, 3), (3, 2), (2, 1), (1, 0)]);
    assert!(text.ends_with("n0 -> n3 -> n2 -> n1 -> n0"), "{text}");
}

#[test]
fn nodes_and_depth_are_bounded() {
    let chain = |length: usize| {
        let edges: Vec<(usize, usize)> = (1..length).map(|to| (to, to - 1)).collect();
        graph(length, &edges).checked()
    };
    assert!(chain(DEPTH_MAX).is_ok());
    let text = chain(DEPTH_MAX + 1).unwrap_err().message;
    assert!(text.contains("the limit is 8"), "{text}");
    assert!(graph(NODES_MAX, &[]).checked().is_ok());
    let text = graph(NODES_MAX + 1, &[]).checked().unwrap_err().message;
    assert!(text.contains("1 to 16 nodes"), "{text}");
}

#[test]
fn mistakes_are_named() {
    let with = |from: &str, to: &str| {
        assert!(TWO.contains(from), "{from}");
        GraphSpec::from_toml(&TWO.replace(from, to)).unwrap_err()
    };
    for (from, to, part) in [
        (
            "triage.probabilities",
            "judge.probabilities",
            "needs node `judge`, which is not there",
        ),
        (
            "expert.class\", \"triage.class",
            "triage.class",
            "no output, node or condition needs node `expert`",
        ),
        (
            "[\"expert.class\", \"triage.class\"]",
            "\"request.image\"",
            "an output comes from a node",
        ),
        (
            "name = \"triage\"",
            "name = \"expert\"",
            "two nodes are called `expert`",
        ),
        (
            "name = \"triage\"",
            "name = \"request\"",
            "`request` cannot name a node",
        ),
        ("\"request.image\"", "\"image\"", "`image` is no source"),
        (
            "is = \"below\"",
            "is = \"under\"",
            "unknown variant `under`",
        ),
        ("value = 0.9", "value = \"x\"", "no number"),
        ("value = 0.9", "value = [1]", "compares with a number"),
        (
            "output = \"triage.probabilities\"",
            "output = \"triage.p\", parameter = \"q\"",
            "either an `output` or a `parameter`",
        ),
        (
            "endpoint = \"small\"",
            "endpont = \"small\"",
            "unknown field `endpont`",
        ),
        (
            "class = [\"expert.class\", \"triage.class\"]",
            "class = []",
            "0 sources",
        ),
    ] {
        let text = with(from, to);
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}
