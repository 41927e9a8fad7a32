//! Replicas that compute, rightly or as a broken device does, for tests of who asks them their version's sentinels.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::device::ComputeDevice;
use crate::drift::vitals::sentinels::Sentinels;
use crate::registry::artifact::Artifact;
use crate::registry::version_file::VersionFile;
use crate::registry::version_file::tests::digits;
use crate::serving::fleet::{Backend, BackendFailure};
use crate::serving::predictor::{Answered, Predictor};
use crate::serving::replica::Inference;
use crate::serving::rows::Batch;

/// How often a task of this thread is let run, which needs a few times.
const TURNS: u32 = 100;

/// A replica with the model that it has now; without one it answers nobody.
#[derive(Clone)]
pub(in crate::serving) struct Computing {
    model: Arc<Mutex<Option<Arc<Predictor>>>>,
    asked: Arc<AtomicUsize>,
}

impl Computing {
    pub(in crate::serving) fn with(model: Option<&Arc<Predictor>>) -> Self {
        Computing {
            model: Arc::new(Mutex::new(model.cloned())),
            asked: Arc::default(),
        }
    }

    /// It computes with this model from now on.
    pub(in crate::serving) fn has(&self, model: &Arc<Predictor>) {
        *self.model.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(model));
    }

    /// How often it was asked.
    pub(in crate::serving) fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

impl Backend for Computing {
    async fn infer(&self, rows: Batch) -> Result<Inference, BackendFailure> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let model = self
            .model
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let Some(model) = model else {
            return std::future::pending().await;
        };
        let Answered { outputs, energies } = model
            .infer(rows)
            .map_err(|error| BackendFailure::Refused(error.to_string()))?;
        Ok(Inference {
            outputs,
            computed_ns: 1,
            memory_percent: None,
            energies,
        })
    }
}

fn predictor(file: VersionFile) -> Arc<Predictor> {
    let artifact = Artifact::Trained(Box::new(file));
    Arc::new(Predictor::new(&artifact, ComputeDevice::Cpu).unwrap())
}

/// A version, as it was registered and as a device computes it that is broken.
pub(in crate::serving) struct Computed {
    pub(in crate::serving) sentinels: Arc<Sentinels>,
    pub(in crate::serving) sound: Arc<Predictor>,
    pub(in crate::serving) broken: Arc<Predictor>,
}

impl Computed {
    /// A replica that computes rightly, and one that does not.
    pub(in crate::serving) fn replicas(&self) -> [Computing; 2] {
        [&self.sound, &self.broken].map(|model| Computing::with(Some(model)))
    }
}

pub(in crate::serving) fn computed() -> Computed {
    let file = digits(50);
    let mut damaged = digits(50);
    for parameter in &mut damaged.parameters {
        *parameter = -*parameter;
    }
    Computed {
        sentinels: Arc::new(Sentinels::of(&file)),
        sound: predictor(file),
        broken: predictor(damaged),
    }
}

/// Gives whoever was asked the time to answer.
pub(in crate::serving) async fn answered() {
    for _ in 0..TURNS {
        tokio::task::yield_now().await;
    }
}
