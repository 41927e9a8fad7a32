//! A cluster with a trained model behind an endpoint, and a client of that endpoint.

use mobula_actors::training::data::{Dataset, Files};
use mobula_actors::training::spec::TrainSpec;
use reqwest::Method;
use reqwest::header::HeaderMap;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::REPLICAS;
use crate::support::{TestCluster, small_job, wait_for};

const STEPS: u32 = 150;

/// Pixels of an image.
pub(crate) const FEATURES: usize = 64;

/// Rows in a request: fewer than an endpoint takes.
pub(crate) const ROWS: usize = 100;

/// An answer, whatever its status.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        let text = String::from_utf8_lossy(&self.body);
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {text}"))
    }
}

/// A cluster with a trained model that is served.
pub(crate) struct Served {
    pub(crate) cluster: TestCluster,
    http: reqwest::Client,
    runtime: Runtime,
    /// The held-out images, one after the other.
    pub(crate) images: Vec<f32>,
    /// What they show.
    pub(crate) labels: Vec<u32>,
    pub(crate) accuracy: f64,
    pub(crate) deployment: Value,
}

impl Served {
    /// Trains, registers and deploys `digits`.
    pub(crate) fn up(workers: u32) -> Self {
        Served::up_with(workers, &[])
    }

    /// The same, with more arguments for `local up`.
    pub(crate) fn up_with(workers: u32, arguments: &[&str]) -> Self {
        let cluster = TestCluster::up_with(workers, arguments, &[]);
        let text =
            small_job("digits", STEPS).replace("seed = 7", "register = \"digits\"\nseed = 7");
        let spec = TrainSpec::from_toml(&text, "job.toml").unwrap();
        let job = cluster.submit_toml(&text);
        let result = cluster.result_of(&job);
        assert_eq!(result["model_version"], 1, "{result}");
        let data = Dataset::load(&spec.dataset, &Files::local()).unwrap();
        let split = data.split(spec.seed, spec.held_out_fraction);
        let held_out = split.held_out.all().unwrap();
        let replicas = REPLICAS.to_string();
        let deployment = cluster.json(&["serve", "deploy", "digits:1", "--replicas", &replicas]);
        Served {
            cluster,
            http: reqwest::Client::new(),
            runtime: tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap(),
            images: held_out.features().to_vec(),
            labels: held_out.labels().to_vec(),
            accuracy: result["accuracy"].as_f64().unwrap(),
            deployment,
        }
    }

    pub(crate) fn token(&self) -> &str {
        self.deployment["token"].as_str().unwrap()
    }

    /// Calls the endpoint; `path` begins after its address.
    pub(crate) fn call(
        &self,
        method: Method,
        path: &str,
        token: Option<&str>,
        json_length: Option<usize>,
        body: Vec<u8>,
    ) -> Answer {
        let url = format!("{}{path}", self.deployment["url"].as_str().unwrap());
        let mut request = self.http.request(method, url).body(body);
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        if let Some(length) = json_length {
            request = request.header("Inference-Header-Content-Length", length);
        }
        self.runtime.block_on(async {
            let response = request.send().await.unwrap();
            Answer {
                status: response.status().as_u16(),
                headers: response.headers().clone(),
                body: response.bytes().await.unwrap().to_vec(),
            }
        })
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.call(Method::GET, path, Some(self.token()), None, Vec::new())
    }

    pub(crate) fn infer(&self, request: &Value) -> Answer {
        let body = request.to_string().into_bytes();
        let path = "/v2/models/digits/infer";
        self.call(Method::POST, path, Some(self.token()), None, body)
    }

    /// The same, asking for an explanation as well.
    pub(crate) fn infer_explained(&self, request: &Value) -> Answer {
        let url = self.deployment["url"].as_str().unwrap();
        let request = self
            .http
            .post(format!("{url}/v2/models/digits/infer"))
            .bearer_auth(self.token())
            .header("x-mobula-explain", "true")
            .body(request.to_string());
        self.runtime.block_on(async {
            let response = request.send().await.unwrap();
            Answer {
                status: response.status().as_u16(),
                headers: response.headers().clone(),
                body: response.bytes().await.unwrap().to_vec(),
            }
        })
    }

    /// Sends the same request so many times at once; the statuses.
    pub(crate) fn infer_at_once(&self, request: &Value, count: usize) -> Vec<u16> {
        let url = self.deployment["url"].as_str().unwrap();
        let requests = (0..count).map(|_| {
            let request = self
                .http
                .post(format!("{url}/v2/models/digits/infer"))
                .bearer_auth(self.token())
                .body(request.to_string());
            async { request.send().await.unwrap().status().as_u16() }
        });
        self.runtime.block_on(futures::future::join_all(requests))
    }

    /// Sends any request; an error where nobody listens.
    pub(crate) fn send(
        &self,
        build: impl FnOnce(&reqwest::Client) -> reqwest::RequestBuilder,
    ) -> reqwest::Result<Answer> {
        let request = build(&self.http);
        self.runtime.block_on(async {
            let response = request.send().await?;
            Ok(Answer {
                status: response.status().as_u16(),
                headers: response.headers().clone(),
                body: response.bytes().await?.to_vec(),
            })
        })
    }

    /// Runs something asynchronous beside the cluster.
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Asks the endpoint at `url`, which may have no router now.
    pub(crate) fn try_infer(&self, url: &str, request: &Value) -> reqwest::Result<Answer> {
        self.send(|http| {
            http.post(format!("{url}/v2/models/digits/infer"))
                .bearer_auth(self.token())
                .body(request.to_string())
        })
    }

    /// One held-out image.
    pub(crate) fn image(&self, index: usize) -> &[f32] {
        &self.images[index * FEATURES..][..FEATURES]
    }

    /// The classes of some images, which must be answered.
    pub(crate) fn classify(&self, images: &[f32]) -> Vec<u64> {
        let answer = self.infer(&request_of(images));
        assert_eq!(answer.status, 200, "{}", answer.json());
        integers(&output(&answer.json(), "class")["data"])
    }

    /// The system's actors that have not ended and whose name begins so.
    pub(crate) fn actors(&self, prefix: &str) -> Vec<Value> {
        let actors = self.cluster.json(&["actors", "list"]);
        let is_wanted = |actor: &&Value| {
            actor["name"].as_str().unwrap().starts_with(prefix) && actor["state"] != "ended"
        };
        actors
            .as_array()
            .unwrap()
            .iter()
            .filter(is_wanted)
            .cloned()
            .collect()
    }

    /// Sends images, changed, over and over until `look` finds something in what the monitor says.
    pub(crate) fn send_until<T>(
        &self,
        what: &str,
        change: fn(f32) -> f32,
        mut look: impl FnMut(&Value) -> Option<T>,
    ) -> T {
        let images: Vec<f32> = self.images.iter().copied().map(change).collect();
        let mut requests = images.chunks_exact(ROWS * FEATURES).cycle();
        wait_for(what, || {
            self.classify(requests.next().unwrap());
            // Until the first window is full there is no monitor to speak of.
            let monitors = self.cluster.json(&["drift", "status"]);
            look(monitors.as_array().unwrap().first()?)
        })
    }
}

pub(crate) fn request_of(images: &[f32]) -> Value {
    let rows = images.len() / FEATURES;
    json!({
        "inputs": [{"name": "image", "shape": [rows, FEATURES], "datatype": "FP32", "data": images}],
    })
}

pub(crate) fn output<'a>(answer: &'a Value, name: &str) -> &'a Value {
    let outputs = answer["outputs"].as_array().unwrap();
    outputs
        .iter()
        .find(|output| output["name"] == name)
        .unwrap()
}

pub(crate) fn integers(values: &Value) -> Vec<u64> {
    values
        .as_array()
        .unwrap()
        .iter()
        .map(|value| value.as_u64().unwrap())
        .collect()
}
