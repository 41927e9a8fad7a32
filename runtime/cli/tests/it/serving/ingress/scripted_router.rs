//! A router that answers as its test says, and tells it what it was asked.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use mobula::Actor;
use mobula_actors::serving::oip::{
    InferRequest, InferResponse, ModelMetadata, OipError, Parameter,
};
use mobula_actors::serving::router::{Described, Router};
use mobula_host::{ActorType, Registry, inventory};
use tokio::sync::{Semaphore, watch};

use super::stage::soon;

/// The endpoint that it answers for.
pub(super) const ENDPOINT: &str = "digits";

/// What a router shall do, and what became of it.
pub(super) struct Script {
    key: u64,
    /// Of each request that it was asked, in microseconds what it allows.
    asked: watch::Sender<Vec<Option<i64>>>,
    /// Requests that it may answer.
    answers: Semaphore,
    /// Requests that it was called back from.
    called_back: watch::Sender<u64>,
    /// Whether it says to everybody that it leaves.
    pub(super) leaves: AtomicBool,
}

/// By their keys, for the routers of this process.
static SCRIPTS: Mutex<BTreeMap<u64, Arc<Script>>> = Mutex::new(BTreeMap::new());

static NEXT_KEY: AtomicU64 = AtomicU64::new(1);

impl Script {
    /// One for a router that is about to start.
    pub(super) fn begin() -> Arc<Self> {
        let key = NEXT_KEY.fetch_add(1, Ordering::Relaxed);
        let script = Arc::new(Script {
            key,
            asked: watch::Sender::new(Vec::new()),
            answers: Semaphore::new(0),
            called_back: watch::Sender::new(0),
            leaves: AtomicBool::new(false),
        });
        SCRIPTS.lock().unwrap().insert(key, Arc::clone(&script));
        script
    }

    /// What its router is made with.
    pub(super) fn key(&self) -> u64 {
        self.key
    }

    /// What its answers say that they come from.
    pub(super) fn version(&self) -> String {
        self.key.to_string()
    }

    /// Has it answer so many requests.
    pub(super) fn let_answer(&self, count: usize) {
        self.answers.add_permits(count);
    }

    /// What each of its requests allows, in microseconds.
    pub(super) fn asked(&self) -> Vec<Option<i64>> {
        self.asked.borrow().clone()
    }

    /// Waits until it has so many requests.
    pub(super) async fn has(&self, count: usize) {
        let mut asked = self.asked.subscribe();
        let has = asked.wait_for(|asked| asked.len() >= count);
        soon("the router's request", has).await.unwrap();
    }

    /// Waits until it was called back from so many of them.
    pub(super) async fn is_called_back_from(&self, count: u64) {
        let mut called_back = self.called_back.subscribe();
        let is = called_back.wait_for(|called_back| *called_back >= count);
        soon("the end of a request that nobody waits for", is)
            .await
            .unwrap();
    }
}

/// A request that a router is at. Dropped before its end, it was called back.
struct At<'a> {
    script: &'a Script,
    is_over: bool,
}

impl Drop for At<'_> {
    fn drop(&mut self) {
        if !self.is_over {
            self.script.called_back.send_modify(|count| *count += 1);
        }
    }
}

/// A router as its test wants it.
struct ScriptedRouter {
    script: Arc<Script>,
}

#[mobula::actor(name = "test.scripted-router", max_concurrency = 1024)]
impl ScriptedRouter {
    fn new(key: u64) -> Self {
        let script = Arc::clone(&SCRIPTS.lock().unwrap()[&key]);
        ScriptedRouter { script }
    }

    async fn describe(&self, _version: Option<String>) -> Result<Described, OipError> {
        let metadata = ModelMetadata {
            name: ENDPOINT.to_owned(),
            versions: vec![self.script.version()],
            platform: "test".to_owned(),
            max_batch_size: 1,
            inputs: Vec::new(),
            outputs: Vec::new(),
        };
        Ok(Described {
            metadata,
            body_bytes_max: 1_000,
        })
    }

    async fn answer(
        &self,
        _version: Option<String>,
        request: InferRequest,
    ) -> Result<InferResponse, OipError> {
        let script = &*self.script;
        let mut at = At {
            script,
            is_over: false,
        };
        let limit = request.parameters.get("timeout").map(|limit| match limit {
            Parameter::Int(micros) => *micros,
            other => panic!("{other:?} is no number of microseconds"),
        });
        script.asked.send_modify(|asked| asked.push(limit));
        if !script.leaves.load(Ordering::Relaxed) {
            script.answers.acquire().await.unwrap().forget();
        }
        at.is_over = true;
        if script.leaves.load(Ordering::Relaxed) {
            return Err(OipError::ShuttingDown);
        }
        Ok(InferResponse {
            model_name: ENDPOINT.to_owned(),
            model_version: script.version(),
            ..InferResponse::default()
        })
    }
}

/// The scripted routers, under the name of the real one.
pub(super) fn registry() -> Registry {
    let mut known = inventory::iter::<ActorType>.into_iter();
    let scripted = known.find(|known| known.name == ScriptedRouter::TYPE_NAME);
    let router = ActorType {
        name: Router::TYPE_NAME,
        ..*scripted.unwrap()
    };
    Registry::new([router]).unwrap()
}
