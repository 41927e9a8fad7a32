//! `mobula models export` and `verify-bundle`.

use std::path::Path;

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_actors::registry::bundle::{self, BUNDLE_BYTES_MAX, BUNDLE_FILE};
use mobula_actors::registry::keys::PublicKey;
use mobula_actors::registry::signer::PrivateKey;
use mobula_actors::registry::statement::VERSION_FILE;
use mobula_actors::registry::{client, statement};
use serde_json::json;

use super::name::VersionName;
use super::{file_of, name_of, one_version};
use crate::args::StoreArguments;
use crate::output::print_json;

/// SLSA provenance, unsigned: for whoever wants to read it.
const PROVENANCE_FILE: &str = "provenance.json";

/// What was signed, as DSSE envelopes.
const PROMOTION_ENVELOPE_FILE: &str = "promotion.dsse.json";
const PROVENANCE_ENVELOPE_FILE: &str = "provenance.dsse.json";

pub(super) async fn export(
    cluster: &Cluster,
    name: &VersionName,
    folder: &Path,
    key: Option<&Path>,
    store: &StoreArguments,
    as_json: bool,
) -> anyhow::Result<()> {
    let key = key.map(PrivateKey::open).transpose()?;
    let version = one_version(cluster, name).await?;
    let signed = client::signed(cluster, &name.model, version.version.version).await?;
    let mut files = vec![(VERSION_FILE, file_of(cluster, &version, store).await?)];
    if let Some(provenance) = &version.provenance {
        let text = statement::provenance(&version.version, provenance);
        files.push((PROVENANCE_FILE, text));
    }
    if let Some(edge) = signed {
        files.push((
            PROMOTION_ENVELOPE_FILE,
            edge.promotion.to_json().to_string().into(),
        ));
        if let Some(provenance) = edge.provenance {
            files.push((
                PROVENANCE_ENVELOPE_FILE,
                provenance.envelope.to_json().to_string().into(),
            ));
        }
    }
    let unusable = || format!("the folder {} cannot be used", folder.display());
    std::fs::create_dir_all(folder).with_context(unusable)?;
    if std::fs::read_dir(folder)
        .with_context(unusable)?
        .next()
        .is_some()
    {
        bail!("the folder {} is not empty: name another", folder.display());
    }
    for (file, bytes) in &files {
        std::fs::write(folder.join(file), bytes).with_context(unusable)?;
    }
    if let Some(key) = &key {
        let text = bundle::sign(folder, &name_of(&version), key)?;
        std::fs::write(folder.join(BUNDLE_FILE), text).with_context(unusable)?;
    }
    let names: Vec<&str> = files
        .iter()
        .map(|(file, _)| *file)
        .chain(key.as_ref().map(|_| BUNDLE_FILE))
        .collect();
    if as_json {
        return print_json(&json!({ "folder": folder, "files": names }));
    }
    println!(
        "{} in {}: {}",
        name_of(&version),
        folder.display(),
        names.join(", ")
    );
    Ok(())
}

pub(super) fn verify_bundle(
    folder: &Path,
    public_key: &Path,
    signature: Option<&Path>,
    as_json: bool,
) -> anyhow::Result<()> {
    let unreadable = |path: &Path| format!("{} cannot be read", path.display());
    let key = std::fs::read_to_string(public_key).with_context(|| unreadable(public_key))?;
    let key = PublicKey::from_pem(&key).with_context(|| public_key.display().to_string())?;
    let usual = folder.join(BUNDLE_FILE);
    let path = signature.unwrap_or(&usual);
    let size = std::fs::metadata(path)
        .with_context(|| unreadable(path))?
        .len();
    if size > BUNDLE_BYTES_MAX {
        bail!(
            "{} has {size} bytes: a signature has {BUNDLE_BYTES_MAX} at the most",
            path.display()
        );
    }
    let text = std::fs::read_to_string(path).with_context(|| unreadable(path))?;
    let verified = bundle::verify(folder, path, &text, &key)?;
    if as_json {
        return print_json(&json!({
            "name": verified.name,
            "files": verified.files,
            "root_sha256": verified.root,
        }));
    }
    println!(
        "{}: {} files are what was signed",
        verified.name, verified.files
    );
    println!("root {}", verified.root);
    Ok(())
}
