//! Policies as text, checked and evaluated: the one file that knows Cedar.
//!
//! Invariants:
//! 1. Everything here is a function of its arguments: no clock, no chance, and what Cedar keeps in hash maps
//!    is sorted before anybody sees it.
//! 2. Cedar gives up where a thread's stack ends, which differs between processors. Each call here has a stack of
//!    its own (`STACK_BYTES`), and no policy that is let in comes near the end of it (`POLICY_BYTES_MAX`).
//! 3. A policy that fails while it is evaluated denies: an error opens no gate.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;
use std::sync::LazyLock;

use cedar_policy::{
    Authorizer, Context, Decision as CedarDecision, Effect, Entities, Entity, EntityId,
    EntityTypeName, EntityUid, Policy, PolicyId, PolicySet, Request, RestrictedExpression, Schema,
    ValidationMode, Validator,
};
use miette::Diagnostic;
use serde::{Deserialize, Serialize};

/// The types that policies can speak of, in Cedar's schema language.
pub const SCHEMA: &str = include_str!("schema.cedarschema");

/// The policies that are always there.
pub const BASE: &str = include_str!("base.cedar");

/// The largest file of policies: it stands in one entry of the log, and is parsed at each gate.
pub const TEXT_BYTES_MAX: usize = 32 * 1024;

/// Policies of a file: each is evaluated at each gate.
pub const POLICIES_MAX: usize = 256;

/// The largest policy: a chain of operators is as deep for whoever evaluates it as it is long, and so must stay far
/// from the end of [`STACK_BYTES`].
const POLICY_BYTES_MAX: usize = 4 * 1024;

/// How deep brackets may be nested: people nest five, and a parser's stack grows with each.
const NESTING_MAX: usize = 32;

/// The stack of a call: what the deepest policy of [`POLICY_BYTES_MAX`] needs, several times over, so that no head
/// comes to its end, whatever its processor. Pages that are not used are never there.
const STACK_BYTES: usize = 64 << 20;

/// Errors of a text that are told at once.
const ERRORS_TOLD_MAX: usize = 5;

/// The longest text that is taken over from Cedar or from an annotation, in bytes.
const SHOWN_BYTES_MAX: usize = 300;

static SCHEMA_READ: LazyLock<Schema> = LazyLock::new(|| {
    let (schema, _) = Schema::from_cedarschema_str(SCHEMA).expect("the schema is tested");
    schema
});

/// Why a text is no file of policies.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// Too long.
    #[error("the policies have {found} bytes, the limit is {TEXT_BYTES_MAX}: leave some out")]
    TooLong {
        /// Its size.
        found: usize,
    },
    /// Too deep.
    #[error(
        "line {line}, column {column}: brackets are nested more than {NESTING_MAX} deep, the limit: write \
         several policies instead"
    )]
    TooDeep {
        /// Where.
        line: usize,
        /// Where.
        column: usize,
    },
    /// One is too long.
    #[error(
        "policy {number} (counted from 1) has {found} bytes, the limit is {POLICY_BYTES_MAX}: write several policies \
         instead"
    )]
    TooLongPolicy {
        /// Which.
        number: usize,
        /// Its size.
        found: usize,
    },
    /// Too many.
    #[error("there are {found} policies, the limit is {POLICIES_MAX}: join some")]
    TooMany {
        /// How many.
        found: usize,
    },
    /// It does not parse, or does not fit the schema.
    #[error("{}; nothing was changed: `mobula policy schema` says what policies can speak of", .0.join("; "))]
    Wrong(Vec<String>),
    /// It cannot be told from others.
    #[error(
        "policy {number} (counted from 1) has no `@id(\"…\")` before it: decisions name the policies that \
         made them"
    )]
    NoId {
        /// Which.
        number: usize,
    },
    /// Its name is taken.
    #[error(
        "two policies have the id `{id}`: rename one of them; the shipped ones are in `mobula policy show`"
    )]
    RepeatedId {
        /// The name.
        id: String,
    },
    /// Templates have nobody to link them.
    #[error(
        "policy {number} (counted from 1) has slots such as `?principal`, which nothing fills: name who it is about"
    )]
    Template {
        /// Which.
        number: usize,
    },
}

/// A value of an attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    /// `Bool`
    Flag(bool),
    /// `Long`
    Number(u64),
    /// `String`
    Text(String),
    /// `Set<String>`
    Texts(BTreeSet<String>),
    /// `Set<Key>`, by their names.
    Keys(BTreeSet<String>),
}

/// A thing that policies speak of.
#[derive(Debug, Clone)]
pub(super) struct Thing {
    /// Its type in the schema.
    pub(super) kind: &'static str,
    /// Its name.
    pub(super) id: String,
    /// Its attributes.
    pub(super) attributes: Vec<(&'static str, Value)>,
    /// Its metrics.
    pub(super) metrics: BTreeMap<String, f64>,
}

/// What is asked.
#[derive(Debug, Clone)]
pub(super) struct Question {
    /// Who asks.
    pub(super) principal: String,
    /// What for.
    pub(super) action: &'static str,
    /// With what.
    pub(super) resource: Thing,
    /// In which circumstances.
    pub(super) context: Vec<(&'static str, Value)>,
    /// The keys that attributes name.
    pub(super) keys: Vec<Thing>,
}

/// A policy that decided.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Deciding {
    /// Its id.
    pub id: String,
    /// Its annotation `@reason`.
    pub reason: Option<String>,
    /// Its annotation `@next`.
    pub next: Option<String>,
}

/// What the policies say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Verdict {
    /// Whether the gate is open.
    pub(super) permitted: bool,
    /// The policies that decided, by id.
    pub(super) policies: Vec<Deciding>,
    /// What went wrong meanwhile, which denies.
    pub(super) errors: Vec<String>,
}

/// Checks a file of policies; the ids of its policies, in the order of the file.
pub fn check(text: &str) -> Result<Vec<String>, PolicyError> {
    stacker::grow(STACK_BYTES, || {
        let own = read(text)?;
        let ids: Vec<String> = own.iter().map(|policy| policy.id().to_string()).collect();
        joined(own, text)?;
        Ok(ids)
    })
}

/// Asks the shipped policies and those of `text`, which was checked.
pub(super) fn decide(text: &str, question: &Question) -> Verdict {
    stacker::grow(STACK_BYTES, || match ask(text, question) {
        Ok(verdict) => verdict,
        Err(error) => Verdict {
            permitted: false,
            policies: Vec::new(),
            errors: vec![shortened(&error)],
        },
    })
}

/// The policies of a text, each under its `@id`.
fn read(text: &str) -> Result<Vec<Policy>, PolicyError> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(PolicyError::TooLong { found: text.len() });
    }
    check_nesting(text)?;
    let parsed = PolicySet::from_str(text).map_err(|errors| {
        let told = errors.iter().take(ERRORS_TOLD_MAX);
        PolicyError::Wrong(told.map(|error| told_at(text, error)).collect())
    })?;
    let count = parsed.num_of_policies() + parsed.num_of_templates();
    if count > POLICIES_MAX {
        return Err(PolicyError::TooMany { found: count });
    }
    (0..count)
        .map(|number| {
            // Cedar counts the policies of a text so.
            let counted = PolicyId::new(format!("policy{number}"));
            let number = number + 1;
            let Some(policy) = parsed.policy(&counted) else {
                return Err(PolicyError::Template { number });
            };
            let found = policy.to_cedar().map_or(0, |text| text.len());
            if found > POLICY_BYTES_MAX {
                return Err(PolicyError::TooLongPolicy { number, found });
            }
            match policy.annotation("id").filter(|id| !id.is_empty()) {
                Some(id) => Ok(policy.new_id(PolicyId::new(shortened(id)))),
                None => Err(PolicyError::NoId { number }),
            }
        })
        .collect()
}

/// The shipped policies and `own`, which were read from `text`, checked against the schema.
fn joined(own: Vec<Policy>, text: &str) -> Result<PolicySet, PolicyError> {
    let mut policies = PolicySet::new();
    for policy in read(BASE)?.into_iter().chain(own) {
        let id = policy.id().to_string();
        policies
            .add(policy)
            .map_err(|_| PolicyError::RepeatedId { id })?;
    }
    let validator = Validator::new(SCHEMA_READ.clone());
    let result = validator.validate(&policies, ValidationMode::Strict);
    let mut errors: Vec<String> = result
        .validation_errors()
        // Those of the shipped ones are found by a test.
        .map(|error| told_at(text, error))
        .collect();
    if errors.is_empty() {
        return Ok(policies);
    }
    errors.sort();
    errors.dedup();
    errors.truncate(ERRORS_TOLD_MAX);
    Err(PolicyError::Wrong(errors))
}

/// Refuses nesting that people do not write. Strings and comments may hold any bracket.
fn check_nesting(text: &str) -> Result<(), PolicyError> {
    let mut depth = 0usize;
    let mut is_text = false;
    for (index, line) in text.lines().enumerate() {
        let mut before = ' ';
        for (column, character) in line.char_indices() {
            match character {
                '"' if before != '\\' => is_text = !is_text,
                // Two of them in a text are one character and no escape of what follows.
                '\\' if before == '\\' => {
                    before = ' ';
                    continue;
                }
                _ if is_text => {}
                '/' if before == '/' => break,
                '(' | '[' | '{' => depth += 1,
                ')' | ']' | '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            before = character;
            if depth > NESTING_MAX {
                let (line, column) = (index + 1, column + 1);
                return Err(PolicyError::TooDeep { line, column });
            }
        }
    }
    Ok(())
}

/// `error` with the line and the column where it is, and what was expected there.
fn told_at(text: &str, error: &(impl Diagnostic + std::fmt::Display)) -> String {
    let label = error.labels().and_then(|mut labels| labels.next());
    let mut told = error.to_string();
    if let Some(label) = &label {
        let before = text.get(..label.offset().min(text.len())).unwrap_or(text);
        let line = before.matches('\n').count() + 1;
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        let column = before[line_start..].chars().count() + 1;
        told = format!("line {line}, column {column}: {told}");
        if let Some(expected) = label.label() {
            told = format!("{told}, {expected}");
        }
    }
    if let Some(help) = error.help() {
        told = format!("{told} ({help})");
    }
    shortened(&told)
}

fn shortened(text: &str) -> String {
    let end = text.floor_char_boundary(SHOWN_BYTES_MAX);
    text[..end].replace('\n', " ")
}

fn ask(text: &str, question: &Question) -> Result<Verdict, String> {
    let told = |error: &dyn std::fmt::Display| error.to_string();
    let own = read(text).map_err(|error| told(&error))?;
    let policies = joined(own, text).map_err(|error| told(&error))?;
    let schema: &Schema = &SCHEMA_READ;
    let principal = uid("Principal", &question.principal);
    let mut entities = vec![Entity::with_uid(principal.clone())];
    for thing in question.keys.iter().chain([&question.resource]) {
        entities.push(entity(thing)?);
    }
    let entities = Entities::from_entities(entities, Some(schema)).map_err(|error| told(&error))?;
    let context = question.context.iter();
    let context = context.map(|(name, value)| ((*name).to_owned(), expression(value)));
    let request = Request::new(
        principal,
        uid("Action", question.action),
        uid(question.resource.kind, &question.resource.id),
        Context::from_pairs(context).map_err(|error| told(&error))?,
        Some(schema),
    )
    .map_err(|error| told(&error))?;
    let response = Authorizer::new().is_authorized(&request, &policies, &entities);
    let diagnostics = response.diagnostics();
    let mut errors: Vec<String> = diagnostics
        .errors()
        .map(|error| shortened(&error.to_string()))
        .collect();
    errors.sort();
    errors.truncate(ERRORS_TOLD_MAX);
    let mut deciding: Vec<Deciding> = diagnostics
        .reason()
        .filter_map(|id| policies.policy(id))
        .map(|policy| Deciding {
            id: policy.id().to_string(),
            reason: policy.annotation("reason").map(shortened),
            next: policy.annotation("next").map(shortened),
        })
        .collect();
    deciding.sort();
    Ok(Verdict {
        permitted: response.decision() == CedarDecision::Allow && errors.is_empty(),
        policies: deciding,
        errors,
    })
}

fn uid(kind: &str, id: &str) -> EntityUid {
    let kind = EntityTypeName::from_str(kind).expect("the schema's names are names");
    EntityUid::from_type_name_and_id(kind, EntityId::new(id))
}

fn entity(thing: &Thing) -> Result<Entity, String> {
    let attributes = thing.attributes.iter();
    let attributes = attributes.map(|(name, value)| ((*name).to_owned(), expression(value)));
    let metrics = thing.metrics.iter().filter_map(|(name, value)| {
        let value = RestrictedExpression::new_decimal(decimal(*value)?);
        Some((name.clone(), value))
    });
    Entity::new_with_tags(uid(thing.kind, &thing.id), attributes, [], metrics)
        .map_err(|error| error.to_string())
}

/// A metric as Cedar's decimals, which have four digits behind the point; `None` for what has no such form.
fn decimal(value: f64) -> Option<String> {
    /// What 64 bits hold, in ten-thousandths.
    const LIMIT: f64 = 9e14;
    (value.abs() <= LIMIT).then(|| format!("{value:.4}"))
}

fn expression(value: &Value) -> RestrictedExpression {
    match value {
        Value::Flag(flag) => RestrictedExpression::new_bool(*flag),
        Value::Number(number) => {
            RestrictedExpression::new_long(i64::try_from(*number).unwrap_or(i64::MAX))
        }
        Value::Text(text) => RestrictedExpression::new_string(text.clone()),
        Value::Texts(texts) => RestrictedExpression::new_set(
            texts
                .iter()
                .map(|text| RestrictedExpression::new_string(text.clone())),
        ),
        Value::Keys(keys) => RestrictedExpression::new_set(
            keys.iter()
                .map(|key| RestrictedExpression::new_entity_uid(uid("Key", key))),
        ),
    }
}

/// What `mobula policy show` says of each policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// Its id.
    pub id: String,
    /// `permit` or `forbid`.
    pub effect: &'static str,
    /// Its annotation `@reason`.
    pub reason: Option<String>,
}

/// The shipped policies and those of `text`, which was checked.
pub fn list(text: &str) -> Result<Vec<Listed>, PolicyError> {
    stacker::grow(STACK_BYTES, || {
        let policies = read(BASE)?.into_iter().chain(read(text)?);
        Ok(policies
            .map(|policy| Listed {
                id: policy.id().to_string(),
                effect: match policy.effect() {
                    Effect::Permit => "permit",
                    Effect::Forbid => "forbid",
                },
                reason: policy.annotation("reason").map(shortened),
            })
            .collect())
    })
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
