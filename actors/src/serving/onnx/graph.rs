//! Looks through a file before anything is computed from it.
//!
//! Invariant: nothing here takes more time or memory than the file has bytes.

use std::collections::{BTreeMap, BTreeSet};

use tract_onnx::pb::tensor_proto::{DataLocation, DataType};
use tract_onnx::pb::tensor_shape_proto::dimension::Value as Size;
use tract_onnx::pb::type_proto::Value as Type;
use tract_onnx::pb::{
    GraphProto, ModelProto, NodeProto, TensorProto, TensorShapeProto, ValueInfoProto,
};
use tract_onnx::prelude::DatumType;

use super::values::datatype_of;
use super::{ONNX_BYTES_MAX, OnnxError};
use crate::serving::oip::TensorMetadata;
use crate::serving::rows::BATCH_BYTES_MAX;

/// Nodes of a graph, with those of the graphs inside it: the largest public models have some thousands.
const NODES_MAX: usize = 50_000;

/// Operators that are named in an error.
const NAMED_OPERATORS_MAX: usize = 8;

/// Inputs, or outputs, of a model: each is named in its metadata.
const TENSORS_MAX: usize = 256;

/// Dimensions of a tensor.
const RANK_MAX: usize = 16;

/// Elements of what a node makes of a shape alone: as many as the largest file has bytes. The engine makes it while it
/// looks at the graph.
const MADE_ELEMENTS_MAX: u64 = ONNX_BYTES_MAX;

/// Refuses a model that the engine cannot be trusted with.
pub(super) fn check(model: &ModelProto, is_known: impl Fn(&str) -> bool) -> Result<(), OnnxError> {
    let Some(graph) = &model.graph else {
        return Err(OnnxError::Malformed("it has no graph".to_owned()));
    };
    if graph.output.is_empty() || graph.node.is_empty() {
        return Err(OnnxError::Malformed(format!(
            "its graph has {} nodes and {} outputs",
            graph.node.len(),
            graph.output.len()
        )));
    }
    let mut sets = model.opset_import.iter();
    let has_operators = |domain: &str| matches!(domain, "" | "ai.onnx" | "ai.onnx.ml");
    if !sets.any(|set| set.version > 0 && has_operators(&set.domain)) {
        return Err(OnnxError::Malformed(
            "it names no operator set of ONNX".to_owned(),
        ));
    }
    let mut seen = Seen::default();
    seen.graph(graph, &is_known)?;
    if !seen.unknown.is_empty() {
        let operators = seen.unknown.into_iter().take(NAMED_OPERATORS_MAX);
        return Err(OnnxError::Operators {
            operators: operators.collect(),
        });
    }
    let constants: BTreeSet<&str> = graph.initializer.iter().map(|c| c.name.as_str()).collect();
    let mut names = constants.clone();
    let mut inputs = 0;
    for input in &graph.input {
        if !constants.contains(input.name.as_str()) {
            inputs += 1;
            names.insert(&input.name);
            check_input(input)?;
        }
    }
    if inputs == 0 || inputs > TENSORS_MAX || graph.output.len() > TENSORS_MAX {
        return Err(OnnxError::Malformed(format!(
            "it has {inputs} inputs and {} outputs, expected 1 to {TENSORS_MAX} of each",
            graph.output.len()
        )));
    }
    names.extend(
        graph
            .node
            .iter()
            .flat_map(|node| &node.output)
            .map(String::as_str),
    );
    let mut outputs = BTreeSet::new();
    for output in &graph.output {
        let reason = if !names.contains(output.name.as_str()) {
            "is computed by nothing: export the model again"
        } else if !outputs.insert(output.name.as_str()) {
            "is given twice: export the model again"
        } else {
            continue;
        };
        return Err(OnnxError::Tensor {
            kind: "output",
            name: output.name.clone(),
            reason: reason.to_owned(),
        });
    }
    Ok(())
}

/// What has been looked at.
#[derive(Default)]
struct Seen {
    nodes: usize,
    /// Operators that the engine does not have.
    unknown: BTreeSet<String>,
}

impl Seen {
    fn graph(
        &mut self,
        graph: &GraphProto,
        is_known: &impl Fn(&str) -> bool,
    ) -> Result<(), OnnxError> {
        self.nodes += graph.node.len();
        if self.nodes > NODES_MAX {
            return Err(OnnxError::TooManyNodes { limit: NODES_MAX });
        }
        for constant in &graph.initializer {
            check_constant(constant)?;
        }
        if let Some(sparse) = graph.sparse_initializer.first() {
            let name = sparse.values.as_ref().map(|values| values.name.clone());
            return Err(OnnxError::Constant {
                name: name.unwrap_or_default(),
                reason: "is sparse, which is not supported".to_owned(),
            });
        }
        let constants = constants_of(graph);
        for node in &graph.node {
            check_made(node, &constants)?;
            self.node(node, is_known)?;
        }
        Ok(())
    }

    fn node(
        &mut self,
        node: &NodeProto,
        is_known: &impl Fn(&str) -> bool,
    ) -> Result<(), OnnxError> {
        if !is_known(&node.op_type) {
            let domain = match node.domain.as_str() {
                "" => "ai.onnx",
                domain => domain,
            };
            let shown: String = node.op_type.chars().take(64).collect();
            self.unknown.insert(format!("{domain}.{shown}"));
        }
        for attribute in &node.attribute {
            for constant in attribute.t.iter().chain(&attribute.tensors) {
                check_constant(constant)?;
            }
            // The decoder bounds how deep they lie in each other.
            for graph in attribute.g.iter().chain(&attribute.graphs) {
                self.graph(graph, is_known)?;
            }
        }
        Ok(())
    }
}

/// The constants of a graph, by name.
fn constants_of(graph: &GraphProto) -> BTreeMap<&str, &TensorProto> {
    let given = graph.initializer.iter();
    let given = given.map(|constant| (constant.name.as_str(), constant));
    let nodes = graph.node.iter().filter(|node| node.op_type == "Constant");
    let named = nodes.filter_map(|node| {
        let constant = node.attribute.iter().find_map(|of| of.t.as_ref());
        Some((node.output.first()?.as_str(), constant?))
    });
    given.chain(named).collect()
}

/// Refuses a node that makes something huge of a shape that the file has: a few bytes would fill the memory.
fn check_made(node: &NodeProto, constants: &BTreeMap<&str, &TensorProto>) -> Result<(), OnnxError> {
    let shape = match node.op_type.as_str() {
        "ConstantOfShape" => node.input.first(),
        "Expand" => node.input.get(1),
        _ => None,
    };
    let Some(shape) = shape.and_then(|name| constants.get(name.as_str())) else {
        return Ok(());
    };
    let sizes = integers(shape);
    // An expansion takes 1 for what its input has there.
    let sizes = sizes.map(|size| u64::try_from(size).unwrap_or(1));
    let elements = sizes.fold(1, u64::saturating_mul);
    if elements <= MADE_ELEMENTS_MAX {
        return Ok(());
    }
    Err(OnnxError::Constant {
        name: node.output.first().cloned().unwrap_or_default(),
        reason: format!("is to have {elements} elements, the limit is {MADE_ELEMENTS_MAX}"),
    })
}

/// The numbers of a shape; of one that is too long to be one, as many as a shape may have.
fn integers(constant: &TensorProto) -> impl Iterator<Item = i64> {
    let is_shape = constant.data_type == DataType::Int64 as i32;
    let raw = constant.raw_data.chunks_exact(size_of::<i64>());
    let raw = raw.map(|bytes| i64::from_le_bytes(bytes.try_into().expect("chunks of eight bytes")));
    let numbers = raw.chain(constant.int64_data.iter().copied());
    numbers.take(if is_shape { RANK_MAX } else { 0 })
}

/// Refuses a constant that has not as many elements as its dimensions say.
fn check_constant(constant: &TensorProto) -> Result<(), OnnxError> {
    let refused = |reason: String| {
        Err(OnnxError::Constant {
            name: constant.name.clone(),
            reason,
        })
    };
    if constant.data_location == Some(DataLocation::External as i32)
        || !constant.external_data.is_empty()
    {
        return Err(OnnxError::ExternalData {
            name: constant.name.clone(),
        });
    }
    if constant.dims.len() > RANK_MAX {
        return refused(format!(
            "has {} dimensions, the limit is {RANK_MAX}",
            constant.dims.len()
        ));
    }
    let elements = constant.dims.iter().try_fold(1u64, |count, size| {
        count.checked_mul(u64::try_from(*size).ok()?)
    });
    let Some(elements) = elements else {
        return refused(format!("claims the shape {:?}", constant.dims));
    };
    let Ok(kind) = DataType::try_from(constant.data_type) else {
        return refused(format!("is of the unknown type {}", constant.data_type));
    };
    let element_bytes = match kind {
        DataType::Bool | DataType::Int8 | DataType::Uint8 => 1u64,
        DataType::Int16 | DataType::Uint16 | DataType::Float16 => 2,
        DataType::Int32 | DataType::Uint32 | DataType::Float => 4,
        DataType::Int64 | DataType::Uint64 | DataType::Double => 8,
        DataType::String => 0,
        other => return refused(format!("is of {other:?}, which is not supported")),
    };
    let raw = constant.raw_data.len() as u64;
    if raw > 0 || (element_bytes > 0 && elements == 0) {
        if elements.checked_mul(element_bytes) != Some(raw) {
            return refused(format!(
                "claims the shape {:?}, which takes {} bytes, and has {raw}",
                constant.dims,
                elements.saturating_mul(element_bytes)
            ));
        }
        return Ok(());
    }
    let given = [
        constant.float_data.len(),
        constant.int32_data.len(),
        constant.int64_data.len(),
        constant.double_data.len(),
        constant.uint64_data.len(),
        constant.string_data.len(),
    ];
    let given = given.into_iter().max().unwrap_or(0) as u64;
    if given != elements {
        return refused(format!(
            "claims the shape {:?}, which has {elements} elements, and has {given}",
            constant.dims
        ));
    }
    Ok(())
}

/// Refuses an input that cannot be served.
fn check_input(tensor: &ValueInfoProto) -> Result<(), OnnxError> {
    let refused = |reason: String| {
        Err(OnnxError::Tensor {
            kind: "input",
            name: tensor.name.clone(),
            reason,
        })
    };
    let declared = tensor.r#type.as_ref().and_then(|of| of.value.as_ref());
    let Some(Type::TensorType(declared)) = declared else {
        return refused("is no tensor: export the model with tensors".to_owned());
    };
    let datum_type = DataType::try_from(declared.elem_type)
        .ok()
        .and_then(|kind| DatumType::try_from(kind).ok());
    let Some(datatype) = datum_type.and_then(datatype_of) else {
        return refused(format!(
            "is of the type {}, which is not served: take numbers or truth values",
            declared.elem_type
        ));
    };
    let rank = declared.shape.as_ref().map_or(0, |shape| shape.dim.len());
    if rank > RANK_MAX {
        return refused(format!("has {rank} dimensions, the limit is {RANK_MAX}"));
    }
    check_size(&TensorMetadata {
        name: tensor.name.clone(),
        datatype,
        shape: declared.shape.as_ref().map(sizes_of).unwrap_or_default(),
        labels: Vec::new(),
    })
}

/// The sizes that a shape says; -1 where it leaves one open.
fn sizes_of(shape: &TensorShapeProto) -> Vec<i64> {
    let size = |value: &Option<Size>| match value {
        Some(Size::DimValue(size)) => *size,
        _ => -1,
    };
    shape.dim.iter().map(|dim| size(&dim.value)).collect()
}

/// Refuses an output that is not what the file says of it.
pub(super) fn check_output(
    declared: &ValueInfoProto,
    computed: &TensorMetadata,
) -> Result<(), OnnxError> {
    let of = declared.r#type.as_ref().and_then(|of| of.value.as_ref());
    let Some(Type::TensorType(of)) = of else {
        return Ok(());
    };
    let kind = DataType::try_from(of.elem_type)
        .ok()
        .and_then(|kind| DatumType::try_from(kind).ok())
        .and_then(datatype_of);
    let sizes = of.shape.as_ref().map(sizes_of);
    let fits = |sizes: &Vec<i64>| {
        let mut pairs = sizes.iter().zip(&computed.shape);
        sizes.len() == computed.shape.len()
            && pairs.all(|(said, found)| *said < 0 || *found < 0 || said == found)
    };
    if kind == Some(computed.datatype) && sizes.as_ref().is_none_or(fits) {
        return Ok(());
    }
    let said = match kind {
        Some(kind) => kind.name().to_owned(),
        None => format!("type {}", of.elem_type),
    };
    Err(OnnxError::Tensor {
        kind: "output",
        name: declared.name.clone(),
        reason: format!(
            "is said to be {said}{:?} and computed as {}{:?}: export the model again",
            sizes.unwrap_or_default(),
            computed.datatype,
            computed.shape
        ),
    })
}

/// Refuses an input of which not even the smallest request could be sent.
pub(super) fn check_size(input: &TensorMetadata) -> Result<(), OnnxError> {
    // Open dimensions may be 1.
    let sizes = input
        .shape
        .iter()
        .map(|size| u64::try_from(*size).unwrap_or(1));
    let element_bytes = input.datatype.size_bytes().unwrap_or(1) as u64;
    let size_bytes = sizes.fold(element_bytes, u64::saturating_mul);
    if size_bytes <= BATCH_BYTES_MAX as u64 {
        return Ok(());
    }
    Err(OnnxError::Tensor {
        kind: "input",
        name: input.name.clone(),
        reason: format!(
            "takes {size_bytes} bytes at least, the limit of a request is {BATCH_BYTES_MAX}: use a smaller one"
        ),
    })
}
