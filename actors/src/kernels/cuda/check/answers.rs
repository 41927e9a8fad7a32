//! Models as replicas ask them: an MLP and a CNN for classes, a transformer for what comes next, on the GPU and on the CPU. The
//! answers must have the same bits.

use candle_core::{Device, Error, Result};

use super::{Outcome, Work};
use crate::kernels::test_values::{bits, normal, relative_error};
use crate::training::data::SampleShape;
use crate::training::model::{Model, ModelError};
use crate::training::models::{ModelSpec, TransformerSpec};

const SEED: u64 = 7;

/// Rows of a batch: more than a model computes at once.
const ROWS: usize = 300;

const CONTEXT: usize = 32;

pub(super) fn check(device: &Device, tell: &mut impl FnMut(Outcome)) -> Result<()> {
    let digits = SampleShape::Classified {
        features: vec![8, 8],
        classes: 10,
    };
    let pixels = normal("pixels", ROWS * 64, 1.0);
    for spec in [
        ModelSpec::Mlp {
            hidden: vec![128, 64],
        },
        ModelSpec::Cnn {
            channels: vec![8, 16],
        },
    ] {
        tell(compare(device, &spec, &digits, |model| {
            model.outputs(&pixels)
        })?);
    }
    let spec = ModelSpec::Transformer(TransformerSpec {
        layers: 2,
        width: 48,
        heads: 4,
        dropout: 0.1,
        tied: true,
    });
    let tokens = SampleShape::Tokens {
        context: CONTEXT,
        vocabulary: 256,
    };
    // Of all lengths, some longer than the model sees.
    let texts: Vec<Vec<u32>> = (1..=CONTEXT as u32 + 8)
        .map(|length| (0..length).map(|at| (at * 31 + length) % 256).collect())
        .collect();
    tell(compare(device, &spec, &tokens, |model| {
        model.next_tokens(&texts)
    })?);
    Ok(())
}

fn compare(
    device: &Device,
    spec: &ModelSpec,
    shape: &SampleShape,
    ask: impl Fn(&Model) -> std::result::Result<Vec<f32>, ModelError>,
) -> Result<Outcome> {
    let cpu = Model::new(spec, shape, SEED).map_err(Error::wrap)?;
    let gpu = Model::on(device.clone(), spec, shape, cpu.flat()).map_err(Error::wrap)?;
    let gpu = ask(&gpu).map_err(Error::wrap)?;
    let cpu = ask(&cpu).map_err(Error::wrap)?;
    let reference: Vec<f64> = cpu.iter().map(|value| f64::from(*value)).collect();
    Ok(Outcome {
        kernel: format!("answers of a {}", spec.kind()),
        shape: format!("{} values", cpu.len()),
        error: relative_error(&gpu, &reference),
        error_max: 0.0,
        has_cpu_bits: bits(&gpu) == bits(&cpu),
        times: None,
        work: Work::Operations(0.0),
    })
}
