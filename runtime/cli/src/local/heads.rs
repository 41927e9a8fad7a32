//! The heads of a local cluster: the first begins it, the others join one after the other.

use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Instant;

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_head::CLIENT_TOKEN_FILE;
use mobula_wire::control::{CreateTokenRequest, ListHeadsRequest};
use serde_json::Value;

use super::process::{last_lines, spawn, wait_for_file};
use super::record::ProcessRecord;
use super::up::{LocalOptions, POLL, READY_LIMIT, record_of};
use crate::tokens;

/// How long the token for joining lives: the start of a cluster.
const TOKEN_TTL_MS: u64 = 10 * 60 * 1000;

/// The heads that were started.
pub(super) struct Heads {
    pub(super) cluster_id: String,
    pub(super) api_addresses: Vec<String>,
    first: Child,
    first_dir: PathBuf,
    first_log: PathBuf,
}

impl Heads {
    /// Starts the head that begins the cluster, and waits until it serves.
    pub(super) async fn start_first(
        options: &LocalOptions,
        processes: &mut Vec<ProcessRecord>,
    ) -> anyhow::Result<Self> {
        let started = start(options, 1, &[], processes)?;
        let (first, ready) = started.ready(processes).await?;
        Ok(Heads {
            cluster_id: text(&ready, "cluster_id"),
            api_addresses: vec![text(&ready, "api_address")],
            first,
            first_dir: options.data_dir.join("head-1"),
            first_log: options.data_dir.join("head-1.log"),
        })
    }

    /// Starts the others, and waits until all of them vote.
    pub(super) async fn start_others(
        &mut self,
        options: &LocalOptions,
        processes: &mut Vec<ProcessRecord>,
        token_dir: &Path,
    ) -> anyhow::Result<()> {
        if options.heads == 1 {
            return Ok(());
        }
        // Those that were stopped are a majority: they must be there before anything is answered.
        let joined_before = (2..=options.heads)
            .filter(|number| head_dir(options, *number).join("head.json").exists())
            .collect::<Vec<_>>();
        let mut starting = Vec::new();
        for number in &joined_before {
            starting.push(start(options, *number, &[], processes)?);
        }
        for started in starting {
            let (_, ready) = started.ready(processes).await?;
            self.api_addresses.push(text(&ready, "api_address"));
        }
        let token = std::fs::read_to_string(self.first_dir.join(CLIENT_TOKEN_FILE))?;
        let cluster = Cluster::connect_to_any(self.api_addresses.clone(), token.trim()).await?;
        let token_file = token_dir.join("head.token");
        for number in 2..=options.heads {
            if joined_before.contains(&number) {
                continue;
            }
            write_head_token(&cluster, &token_file).await?;
            let join = [
                "--join".to_owned(),
                self.api_addresses[0].clone(),
                "--join-token-file".to_owned(),
                token_file.display().to_string(),
            ];
            let started = start(options, number, &join, processes)?;
            let (_, ready) = started.ready(processes).await?;
            self.api_addresses.push(text(&ready, "api_address"));
        }
        // It has done its work, and has uses left.
        let _ = std::fs::remove_file(&token_file);
        wait_for_voters(&cluster, options.heads as usize).await
    }

    /// Copies a token that the first head made to where users look for it.
    pub(super) async fn copy_token(
        &mut self,
        file: &str,
        token_dir: &Path,
    ) -> anyhow::Result<PathBuf> {
        let source = self.first_dir.join(file);
        let deadline = Instant::now() + READY_LIMIT;
        let text = loop {
            match std::fs::read_to_string(&source) {
                Ok(text) => break text,
                Err(_) if Instant::now() < deadline && self.first.try_wait()?.is_none() => {
                    tokio::time::sleep(POLL).await;
                }
                Err(error) => bail!(
                    "the head made no token ({error}); its log ends with:\n{}",
                    last_lines(&self.first_log)
                ),
            }
        };
        let name = Path::new(file)
            .file_name()
            .context("a token file has a name")?;
        let target = token_dir.join(name);
        write_secret(&target, &text)?;
        Ok(target)
    }
}

fn text(ready: &Value, key: &str) -> String {
    ready[key].as_str().unwrap_or_default().to_owned()
}

fn head_dir(options: &LocalOptions, number: u32) -> PathBuf {
    options.data_dir.join(format!("head-{number}"))
}

/// A head that was started and may not serve yet.
struct Started {
    child: Child,
    name: String,
    /// Its place among the processes.
    position: usize,
    ready_file: PathBuf,
    log: PathBuf,
}

impl Started {
    async fn ready(mut self, processes: &mut [ProcessRecord]) -> anyhow::Result<(Child, Value)> {
        let ready = wait_for_file(&mut self.child, &self.ready_file, &self.log, READY_LIMIT)
            .await
            .with_context(|| format!("{} does not serve", self.name))?;
        processes[self.position].addresses =
            vec![text(&ready, "api_address"), text(&ready, "cluster_address")];
        Ok((self.child, ready))
    }
}

fn start(
    options: &LocalOptions,
    number: u32,
    more: &[String],
    processes: &mut Vec<ProcessRecord>,
) -> anyhow::Result<Started> {
    let (dir, name) = (&options.data_dir, format!("head-{number}"));
    let head_dir = head_dir(options, number);
    std::fs::create_dir_all(&head_dir)?;
    let ready_file = head_dir.join("ready.json");
    let (api, cluster) = addresses_before(options, &ready_file);
    // A file of an earlier start would be taken for this one's.
    let _ = std::fs::remove_file(&ready_file);
    let storage_url = options
        .storage_url
        .clone()
        .unwrap_or_else(|| format!("file://{}", dir.join("store").display()));
    let mut arguments = vec!["head".to_owned()];
    let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
    if let Some(config) = &options.config {
        option("--config", config.display().to_string());
    }
    // A configuration may fix the addresses of a single head; those of several must differ.
    if options.config.is_none() || options.heads > 1 {
        option("--api-listen", api);
        option("--cluster-listen", cluster);
    }
    option("--name", name.clone());
    option("--data-dir", head_dir.display().to_string());
    option("--storage-url", storage_url);
    option("--ready-file", ready_file.display().to_string());
    arguments.extend_from_slice(more);
    let log = dir.join(format!("{name}.log"));
    let child = spawn(&arguments, &log)?;
    processes.push(record_of(&child, "head", &name, &log)?);
    Ok(Started {
        child,
        name,
        position: processes.len() - 1,
        ready_file,
        log,
    })
}

/// Where a head listens: in a group where it did before, for the others look for it there; free
/// ports at the first start, because several local clusters must not collide.
fn addresses_before(options: &LocalOptions, ready_file: &Path) -> (String, String) {
    let free = || "127.0.0.1:0".to_owned();
    let known = std::fs::read(ready_file)
        .ok()
        .filter(|_| options.heads > 1)
        .and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
    match known {
        Some(known) => (text(&known, "api_address"), text(&known, "cluster_address")),
        None => (free(), free()),
    }
}

async fn write_head_token(cluster: &Cluster, file: &Path) -> anyhow::Result<()> {
    let request = CreateTokenRequest {
        stamp: None,
        role: "head".to_owned(),
        ttl_ms: TOKEN_TTL_MS,
        uses: 3,
        principal: None,
    };
    let reply = tokens::create(cluster, request).await?;
    write_secret(file, &reply.token)
}

fn write_secret(file: &Path, text: &str) -> anyhow::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
    let directory = file.parent().context("a file lies in a directory")?;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)?;
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options
        .open(file)
        .and_then(|mut open| open.write_all(text.as_bytes()))
        .with_context(|| format!("{} cannot be written", file.display()))
}

async fn wait_for_voters(cluster: &Cluster, count: usize) -> anyhow::Result<()> {
    let deadline = Instant::now() + READY_LIMIT;
    loop {
        let heads = cluster
            .control()
            .read("list the heads", |mut client| async move {
                client
                    .list_heads(ListHeadsRequest { by_leader: true })
                    .await
            })
            .await?
            .heads;
        let voters = heads.iter().filter(|head| head.role == "voter").count();
        if voters >= count {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!(
                "only {voters} of {count} heads vote after {} s: see their logs",
                READY_LIMIT.as_secs()
            );
        }
        tokio::time::sleep(POLL).await;
    }
}
