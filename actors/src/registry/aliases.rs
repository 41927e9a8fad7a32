//! Names that people give to versions, and tags.
//!
//! Invariants:
//! 1. An alias names a version that exists.
//! 2. No alias can be taken for a version's number.

use mobula_core::control::{ApplyContext, Reader, Txn};
use mobula_core::error::{ErrorCode, Rejection};
use mobula_core::row;
use serde::{Deserialize, Serialize};

use super::events::{self, Event};
use super::stages::{self, ModelState};
use super::tables::{ALIASES, model_prefix, named_key};
use super::versions::{ModelVersion, find};

/// Aliases of a model: they are names that people remember.
const ALIASES_MAX: usize = 64;

/// Earlier versions that an alias remembers; the log has all of them.
const HISTORY_MAX: usize = 32;

/// Tags of a version, and the longest value of one in bytes.
const TAGS_MAX: usize = 32;
const TAG_VALUE_BYTES_MAX: usize = 256;

/// A name for a version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alias {
    /// The version that it names.
    pub version: u64,
    /// Since when, in milliseconds since the Unix epoch.
    pub since_ms: u64,
    /// What it named before and since when, the latest last, 32 at the most.
    pub history: Vec<(u64, u64)>,
}

/// The aliases of a model, by name.
pub fn of_model(reader: &dyn Reader, model: &str) -> Vec<(String, Alias)> {
    let prefix = model_prefix(model);
    row::all(reader, ALIASES, &prefix)
        .into_iter()
        .map(|(key, alias)| {
            let name = String::from_utf8(key[prefix.len()..].to_vec());
            (name.expect("an alias is ASCII"), alias)
        })
        .collect()
}

/// What an alias names.
pub fn resolve(reader: &dyn Reader, model: &str, alias: &str) -> Result<u64, Rejection> {
    find(reader, model, None)?;
    let found: Option<Alias> = row::get(reader, ALIASES, &named_key(model, alias));
    found.map(|alias| alias.version).ok_or_else(|| {
        let shown: String = alias.chars().take(64).collect();
        Rejection::not_found(format!(
            "model `{model}` has no alias `{shown}`: see `mobula models show {model}`"
        ))
    })
}

/// Makes an alias name `version`, or nothing.
pub(super) fn set(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    model: &str,
    alias: &str,
    version: Option<u64>,
    expected_revision: u64,
) -> Result<ModelState, Rejection> {
    crate::name::check("an alias", alias)?;
    if alias.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Rejection::invalid(format!(
            "`{alias}` cannot name an alias: it reads as a version's number; add a letter"
        )));
    }
    find(txn, model, version)?;
    let state = stages::next_revision(txn, model, expected_revision)?;
    let key = named_key(model, alias);
    let before: Option<Alias> = row::get(txn, ALIASES, &key);
    let event = Event::Aliased {
        model,
        alias,
        from: before.as_ref().map(|alias| alias.version),
        to: version,
        revision: state.revision,
    };
    let Some(version) = version else {
        if before.is_none() {
            return resolve(txn, model, alias).map(|_| state);
        }
        events::append(txn, context, &event);
        txn.delete(ALIASES, &key);
        stages::put_model_state(txn, model, &state);
        return Ok(state);
    };
    if before.is_none() && of_model(txn, model).len() >= ALIASES_MAX {
        return Err(Rejection::new(
            ErrorCode::FailedPrecondition,
            format!(
                "model `{model}` has {ALIASES_MAX} aliases, the limit: remove one, or use a tag"
            ),
        ));
    }
    events::append(txn, context, &event);
    let mut history = Vec::new();
    if let Some(before) = before {
        history = before.history;
        history.push((before.version, before.since_ms));
        history.drain(..history.len().saturating_sub(HISTORY_MAX));
    }
    let row = Alias {
        version,
        since_ms: context.now_ms,
        history,
    };
    row::put(txn, ALIASES, &key, &row);
    stages::put_model_state(txn, model, &state);
    Ok(state)
}

/// Gives a version a tag, or takes it away.
pub(super) fn tag(
    context: &ApplyContext,
    txn: &mut dyn Txn,
    (model, version): (&str, u64),
    tag: &str,
    value: Option<String>,
) -> Result<ModelVersion, Rejection> {
    crate::name::check("a tag", tag)?;
    let found = find(txn, model, Some(version))?;
    let mut standing = stages::standing(txn, &found);
    let event = Event::Tagged {
        model,
        version,
        tag,
        value: value.as_deref(),
    };
    match &value {
        None => {
            if standing.tags.remove(tag).is_none() {
                return Err(Rejection::not_found(format!(
                    "{model}:{version} has no tag `{tag}`: see `mobula models show {model}`"
                )));
            }
        }
        Some(value) => {
            if value.len() > TAG_VALUE_BYTES_MAX {
                return Err(Rejection::invalid(format!(
                    "the tag's value has {} bytes, the limit is {TAG_VALUE_BYTES_MAX}: shorten it",
                    value.len()
                )));
            }
            standing.tags.insert(tag.to_owned(), value.clone());
            if standing.tags.len() > TAGS_MAX {
                return Err(Rejection::new(
                    ErrorCode::FailedPrecondition,
                    format!("{model}:{version} has {TAGS_MAX} tags, the limit: remove one"),
                ));
            }
        }
    }
    events::append(txn, context, &event);
    stages::put_standing(txn, model, version, &standing);
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::state::tests::World;

    #[test]
    fn an_alias_moves_remembers_and_is_removed() {
        let mut world = World::with_versions(3);
        assert_eq!(world.alias("champion", Some(1)).unwrap().revision, 1);
        world.alias("champion", Some(3)).unwrap();
        assert_eq!(resolve(&world.tables, "digits", "champion").unwrap(), 3);
        let (name, alias) = of_model(&world.tables, "digits").remove(0);
        assert_eq!((name.as_str(), alias.version), ("champion", 3));
        assert_eq!(alias.history, [(1, 1)]);
        world.alias("champion", None).unwrap();
        let error = world.alias("champion", None).unwrap_err();
        assert!(error.message.contains("has no alias `champion`"), "{error}");
        for _ in 0..HISTORY_MAX + 5 {
            world.alias("champion", Some(2)).unwrap();
        }
        let (_, alias) = of_model(&world.tables, "digits").remove(0);
        assert_eq!(alias.history.len(), HISTORY_MAX);
    }

    #[test]
    fn what_cannot_be_an_alias_is_refused() {
        let mut world = World::with_versions(1);
        for (alias, version, expected) in [
            ("12", Some(1), "reads as a version's number"),
            ("-x", Some(1), "cannot name an alias"),
            ("good", Some(2), "has no version 2"),
        ] {
            let error = world.alias(alias, version).unwrap_err();
            assert!(error.message.contains(expected), "{error}");
        }
        world.alias("good", Some(1)).unwrap();
        let stale = world.alias_at("good", Some(1), 0).unwrap_err();
        assert_eq!(stale.code, ErrorCode::Fenced);
        for number in 1..ALIASES_MAX {
            world.alias(&format!("a{number}"), Some(1)).unwrap();
        }
        let error = world.alias("one-more", Some(1)).unwrap_err();
        assert!(error.message.contains("64 aliases"), "{error}");
    }

    #[test]
    fn tags_come_and_go_within_their_bounds() {
        let mut world = World::with_versions(1);
        let mut tag = |name: &str, value: Option<&str>| world.tag(1, name, value);
        tag("team", Some("vision")).unwrap();
        tag("team", Some("text")).unwrap();
        tag("team", None).unwrap();
        let error = tag("team", None).unwrap_err();
        assert!(error.message.contains("has no tag `team`"), "{error}");
        let error = tag("team", Some(&"x".repeat(257))).unwrap_err();
        assert!(error.message.contains("257 bytes"), "{error}");
        for number in 0..TAGS_MAX {
            tag(&format!("t{number}"), Some("")).unwrap();
        }
        let error = tag("one-more", Some("")).unwrap_err();
        assert!(error.message.contains("32 tags"), "{error}");
    }
}
