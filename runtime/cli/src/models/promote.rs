//! `mobula models promote`, `archive` and `policy`: what is signed.

use std::path::Path;

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_actors::registry::client;
use mobula_actors::registry::decide::Decision;
use mobula_actors::registry::envelope::Envelope;
use mobula_actors::registry::stages::{Policy, Risk, Stage};
use mobula_actors::registry::statement;
use serde_json::{Value, json};

use super::name::VersionName;
use super::{VersionJson, name_of, one_version};
use crate::args::{RiskArgument, SigningArguments};
use crate::output::print_json;
use crate::signing::KeySource;

/// Brings a version to `to`, or one stage further.
pub(super) async fn promote(
    cluster: &Cluster,
    name: &VersionName,
    to: Option<Stage>,
    signing: SigningArguments,
    json: bool,
) -> anyhow::Result<()> {
    let version = one_version(cluster, name).await?;
    let model = client::model(cluster, &name.model).await?;
    let to = to.unwrap_or(match version.standing.stage {
        Stage::Staging => Stage::Production,
        _ => Stage::Staging,
    });
    let handed_on = signing.envelope.as_deref().map(read_json).transpose()?;
    let reason = match &handed_on {
        Some(file) => Decision::reason_in(file)?.to_owned(),
        None => signing.reason,
    };
    let mut decision = Decision::new(&model, &version, to, &reason);
    if let Some(file) = &handed_on {
        decision.take_over(file)?;
    }
    for key in &signing.keys {
        let signatures = key.sign(cluster, &decision.statements()).await?;
        decision.add_signatures(signatures);
    }
    let (from, replaces) = (decision.from, decision.replaces);
    if let Some(path) = &signing.save {
        std::fs::write(path, format!("{:#}\n", decision.to_json()))
            .with_context(|| format!("{} cannot be written", path.display()))?;
        println!(
            "{} from {} to {}: signed by {} of {}, in {}; nothing was changed",
            name_of(&version),
            from.as_str(),
            to.as_str(),
            decision.signatures(),
            decision.signatures_needed,
            path.display()
        );
        return Ok(());
    }
    let shown = client::stage(cluster, decision.into_change()).await?;
    if json {
        return print_json(&VersionJson::from(&shown));
    }
    print!("{} is in {}", name_of(&shown), to.as_str());
    match replaces {
        Some(replaced) => println!("; {}:{replaced} is archived", name.model),
        None => println!(),
    }
    Ok(())
}

fn read_json(path: &Path) -> anyhow::Result<Value> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("{} cannot be read", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))
}

/// Sets who decides about a model.
pub(super) async fn policy(
    cluster: &Cluster,
    model: &str,
    risk: RiskArgument,
    signatures: Option<u32>,
    keys: &[KeySource],
    json: bool,
) -> anyhow::Result<()> {
    let view = client::model(cluster, model).await?;
    let (risk, fewest) = match risk {
        RiskArgument::Normal => (Risk::Normal, 1),
        RiskArgument::High => (Risk::High, 2),
    };
    let policy = Policy {
        risk,
        signatures: signatures.unwrap_or(fewest),
    };
    let revision = view.state.revision;
    let mut envelope = Envelope {
        payload: statement::policy(model, &policy, revision),
        signatures: Vec::new(),
    };
    for key in keys {
        let payload = [envelope.payload.as_slice()];
        envelope
            .signatures
            .extend(key.sign(cluster, &payload).await?);
    }
    let envelope = Some(envelope).filter(|envelope| !envelope.signatures.is_empty());
    if policy == view.state.policy {
        bail!("model `{model}` has this policy already");
    }
    let state = client::set_policy(cluster, model, policy, revision, envelope).await?;
    let policy = state.policy;
    if json {
        return print_json(&json!({
            "model": model,
            "risk": policy.risk.as_str(),
            "signatures": policy.signatures,
            "revision": state.revision,
        }));
    }
    println!(
        "{model} is of {} risk: {} different keys sign each change of a stage",
        policy.risk.as_str(),
        policy.signatures
    );
    Ok(())
}
