//! A graph of endpoints at the ingress: created, asked like an endpoint, counted, gone.

use serde_json::{Value, json};

use super::get;
use crate::serving::served::{Served, integers, output, request_of};
use crate::support::wait_for;

/// Two looks at one image, the second only where the first has seen a nine.
const GRAPH: &str = r#"
[outputs]
seen = ["again.class", "first.class"]
first = "first.class"

[[nodes]]
name = "again"
endpoint = "digits"
inputs = { image = "request.picture" }
when = { output = "first.class", is = "equal", value = 9 }

[[nodes]]
name = "first"
endpoint = "digits"
inputs = { image = "request.picture" }
"#;

pub(super) fn runs_a_graph(served: &Served, url: &str) {
    let cluster = &served.cluster;
    let file = cluster.dir().join("graph.toml");
    let path = file.to_str().unwrap();
    let create = ["serve", "graph", "create", "twice", "--file", path];
    let token_of = |created: &Value| created["token"].as_str().unwrap().to_owned();
    let ask =
        |token: &str, path: &str| get(served, &format!("{url}/v2/models/twice{path}"), Some(token));
    // What comes out of a node is no picture.
    let misfit = GRAPH.replacen("request.picture", "first.class", 1);
    std::fs::write(&file, misfit).unwrap();
    let token = token_of(&cluster.json(&create));
    let refused = wait_for("the graph to be known", || {
        let answer = ask(&token, "").unwrap();
        (answer.status == 500).then(|| answer.json().to_string())
    });
    assert!(
        refused.contains("input `image` of node `again` takes FP32"),
        "{refused}"
    );
    cluster.ok(&["serve", "graph", "delete", "twice"]);
    std::fs::write(
        &file,
        GRAPH.replace("first.class\", is", "again.class\", is"),
    )
    .unwrap();
    let text = cluster.refused(&create);
    assert!(text.contains("again -> again"), "{text}");
    std::fs::write(&file, GRAPH).unwrap();
    let created = cluster.json(&create);
    assert_eq!(created["nodes"][0]["name"], "first", "{created}");
    let token = token_of(&created);
    let metadata = wait_for("the graph to be known", || {
        let answer = ask(&token, "").unwrap();
        (answer.status == 200).then(|| answer.json())
    });
    assert_eq!(
        metadata["inputs"],
        json!([{"name": "picture", "datatype": "FP32", "shape": [-1, 64]}])
    );
    assert_eq!(ask(&token, "/ready").unwrap().status, 200);
    assert_eq!(ask(served.token(), "").unwrap().status, 401);

    let look = |image: &[f32]| {
        let mut request = request_of(image);
        request["inputs"][0]["name"] = json!("picture");
        let answer = served.send(|http| {
            http.post(format!("{url}/v2/models/twice/infer"))
                .bearer_auth(&token)
                .header("x-mobula-explain", "true")
                .body(request.to_string())
        });
        let answer = answer.unwrap();
        assert_eq!(answer.status, 200, "{}", answer.json());
        let nodes = answer.headers["x-mobula-nodes-us"].to_str().unwrap();
        let was_skipped = nodes.contains("again=skipped");
        assert!(nodes.starts_with("first="), "{nodes}");
        let answer = answer.json();
        assert_eq!(
            output(&answer, "seen")["data"],
            output(&answer, "first")["data"]
        );
        (integers(&output(&answer, "first")["data"])[0], was_skipped)
    };
    for index in 0..40 {
        let (class, was_skipped) = look(served.image(index));
        assert_eq!(was_skipped, class != 9, "image {index}");
    }
    // Which worker the address belongs to is not said: one of the two has answered all.
    let executions = "ml_pipeline_executions_total{";
    wait_for("the graph's executions to be exported", || {
        let shown = ["worker-1", "worker-2"].map(|worker| cluster.ok(&["metrics", worker]));
        let mut lines = shown.iter().flat_map(|text| text.lines());
        lines
            .any(|line| {
                line.starts_with(executions)
                    && line.contains("graph=\"twice\"")
                    && line.ends_with(" 40.0")
            })
            .then_some(())
    });
    let listed = cluster.json(&["serve", "graph", "list"]);
    assert_eq!(listed[0]["graph"], "twice", "{listed}");
    cluster.ok(&["serve", "graph", "delete", "twice"]);
}
