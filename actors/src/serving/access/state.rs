//! Tokens and rules of each endpoint, replicated.
//!
//! Invariants:
//! 1. Of a token only its hash is here. Names of tokens are unique in an endpoint.
//! 2. What an endpoint has is bounded, so that doors can be told of all endpoints in one answer.
//! 3. Each change of what doors must know moves their revision, and nothing else does.
//! 4. While an experiment is under way, no rule comes, goes or changes that sends requests to one of its versions: a key
//!    that is counted for one of them would meet the other, and sizes of groups do not show it.

use mobula_core::control::{ApplyContext, Caller, ModuleId, Reader, Table, Txn};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::row;
use serde::{Deserialize, Serialize};

use super::rules::{Matcher, Rule, headers_of};
use crate::registry;
use crate::serving::experiment::state as experiment;
use crate::serving::graph::spec::GraphSpec;
use crate::serving::graph::state as graph;
use crate::serving::rollout::state::standing;
use crate::serving::state::{Endpoint, endpoints, find as find_endpoint};

/// Name of an endpoint or graph → what is kept of it.
const ACCESS: Table = Table {
    module: ModuleId::SERVING,
    tag: 20,
};

/// Nothing → the log index of the last change that doors must know of.
const REVISION: Table = Table {
    module: ModuleId::SERVING,
    tag: 21,
};

/// Tokens of an endpoint beside that of its deployment: a thousand endpoints with as many fit into one answer.
pub const TOKENS_MAX: usize = 16;

/// Rules of an endpoint: each request is held against all of them.
pub const RULES_MAX: usize = 16;

/// The name of the token that an endpoint was deployed with.
pub const FIRST_TOKEN: &str = "deploy";

/// Requests a second that a token may be given, at the most.
const RATE_MAX: u32 = 1_000_000;

/// How long a token may live that does not live for ever: ten years, in milliseconds.
const TTL_MS_MAX: u64 = 10 * 365 * 86_400_000;

/// One token.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// Its name.
    pub name: String,
    /// BLAKE3 of it.
    pub hash: [u8; 32],
    /// When it was made, in milliseconds since the Unix epoch.
    pub created_ms: u64,
    /// From when on it is refused, in milliseconds since the Unix epoch.
    pub expires_ms: Option<u64>,
    /// Requests a second that are taken with it.
    pub per_second: Option<u32>,
}

impl Token {
    /// Whether it is refused because of its age.
    #[must_use]
    pub fn is_expired(&self, now_ms: u64) -> bool {
        self.expires_ms
            .is_some_and(|expires_ms| expires_ms <= now_ms)
    }
}

/// Who may ask an endpoint, and the rules by which their requests are sent.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Access {
    /// The tokens that are accepted, oldest first.
    pub tokens: Vec<Token>,
    /// In the order in which a request is held against them.
    pub rules: Vec<Rule>,
}

/// What is kept of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct AccessRow {
    /// Tokens beside that of the deployment.
    tokens: Vec<Token>,
    /// Whether the deployment's own token is refused.
    is_first_revoked: bool,
    rules: Vec<Rule>,
}

/// What a door knows of one endpoint, or of a graph.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Door {
    /// Its name.
    pub endpoint: String,
    /// When it was deployed: another deployment of the name is another endpoint.
    pub deployed_ms: u64,
    /// The tokens that are accepted.
    pub tokens: Vec<Token>,
    /// The headers that its rules look at.
    pub headers: Vec<String>,
    /// What it is made of, if it is a graph.
    pub graph: Option<GraphSpec>,
}

/// What doors are told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Doors {
    /// The log index of the last change of it.
    pub revision: u64,
    /// All endpoints that are not being taken down, and all graphs, by name; `None` where the asker knows them.
    pub doors: Option<Vec<Door>>,
}

/// A change. Append-only: positions are tags.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Command {
    /// Accepts one more token. Answer: [`Access`], like that of all of these.
    AddToken {
        /// The endpoint.
        endpoint: String,
        /// The token's name.
        name: String,
        /// BLAKE3 of it.
        hash: [u8; 32],
        /// How long it is accepted, in milliseconds; for ever if absent.
        ttl_ms: Option<u64>,
        /// Requests a second that are taken with it.
        per_second: Option<u32>,
    },
    /// Accepts a token no more.
    RevokeToken {
        /// The endpoint.
        endpoint: String,
        /// The token's name.
        name: String,
    },
    /// Sends requests by a rule; one that looks at the same is changed where it stands.
    SetRule {
        /// The endpoint.
        endpoint: String,
        /// The rule.
        rule: Rule,
        /// Whether it stands before all others.
        is_first: bool,
    },
    /// Forgets a rule.
    RemoveRule {
        /// The endpoint.
        endpoint: String,
        /// What it looks at.
        matcher: Matcher,
    },
}

/// Whether `caller` may give such commands.
pub(in crate::serving) fn is_allowed(caller: &Caller) -> bool {
    matches!(caller, Caller::Client)
}

/// Whose tokens these are: an endpoint's, or a graph's.
struct Owner {
    name: String,
    token_hash: [u8; 32],
    created_ms: u64,
    /// What an endpoint answers with.
    model: Option<String>,
}

impl Owner {
    fn of_endpoint(endpoint: Endpoint) -> Self {
        Owner {
            name: endpoint.name,
            token_hash: endpoint.token_hash,
            created_ms: endpoint.deployed_ms,
            model: Some(endpoint.model),
        }
    }

    fn of_graph(graph: &graph::Graph) -> Self {
        Owner {
            name: graph.name.clone(),
            token_hash: graph.token_hash,
            created_ms: graph.created_ms,
            model: None,
        }
    }
}

/// The endpoint or graph of this name, to be changed.
fn standing_owner(reader: &dyn Reader, name: &str) -> Result<Owner, Rejection> {
    match graph::get(reader, name) {
        Some(graph) => Ok(Owner::of_graph(&graph)),
        None => standing(reader, name).map(Owner::of_endpoint),
    }
}

/// Who may ask the endpoint or graph of this name.
pub fn of(reader: &dyn Reader, name: &str) -> Result<Access, Rejection> {
    let owner = match graph::get(reader, name) {
        Some(graph) => Owner::of_graph(&graph),
        None => Owner::of_endpoint(find_endpoint(reader, name)?),
    };
    Ok(find(reader, &owner))
}

fn find(reader: &dyn Reader, owner: &Owner) -> Access {
    let row = load(reader, &owner.name);
    let first = Token {
        name: FIRST_TOKEN.to_owned(),
        hash: owner.token_hash,
        created_ms: owner.created_ms,
        expires_ms: None,
        per_second: None,
    };
    let first = (!row.is_first_revoked).then_some(first);
    Access {
        tokens: first.into_iter().chain(row.tokens).collect(),
        rules: row.rules,
    }
}

/// What doors must know, if it has changed since `known`.
pub fn doors(reader: &dyn Reader, known: u64) -> Doors {
    let revision = row::get(reader, REVISION, &[]).unwrap_or(0);
    if revision == known && known != 0 {
        return Doors {
            revision,
            doors: None,
        };
    }
    let door = |owner: Owner, graph: Option<GraphSpec>| {
        let Access { tokens, rules } = find(reader, &owner);
        Door {
            endpoint: owner.name,
            deployed_ms: owner.created_ms,
            tokens,
            headers: headers_of(&rules),
            graph,
        }
    };
    let open = endpoints(reader)
        .into_iter()
        .filter(|endpoint| !endpoint.deleting);
    let of_endpoints = open.map(|endpoint| door(Owner::of_endpoint(endpoint), None));
    let of_graphs = graph::graphs(reader)
        .into_iter()
        .map(|graph| door(Owner::of_graph(&graph), Some(graph.spec)));
    Doors {
        revision,
        doors: Some(of_endpoints.chain(of_graphs).collect()),
    }
}

/// Has doors ask again.
pub(in crate::serving) fn touch(context: &ApplyContext, txn: &mut dyn Txn) {
    row::put(txn, REVISION, &[], &context.index);
}

/// Forgets who might ask an endpoint that is gone.
pub(in crate::serving) fn forget(txn: &mut dyn Txn, endpoint: &str) {
    txn.delete(ACCESS, endpoint.as_bytes());
}

fn load(reader: &dyn Reader, endpoint: &str) -> AccessRow {
    row::get(reader, ACCESS, endpoint.as_bytes()).unwrap_or_default()
}

/// Applies a command; who may ask the endpoint then.
pub(in crate::serving) fn apply(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    command: Command,
) -> Result<Access, Rejection> {
    let (Command::AddToken { endpoint, .. }
    | Command::RevokeToken { endpoint, .. }
    | Command::SetRule { endpoint, .. }
    | Command::RemoveRule { endpoint, .. }) = &command;
    let owner = standing_owner(txn, endpoint)?;
    let mut row = load(txn, &owner.name);
    match command {
        Command::AddToken {
            name,
            hash,
            ttl_ms,
            per_second,
            ..
        } => {
            let token = new_token(context.now_ms, name, hash, ttl_ms, per_second)?;
            row.tokens.retain(|token| !token.is_expired(context.now_ms));
            add(&owner, &mut row, token)?;
        }
        Command::RevokeToken { name, .. } => revoke(&owner, &mut row, &name)?,
        Command::SetRule { rule, is_first, .. } => {
            let Some(model) = &owner.model else {
                return Err(Rejection::invalid(format!(
                    "`{}` is a graph: rules are set for its endpoints",
                    owner.name
                )));
            };
            registry::state::find(txn, model, Some(rule.version))?;
            check_experiment(txn, &owner.name, &row.rules, &rule.matcher, Some(&rule))?;
            set_rule(&owner, &mut row, rule, is_first)?;
        }
        Command::RemoveRule { matcher, .. } => {
            check_experiment(txn, &owner.name, &row.rules, &matcher, None)?;
            let count = row.rules.len();
            row.rules
                .retain(|rule| !rule.matcher.looks_at_same(&matcher));
            if row.rules.len() == count {
                return Err(Rejection::not_found(format!(
                    "endpoint `{}` has no rule for {matcher}: see `mobula serve route list {0}`",
                    owner.name
                )));
            }
        }
    }
    row::put(txn, ACCESS, owner.name.as_bytes(), &row);
    touch(context, txn);
    Ok(find(txn, &owner))
}

fn new_token(
    now_ms: u64,
    name: String,
    hash: [u8; 32],
    ttl_ms: Option<u64>,
    per_second: Option<u32>,
) -> Result<Token, Rejection> {
    crate::name::check("a token", &name)?;
    if ttl_ms.is_some_and(|ttl_ms| !(1..=TTL_MS_MAX).contains(&ttl_ms)) {
        return Err(Rejection::invalid(
            "a token lives from 1 ms to ten years, or for ever: give another time, or none",
        ));
    }
    if per_second.is_some_and(|rate| !(1..=RATE_MAX).contains(&rate)) {
        return Err(Rejection::invalid(format!(
            "a token is good for 1 to {RATE_MAX} requests a second: give another rate, or none"
        )));
    }
    Ok(Token {
        name,
        hash,
        created_ms: now_ms,
        expires_ms: ttl_ms.map(|ttl_ms| now_ms.saturating_add(ttl_ms)),
        per_second,
    })
}

fn add(owner: &Owner, row: &mut AccessRow, token: Token) -> Result<(), Rejection> {
    let Owner { name, .. } = owner;
    if token.name == FIRST_TOKEN || row.tokens.iter().any(|known| known.name == token.name) {
        return Err(Rejection::new(
            ErrorCode::AlreadyExists,
            format!(
                "endpoint `{name}` has a token that is called `{0}`: choose another name, or revoke that one with \
                 `mobula serve tokens revoke {name} {0}`",
                token.name
            ),
        ));
    }
    if row.tokens.len() >= TOKENS_MAX {
        return Err(Rejection::new(
            ErrorCode::Overloaded,
            format!(
                "endpoint `{name}` has {TOKENS_MAX} tokens, the limit: revoke one with `mobula serve tokens revoke`"
            ),
        ));
    }
    row.tokens.push(token);
    Ok(())
}

fn revoke(owner: &Owner, row: &mut AccessRow, name: &str) -> Result<(), Rejection> {
    let count = row.tokens.len();
    row.tokens.retain(|token| token.name != name);
    let is_first = name == FIRST_TOKEN && !row.is_first_revoked;
    row.is_first_revoked |= is_first;
    if row.tokens.len() < count || is_first {
        return Ok(());
    }
    Err(Rejection::not_found(format!(
        "endpoint `{}` has no token that is called `{name}`: see `mobula serve tokens list {0}`",
        owner.name
    )))
}

/// Refuses another rule for a matcher, or none, where the one that stands or the one that comes names a version of an
/// experiment that is under way.
fn check_experiment(
    reader: &dyn Reader,
    name: &str,
    rules: &[Rule],
    matcher: &Matcher,
    new: Option<&Rule>,
) -> Result<(), Rejection> {
    let Some(open) = experiment::newest(reader, name).filter(|newest| newest.is_open()) else {
        return Ok(());
    };
    let arms = [
        ("control", open.plan.control.version),
        ("treatment", open.plan.treatment.version),
    ];
    let standing = rules
        .iter()
        .find(|rule| rule.matcher.looks_at_same(matcher));
    for rule in standing.into_iter().chain(new) {
        let named = arms.iter().find(|(_, version)| *version == rule.version);
        let Some((arm, version)) = named else {
            continue;
        };
        let number = open.number;
        return Err(Rejection::new(
            ErrorCode::FailedPrecondition,
            format!(
                "the rule `{rule}` is about version {version}, the {arm} of experiment {number} of endpoint `{name}`, \
                 and keys that it counts for one version would meet the other: wait for its end (`mobula experiment \
                 status {name}`), or end it with `mobula experiment stop {name}`, then change the rule"
            ),
        ));
    }
    Ok(())
}

fn set_rule(
    owner: &Owner,
    row: &mut AccessRow,
    rule: Rule,
    is_first: bool,
) -> Result<(), Rejection> {
    rule.matcher.check()?;
    let known = row
        .rules
        .iter()
        .position(|known| known.matcher.looks_at_same(&rule.matcher));
    if known.is_none() && row.rules.len() >= RULES_MAX {
        return Err(Rejection::new(
            ErrorCode::Overloaded,
            format!(
                "endpoint `{}` has {RULES_MAX} rules, the limit: remove one with `mobula serve route remove`",
                owner.name
            ),
        ));
    }
    match known {
        Some(at) if !is_first => row.rules[at] = rule,
        Some(at) => {
            row.rules.remove(at);
            row.rules.insert(0, rule);
        }
        None if is_first => row.rules.insert(0, rule),
        None => row.rules.push(rule),
    }
    Ok(())
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;
