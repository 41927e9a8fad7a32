//! What a graph takes and gives: its inputs are those of the endpoints that the request feeds, its outputs those of the
//! endpoints that feed them.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::spec::{GraphSpec, Node, Source, Wire};
use crate::serving::oip::{ModelMetadata, OipError, TensorMetadata};

/// The version of every graph: what changes is a graph's spec, of which there is one.
pub const GRAPH_VERSION: &str = "1";

/// The metadata of the endpoints of a graph, by their names.
pub type EndpointMetadata = BTreeMap<String, Arc<ModelMetadata>>;

/// What a graph takes and gives.
///
/// # Errors
/// [`OipError::GraphMisfit`] names what does not fit together.
pub fn derive(
    name: &str,
    spec: &GraphSpec,
    endpoints: &EndpointMetadata,
) -> Result<ModelMetadata, OipError> {
    let derived = Deriving { spec, endpoints }.derive(name);
    derived.map_err(|reason| OipError::GraphMisfit {
        graph: name.to_owned(),
        reason,
    })
}

struct Deriving<'a> {
    spec: &'a GraphSpec,
    endpoints: &'a EndpointMetadata,
}

impl<'a> Deriving<'a> {
    fn derive(&self, name: &str) -> Result<ModelMetadata, String> {
        let mut inputs: Vec<TensorMetadata> = Vec::new();
        for node in &self.spec.nodes {
            self.check_node(node, &mut inputs)?;
        }
        let outputs = self.spec.outputs.iter().map(|wire| self.output(wire));
        let batches = self.endpoints.values().map(|model| model.max_batch_size);
        Ok(ModelMetadata {
            name: name.to_owned(),
            versions: vec![GRAPH_VERSION.to_owned()],
            platform: "mobula_graph".to_owned(),
            max_batch_size: batches.min().unwrap_or(0),
            inputs,
            outputs: outputs.collect::<Result<_, _>>()?,
        })
    }

    fn model(&self, endpoint: &str) -> Result<&'a ModelMetadata, String> {
        let model = self.endpoints.get(endpoint);
        model
            .map(|model| &**model)
            .ok_or_else(|| format!("endpoint `{endpoint}` is not known"))
    }

    /// Sees that a node's inputs are its endpoint's, and adds those of the request to what the graph takes.
    fn check_node(&self, node: &Node, inputs: &mut Vec<TensorMetadata>) -> Result<(), String> {
        let model = self.model(&node.endpoint)?;
        let missing = model
            .inputs
            .iter()
            .find(|input| node.inputs.iter().all(|wire| wire.name != input.name));
        if let Some(missing) = missing {
            return Err(format!(
                "node `{}` gives endpoint `{}` no input `{}`",
                node.name, node.endpoint, missing.name
            ));
        }
        for wire in &node.inputs {
            let taken = model.inputs.iter().find(|input| input.name == wire.name);
            let taken = taken.ok_or_else(|| {
                format!(
                    "node `{}` gives endpoint `{}` an input `{}`, which it does not take",
                    node.name, node.endpoint, wire.name
                )
            })?;
            for source in &wire.sources {
                let whose = format!("input `{}` of node `{}`", wire.name, node.name);
                match source {
                    Source::Request { input } => take(inputs, input, taken, &whose)?,
                    Source::Node { .. } => fits(self.given(source)?, taken, source, &whose)?,
                }
            }
        }
        Ok(())
    }

    /// The output of an endpoint that a source names.
    fn given(&self, source: &Source) -> Result<&'a TensorMetadata, String> {
        let Source::Node { node, output } = source else {
            return Err(format!("`{source}` is no output"));
        };
        let found = self.spec.nodes.iter().find(|known| known.name == *node);
        let node = found.ok_or_else(|| format!("node `{node}` is not there"))?;
        let model = self.model(&node.endpoint)?;
        let given = model.outputs.iter().find(|given| given.name == *output);
        given.ok_or_else(|| {
            let names: Vec<&str> = model.outputs.iter().map(|o| o.name.as_str()).collect();
            format!(
                "endpoint `{}` of node `{}` gives no `{output}`, but {}",
                node.endpoint,
                node.name,
                names.join(", ")
            )
        })
    }

    fn output(&self, wire: &Wire) -> Result<TensorMetadata, String> {
        let mut merged: Option<TensorMetadata> = None;
        for source in &wire.sources {
            let given = self.given(source)?;
            let Some(known) = &mut merged else {
                merged = Some(TensorMetadata {
                    name: wire.name.clone(),
                    ..given.clone()
                });
                continue;
            };
            if known.datatype != given.datatype || known.shape.len() != given.shape.len() {
                return Err(format!(
                    "the sources of output `{}` differ: {} {:?} and {} {:?} of `{source}`",
                    wire.name, known.datatype, known.shape, given.datatype, given.shape
                ));
            }
            for (dimension, other) in known.shape.iter_mut().zip(&given.shape) {
                if dimension != other {
                    *dimension = -1;
                }
            }
        }
        merged.ok_or_else(|| format!("output `{}` has no source", wire.name))
    }
}

/// Adds an input of the request to what the graph takes, or sees that it fits what is taken already.
fn take(
    inputs: &mut Vec<TensorMetadata>,
    name: &str,
    taken: &TensorMetadata,
    whose: &str,
) -> Result<(), String> {
    let Some(known) = inputs.iter_mut().find(|input| input.name == name) else {
        inputs.push(TensorMetadata {
            name: name.to_owned(),
            ..taken.clone()
        });
        return Ok(());
    };
    let pairs = || known.shape.iter().zip(&taken.shape);
    let is_same = known.datatype == taken.datatype
        && known.shape.len() == taken.shape.len()
        && pairs().all(|(a, b)| a == b || *a == -1 || *b == -1);
    if !is_same {
        return Err(format!(
            "input `{name}` of the request would be {} {:?}, and {} {:?} as {whose}",
            known.datatype, known.shape, taken.datatype, taken.shape
        ));
    }
    for (dimension, other) in known.shape.iter_mut().zip(&taken.shape) {
        // What both take.
        *dimension = (*dimension).max(*other);
    }
    Ok(())
}

/// Whether an output may be an input.
fn fits(
    given: &TensorMetadata,
    taken: &TensorMetadata,
    source: &Source,
    whose: &str,
) -> Result<(), String> {
    let mut pairs = given.shape.iter().zip(&taken.shape);
    let is_same = given.datatype == taken.datatype
        && given.shape.len() == taken.shape.len()
        && pairs.all(|(a, b)| a == b || *a == -1 || *b == -1);
    if is_same {
        return Ok(());
    }
    Err(format!(
        "`{source}` is {} {:?}, and {whose} takes {} {:?}",
        given.datatype, given.shape, taken.datatype, taken.shape
    ))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::serving::oip::Datatype;

    pub(in crate::serving::graph) fn model(
        name: &str,
        inputs: &[(&str, Datatype, &[i64])],
        outputs: &[(&str, Datatype, &[i64])],
    ) -> (String, Arc<ModelMetadata>) {
        let tensors = |tensors: &[(&str, Datatype, &[i64])]| {
            let tensor = |(name, datatype, shape): &(&str, Datatype, &[i64])| TensorMetadata {
                name: (*name).to_owned(),
                datatype: *datatype,
                shape: shape.to_vec(),
                labels: Vec::new(),
            };
            tensors.iter().map(tensor).collect()
        };
        let model = ModelMetadata {
            name: name.to_owned(),
            versions: vec!["7".to_owned()],
            platform: "test".to_owned(),
            max_batch_size: 8,
            inputs: tensors(inputs),
            outputs: tensors(outputs),
        };
        (name.to_owned(), Arc::new(model))
    }

    const PIPELINE: &str = r#"
[outputs]
score = ["second.y", "first.y"]
[[nodes]]
name = "first"
endpoint = "a"
inputs = { x = "request.data" }
[[nodes]]
name = "second"
endpoint = "b"
inputs = { x = "first.y" }
"#;

    #[test]
    fn the_ends_say_what_a_graph_takes_and_gives() {
        let spec = GraphSpec::from_toml(PIPELINE).unwrap();
        let fp32 = Datatype::Fp32;
        let endpoints = EndpointMetadata::from([
            model("a", &[("x", fp32, &[-1, 4])], &[("y", fp32, &[-1, 2])]),
            model("b", &[("x", fp32, &[-1, 2])], &[("y", fp32, &[-1, 3])]),
        ]);
        let graph = derive("g", &spec, &endpoints).unwrap();
        assert_eq!(
            (graph.inputs[0].name.as_str(), &*graph.inputs[0].shape),
            ("data", &[-1, 4][..])
        );
        // Either of two may answer, and they differ in width.
        assert_eq!(
            (graph.outputs[0].name.as_str(), &*graph.outputs[0].shape),
            ("score", &[-1, -1][..])
        );
        assert_eq!(
            (graph.max_batch_size, &*graph.versions),
            (8, &["1".to_owned()][..])
        );

        let refused = |a, b| {
            let endpoints = EndpointMetadata::from([a, b]);
            derive("g", &spec, &endpoints).unwrap_err().to_string()
        };
        let first = || model("a", &[("x", fp32, &[-1, 4])], &[("y", fp32, &[-1, 2])]);
        let narrow = model("b", &[("x", fp32, &[-1, 5])], &[("y", fp32, &[-1, 3])]);
        let text = refused(first(), narrow);
        assert!(
            text.contains(
                "`first.y` is FP32 [-1, 2], and input `x` of node `second` takes FP32 [-1, 5]"
            ),
            "{text}"
        );
        let whole = model(
            "b",
            &[("x", fp32, &[-1, 2])],
            &[("y", Datatype::Int64, &[-1, 3])],
        );
        let text = refused(first(), whole);
        assert!(
            text.contains("the sources of output `score` differ"),
            "{text}"
        );
        let more = model("b", &[("x", fp32, &[-1, 2]), ("z", fp32, &[1])], &[]);
        let text = refused(first(), more);
        assert!(text.contains("gives endpoint `b` no input `z`"), "{text}");
        let other = model("b", &[("x", fp32, &[-1, 2])], &[("p", fp32, &[1])]);
        let text = refused(first(), other);
        assert!(text.contains("gives no `y`, but p"), "{text}");
        let text = refused(first(), model("c", &[], &[]));
        assert!(text.contains("endpoint `b` is not known"), "{text}");
    }

    #[test]
    fn two_nodes_may_take_the_same_input_where_they_agree() {
        let text = PIPELINE.replace("first.y\" }", "request.data\" }");
        let spec = GraphSpec::from_toml(&text).unwrap();
        let fp32 = Datatype::Fp32;
        let a = || model("a", &[("x", fp32, &[-1, -1])], &[("y", fp32, &[-1])]);
        let b = |datatype| model("b", &[("x", datatype, &[-1, 3])], &[("y", fp32, &[-1])]);
        let agree = EndpointMetadata::from([a(), b(fp32)]);
        let graph = derive("g", &spec, &agree).unwrap();
        assert_eq!(
            (graph.inputs.len(), &*graph.inputs[0].shape),
            (1, &[-1, 3][..])
        );
        let differ = EndpointMetadata::from([a(), b(Datatype::Int8)]);
        let text = derive("g", &spec, &differ).unwrap_err().to_string();
        assert!(
            text.contains("input `data` of the request would be FP32"),
            "{text}"
        );
    }
}
