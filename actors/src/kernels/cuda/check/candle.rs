//! Functions as candle's own operations compose them: the reference in `f64` on the CPU, and what our kernels are timed
//! against on the GPU.

use candle_core::{D, DType, Result, Tensor, Var};

use crate::kernels::update::AdamwUpdate;

/// As `candle_nn::ops::softmax`, which keeps gradients.
pub(super) fn softmax(logits: &Tensor) -> Result<Tensor> {
    let largest = logits.max_keepdim(D::Minus1)?;
    let powers = logits.broadcast_sub(&largest)?.exp()?;
    powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)
}

/// As the form of `candle_nn::LayerNorm` that keeps gradients.
pub(super) fn layer_norm(
    values: &Tensor,
    scale: &Tensor,
    shift: &Tensor,
    epsilon: f32,
) -> Result<Tensor> {
    let count = values.dim(D::Minus1)? as f64;
    let mean = (values.sum_keepdim(D::Minus1)? / count)?;
    let centred = values.broadcast_sub(&mean)?;
    let variance = (centred.sqr()?.sum_keepdim(D::Minus1)? / count)?;
    let normalised = centred.broadcast_div(&(variance + f64::from(epsilon))?.sqrt()?)?;
    normalised.broadcast_mul(scale)?.broadcast_add(shift)
}

/// `½x(1 + tanh(√(2/π)(x + 0.044715 x³)))`. candle's own has a gradient with constants of six digits.
pub(super) fn gelu(values: &Tensor) -> Result<Tensor> {
    let cube = (values.sqr()? * values)?;
    let inner = ((values + (cube * 0.044_715)?)? * (2.0 / std::f64::consts::PI).sqrt())?;
    (values * 0.5)? * (inner.tanh()? + 1.0)?
}

/// As the step of `candle_nn::AdamW`: parameters, means and squares after the update.
pub(super) fn adamw(update: &AdamwUpdate, [p, m, s, g]: [&Tensor; 4]) -> Result<[Tensor; 3]> {
    let of = |value: f32| f64::from(value);
    let g = (g * of(update.scale))?;
    let m = ((m * of(update.beta1))? + (&g * of(update.one_minus_beta1))?)?;
    let s = ((s * of(update.beta2))? + (g.sqr()? * of(update.one_minus_beta2))?)?;
    let root = ((&s * of(update.inverse_square_correction))?.sqrt()? + of(update.epsilon))?;
    let p = ((p * of(update.keep))? - ((&m / root)? * of(update.rate))?)?;
    Ok([p, m, s])
}

/// The result of a function, and the gradient of each argument where `gradient` is that of the result.
pub(super) fn with_gradients(
    arguments: &[Tensor],
    gradient: &Tensor,
    function: impl Fn(&[Tensor]) -> Result<Tensor>,
) -> Result<Vec<Tensor>> {
    let variables: Vec<Var> = arguments
        .iter()
        .map(Var::from_tensor)
        .collect::<Result<_>>()?;
    let tensors: Vec<Tensor> = variables
        .iter()
        .map(|var| var.as_tensor().clone())
        .collect();
    let result = function(&tensors)?;
    let store = (&result * gradient)?.sum_all()?.backward()?;
    let mut all = vec![result];
    for tensor in &tensors {
        match store.get(tensor) {
            Some(gradient) => all.push(gradient.clone()),
            None => candle_core::bail!("an argument got no gradient"),
        }
    }
    Ok(all)
}

/// All values, in `f64`.
pub(super) fn wide(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}
