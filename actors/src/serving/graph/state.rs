//! Graphs, replicated.
//!
//! Invariants:
//! 1. A graph's name is no endpoint's, as both are models to those who ask.
//! 2. The endpoints of a graph were there when it was made. One that was deleted since is an error of the requests that
//!    need it.

use mobula_core::control::{ApplyContext, Caller, ModuleId, Reader, Table, Txn};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::row;
use serde::{Deserialize, Serialize};

use super::spec::GraphSpec;
use crate::serving::access::state as access;
use crate::serving::rollout::state::standing;
use crate::serving::state::find as find_endpoint;

/// Graph name → [`Graph`].
const GRAPHS: Table = Table {
    module: ModuleId::SERVING,
    tag: 22,
};

/// Graphs of a cluster: doors are told of all of them in one answer.
const GRAPHS_MAX: usize = 64;

/// A graph.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Graph {
    /// Its name, which also is the model's name in its URLs.
    pub name: String,
    /// What it is made of.
    pub spec: GraphSpec,
    /// BLAKE3 of the first token that its callers show.
    pub token_hash: [u8; 32],
    /// When it was made, in milliseconds since the Unix epoch.
    pub created_ms: u64,
}

/// A change. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// Makes a graph. Answer: [`Graph`], like that of all of these.
    Create {
        /// Its name.
        graph: String,
        /// What it is made of.
        spec: GraphSpec,
        /// BLAKE3 of its callers' token.
        token_hash: [u8; 32],
    },
    /// Makes another graph of it, with the same tokens.
    Change {
        /// Its name.
        graph: String,
        /// What it is made of from now on.
        spec: GraphSpec,
    },
    /// Forgets a graph.
    Delete {
        /// Its name.
        graph: String,
    },
}

/// Whether `caller` may give such commands.
pub(in crate::serving) fn is_allowed(caller: &Caller) -> bool {
    matches!(caller, Caller::Client)
}

/// All graphs, by name.
pub fn graphs(reader: &dyn Reader) -> Vec<Graph> {
    let rows = row::all(reader, GRAPHS, &[]);
    rows.into_iter().map(|(_, graph)| graph).collect()
}

/// The graph of this name, if there is one.
pub fn get(reader: &dyn Reader, name: &str) -> Option<Graph> {
    row::get(reader, GRAPHS, name.as_bytes())
}

/// The graph of this name.
pub fn find(reader: &dyn Reader, name: &str) -> Result<Graph, Rejection> {
    get(reader, name).ok_or_else(|| {
        Rejection::not_found(format!(
            "no graph is called `{name}`: see `mobula serve graph list`"
        ))
    })
}

/// Refuses the name of a graph for an endpoint.
pub(in crate::serving) fn check_free(reader: &dyn Reader, name: &str) -> Result<(), Rejection> {
    match get(reader, name) {
        None => Ok(()),
        Some(_) => Err(Rejection::new(
            ErrorCode::AlreadyExists,
            format!(
                "`{name}` is a graph: choose another name for the endpoint, or delete the graph with `mobula serve graph \
                 delete {name}`"
            ),
        )),
    }
}

/// Applies a command; the graph.
pub(in crate::serving) fn apply(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    command: Command,
) -> Result<Graph, Rejection> {
    let graph = match command {
        Command::Create {
            graph: name,
            spec,
            token_hash,
        } => {
            check_new(txn, &name)?;
            let spec = checked(txn, spec)?;
            let graph = Graph {
                name,
                spec,
                token_hash,
                created_ms: context.now_ms,
            };
            row::put(txn, GRAPHS, graph.name.as_bytes(), &graph);
            graph
        }
        Command::Change { graph, spec } => {
            let known = find(txn, &graph)?;
            let spec = checked(txn, spec)?;
            let graph = Graph { spec, ..known };
            row::put(txn, GRAPHS, graph.name.as_bytes(), &graph);
            graph
        }
        Command::Delete { graph } => {
            let graph = find(txn, &graph)?;
            txn.delete(GRAPHS, graph.name.as_bytes());
            access::forget(txn, &graph.name);
            graph
        }
    };
    access::touch(context, txn);
    Ok(graph)
}

fn check_new(txn: &mut dyn Txn, name: &str) -> Result<(), Rejection> {
    crate::name::check("a graph", name)?;
    if get(txn, name).is_some() {
        return Err(Rejection::new(
            ErrorCode::AlreadyExists,
            format!(
                "there is a graph `{name}` already: change it with `mobula serve graph change {name}`, or delete it first"
            ),
        ));
    }
    if find_endpoint(txn, name).is_ok() {
        return Err(Rejection::new(
            ErrorCode::AlreadyExists,
            format!("`{name}` is an endpoint: choose another name for the graph"),
        ));
    }
    if graphs(txn).len() >= GRAPHS_MAX {
        return Err(Rejection::new(
            ErrorCode::Overloaded,
            format!("there are {GRAPHS_MAX} graphs, the limit: delete one first"),
        ));
    }
    Ok(())
}

/// The spec, if it keeps its invariants and its endpoints are there.
fn checked(reader: &dyn Reader, spec: GraphSpec) -> Result<GraphSpec, Rejection> {
    let spec = spec.checked()?;
    for node in &spec.nodes {
        if get(reader, &node.endpoint).is_some() {
            return Err(Rejection::invalid(format!(
                "node `{}` names graph `{}`: a graph is made of endpoints, not of graphs",
                node.name, node.endpoint
            )));
        }
        standing(reader, &node.endpoint).map_err(|rejection| Rejection {
            message: format!("node `{}`: {}", node.name, rejection.message),
            ..rejection
        })?;
    }
    Ok(spec)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serving::state::Command as ServingCommand;
    use crate::serving::test_tables::TestTables;

    fn deploy(tables: &mut TestTables, endpoint: &str) -> Result<Vec<u8>, Rejection> {
        tables.serving(&ServingCommand::Deploy {
            endpoint: endpoint.into(),
            model: "digits".into(),
            version: None,
            replicas: 1,
            settings: Default::default(),
            token_hash: [7; 32],
        })
    }

    fn spec(endpoint: &str) -> GraphSpec {
        let text = format!(
            "[outputs]\nclass = \"a.class\"\n[[nodes]]\nname = \"a\"\nendpoint = \"{endpoint}\"\n\
             inputs = {{ image = \"request.image\" }}\n"
        );
        GraphSpec::from_toml(&text).unwrap()
    }

    fn create(tables: &mut TestTables, graph: &str, endpoint: &str) -> Result<Vec<u8>, Rejection> {
        tables.serving(&ServingCommand::Graph(Command::Create {
            graph: graph.into(),
            spec: spec(endpoint),
            token_hash: [8; 32],
        }))
    }

    #[test]
    fn graphs_and_endpoints_share_names_and_doors() {
        let mut tables = TestTables::with_versions(1);
        deploy(&mut tables, "small").unwrap();
        create(&mut tables, "both", "small").unwrap();
        let doors = access::doors(&tables.tables, 0).doors.unwrap();
        let names: Vec<&str> = doors.iter().map(|door| door.endpoint.as_str()).collect();
        assert_eq!(names, ["small", "both"]);
        assert_eq!(doors[1].graph, Some(spec("small")));
        assert_eq!(doors[1].tokens[0].hash, [8; 32]);

        for (graph, endpoint, part) in [
            ("both", "small", "graph change both"),
            ("small", "small", "is an endpoint"),
            ("other", "none", "node `a`: no endpoint is called `none`"),
            ("other", "both", "not of graphs"),
            (".x", "small", "cannot name a graph"),
        ] {
            let error = create(&mut tables, graph, endpoint).unwrap_err();
            assert!(error.message.contains(part), "{error}");
        }
        let error = deploy(&mut tables, "both").unwrap_err();
        assert!(error.message.contains("`both` is a graph"), "{error}");

        let add = access::Command::AddToken {
            endpoint: "both".into(),
            name: "ann".into(),
            hash: [9; 32],
            ttl_ms: None,
            per_second: None,
        };
        tables.serving(&ServingCommand::Access(add)).unwrap();
        assert_eq!(access::of(&tables.tables, "both").unwrap().tokens.len(), 2);
        let delete = ServingCommand::Graph(Command::Delete {
            graph: "both".into(),
        });
        tables.serving(&delete).unwrap();
        assert_eq!(access::doors(&tables.tables, 0).doors.unwrap().len(), 1);
        assert_eq!(
            tables.serving(&delete).unwrap_err().code,
            ErrorCode::NotFound
        );
        create(&mut tables, "both", "small").unwrap();
        assert_eq!(access::of(&tables.tables, "both").unwrap().tokens.len(), 1);
    }
}
