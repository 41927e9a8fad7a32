use std::sync::Mutex;

use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};

use super::*;
use crate::serving::arm::{Arm, Asker, Compared, Origin};
use crate::serving::auth::BearerAuth;
use crate::serving::endpoint_service::EndpointService;
use crate::serving::experiment::findings::Decision;
use crate::serving::experiment::tally::{Tally, variant};
use crate::serving::experiment::{Direction, Measure, Metric, Plan};
use crate::serving::feed::feed;
use crate::serving::fleet::{BackendFailure, Fleet};
use crate::serving::grpc::oip_routes;
use crate::serving::replica::{Inference, classified};
use crate::serving::rollout::plan::Served;
use crate::serving::rows::Batch;
use crate::serving::server;
use crate::serving::shadow::mirror::mirror;
use crate::serving::signature::{INPUT, Signature};

const FEATURES: usize = 4;
const CLASSES: usize = 2;

/// Answers with this probability for every class.
#[derive(Clone)]
struct Always(f32);

impl Backend for Always {
    async fn infer(&self, rows: Batch) -> Result<Inference, BackendFailure> {
        let count = rows.rows.unwrap() as usize;
        Ok(Inference {
            outputs: classified(vec![self.0; count * CLASSES], vec![0; count]),
            computed_ns: 1,
            memory_percent: None,
            energies: Vec::new(),
        })
    }
}

fn arm(version: u64, backend: Always) -> Arc<Arm<Always>> {
    let (feed, _) = feed();
    let (_, origin) = watch::channel(Origin::default());
    let (arm, _) = Arm::new(version, origin, Fleet::new(1), feed, JoinSet::new());
    arm.fleet().berths().next().unwrap().1.open(backend);
    Arc::new(arm)
}

fn plan() -> Plan {
    let served = |version| Served {
        version,
        digest: "d".repeat(64),
        size_bytes: 1,
    };
    Plan {
        endpoint: "digits".into(),
        model: "digits".into(),
        control: served(1),
        treatment: served(2),
        control_share_bp: 4_000,
        treatment_share_bp: 4_000,
        seed: "exp".into(),
        primary: Metric {
            measure: Measure::Outcome("clicks".into()),
            direction: Direction::Up,
        },
        effect_min: 0.1,
        guardrails: Vec::new(),
        alpha_bp: 500,
        samples_max: 1_000,
    }
}

/// An endpoint on a loopback socket, whose treatment answers with this probability.
struct Endpoint {
    address: SocketAddr,
    tally: Arc<Mutex<Tally>>,
    treatment: Arc<Arm<Always>>,
    routes: watch::Sender<Arc<Routes<Always>>>,
    stop: oneshot::Sender<()>,
    server: JoinHandle<()>,
}

async fn start(probability: f32) -> Endpoint {
    let (active, treatment) = (arm(1, Always(0.5)), arm(2, Always(probability)));
    let tally = Arc::new(Mutex::new(Tally::new(plan(), 0.05)));
    let (routes, receiver) = watch::channel(Arc::new(Routes {
        active,
        tried: None,
        compared: Some(Compared {
            arm: Arc::clone(&treatment),
            plan: Arc::new(plan()),
            tally: Arc::clone(&tally),
        }),
        shadowed: None,
    }));
    let labels = vec!["no".into(), "yes".into()];
    let signature = Signature::classifier(FEATURES, CLASSES, labels);
    let limits = signature.body_limits();
    let auth = BearerAuth::with_token("secret");
    let outcomes = outcome_routes("digits", receiver.clone(), auth.clone());
    let (mirror, _copies) = mirror();
    let service = Arc::new(EndpointService::new("digits", signature, receiver, mirror));
    let app = oip_routes(service, auth, limits).merge(outcomes);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel();
    let server = tokio::spawn(async move {
        let stopped = async { drop(stopped.await) };
        server::serve(listener, app, stopped).await.unwrap();
    });
    Endpoint {
        address,
        tally,
        treatment,
        routes,
        stop,
        server,
    }
}

impl Endpoint {
    async fn infer(&self, key: Option<&str>) -> String {
        let body = json!({"inputs": [
            {"name": INPUT, "shape": [1, FEATURES], "datatype": "FP32", "data": vec![0.5; FEATURES]},
        ]});
        let url = format!("http://{}/v2/models/digits/infer", self.address);
        let mut request = reqwest::Client::new()
            .post(url)
            .bearer_auth("secret")
            .body(body.to_string());
        if let Some(key) = key {
            request = request.header("x-mobula-key", key);
        }
        let answer = request.send().await.unwrap().bytes().await.unwrap();
        let answer: serde_json::Value = serde_json::from_slice(&answer).unwrap();
        answer["model_version"].as_str().unwrap().to_owned()
    }

    async fn report(&self, key: &str, value: f64) -> Result<Counted, (u16, String)> {
        let reported = Reported {
            key: key.to_owned(),
            value,
            metric: None,
        };
        match report("digits", self.address, "secret", &reported).await {
            Ok(counted) => Ok(counted),
            Err(NotReported::Refused { status, reason, .. }) => Err((status, reason)),
            Err(error) => panic!("{error}"),
        }
    }

    async fn end(self) {
        self.stop.send(()).unwrap();
        self.server.await.unwrap();
    }
}

#[tokio::test]
async fn a_value_counts_once_for_the_version_that_its_key_met() {
    let endpoint = start(0.9).await;
    let (status, reason) = endpoint.report("user-1", 1.0).await.unwrap_err();
    assert_eq!(status, 404, "{reason}");
    let mut counts = [0, 0];
    for user in 0..60 {
        let key = format!("user-{user}");
        let version = endpoint.infer(Some(&key)).await;
        assert_eq!(endpoint.infer(Some(&key)).await, version);
        let expected = match variant(&plan(), &key) {
            Some(Variant::Treatment) => Some(("treatment", 2)),
            Some(Variant::Control) => Some(("control", 1)),
            None => None,
        };
        assert_eq!(
            version,
            expected.map_or(1, |(_, version)| version).to_string()
        );
        match expected {
            Some((name, version)) => {
                counts[version - 1] += 1;
                let counted = endpoint.report(&key, 1.0).await.unwrap();
                assert_eq!(
                    (counted.variant.as_str(), counted.version),
                    (name, version as u64)
                );
                let (status, reason) = endpoint.report(&key, 0.0).await.unwrap_err();
                assert_eq!(status, 409, "{reason}");
            }
            // Who takes no part is answered, and counts for nothing.
            None => assert_eq!(endpoint.report(&key, 1.0).await.unwrap_err().0, 404),
        }
    }
    let (_, findings) = lock(&endpoint.tally).judge();
    let keys = &findings.ratios[0];
    assert_eq!(
        [keys.control, keys.treatment],
        counts.map(|count| count as u64)
    );
    assert!(
        counts[0] > 0 && counts[1] > 0 && counts[0] + counts[1] < 60,
        "{counts:?}"
    );
    let clicks = &findings.measured[0];
    assert_eq!(clicks.treatment.count, keys.treatment);
    endpoint.end().await;
}

#[tokio::test]
async fn what_is_no_outcome_is_refused_in_words() {
    let endpoint = start(0.9).await;
    let url = format!("http://{}/v2/models/digits/outcomes", endpoint.address);
    let http = reqwest::Client::new();
    let post = |url: &str, token: &str, body: &str| {
        http.post(url).bearer_auth(token).body(body.to_owned())
    };
    let other = url.replace("digits", "faces");
    let long = format!("{{\"key\": \"{}\"}}", "k".repeat(BODY_BYTES_MAX));
    for (request, status, expected) in [
        (post(&url, "wrong", "{}"), 401, "token"),
        (post(&other, "secret", "{}"), 404, "faces"),
        (post(&url, "secret", "{"), 400, "the body is no outcome"),
        (
            post(&url, "secret", "{\"key\": \"a\"}"),
            400,
            "missing field `value`",
        ),
        (post(&url, "secret", &long), 413, "length limit"),
        (
            http.get(&url).bearer_auth("secret"),
            405,
            "GET is not allowed",
        ),
    ] {
        let answer = request.send().await.unwrap();
        let found = answer.status().as_u16();
        let body = answer.bytes().await.unwrap();
        let text = String::from_utf8_lossy(&body).into_owned();
        assert_eq!(found, status, "{text}");
        let said: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert!(said["error"].as_str().unwrap().contains(expected), "{text}");
    }
    let (status, reason) = endpoint.report("a", f64::MAX).await.unwrap_err();
    assert_eq!(status, 400, "{reason}");

    // Without an experiment there is nothing to count for.
    let routes = Arc::clone(&endpoint.routes.borrow());
    endpoint.routes.send_replace(Arc::new(Routes {
        active: Arc::clone(&routes.active),
        tried: None,
        compared: None,
        shadowed: None,
    }));
    let (status, reason) = endpoint.report("a", 1.0).await.unwrap_err();
    assert_eq!(status, 404);
    assert!(
        reason.contains("no experiment is under way at digits"),
        "{reason}"
    );
    endpoint.end().await;
}

#[tokio::test]
async fn a_treatment_that_fails_costs_nobody_an_answer_and_counts_as_met() {
    let endpoint = start(f32::NAN).await;
    for user in 0..40 {
        assert_eq!(endpoint.infer(Some(&format!("user-{user}"))).await, "1");
    }
    // Those without a key take part as well, each for itself.
    for _ in 0..20 {
        assert_eq!(endpoint.infer(None).await, "1");
    }
    let (ending, findings) = lock(&endpoint.tally).judge();
    assert_eq!((ending, findings.decision), (None, Decision::Undecided));
    assert!(findings.ratios[0].treatment > 0);
    let treated =
        (0..40).find(|user| variant(&plan(), &format!("user-{user}")) == Some(Variant::Treatment));
    let counted = endpoint
        .report(&format!("user-{}", treated.unwrap()), 1.0)
        .await;
    assert_eq!(counted.unwrap().variant, "treatment");

    // While no replica of it answers, nobody is assigned and nothing is counted.
    let before = lock(&endpoint.tally).exposed();
    endpoint
        .treatment
        .fleet()
        .berths()
        .next()
        .unwrap()
        .1
        .close();
    for user in 100..120 {
        assert_eq!(endpoint.infer(Some(&format!("user-{user}"))).await, "1");
    }
    assert_eq!(lock(&endpoint.tally).exposed(), before);
    let routes = Arc::clone(&endpoint.routes.borrow());
    assert!(routes.assign(Asker::Key("user-100")).counted.is_none());
    assert_eq!(routes.versions(), ["1", "2"]);
    endpoint.end().await;
}
