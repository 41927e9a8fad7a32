//! What a graph is made of.
//!
//! Invariants of a spec that was checked:
//! 1. Every source names an input of the request or an output of a node that is there.
//! 2. There is no cycle, and nodes, depth and tensors are bounded.
//! 3. Every node is of use: an output, another node or a condition needs it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use mobula_core::error::Rejection;
use serde::{Deserialize, Serialize};

use super::condition::{Condition, ConditionFile};

/// Nodes of a graph: all may run at once for one request.
pub const NODES_MAX: usize = 16;

/// Nodes that wait for each other, at the most: each is a call, and a deadline is shared by all of them.
pub const DEPTH_MAX: usize = 8;

/// Inputs of a node, and outputs of a graph.
const TENSORS_MAX: usize = 16;

/// Sources of one tensor: one of each node.
const SOURCES_MAX: usize = NODES_MAX;

/// Bytes of all names in a spec: doors are told of all graphs in one answer.
const NAMES_BYTES_MAX: usize = 8 * 1024;

/// The longest name of a tensor, in bytes.
const TENSOR_NAME_BYTES_MAX: usize = 128;

/// What stands for the request where a node's name would stand.
const REQUEST: &str = "request";

/// Where a tensor comes from. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// An input of the graph's request.
    Request {
        /// Its name.
        input: String,
    },
    /// An output of a node.
    Node {
        /// The node.
        node: String,
        /// The output's name.
        output: String,
    },
}

impl Source {
    /// The source that `text` spells: `request.INPUT` or `NODE.OUTPUT`.
    ///
    /// # Errors
    /// What is expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        match text.split_once('.') {
            Some((_, "")) | Some(("", _)) | None => Err(format!(
                "`{text}` is no source: write request.INPUT or NODE.OUTPUT"
            )),
            Some((REQUEST, input)) => Ok(Source::Request {
                input: input.to_owned(),
            }),
            Some((node, output)) => Ok(Source::Node {
                node: node.to_owned(),
                output: output.to_owned(),
            }),
        }
    }

    /// The node that it waits for.
    #[must_use]
    pub fn node(&self) -> Option<&str> {
        match self {
            Source::Request { .. } => None,
            Source::Node { node, .. } => Some(node),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Request { input } => write!(f, "{REQUEST}.{input}"),
            Source::Node { node, output } => write!(f, "{node}.{output}"),
        }
    }
}

/// A tensor, and where it comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wire {
    /// The tensor's name.
    pub name: String,
    /// The first of these whose node has run.
    pub sources: Vec<Source>,
}

/// One endpoint in a graph.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Node {
    /// Its name in the graph.
    pub name: String,
    /// The endpoint that answers.
    pub endpoint: String,
    /// Its inputs.
    pub inputs: Vec<Wire>,
    /// When it runs; always if absent.
    pub when: Option<Condition>,
}

impl Node {
    /// The nodes that it waits for, each once.
    #[must_use]
    pub fn waits_for(&self) -> BTreeSet<&str> {
        let inputs = self.inputs.iter().flat_map(|wire| &wire.sources);
        let of_inputs = inputs.filter_map(Source::node);
        let of_condition = self.when.as_ref().and_then(Condition::node);
        of_inputs.chain(of_condition).collect()
    }
}

/// A graph.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GraphSpec {
    /// Its nodes; each stands behind those that it waits for, once the spec is checked.
    pub nodes: Vec<Node>,
    /// What it gives.
    pub outputs: Vec<Wire>,
}

/// A graph's file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GraphFile {
    nodes: Vec<NodeFile>,
    outputs: BTreeMap<String, SourcesFile>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NodeFile {
    name: String,
    endpoint: String,
    inputs: BTreeMap<String, SourcesFile>,
    when: Option<ConditionFile>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum SourcesFile {
    One(String),
    Several(Vec<String>),
}

fn wires(named: BTreeMap<String, SourcesFile>) -> Result<Vec<Wire>, String> {
    let wire = |(name, sources)| {
        let texts = match sources {
            SourcesFile::One(text) => vec![text],
            SourcesFile::Several(texts) => texts,
        };
        let parsed: Result<_, String> = texts.iter().map(|text| Source::parse(text)).collect();
        let sources = parsed.map_err(|error| format!("`{name}`: {error}"))?;
        Ok(Wire { name, sources })
    };
    named.into_iter().map(wire).collect()
}

impl GraphSpec {
    /// The graph that a TOML file describes, checked.
    ///
    /// # Errors
    /// What is wrong with it, for people.
    pub fn from_toml(text: &str) -> Result<Self, String> {
        let file: GraphFile = toml::from_str(text).map_err(|error| error.to_string())?;
        let node = |file: NodeFile| {
            let named = |error: String| format!("node `{}`: {error}", file.name);
            let inputs = wires(file.inputs).map_err(named)?;
            let when = file.when.map(Condition::try_from).transpose();
            let when = when.map_err(named)?;
            Ok::<_, String>(Node {
                name: file.name,
                endpoint: file.endpoint,
                inputs,
                when,
            })
        };
        let nodes: Result<_, String> = file.nodes.into_iter().map(node).collect();
        let spec = GraphSpec {
            nodes: nodes?,
            outputs: wires(file.outputs).map_err(|error| format!("outputs: {error}"))?,
        };
        spec.checked().map_err(|rejection| rejection.message)
    }

    /// The same graph with its nodes in order, if it keeps the invariants.
    pub fn checked(mut self) -> Result<Self, Rejection> {
        self.check_sizes()?;
        self.check_names()?;
        self.check_sources()?;
        self.order()?;
        self.check_use()?;
        Ok(self)
    }

    fn check_sizes(&self) -> Result<(), Rejection> {
        if self.nodes.is_empty() || self.nodes.len() > NODES_MAX {
            return Err(Rejection::invalid(format!(
                "a graph has 1 to {NODES_MAX} nodes, this one has {}",
                self.nodes.len()
            )));
        }
        let of_nodes = self
            .nodes
            .iter()
            .map(|node| (node.name.as_str(), &node.inputs));
        for (owner, wires) in of_nodes.chain([("outputs", &self.outputs)]) {
            if wires.is_empty() || wires.len() > TENSORS_MAX {
                return Err(Rejection::invalid(format!(
                    "`{owner}` names {} tensors, it needs 1 to {TENSORS_MAX}",
                    wires.len()
                )));
            }
            let many = wires
                .iter()
                .find(|wire| wire.sources.is_empty() || wire.sources.len() > SOURCES_MAX);
            if let Some(wire) = many {
                return Err(Rejection::invalid(format!(
                    "`{}` of `{owner}` has {} sources, it needs 1 to {SOURCES_MAX}",
                    wire.name,
                    wire.sources.len()
                )));
            }
        }
        let bytes = mobula_core::codec::encode_plain(self).len();
        if bytes > NAMES_BYTES_MAX {
            return Err(Rejection::invalid(format!(
                "the graph takes {bytes} bytes, the limit is {NAMES_BYTES_MAX}: use shorter names, or fewer nodes"
            )));
        }
        Ok(())
    }

    fn check_names(&self) -> Result<(), Rejection> {
        let mut seen = BTreeSet::new();
        for node in &self.nodes {
            let name = &node.name;
            crate::name::check("a node", name)?;
            crate::name::check("an endpoint", &node.endpoint)?;
            // A source is split at its first dot.
            if name == REQUEST || name.contains('.') {
                return Err(Rejection::invalid(format!(
                    "`{name}` cannot name a node: `{REQUEST}` is the request, and a dot ends a node's name"
                )));
            }
            if !seen.insert(name) {
                return Err(Rejection::invalid(format!("two nodes are called `{name}`")));
            }
            if let Some(condition) = &node.when {
                condition.check(name)?;
            }
        }
        let of_nodes = self.nodes.iter().flat_map(|node| &node.inputs);
        for wire in of_nodes.chain(&self.outputs) {
            if !(1..=TENSOR_NAME_BYTES_MAX).contains(&wire.name.len()) {
                return Err(Rejection::invalid(format!(
                    "the name of a tensor has 1 to {TENSOR_NAME_BYTES_MAX} bytes, one here has {}",
                    wire.name.len()
                )));
            }
        }
        Ok(())
    }

    fn check_sources(&self) -> Result<(), Rejection> {
        let known = |name: &str| self.nodes.iter().any(|node| node.name == name);
        let refuse = |owner: &str, unknown: &str| {
            let names: Vec<&str> = self.nodes.iter().map(|node| node.name.as_str()).collect();
            Rejection::invalid(format!(
                "{owner} needs node `{unknown}`, which is not there: the nodes are {}",
                names.join(", ")
            ))
        };
        for node in &self.nodes {
            if let Some(unknown) = node.waits_for().into_iter().find(|name| !known(name)) {
                return Err(refuse(&format!("node `{}`", node.name), unknown));
            }
        }
        for wire in &self.outputs {
            let mut needed = wire.sources.iter().filter_map(Source::node);
            if let Some(unknown) = needed.find(|name| !known(name)) {
                return Err(refuse(&format!("output `{}`", wire.name), unknown));
            }
            if wire.sources.iter().any(|source| source.node().is_none()) {
                return Err(Rejection::invalid(format!(
                    "output `{}` is an input of the request: an output comes from a node",
                    wire.name
                )));
            }
        }
        Ok(())
    }

    /// Brings the nodes into an order in which each stands behind those that it waits for.
    fn order(&mut self) -> Result<(), Rejection> {
        let mut depths: BTreeMap<String, usize> = BTreeMap::new();
        let mut waiting = std::mem::take(&mut self.nodes);
        while !waiting.is_empty() {
            let is_ready = |node: &Node| {
                node.waits_for()
                    .iter()
                    .all(|name| depths.contains_key(*name))
            };
            let (ready, rest): (Vec<Node>, Vec<Node>) = waiting.into_iter().partition(is_ready);
            if ready.is_empty() {
                return Err(Rejection::invalid(format!(
                    "the graph has a cycle: {}",
                    cycle(&rest).join(" -> ")
                )));
            }
            for node in &ready {
                let before = node.waits_for().iter().map(|name| depths[*name]).max();
                depths.insert(node.name.clone(), before.unwrap_or(0) + 1);
            }
            self.nodes.extend(ready);
            waiting = rest;
        }
        let deepest = depths.values().copied().max().unwrap_or(0);
        if deepest > DEPTH_MAX {
            return Err(Rejection::invalid(format!(
                "{deepest} nodes wait for each other, the limit is {DEPTH_MAX}: have some of them answer at once"
            )));
        }
        Ok(())
    }

    fn check_use(&self) -> Result<(), Rejection> {
        let of_outputs = self.outputs.iter().flat_map(|wire| &wire.sources);
        let mut used: BTreeSet<&str> = of_outputs.filter_map(Source::node).collect();
        for node in &self.nodes {
            used.extend(node.waits_for());
        }
        match self
            .nodes
            .iter()
            .find(|node| !used.contains(node.name.as_str()))
        {
            None => Ok(()),
            Some(idle) => Err(Rejection::invalid(format!(
                "no output, node or condition needs node `{}`: use it, or leave it out",
                idle.name
            ))),
        }
    }
}

/// A cycle among nodes of which each waits for another: the names along it, the first again at its end.
fn cycle(nodes: &[Node]) -> Vec<String> {
    let next = |name: &str| {
        let node = nodes.iter().find(|node| node.name == name)?;
        let is_waiting = |other: &&&str| nodes.iter().any(|node| node.name == ***other);
        node.waits_for()
            .iter()
            .find(is_waiting)
            .map(|name| (*name).to_owned())
    };
    let mut path: Vec<String> = nodes
        .first()
        .map(|node| node.name.clone())
        .into_iter()
        .collect();
    while let Some(name) = path.last().and_then(|last| next(last)) {
        let seen = path.iter().position(|known| *known == name);
        path.push(name);
        if let Some(from) = seen {
            return path.split_off(from);
        }
    }
    path
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
