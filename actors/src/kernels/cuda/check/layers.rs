//! The layers of the built-in models: dense, convolution, GELU, embedding, dropout, attention.

use std::cell::RefCell;

use candle_core::{DType, Device, Result, Tensor};

use super::Work;
use super::candle;
use super::operations::{Case, Function};
use crate::kernels::attention::CausalAttention;
use crate::kernels::convolution::Images;
use crate::kernels::{Activation, affine, convolution, gelu};
use crate::training::models::layers::{Dropout, embed};
use crate::training::trainable::{Mode, ShardContext};

pub(super) fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (rows, inputs, outputs) in [(8, 64, 128), (515, 1030, 770), (4096, 1024, 1024)] {
        let operations = 2.0 * rows as f64 * inputs as f64 * outputs as f64;
        cases.push(Case {
            kernel: "dense layer with rectifier",
            shape: format!("{rows}x{inputs} · {inputs}x{outputs}"),
            arguments: vec![
                (vec![rows, inputs], 1.0),
                (vec![inputs, outputs], 0.3),
                (vec![outputs], 1.0),
            ],
            ours: |of| affine(&of[0], &of[1], &of[2], Activation::Relu),
            candles: |of| of[0].matmul(&of[1])?.broadcast_add(&of[2])?.relu(),
            chain: rows.max(inputs).max(outputs),
            work: [operations, 3.0 * operations].map(Work::Operations),
        });
    }
    cases.push(convolution_case(
        8,
        FIRST,
        16,
        |of| ours_of(of, FIRST),
        |of| candles_of(of, FIRST),
    ));
    cases.push(convolution_case(
        64,
        SECOND,
        64,
        |of| ours_of(of, SECOND),
        |of| candles_of(of, SECOND),
    ));
    for (rows, columns) in [(37, 100), (8192, 4096)] {
        let bytes = 4.0 * rows as f64 * columns as f64;
        cases.push(Case {
            kernel: "GELU",
            shape: format!("{rows}x{columns}"),
            arguments: vec![(vec![rows, columns], 2.0)],
            ours: |of| gelu(&of[0]),
            candles: |of| candle::gelu(&of[0]),
            chain: 1,
            work: [2.0 * bytes, 5.0 * bytes].map(Work::Bytes),
        });
    }
    for (count, width) in [(256, 64), (32_000, 1024)] {
        let bytes = 4.0 * USES as f64 * width as f64;
        cases.push(Case {
            kernel: "embedding",
            shape: format!("{USES} of {count}x{width}"),
            arguments: vec![(vec![count, width], 1.0)],
            ours: |of| embed(&of[0], uses(&of[0])?),
            candles: |of| {
                let rows = Tensor::from_vec(uses(&of[0])?, USES, of[0].device())?;
                of[0].index_select(&rows, 0)
            },
            chain: USES,
            work: [2.0 * bytes, 4.0 * bytes + 4.0 * (count * width) as f64].map(Work::Bytes),
        });
    }
    for (samples, values) in [(3, 517), (512, 65_536)] {
        let bytes = 4.0 * samples as f64 * values as f64;
        cases.push(Case {
            kernel: "dropout",
            shape: format!("{samples}x{values}"),
            arguments: vec![(vec![samples, values], 1.0)],
            ours: |of| dropped(&of[0]),
            candles: |of| &of[0] * mask_for(&of[0])?,
            chain: 1,
            work: [2.0 * bytes, 4.0 * bytes].map(Work::Bytes),
        });
    }
    let width = SEEN.heads * HEAD;
    let tokens = WINDOWS * SEEN.context;
    let pairs = (tokens * SEEN.context) as f64 / 2.0;
    let operations = 4.0 * pairs * width as f64;
    cases.push(Case {
        kernel: "causal attention",
        shape: format!("{WINDOWS}x{}, {} heads of {HEAD}", SEEN.context, SEEN.heads),
        arguments: vec![(vec![tokens, 3 * width], 1.0)],
        ours: |of| SEEN.apply(&of[0]),
        candles: |of| candles_attention(&of[0]),
        chain: SEEN.context,
        work: [operations, 3.5 * operations].map(Work::Operations),
    });
    cases
}

/// Of a network's first layer, and of a deeper one that halves the sides.
const FIRST: Images = Images {
    height: 28,
    width: 28,
    channels: 1,
    stride: 1,
};
const SECOND: Images = Images {
    height: 33,
    width: 31,
    channels: 32,
    stride: 2,
};

fn convolution_case(
    count: usize,
    images: Images,
    outputs: usize,
    ours: Function,
    candles: Function,
) -> Case {
    let places = count * images.output_len();
    let operations = 2.0 * (places * images.patch_len() * outputs) as f64;
    Case {
        kernel: "convolution with rectifier",
        shape: format!(
            "{count}x{}x{}x{} to {outputs}",
            images.height, images.width, images.channels
        ),
        arguments: vec![
            (vec![count, images.image_len()], 1.0),
            (vec![images.patch_len(), outputs], 0.2),
            (vec![outputs], 1.0),
        ],
        ours,
        candles,
        chain: places.max(images.patch_len()),
        work: [operations, 3.0 * operations].map(Work::Operations),
    }
}

fn ours_of(of: &[Tensor], images: Images) -> Result<Tensor> {
    convolution(&of[0], &of[1], &of[2], images, Activation::Relu)
}

/// The same with candle's layout, in which channels come before height and width.
fn candles_of(of: &[Tensor], images: Images) -> Result<Tensor> {
    let (count, outputs) = (of[0].dim(0)?, of[2].dim(0)?);
    let pixels = of[0]
        .reshape((count, images.height, images.width, images.channels))?
        .permute((0, 3, 1, 2))?
        .contiguous()?;
    let weight = of[1]
        .reshape((3, 3, images.channels, outputs))?
        .permute((3, 2, 0, 1))?
        .contiguous()?;
    let sums = pixels.conv2d(&weight, 1, images.stride, 1, 1)?;
    let bias = of[2].reshape((1, outputs, 1, 1))?;
    let rows = sums.broadcast_add(&bias)?.relu()?.permute((0, 2, 3, 1))?;
    rows.contiguous()?.reshape((count, ()))
}

/// Rows that are looked up.
const USES: usize = 8192;

/// Which ones: some often, some never.
fn uses(table: &Tensor) -> Result<Vec<u32>> {
    let count = table.dim(0)? as u64;
    Ok((0..USES as u64)
        .map(|use_| (use_ * use_ * 7 % count) as u32)
        .collect())
}

fn dropped(values: &Tensor) -> Result<Tensor> {
    let context = ShardContext {
        seed: 5,
        step: 9,
        first_sample: 77,
        mode: Mode::Training,
    };
    Dropout::apply(values, 0.1, "layer", values.dim(0)?, &context)
}

/// What [`dropped`] multiplies these values by. It is made once for each tensor in turn, so that a time is that of the
/// multiplication.
fn mask_for(values: &Tensor) -> Result<Tensor> {
    thread_local! {
        static MASK: RefCell<Option<Tensor>> = const { RefCell::new(None) };
    }
    let fits = |mask: &Tensor| {
        mask.dims() == values.dims()
            && mask.dtype() == values.dtype()
            && mask.device().same_device(values.device())
    };
    if let Some(mask) = MASK.with_borrow(|mask| mask.clone().filter(fits)) {
        return Ok(mask);
    }
    let ones = Tensor::ones(values.shape(), DType::F32, &Device::Cpu)?;
    let mask = dropped(&ones)?.to_dtype(values.dtype())?;
    let mask = mask.to_device(values.device())?;
    MASK.set(Some(mask.clone()));
    Ok(mask)
}

const WINDOWS: usize = 8;
const HEAD: usize = 64;
const SEEN: CausalAttention = CausalAttention {
    context: 256,
    heads: 8,
};

fn candles_attention(projected: &Tensor) -> Result<Tensor> {
    let CausalAttention { context, heads } = SEEN;
    let parts = projected.reshape((WINDOWS, context, 3, heads, HEAD))?;
    let part = |which: usize| {
        let part = parts.narrow(2, which, 1)?.squeeze(2)?;
        part.transpose(1, 2)?.contiguous()
    };
    let (queries, keys, values) = (part(0)?, part(1)?, part(2)?);
    let scores = queries.matmul(&keys.transpose(2, 3)?.contiguous()?)?;
    let scores = (scores / (HEAD as f64).sqrt())?;
    let later = |query: usize, other: usize| if other > query { -1e30 } else { 0.0f32 };
    let mask: Vec<f32> = (0..context)
        .flat_map(|query| (0..context).map(move |other| later(query, other)))
        .collect();
    let mask = Tensor::from_vec(mask, (context, context), projected.device())?;
    let scores = scores.broadcast_add(&mask.to_dtype(projected.dtype())?)?;
    let seen = candle::softmax(&scores)?.matmul(&values)?;
    let rows = seen.transpose(1, 2)?.contiguous()?;
    rows.reshape((WINDOWS * context, heads * HEAD))
}
