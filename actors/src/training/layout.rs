//! Where each parameter of a model lies in the flat vector.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::parameters::Parameter;

/// One parameter's place in the flat vector.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParameterSlot {
    /// The parameter's name, as `dense.0.weight`.
    pub name: String,
    /// Its shape; row-major in the flat vector.
    pub shape: Vec<usize>,
    /// Index of its first value.
    pub offset: usize,
}

impl ParameterSlot {
    /// Number of values.
    pub fn value_count(&self) -> usize {
        self.shape.iter().product()
    }

    /// The parameter's range in the flat vector.
    pub fn range(&self) -> std::ops::Range<usize> {
        self.offset..self.offset + self.value_count()
    }
}

/// Where each parameter lies in the flat vector, in sorted name order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    /// The parameters.
    pub slots: Vec<ParameterSlot>,
}

impl Layout {
    /// The layout of these parameters, whose names differ.
    #[must_use]
    pub fn of(parameters: &[Parameter]) -> Self {
        let shapes: BTreeMap<&str, &[usize]> = parameters
            .iter()
            .map(|parameter| (parameter.name.as_str(), parameter.shape.as_slice()))
            .collect();
        let mut offset = 0;
        let slots = shapes.into_iter().map(|(name, shape)| {
            let slot = ParameterSlot {
                name: name.to_owned(),
                shape: shape.to_vec(),
                offset,
            };
            offset += slot.value_count();
            slot
        });
        Self {
            slots: slots.collect(),
        }
    }

    /// Number of values of all parameters.
    #[must_use]
    pub fn value_count(&self) -> usize {
        self.slots.iter().map(ParameterSlot::value_count).sum()
    }

    /// The place of a parameter.
    #[must_use]
    pub fn slot(&self, name: &str) -> Option<&ParameterSlot> {
        let index = self
            .slots
            .binary_search_by(|slot| slot.name.as_str().cmp(name))
            .ok()?;
        Some(&self.slots[index])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::training::parameters::Initial;

    #[test]
    fn layouts_are_in_sorted_name_order_without_gaps() {
        let parameter = |name: &str, shape: &[usize]| Parameter {
            name: name.to_owned(),
            shape: shape.to_vec(),
            initial: Initial::Zeros,
        };
        let layout = Layout::of(&[
            parameter("b", &[2, 3]),
            parameter("a.weight", &[4]),
            parameter("a.bias", &[1]),
        ]);
        let found: Vec<_> = layout
            .slots
            .iter()
            .map(|slot| (slot.name.as_str(), slot.range()))
            .collect();
        assert_eq!(found, [("a.bias", 0..1), ("a.weight", 1..5), ("b", 5..11)]);
        assert_eq!(layout.value_count(), 11);
        assert_eq!(layout.slot("b").unwrap().shape, [2, 3]);
        assert!(layout.slot("c").is_none());
    }
}
