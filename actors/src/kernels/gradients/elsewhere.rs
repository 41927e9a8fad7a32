//! Gradients that are not in the CPU's memory: sums that stay where they are computed until the pass is over.
//!
//! Invariants:
//! 1. The order of additions is that of the place in the CPU's memory: the first contribution as it is, the following ones
//!    added to it, at last what is in candle's store. Nothing is added to a zero that was not there.
//! 2. All gradients come back in one copy.

use std::cell::RefCell;

use candle_core::{Result, Tensor, TensorId};

use super::GradientError;

/// A parameter, and the sum of what it was given.
type Sum = (TensorId, Option<Tensor>);

thread_local! {
    /// Those of the pass that goes on.
    static SUMS: RefCell<Vec<Sum>> = const { RefCell::new(Vec::new()) };
}

/// Whether the gradients of this loss are not in the CPU's memory.
pub(super) fn is_asked_for(loss: &Tensor) -> bool {
    #[cfg(test)]
    if IS_FORCED.get() {
        return true;
    }
    !loss.device().is_cpu()
}

#[cfg(test)]
thread_local! {
    static IS_FORCED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Runs `work` with gradients gathered as on a GPU, though they are on the CPU.
#[cfg(test)]
pub(crate) fn run_elsewhere<R>(work: impl FnOnce() -> R) -> R {
    IS_FORCED.set(true);
    let result = work();
    IS_FORCED.set(false);
    result
}

/// As [`super::backward`], for parameters of any one device.
pub(super) fn backward(
    loss: &Tensor,
    parameters: &[(&str, &Tensor)],
) -> std::result::Result<Vec<f32>, GradientError> {
    let places = parameters
        .iter()
        .map(|(_, parameter)| (parameter.id(), None));
    SUMS.set(places.collect());
    let store = loss.backward();
    let sums = SUMS.take();
    let mut store = store?;
    let mut gradients = Vec::with_capacity(sums.len());
    for ((name, parameter), (_, sum)) in parameters.iter().zip(sums) {
        let gradient = match (sum, store.remove(parameter)) {
            (Some(sum), Some(rest)) => (sum + rest)?,
            (Some(only), None) | (None, Some(only)) => only,
            (None, None) => {
                return Err(GradientError::Missing {
                    name: (*name).to_owned(),
                });
            }
        };
        gradients.push(gradient.flatten_all()?);
    }
    match gradients.is_empty() {
        true => Ok(Vec::new()),
        false => Ok(Tensor::cat(&gradients, 0)?.to_vec1()?),
    }
}

/// Adds a gradient to its parameter's sum; whether there is one.
pub(super) fn keep(parameter: &Tensor, gradient: &Tensor) -> Result<bool> {
    SUMS.with_borrow_mut(|sums| {
        let found = sums.iter_mut().find(|(id, _)| *id == parameter.id());
        let Some((_, sum)) = found else {
            return Ok(false);
        };
        let gradient = gradient.reshape(parameter.shape())?;
        *sum = Some(match sum.take() {
            Some(sum) => (sum + gradient)?,
            None => gradient,
        });
        Ok(true)
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{loss, var};
    use super::*;
    use crate::kernels::gradients;
    use crate::kernels::test_values::bits;

    /// The same operations on the same device, gathered in both ways.
    #[test]
    fn gradients_have_the_bits_of_those_that_are_computed_in_place() {
        let (w, b, s) = (var("w", &[5, 5]), var("b", &[5]), var("s", &[5]));
        let parameters =
            [("b", &b), ("s", &s), ("w", &w)].map(|(name, var)| (name, var.as_tensor()));
        let in_place = gradients::backward(&loss(&w, &b, &s), parameters, Vec::new()).unwrap();
        let apart = backward(&loss(&w, &b, &s), &parameters).unwrap();
        assert_eq!(bits(&apart), bits(&in_place));
        // Nothing is left behind for the next pass.
        let again = gradients::backward(&loss(&w, &b, &s), parameters, Vec::new()).unwrap();
        assert_eq!(bits(&again), bits(&in_place));
        let other = var("other", &[2]);
        let with_other = [("b", b.as_tensor()), ("other", other.as_tensor())];
        let error = backward(&loss(&w, &b, &s), &with_other).unwrap_err();
        let error = error.to_string();
        assert!(
            error.starts_with("parameter other got no gradient"),
            "{error}"
        );
    }
}
