//! Jobs as trainers compute them, twenty steps each: an MLP, a CNN and a transformer, on the GPU and on the CPU. Weights and
//! optimizer state must end in one hash.

use std::path::PathBuf;

use candle_core::{Device, Error, Result};

use super::{Outcome, Work};
use crate::kernels::test_values::relative_error;
use crate::training::data::text::TextSpec;
use crate::training::data::{DataSpec, Files};
use crate::training::local::LocalTrainer;
use crate::training::models::{ModelSpec, TransformerSpec};
use crate::training::spec::TrainSpec;
use crate::training::state::TrainState;
use crate::training::workload::Workload;

const STEPS: u64 = 20;

pub(super) fn check(device: &Device, tell: &mut impl FnMut(Outcome)) -> Result<()> {
    let text = TextFile::new()?;
    for spec in [
        TrainSpec::digits_mlp("mlp"),
        TrainSpec::digits_cnn("cnn"),
        transformer(&text),
    ] {
        let spec = TrainSpec {
            steps: STEPS,
            ..spec
        };
        let gpu = train(&spec, device)?;
        let cpu = train(&spec, &Device::Cpu)?;
        let reference: Vec<f64> = cpu.params.iter().map(|value| f64::from(*value)).collect();
        tell(Outcome {
            kernel: format!("training of a {}", spec.model.kind()),
            shape: format!("{STEPS} steps"),
            error: relative_error(&gpu.params, &reference),
            error_max: 0.0,
            has_cpu_bits: gpu.weights_blake3() == cpu.weights_blake3(),
            times: None,
            work: Work::Operations(0.0),
        });
    }
    Ok(())
}

fn train(spec: &TrainSpec, device: &Device) -> Result<TrainState> {
    let workload = Workload::load(spec, &Files::local()).map_err(Error::wrap)?;
    let workload = workload.on(device.clone());
    let mut trainer = LocalTrainer::new(&workload).map_err(Error::wrap)?;
    trainer.run(1).map_err(Error::wrap)?;
    Ok(trainer.state().clone())
}

fn transformer(text: &TextFile) -> TrainSpec {
    TrainSpec {
        dataset: DataSpec::Text(TextSpec {
            files: vec![text.0.display().to_string()],
            context: 32,
        }),
        model: ModelSpec::Transformer(TransformerSpec {
            layers: 2,
            width: 48,
            heads: 4,
            dropout: 0.1,
            tied: true,
        }),
        global_batch: 64,
        ..TrainSpec::digits_mlp("transformer")
    }
}

/// A text of this process's own, removed at the end.
struct TextFile(PathBuf);

impl TextFile {
    fn new() -> Result<Self> {
        let name = format!("mobula-gpu-check-{}.txt", std::process::id());
        let path = std::env::temp_dir().join(name);
        let lines = (0..2000u64).map(|line| {
            let (a, b) = (line * 37 % 101, line * 53 % 97);
            format!("line {line}: {a} times {b} is {}\n", a * b)
        });
        std::fs::write(&path, lines.collect::<String>())?;
        Ok(TextFile(path))
    }
}

impl Drop for TextFile {
    fn drop(&mut self) {
        // It is the system's folder for what may go any time.
        let _ = std::fs::remove_file(&self.0);
    }
}
