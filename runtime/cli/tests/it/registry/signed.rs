//! Who has signed for a version, as the answers of its endpoint say.

use reqwest::header::HeaderMap;
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::serving::served::{FEATURES, request_of};
use crate::support::{TestCluster, wait_for};

/// An endpoint of version 1, which answers before anybody has signed for it.
pub(super) struct Signed {
    deployment: Value,
    http: reqwest::Client,
    runtime: Runtime,
}

impl Signed {
    pub(super) fn up(cluster: &TestCluster) -> Self {
        let endpoint = "--endpoint=signed";
        let signed = Signed {
            deployment: cluster.json(&["serve", "deploy", "digits:1", endpoint, "--replicas=1"]),
            http: reqwest::Client::new(),
            runtime: Runtime::new().unwrap(),
        };
        // It knows of the version, and of nobody who signed.
        wait_for("the router to know where the version comes from", || {
            let headers = signed.explained()?;
            assert!(!headers.contains_key("x-mobula-signers"), "{headers:?}");
            headers.contains_key("x-mobula-digest").then_some(())
        });
        signed
    }

    /// The headers of an explained answer, if it answers.
    fn explained(&self) -> Option<HeaderMap> {
        let url = self.deployment["url"].as_str().unwrap();
        let request = self
            .http
            .post(format!("{url}/v2/models/signed/infer"))
            .bearer_auth(self.deployment["token"].as_str().unwrap())
            .header("x-mobula-explain", "true")
            .body(request_of(&[0.5; FEATURES]).to_string());
        let response = self.runtime.block_on(request.send()).ok()?;
        (response.status() == 200).then(|| response.headers().clone())
    }

    /// The router asks every 30 s who has signed.
    pub(super) fn names_its_signers(&self, cluster: &TestCluster) {
        let known = cluster.json(&["keys", "list"]);
        let mut expected: Vec<String> = ["ann", "bob"]
            .iter()
            .map(|owner| {
                let mut keys = known.as_array().unwrap().iter();
                let key = keys.find(|key| key["owner"] == *owner);
                key.unwrap()["key"].as_str().unwrap().to_owned()
            })
            .collect();
        expected.sort();
        wait_for("the router to know both who signed", || {
            let headers = self.explained()?;
            let said = headers.get("x-mobula-signers")?.to_str().unwrap();
            let mut signers: Vec<&str> = said.split(", ").collect();
            signers.sort_unstable();
            (signers == expected).then_some(())
        });
    }
}
