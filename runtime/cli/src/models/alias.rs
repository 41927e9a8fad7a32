//! `mobula models alias` and `tag`.

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_actors::registry::client;
use mobula_actors::registry::search::Selector;
use serde_json::json;

use super::name::VersionName;
use super::{VersionJson, name_of, one_version};
use crate::output::print_json;

/// Moves an alias, makes it or removes it.
pub(super) async fn alias(
    cluster: &Cluster,
    name: &VersionName,
    alias: &str,
    remove: bool,
    as_json: bool,
) -> anyhow::Result<()> {
    let model = &name.model;
    let version = if remove {
        if name.selector != Selector::Newest {
            bail!("--remove takes the model: `mobula models alias {model} {alias} --remove`");
        }
        None
    } else {
        Some(one_version(cluster, name).await?.version.version)
    };
    let revision = client::model(cluster, model).await?.state.revision;
    let state = client::alias(cluster, model, alias, version, revision).await?;
    if as_json {
        return print_json(&json!({
            "model": model,
            "alias": alias,
            "version": version,
            "revision": state.revision,
        }));
    }
    match version {
        Some(version) => println!("{model}:{alias} is {model}:{version}"),
        None => println!("{model}:{alias} is nothing any more"),
    }
    Ok(())
}

/// Sets a tag or takes it away.
pub(super) async fn tag(
    cluster: &Cluster,
    name: &VersionName,
    tag: &str,
    remove: bool,
    as_json: bool,
) -> anyhow::Result<()> {
    let version = one_version(cluster, name).await?;
    let number = version.version.version;
    let (tag, value) = if remove {
        (tag, None)
    } else {
        let (tag, value) = tag
            .split_once('=')
            .with_context(|| format!("`{tag}` has no value: write `{tag}=value`"))?;
        (tag, Some(value.to_owned()))
    };
    let shown = client::tag(cluster, &name.model, number, tag, value).await?;
    if as_json {
        return print_json(&VersionJson::from(&shown));
    }
    let tags: Vec<String> = shown
        .standing
        .tags
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    println!("{}: {}", name_of(&shown), tags.join(" "));
    Ok(())
}
