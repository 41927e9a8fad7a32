//! Requests to an endpoint by the Open Inference Protocol over HTTP, as any client would send
//! them.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use mobula_actors::training::data::Dataset;
use serde_json::{Value, json};

/// Requests under way at the same time.
const CONCURRENCY: usize = 8;

/// How long one request may take.
const TIMEOUT: Duration = Duration::from_secs(10);

/// An endpoint, as a client sees it.
#[derive(Clone)]
pub(super) struct Client {
    http: reqwest::Client,
    infer_url: String,
    token: String,
}

/// What a run of requests gave.
pub(super) struct Load {
    /// Answers whose class was the label.
    pub(super) correct: usize,
    /// All answers.
    pub(super) count: usize,
    /// Of one request, sorted, in milliseconds.
    pub(super) latencies_ms: Vec<f64>,
    /// From the first request to the last answer.
    pub(super) wall: Duration,
}

impl Load {
    /// The latency that this share of the requests stayed below, in milliseconds.
    pub(super) fn percentile_ms(&self, share: f64) -> f64 {
        let last = self.latencies_ms.len().saturating_sub(1);
        let index = (share * last as f64).round() as usize;
        self.latencies_ms.get(index).copied().unwrap_or(f64::NAN)
    }

    /// Share of answers that were right.
    pub(super) fn accuracy(&self) -> f64 {
        self.correct as f64 / self.count.max(1) as f64
    }

    /// Answers a second.
    pub(super) fn rate(&self) -> f64 {
        self.count as f64 / self.wall.as_secs_f64()
    }
}

impl Client {
    pub(super) fn new(http_address: &str, endpoint: &str, token: &str) -> anyhow::Result<Self> {
        let http = reqwest::Client::builder()
            .timeout(TIMEOUT)
            .tcp_nodelay(true)
            .build()?;
        Ok(Client {
            http,
            infer_url: format!("http://{http_address}/v2/models/{endpoint}/infer"),
            token: token.to_owned(),
        })
    }

    /// Sends one image; the predicted class.
    async fn classify(&self, image: &[f32]) -> anyhow::Result<u32> {
        let body = json!({
            "inputs": [{
                "name": "image",
                "shape": [1, image.len()],
                "datatype": "FP32",
                "data": image,
            }],
        });
        let response = self
            .http
            .post(&self.infer_url)
            .bearer_auth(&self.token)
            .json(&body)
            .send()
            .await?;
        let status = response.status();
        let answer: Value = response.json().await?;
        if !status.is_success() {
            bail!("{status}: {answer}");
        }
        let outputs = answer["outputs"]
            .as_array()
            .context("an answer has outputs")?;
        let class = outputs
            .iter()
            .find(|output| output["name"] == "class")
            .and_then(|output| output["data"][0].as_u64())
            .with_context(|| format!("no class in {answer}"))?;
        Ok(u32::try_from(class)?)
    }

    /// Sends every image of `data` after `change`, several at a time.
    pub(super) async fn send_all(
        &self,
        data: &Dataset,
        change: fn(f32) -> f32,
    ) -> anyhow::Result<Load> {
        let started = Instant::now();
        let (all, width) = (data.all()?, data.shape().feature_count());
        let mut workers = tokio::task::JoinSet::new();
        for lane in 0..CONCURRENCY {
            let client = self.clone();
            let images: Vec<(Vec<f32>, u32)> = (lane..data.len())
                .step_by(CONCURRENCY)
                .map(|i| {
                    let pixels = &all.features()[i * width..][..width];
                    (
                        pixels.iter().copied().map(change).collect(),
                        all.labels()[i],
                    )
                })
                .collect();
            workers.spawn(async move {
                let mut answers = Vec::with_capacity(images.len());
                for (image, label) in images {
                    let sent = Instant::now();
                    let class = client.classify(&image).await?;
                    answers.push((class == label, sent.elapsed().as_secs_f64() * 1000.0));
                }
                anyhow::Ok(answers)
            });
        }
        let mut answers = Vec::with_capacity(data.len());
        while let Some(lane) = workers.join_next().await {
            answers.extend(lane??);
        }
        let mut latencies_ms: Vec<f64> = answers.iter().map(|(_, ms)| *ms).collect();
        latencies_ms.sort_by(f64::total_cmp);
        Ok(Load {
            correct: answers.iter().filter(|(is_correct, _)| *is_correct).count(),
            count: answers.len(),
            latencies_ms,
            wall: started.elapsed(),
        })
    }
}
