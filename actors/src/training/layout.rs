//! The shape of a model: which layers it has, and where each parameter lies in the flat vector.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::data::{CLASSES, FEATURES, IMAGE_SIDE};
use super::patches::{KERNEL_AREA, Patches};

/// Hidden or convolution layers of a model, at most; also keeps names of one digit in sorted order.
pub const LAYERS_MAX: usize = 8;
/// Units or channels of a layer, at most: one layer pair is then at most 16 Mi parameters.
pub const WIDTH_MAX: usize = 4096;
/// Which network to train.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ModelSpec {
    /// Dense layers with rectifiers between them.
    Mlp {
        /// Units of each hidden layer.
        hidden: Vec<usize>,
    },
    /// 3×3 convolutions with rectifiers, the first at full size, each further one at half the side of
    /// the one before; then one dense layer.
    Cnn {
        /// Channels of each convolution.
        channels: Vec<usize>,
    },
}

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
    /// The layout of a model.
    pub fn of(spec: &ModelSpec) -> Self {
        let shapes: BTreeMap<String, Vec<usize>> = parameter_shapes(spec).into_iter().collect();
        let mut offset = 0;
        let slots = shapes.into_iter().map(|(name, shape)| {
            let slot = ParameterSlot {
                name,
                shape,
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
    pub fn value_count(&self) -> usize {
        self.slots.iter().map(ParameterSlot::value_count).sum()
    }
}

/// The convolutions of a CNN, in order.
pub(super) fn convolutions(channels: &[usize]) -> Vec<Patches> {
    let mut side = IMAGE_SIDE;
    let mut inputs = 1;
    let mut convolutions = Vec::with_capacity(channels.len());
    for (layer, outputs) in channels.iter().enumerate() {
        let patches = Patches {
            side,
            channels: inputs,
            stride: if layer == 0 { 1 } else { 2 },
        };
        side = patches.output_side();
        inputs = *outputs;
        convolutions.push(patches);
    }
    convolutions
}

/// Every parameter's name and shape: weights are `[inputs, outputs]`, biases `[outputs]`.
fn parameter_shapes(spec: &ModelSpec) -> Vec<(String, Vec<usize>)> {
    let mut shapes = Vec::new();
    let mut layer = |name: String, inputs: usize, outputs: usize| {
        shapes.push((format!("{name}.weight"), vec![inputs, outputs]));
        shapes.push((format!("{name}.bias"), vec![outputs]));
    };
    match spec {
        ModelSpec::Mlp { hidden } => {
            let mut inputs = FEATURES;
            for (index, outputs) in hidden.iter().chain([&CLASSES]).enumerate() {
                layer(format!("dense.{index}"), inputs, *outputs);
                inputs = *outputs;
            }
        }
        ModelSpec::Cnn { channels } => {
            let mut features = FEATURES;
            for (index, (patches, outputs)) in
                convolutions(channels).into_iter().zip(channels).enumerate()
            {
                layer(
                    format!("conv.{index}"),
                    KERNEL_AREA * patches.channels,
                    *outputs,
                );
                features = patches.output_side() * patches.output_side() * outputs;
            }
            layer("dense.0".to_owned(), features, CLASSES);
        }
    }
    shapes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mlp() -> ModelSpec {
        ModelSpec::Mlp {
            hidden: vec![12, 8],
        }
    }

    fn cnn() -> ModelSpec {
        ModelSpec::Cnn {
            channels: vec![3, 5],
        }
    }

    #[test]
    fn layouts_are_in_sorted_name_order_without_gaps() {
        let names = |spec| {
            let layout = Layout::of(&spec);
            let mut offset = 0;
            for slot in &layout.slots {
                assert_eq!(slot.offset, offset);
                offset += slot.value_count();
            }
            assert_eq!(layout.value_count(), offset);
            assert!(layout.slots.is_sorted_by(|a, b| a.name < b.name));
            layout
                .slots
                .into_iter()
                .map(|slot| (slot.name, slot.shape))
                .collect::<Vec<_>>()
        };
        assert_eq!(names(mlp())[1], ("dense.0.weight".to_owned(), vec![64, 12]));
        assert_eq!(names(cnn())[3], ("conv.1.weight".to_owned(), vec![27, 5]));
        assert_eq!(
            names(cnn())[5],
            ("dense.0.weight".to_owned(), vec![16 * 5, 10])
        );
    }
}
