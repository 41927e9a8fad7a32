//! Backward passes whose parameter gradients go straight into one flat vector.
//!
//! candle's `backward` makes a tensor of zeros for each gradient, adds the gradient to it into a third tensor, and
//! its caller copies that. For parameters this is most of a step's memory traffic. Here a kernel that has a
//! parameter's gradient writes it to its place and tells candle nothing; what other operations leave in candle's
//! store is added at the end. On a GPU there is no such place: `elsewhere` keeps the sums as tensors there, adds in the same
//! order, and fetches all of them in one copy.
//!
//! Invariants:
//! 1. A parameter's gradient is its first contribution, plus the following ones in the order of the backward
//!    pass, plus what is in candle's store. The pass is in the order of the graph, so this is fixed.
//! 2. Every parameter gets a gradient, or [`GradientError::Missing`] names it.

mod elsewhere;

#[cfg(test)]
pub(crate) use elsewhere::run_elsewhere;

use std::cell::RefCell;
use std::ops::Range;

use candle_core::{Result, Shape, Tensor, TensorId, bail};

use super::elementwise::add_to;
use super::product::{MatrixView, multiply, product_without_gradient};
use super::{Execution, seed};

/// Why there are no gradients.
#[derive(Debug, thiserror::Error)]
pub enum GradientError {
    /// The tensor library refused an operation.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
    /// The loss does not depend on a parameter, so training would leave it as it is.
    #[error("parameter {name} got no gradient; the loss does not depend on it")]
    Missing {
        /// The parameter.
        name: String,
    },
}

/// A parameter's place.
struct Slot {
    id: TensorId,
    range: Range<usize>,
    has_gradient: bool,
}

/// Where gradients go during one backward pass.
struct Arena {
    /// Sorted by nothing: looked up by id, walked in the caller's order.
    slots: Vec<Slot>,
    values: Vec<f32>,
}

thread_local! {
    static ARENA: RefCell<Option<Arena>> = const { RefCell::new(None) };
}

/// The gradient of a scalar `loss` for each of the `parameters` (candle's variables), flat, one after the
/// other.
///
/// `buffer` is used for the result if it is large enough; what is in it does not matter.
pub fn backward<'a>(
    loss: &Tensor,
    parameters: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    buffer: Vec<f32>,
) -> std::result::Result<Vec<f32>, GradientError> {
    let parameters: Vec<(&str, &Tensor)> = parameters.into_iter().collect();
    if elsewhere::is_asked_for(loss) {
        return elsewhere::backward(loss, &parameters);
    }
    let mut end = 0;
    let slots: Vec<Slot> = parameters
        .iter()
        .map(|(_, parameter)| {
            let start = end;
            end += parameter.elem_count();
            Slot {
                id: parameter.id(),
                range: start..end,
                has_gradient: false,
            }
        })
        .collect();
    let mut values = buffer;
    values.resize(end, 0.0);
    ARENA.set(Some(Arena { slots, values }));
    let store = loss.backward();
    let Arena { slots, mut values } = ARENA.take().expect("it was put there above");
    let mut store = store?;
    for ((name, parameter), slot) in parameters.iter().zip(slots) {
        let place = &mut values[slot.range];
        match store.remove(parameter) {
            Some(gradient) => {
                let gradient = gradient.flatten_all()?.to_vec1::<f32>()?;
                if slot.has_gradient {
                    add_to(Execution::current(), place, &gradient);
                } else {
                    place.copy_from_slice(&gradient);
                }
            }
            None if slot.has_gradient => {}
            None => {
                return Err(GradientError::Missing {
                    name: (*name).to_owned(),
                });
            }
        }
    }
    Ok(values)
}

/// As [`backward`], of a loss whose gradient with respect to `output` is known already.
pub fn backward_from<'a>(
    output: &Tensor,
    gradient: Tensor,
    parameters: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    buffer: Vec<f32>,
) -> std::result::Result<Vec<f32>, GradientError> {
    backward(&seed::seeded(output, gradient)?, parameters, buffer)
}

/// Gives a parameter's place to `write`, with whether it holds a gradient already. `None` where there is no such
/// place: outside [`backward`], or for a tensor that is no parameter.
fn in_place<R>(parameter: &Tensor, write: impl FnOnce(&mut [f32], bool) -> R) -> Option<R> {
    ARENA.with_borrow_mut(|arena| {
        let Arena { slots, values } = arena.as_mut()?;
        let slot = slots.iter_mut().find(|slot| slot.id == parameter.id())?;
        let had_gradient = std::mem::replace(&mut slot.has_gradient, true);
        Some(write(&mut values[slot.range.clone()], had_gradient))
    })
}

/// Adds a gradient to its parameter's place, or returns it for candle to keep.
pub(super) fn keep(parameter: &Tensor, gradient: Tensor) -> Result<Option<Tensor>> {
    if elsewhere::keep(parameter, &gradient)? {
        return Ok(None);
    }
    let execution = Execution::current();
    let flat = gradient.flatten_all()?;
    let (storage, layout) = flat.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else {
        // On a GPU, outside of [`backward`].
        return Ok(Some(gradient.clone()));
    };
    let gradient_values = super::contiguous_values(storage, layout, "gradient")?;
    let kept = in_place(parameter, |place, had_gradient| match had_gradient {
        true => add_to(execution, place, gradient_values),
        false => place.copy_from_slice(gradient_values),
    });
    Ok(kept.is_none().then(|| gradient.clone()))
}

/// Computes `a · b`, the gradient of `parameter`, in its place; or returns it for candle to keep.
pub(super) fn product_into(parameter: &Tensor, a: &Tensor, b: &Tensor) -> Result<Option<Tensor>> {
    let execution = Execution::current();
    if !is_first(parameter) {
        return keep(parameter, product_without_gradient(a, b)?);
    }
    let (a_storage, a_layout) = a.storage_and_layout();
    let (b_storage, b_layout) = b.storage_and_layout();
    let (candle_core::Storage::Cpu(a_values), candle_core::Storage::Cpu(b_values)) =
        (&*a_storage, &*b_storage)
    else {
        bail!("what is collected in the CPU's memory is computed there")
    };
    let a = matrix_of(
        a_values.as_slice::<f32>()?,
        a_layout.shape(),
        a_layout.stride(),
        a_layout.start_offset(),
    )?;
    let b = matrix_of(
        b_values.as_slice::<f32>()?,
        b_layout.shape(),
        b_layout.stride(),
        b_layout.start_offset(),
    )?;
    in_place(parameter, |place, _| multiply(execution, &a, &b, place));
    Ok(None)
}

/// Whether the parameter has a place, and nothing in it yet.
fn is_first(parameter: &Tensor) -> bool {
    ARENA.with_borrow(|arena| {
        let slots = arena.iter().flat_map(|arena| &arena.slots);
        slots
            .filter(|slot| slot.id == parameter.id())
            .any(|slot| !slot.has_gradient)
    })
}

fn matrix_of<'a>(
    values: &'a [f32],
    shape: &Shape,
    stride: &[usize],
    start: usize,
) -> Result<MatrixView<'a>> {
    let (rows, columns) = shape.dims2()?;
    Ok(MatrixView::new(
        &values[start..],
        [rows, columns],
        [stride[0], stride[1]],
    ))
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::kernels::test_values::{bits, normal};
    use crate::kernels::{Activation, affine};

    pub(super) fn var(name: &str, shape: &[usize]) -> Var {
        let count = shape.iter().product();
        Var::from_vec(normal(name, count, 1.0), shape, &Device::Cpu).unwrap()
    }

    /// Uses `w` twice in dense layers and once outside of one, `b` twice in layers, `s` in candle's own operation.
    pub(super) fn loss(w: &Var, b: &Var, s: &Var) -> Tensor {
        let x = Tensor::from_vec(normal("x", 10, 1.0), (2, 5), &Device::Cpu).unwrap();
        let once = affine(&x, w, b, Activation::Relu).unwrap();
        let twice = affine(&once, w, b, Activation::Identity).unwrap();
        let scaled = twice.broadcast_mul(s).unwrap();
        let sum = scaled.sqr().unwrap().sum_all().unwrap();
        (sum + w.sqr().unwrap().sum_all().unwrap()).unwrap()
    }

    #[test]
    fn gradients_are_those_of_candles_store() {
        let (w, b, s) = (var("w", &[5, 5]), var("b", &[5]), var("s", &[5]));
        let store = loss(&w, &b, &s).backward().unwrap();
        let parameters =
            [("b", &b), ("s", &s), ("w", &w)].map(|(name, var)| (name, var.as_tensor()));
        let expected: Vec<f32> = parameters
            .iter()
            .flat_map(|(_, tensor)| {
                let gradient = store.get(tensor).unwrap().flatten_all().unwrap();
                gradient.to_vec1::<f32>().unwrap()
            })
            .collect();
        let ours = backward(&loss(&w, &b, &s), parameters, vec![f32::NAN; 99]).unwrap();
        // candle adds in another order where there are several contributions.
        for (ours, expected) in ours.iter().zip(&expected) {
            assert!(
                (ours - expected).abs() <= 1e-5 * expected.abs().max(1.0),
                "{ours} {expected}"
            );
        }
        assert_eq!(ours.len(), expected.len());
        let again = backward(&loss(&w, &b, &s), parameters, ours.clone()).unwrap();
        assert_eq!(bits(&again), bits(&ours));
        // Nothing is left behind for the next pass.
        assert!(
            loss(&w, &b, &s)
                .backward()
                .unwrap()
                .get(b.as_tensor())
                .is_some()
        );
    }

    #[test]
    fn a_parameter_without_gradient_is_named_and_a_known_gradient_enters() {
        let (w, b, s) = (var("w", &[5, 5]), var("b", &[5]), var("s", &[5]));
        let other = var("other", &[2]);
        let parameters = [("b", &b), ("other", &other), ("s", &s), ("w", &w)];
        let parameters = parameters.map(|(name, var)| (name, var.as_tensor()));
        let error = backward(&loss(&w, &b, &s), parameters, vec![])
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("parameter other got no gradient"),
            "{error}"
        );
        let x = var("x", &[3, 5]);
        let output = affine(&x, &w, &b, Activation::Identity).unwrap();
        let gradient = Tensor::ones((3, 5), candle_core::DType::F32, &Device::Cpu).unwrap();
        let found = backward_from(&output, gradient, [("b", b.as_tensor())], vec![]).unwrap();
        assert_eq!(found, [3.0; 5]);
    }
}
