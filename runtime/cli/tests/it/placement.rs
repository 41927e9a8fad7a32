//! Where actors of a job run, on workers that differ.

use serde_json::json;

use crate::examples::{embedded, example};
use crate::extra_worker::ExtraWorker;
use crate::support::TestCluster;

#[test]
fn actors_keep_apart_and_together_and_go_where_labels_and_resources_are() {
    let text = embedded("placement", &[]);
    assert!(text.contains("three that keep together are on"), "{text}");

    let cluster = TestCluster::up(1);
    let _north = ExtraWorker::start(&cluster, "north", "");
    let licences = "[worker.resources.custom]\nlicence = 2.0";
    let _south = ExtraWorker::start(&cluster, "south", licences);
    let program = example("placement");
    let arguments = ["submit", program.to_str().unwrap(), "--follow"];
    cluster.ok(&[&arguments[..], &["--", "north", "licence"]].concat());
    let result = cluster.json(&["jobs", "show", "job-1"])["result"].clone();
    assert_eq!(result["apart"], json!(["north", "south", "worker-1"]));
    assert_eq!(result["together"].as_array().unwrap().len(), 1, "{result}");
    assert_eq!(result["labelled"], "north");
    assert_ne!(result["elsewhere"], "north");
    assert_eq!(result["licensed"], json!(["south"]));
    assert_eq!(result["third"], "south");
}
