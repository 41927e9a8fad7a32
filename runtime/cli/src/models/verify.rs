//! `mobula models verify`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use mobula::Cluster;
use mobula_actors::registry::decide::{Finding, verify as verify_signed};
use mobula_actors::registry::keys::KeyRecord;
use mobula_actors::registry::{client, merkle};

use super::name::VersionName;
use super::{file_of, name_of, one_version};
use crate::args::StoreArguments;
use crate::output::print_json;

pub(super) async fn verify(
    cluster: &Cluster,
    name: &VersionName,
    store: &StoreArguments,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let version = one_version(cluster, name).await?;
    let signed = client::signed(cluster, &name.model, version.version.version).await?;
    let keys: BTreeMap<String, KeyRecord> = client::keys(cluster)
        .await?
        .into_iter()
        .map(|key| (key.id.clone(), key))
        .collect();
    let mut findings = verify_signed(&version, signed.as_ref(), |id| keys.get(id).cloned());
    let expected = version
        .provenance
        .as_ref()
        .and_then(|provenance| provenance.sha256.clone());
    let outcome = match file_of(cluster, &version, store).await {
        Err(error) => Err(crate::output::causes(&error)),
        Ok(bytes) => match (merkle::to_hex(&merkle::hash(&bytes)), expected) {
            (found, Some(expected)) if found != expected => Err(format!(
                "its SHA-256 is {found}, and {expected} was registered"
            )),
            _ => Ok(format!("whole, {} bytes read", bytes.len())),
        },
    };
    let (ok, detail) = match outcome {
        Ok(detail) => (true, detail),
        Err(detail) => (false, detail),
    };
    let check = "file";
    findings.push(Finding { check, ok, detail });
    let is_good = findings.iter().all(|finding| finding.ok);
    if json {
        print_json(&findings)?;
    } else {
        for finding in &findings {
            let verdict = if finding.ok { "ok " } else { "BAD" };
            println!("{verdict} {:<10} {}", finding.check, finding.detail);
        }
    }
    if is_good {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("{} is not what it should be", name_of(&version));
    Ok(ExitCode::FAILURE)
}
