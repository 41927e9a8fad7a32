//! Which endpoints and graphs there are, and whose tokens open them, as last heard from the head.
//!
//! Invariants:
//! 1. What is known stays known while the head is away.
//! 2. An endpoint that stays keeps its link, whatever else changes.

use std::collections::BTreeMap;
use std::sync::Arc;

use mobula::Cluster;
use tokio::sync::watch;

use super::link::RouterLink;
use crate::serving::access::follow::next_change;
use crate::serving::access::keyring::{Keyring, Shown, now_ms};
use crate::serving::access::rates::TokenRates;
use crate::serving::access::state::{Door, Doors, Token};
use crate::serving::auth::{Caller, Gate, Subject};
use crate::serving::client;
use crate::serving::graph::run::GraphModel;
use crate::serving::oip::OipError;

/// What answers behind a door.
pub enum Behind<L> {
    /// An endpoint: the way to its router.
    Endpoint(Arc<L>),
    /// A graph, which runs here.
    Graph(Arc<GraphModel>),
}

impl<L> Clone for Behind<L> {
    fn clone(&self) -> Self {
        match self {
            Behind::Endpoint(link) => Behind::Endpoint(Arc::clone(link)),
            Behind::Graph(graph) => Behind::Graph(Arc::clone(graph)),
        }
    }
}

/// One endpoint or graph, as an ingress knows it.
pub struct OpenDoor<L> {
    name: Arc<str>,
    deployed_ms: u64,
    keyring: Keyring,
    /// Those of a graph, whose limits hold here; an endpoint's router keeps its own.
    tokens: Vec<Token>,
    rates: Arc<TokenRates>,
    headers: Vec<String>,
    behind: Behind<L>,
}

impl<L> OpenDoor<L> {
    /// What answers.
    #[must_use]
    pub fn behind(&self) -> &Behind<L> {
        &self.behind
    }

    /// The headers that its rules look at.
    #[must_use]
    pub fn headers(&self) -> &[String] {
        &self.headers
    }

    /// Takes a request with a token of this name.
    ///
    /// # Errors
    /// [`OipError::TokenRateLimited`].
    pub fn take(&self, token: &str) -> Result<(), OipError> {
        self.rates.admit(&self.tokens, token, now_ms())
    }

    fn caller(&self, shown: Shown, now_ms: u64) -> Option<Caller> {
        let token = self.keyring.find(shown, now_ms)?;
        Some(Caller {
            model: Some(Arc::clone(&self.name)),
            token: Some(Arc::clone(token)),
        })
    }
}

/// All endpoints, by name, with the ways to their routers.
pub struct DoorTable<L = RouterLink> {
    /// 0 before anything was heard.
    revision: u64,
    doors: BTreeMap<String, OpenDoor<L>>,
}

impl<L> Default for DoorTable<L> {
    fn default() -> Self {
        DoorTable {
            revision: 0,
            doors: BTreeMap::new(),
        }
    }
}

impl<L> DoorTable<L> {
    /// The door of an endpoint.
    ///
    /// # Errors
    /// [`OipError::UnknownModel`].
    pub fn door(&self, endpoint: &str) -> Result<&OpenDoor<L>, OipError> {
        self.doors
            .get(endpoint)
            .ok_or_else(|| OipError::UnknownModel {
                model: endpoint.to_owned(),
            })
    }

    /// Whether the head was ever heard.
    #[must_use]
    pub fn is_known(&self) -> bool {
        self.revision > 0
    }

    /// The table after what the head said; `link` makes the way to the router of an endpoint that is new.
    fn after(&self, revision: u64, doors: Vec<Door>, link: impl Fn(&str) -> L) -> Self {
        let open = |door: Door| {
            let known = self.doors.get(&door.endpoint);
            let same = known.filter(|known| known.deployed_ms == door.deployed_ms);
            let behind = match (door.graph, same.map(OpenDoor::behind)) {
                (None, Some(Behind::Endpoint(link))) => Behind::Endpoint(Arc::clone(link)),
                (None, _) => Behind::Endpoint(Arc::new(link(&door.endpoint))),
                // Counts go on as long as it stays what it is.
                (Some(spec), Some(Behind::Graph(graph))) if *graph.spec() == spec => {
                    Behind::Graph(Arc::clone(graph))
                }
                (Some(spec), _) => Behind::Graph(Arc::new(GraphModel::new(&door.endpoint, spec))),
            };
            let open = OpenDoor {
                name: Arc::from(door.endpoint.as_str()),
                deployed_ms: door.deployed_ms,
                keyring: Keyring::new(&door.tokens),
                tokens: match &behind {
                    Behind::Endpoint(_) => Vec::new(),
                    Behind::Graph(_) => door.tokens,
                },
                rates: same.map_or_else(Arc::default, |known| Arc::clone(&known.rates)),
                headers: door.headers,
                behind,
            };
            (door.endpoint, open)
        };
        DoorTable {
            // Where nothing was ever changed there is nothing, and that is known then.
            revision: revision.max(1),
            doors: doors.into_iter().map(open).collect(),
        }
    }

    fn admit(&self, shown: Shown, subject: Subject<'_>, now_ms: u64) -> Result<Caller, OipError> {
        let any = || {
            self.doors
                .values()
                .find_map(|door| door.caller(shown, now_ms))
        };
        match subject {
            Subject::Model(model) => match self.doors.get(model) {
                Some(door) => door.caller(shown, now_ms),
                // Only who may ask something learns which names exist.
                None if any().is_some() => {
                    return Err(OipError::UnknownModel {
                        model: model.to_owned(),
                    });
                }
                None => None,
            },
            Subject::Health | Subject::Server => any(),
        }
        .ok_or(OipError::Unauthorized)
    }
}

/// The gate of an ingress: a token opens the endpoint that it was made for. Whether the ingress lives and takes
/// requests is answered to anybody, in one bit: those who balance load over ingresses have no token.
pub struct IngressGate {
    table: watch::Receiver<Arc<DoorTable>>,
}

impl IngressGate {
    /// The gate to these doors.
    #[must_use]
    pub fn new(table: watch::Receiver<Arc<DoorTable>>) -> Self {
        IngressGate { table }
    }
}

impl Gate for IngressGate {
    fn admit(
        &self,
        authorization: Option<&[u8]>,
        subject: Subject<'_>,
    ) -> Result<Caller, OipError> {
        if subject == Subject::Health {
            return Ok(Caller::default());
        }
        let shown = Shown::of(authorization).ok_or(OipError::Unauthorized)?;
        let table = Arc::clone(&self.table.borrow());
        table.admit(shown, subject, now_ms())
    }
}

/// Follows the head until nobody listens.
pub(in crate::serving) async fn follow(cluster: Cluster, table: watch::Sender<Arc<DoorTable>>) {
    let mut seen = 0;
    while !table.is_closed() {
        let known = table.borrow().revision;
        match client::doors(&cluster, known).await {
            Ok(Doors { doors: None, .. }) => {}
            Ok(Doors {
                revision,
                doors: Some(doors),
            }) => {
                let link = |endpoint: &str| RouterLink::new(cluster.clone(), endpoint);
                let next = table.borrow().after(revision, doors, link);
                tracing::info!(
                    revision,
                    endpoints = next.doors.len(),
                    "the doors have changed"
                );
                table.send_replace(Arc::new(next));
            }
            Err(error) => {
                tracing::debug!(%error, "the head does not say which endpoints there are")
            }
        }
        seen = next_change(&cluster, seen).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn door(endpoint: &str, deployed_ms: u64, token: &str) -> Door {
        Door {
            endpoint: endpoint.to_owned(),
            deployed_ms,
            tokens: vec![Token {
                name: "deploy".to_owned(),
                hash: *blake3::hash(token.as_bytes()).as_bytes(),
                created_ms: 0,
                expires_ms: None,
                per_second: None,
            }],
            headers: Vec::new(),
            graph: None,
        }
    }

    fn shown(token: &str) -> Shown {
        Shown::of(Some(format!("Bearer {token}").as_bytes())).unwrap()
    }

    /// The table after these doors, whose links are their names.
    fn after(known: &DoorTable<String>, revision: u64, doors: Vec<Door>) -> DoorTable<String> {
        known.after(revision, doors, str::to_owned)
    }

    #[test]
    fn a_token_opens_its_endpoint_and_no_other() {
        let doors = vec![door("a", 1, "one"), door("b", 1, "two")];
        let table = after(&DoorTable::default(), 7, doors);
        let admit = |token: &str, subject| {
            table
                .admit(shown(token), subject, 0)
                .map(|caller| caller.model.unwrap().to_string())
                .map_err(|error| error.status())
        };
        assert_eq!(admit("one", Subject::Model("a")), Ok("a".to_owned()));
        assert_eq!(admit("one", Subject::Model("b")), Err(401));
        assert_eq!(admit("one", Subject::Model("c")), Err(404));
        assert_eq!(admit("six", Subject::Model("c")), Err(401));
        assert_eq!(admit("two", Subject::Server), Ok("b".to_owned()));
        assert_eq!(admit("six", Subject::Server), Err(401));
    }

    #[test]
    fn an_endpoint_that_stays_keeps_its_link() {
        let first = DoorTable::default();
        assert!(!first.is_known());
        let first = after(&first, 0, vec![door("a", 1, "x"), door("b", 1, "x")]);
        assert!(first.is_known());
        let second = after(&first, 9, vec![door("a", 1, "y"), door("b", 2, "x")]);
        let is_same = |name: &str| {
            let link = |table: &DoorTable<String>| match table.door(name).ok().unwrap().behind() {
                Behind::Endpoint(link) => Arc::clone(link),
                Behind::Graph(_) => panic!("it is an endpoint"),
            };
            Arc::ptr_eq(&link(&first), &link(&second))
        };
        assert!(is_same("a"));
        assert!(!is_same("b"));
    }
}
