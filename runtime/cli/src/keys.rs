//! `mobula keys`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_actors::registry::client;
use mobula_actors::registry::key_holder::{self, HoldOrder};
use mobula_actors::registry::keys::{Algorithm, KeyRecord, PublicKey, Role};
use mobula_actors::registry::signer::{PrivateKey, Signer};
use mobula_actors::registry::statement::{self, KeyChange};
use mobula_core::clock::Clock;
use serde::Serialize;
use serde_json::json;

use crate::args::{
    AdminSigning, AlgorithmArgument, Format, KeysCommand, KnownKeyArguments, Target,
};
use crate::clock::SystemClock;
use crate::connect::connect;
use crate::output::{age, print_json, print_table};
use crate::signing::PREFIX_MIN;

/// A key as `--json` prints it.
#[derive(Serialize)]
struct KeyJson<'a> {
    key: &'a str,
    algorithm: &'static str,
    roles: Vec<&'static str>,
    owner: &'a str,
    public_key: String,
    added_ms: u64,
    revoked_ms: Option<u64>,
    revoked_reason: Option<&'a str>,
}

impl<'a> From<&'a KeyRecord> for KeyJson<'a> {
    fn from(record: &'a KeyRecord) -> Self {
        let key = record.public_key();
        let revoked = record.revoked.as_ref();
        KeyJson {
            key: &record.id,
            algorithm: key.algorithm().as_str(),
            roles: record.roles.iter().map(|role| role.as_str()).collect(),
            owner: &record.owner,
            public_key: key.to_pem(),
            added_ms: record.added_ms,
            revoked_ms: revoked.map(|revoked| revoked.revoked_ms),
            revoked_reason: revoked.map(|revoked| revoked.reason.as_str()),
        }
    }
}

pub(crate) async fn run(target: &Target, command: KeysCommand) -> anyhow::Result<()> {
    match command {
        KeysCommand::Create {
            file,
            algorithm,
            offline,
            known,
            format,
        } => {
            // First, so that no key is made for a cluster that is not there.
            let cluster = match offline {
                true => None,
                false => Some(connect(target).await?),
            };
            let key = create(&file, algorithm)?;
            match cluster {
                Some(cluster) => add(&cluster, &key, &file, known, format).await,
                None if format.json => print_json(&json!({ "key": key.id() })),
                None => {
                    println!("{}", key.id());
                    Ok(())
                }
            }
        }
        KeysCommand::Add {
            file,
            known,
            format,
        } => {
            let text = std::fs::read_to_string(&file)
                .with_context(|| format!("{} cannot be read", file.display()))?;
            let key = PublicKey::from_pem(&text).with_context(|| file.display().to_string())?;
            add(&connect(target).await?, &key, &file, known, format).await
        }
        KeysCommand::Hold {
            files,
            labels,
            format,
        } => hold(&connect(target).await?, &files, &labels, format).await,
        KeysCommand::List(format) => list(&connect(target).await?, format).await,
        KeysCommand::Revoke {
            key,
            reason,
            signing,
            format,
        } => revoke(&connect(target).await?, &key, &reason, &signing, format).await,
    }
}

/// Makes the files of a key; its public half.
fn create(file: &Path, algorithm: AlgorithmArgument) -> anyhow::Result<PublicKey> {
    let algorithm = match algorithm {
        AlgorithmArgument::EcdsaP256 => Algorithm::EcdsaP256,
        AlgorithmArgument::Ed25519 => Algorithm::Ed25519,
    };
    let key = PrivateKey::create(file, algorithm)?.public_key().clone();
    let mut public = file.as_os_str().to_owned();
    public.push(".pub");
    std::fs::write(&public, key.to_pem())
        .with_context(|| format!("{} cannot be written", Path::new(&public).display()))?;
    Ok(key)
}

async fn add(
    cluster: &Cluster,
    key: &PublicKey,
    file: &Path,
    known: KnownKeyArguments,
    format: Format,
) -> anyhow::Result<()> {
    let roles: BTreeSet<Role> = known.roles.into_iter().map(Role::from).collect();
    let owner = known.owner.unwrap_or_else(|| {
        let name = file.file_stem().unwrap_or_default();
        name.to_string_lossy().into_owned()
    });
    let change = KeyChange::Enrol {
        roles: &roles,
        owner: &owner,
    };
    let statement = statement::key(&key.id(), &change);
    let envelope = known.signing.envelope(cluster, statement).await?;
    let record = client::add_key(cluster, key, roles.clone(), &owner, envelope).await?;
    if format.json {
        return print_json(&KeyJson::from(&record));
    }
    println!("{}", record.id);
    Ok(())
}

/// Starts the key holder; the job that does so ends, and the actor stays.
async fn hold(
    cluster: &Cluster,
    files: &[PathBuf],
    labels: &[String],
    format: Format,
) -> anyhow::Result<()> {
    let files = files.iter().map(|file| -> anyhow::Result<String> {
        let file = std::path::absolute(file)?;
        let text = file
            .to_str()
            .context("a key file's path is no UTF-8: move it")?;
        Ok(text.to_owned())
    });
    let labels = labels
        .iter()
        .map(|label| -> anyhow::Result<(String, String)> {
            let (name, value) = label
                .split_once('=')
                .with_context(|| format!("`{label}` is no label: write `zone=vault`"))?;
            Ok((name.to_owned(), value.to_owned()))
        });
    let order = HoldOrder {
        files: files.collect::<anyhow::Result<_>>()?,
        labels: labels.collect::<anyhow::Result<_>>()?,
    };
    let job = cluster
        .new_job("hold-keys")
        .builtin()
        .args(["hold-keys".to_owned(), serde_json::to_string(&order)?])
        .namespace(key_holder::NAMESPACE);
    let keys: Vec<String> = job.submit().await?.result().await?.unwrap_or_default();
    if format.json {
        return print_json(&json!({ "keys": keys }));
    }
    for key in keys {
        println!("holder:{key}");
    }
    Ok(())
}

async fn list(cluster: &Cluster, format: Format) -> anyhow::Result<()> {
    let keys = client::keys(cluster).await?;
    if format.json {
        return print_json(&keys.iter().map(KeyJson::from).collect::<Vec<_>>());
    }
    let now_ms = SystemClock.now_ms();
    let rows: Vec<Vec<String>> = keys
        .iter()
        .map(|record| {
            let roles: Vec<&str> = record.roles.iter().map(|role| role.as_str()).collect();
            let state = match &record.revoked {
                None => "good".to_owned(),
                Some(revoked) => format!("revoked: {}", revoked.reason),
            };
            vec![
                record.id[..16].to_owned(),
                record.owner.clone(),
                roles.join(","),
                record.public_key().algorithm().as_str().to_owned(),
                age(record.added_ms, now_ms),
                state,
            ]
        })
        .collect();
    print_table(
        &["KEY", "OWNER", "ROLES", "ALGORITHM", "AGE", "STATE"],
        &rows,
    );
    Ok(())
}

async fn revoke(
    cluster: &Cluster,
    prefix: &str,
    reason: &str,
    signing: &AdminSigning,
    format: Format,
) -> anyhow::Result<()> {
    if prefix.len() < PREFIX_MIN {
        bail!("`{prefix}` is too short for a key's name: give {PREFIX_MIN} digits or more");
    }
    let keys = client::keys(cluster).await?;
    let mut found = keys.iter().filter(|key| key.id.starts_with(prefix));
    let Some(key) = found.next() else {
        bail!("no key begins with `{prefix}`: see `mobula keys list`");
    };
    if found.next().is_some() {
        bail!("more than one key begins with `{prefix}`: give more digits");
    }
    let statement = statement::key(&key.id, &KeyChange::Revoke { reason });
    let envelope = signing.envelope(cluster, statement).await?;
    let record = client::revoke_key(cluster, &key.id, reason, envelope).await?;
    if format.json {
        return print_json(&KeyJson::from(&record));
    }
    println!("{} is revoked", record.id);
    Ok(())
}
