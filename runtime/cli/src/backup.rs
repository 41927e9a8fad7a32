//! `mobula head backup` and `mobula head restore`.

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use mobula_core::clock::Clock;
use mobula_head::backup::{
    self, BackupError, BackupFile, BackupStart, BackupTarget, Manifest, RestoreOptions,
};
use mobula_net::identity::{ClusterCa, SecretReader};
use mobula_wire::control::{self as api, BackupPart, BackupRequest};
use serde_json::json;
use tonic::Streaming;

use crate::args::{Format, Target};
use crate::clock::SystemClock;
use crate::connect::{connect, connect_without_leader};
use crate::output::print_json;

/// What stands for standard output.
const STANDARD_OUTPUT: &str = "-";

pub(crate) async fn backup(
    target: &Target,
    file: &Path,
    local: bool,
    format: Format,
) -> anyhow::Result<()> {
    let to_output = file == Path::new(STANDARD_OUTPUT);
    if to_output && std::io::stdout().is_terminal() {
        bail!("a backup holds the cluster's private key, and this is a terminal: name a file");
    }
    // Before the head is asked, for each answer gives the key away and is recorded.
    if !to_output && file.symlink_metadata().is_ok() {
        let path = file.to_owned();
        return Err(BackupError::Exists { path }.into());
    }
    let cluster = match local {
        true => connect_without_leader(target).await?,
        false => connect(target).await?,
    };
    let reader = SecretReader::new();
    let request = BackupRequest {
        public_key: reader.public_key().to_vec(),
        local,
    };
    let mut parts = cluster
        .control()
        .read("make a backup", |mut client| {
            let request = request.clone();
            async move { client.backup(request).await }
        })
        .await?;
    let first = next(&mut parts).await?.and_then(|part| part.start);
    let start = started(reader, first.context("the head sent no backup")?)?;
    let manifest = if to_output {
        let mut file = BackupFile::begin(std::io::stdout().lock(), start)?;
        while let Some(part) = next(&mut parts).await? {
            file.push_frame(&part.frame)?;
        }
        let (manifest, _) = file.finish()?;
        manifest
    } else {
        let mut target = BackupTarget::create(file, start)?;
        while let Some(part) = next(&mut parts).await? {
            target.push_frame(&part.frame)?;
        }
        target.finish()?
    };
    match (to_output, format.json) {
        // Standard output is taken.
        (true, true) => writeln!(std::io::stderr(), "{}", serde_json::to_string(&manifest)?)?,
        (true, false) => eprintln!("{}", sentence(&manifest)),
        (false, true) => print_json(&manifest)?,
        (false, false) => {
            println!("{}", sentence(&manifest));
            println!(
                "{} holds the cluster's private key: keep it as secret as a head's data directory",
                file.display()
            );
        }
    }
    Ok(())
}

async fn next(parts: &mut Streaming<BackupPart>) -> anyhow::Result<Option<BackupPart>> {
    parts.message().await.map_err(|status| {
        anyhow::anyhow!(
            "the backup broke off: {}; nothing was kept",
            status.message()
        )
    })
}

fn started(reader: SecretReader, start: api::BackupStart) -> anyhow::Result<BackupStart> {
    let key = reader.open(&start.public_key, &start.sealed_key)?;
    let key = String::from_utf8(key).context("the CA's key is no text")?;
    Ok(BackupStart {
        ca: ClusterCa::from_pem(&start.ca_pem, &key)?,
        raft_id: start.raft_id,
        version: start.version,
        made_ms: start.made_ms,
    })
}

fn sentence(manifest: &Manifest) -> String {
    format!(
        "backup of cluster {} at entry {}: {} rows, {} bytes, state hash {}",
        manifest.cluster_id,
        manifest.index,
        manifest.rows,
        manifest.rows_bytes,
        manifest.state_hash
    )
}

pub(crate) fn restore(
    file: &Path,
    data_dir: Option<PathBuf>,
    name: String,
    format: Format,
) -> anyhow::Result<()> {
    let Some(data_dir) = data_dir else {
        let manifest = backup::verify(file)?;
        if format.json {
            return print_json(&manifest);
        }
        println!("{}", sentence(&manifest));
        println!("all of it was read, and is as it was written");
        return Ok(());
    };
    let options = RestoreOptions {
        data_dir,
        name,
        modules: mobula_actors::modules()
            .iter()
            .map(|module| module.id())
            .collect(),
        now_ms: SystemClock.now_ms(),
    };
    let restored = backup::restore(file, &options)?;
    if format.json {
        return print_json(&json!({
            "backup": restored.manifest,
            "data_dir": options.data_dir,
            "raft_id": restored.raft_id,
            "term": restored.term,
        }));
    }
    println!("{}", sentence(&restored.manifest));
    let dir = options.data_dir.display();
    println!(
        "restored into {dir}, as head {} of a group of one",
        restored.raft_id
    );
    println!("make sure that no head of the old group runs any more, and start it:");
    println!("  mobula head --data-dir {dir}");
    println!("with the addresses and the configuration of before, so that the workers find it");
    Ok(())
}
