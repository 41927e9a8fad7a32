//! `mobula submit`: a program that uses the SDK, or a TOML file for a built-in job.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_core::id::JobId;

use crate::args::{SubmitArguments, Target};
use crate::connect::connect;
use crate::jobs::{as_json, print_logs};
use crate::output::{print_json, result_lines};
use crate::{secrets, train_file};

pub(crate) async fn run(target: &Target, arguments: SubmitArguments) -> anyhow::Result<ExitCode> {
    let env = parse_env(&arguments.env)?;
    let mut files = parse_files(&arguments.files)?;
    let mut secrets = secrets::from_arguments(&arguments.secrets)?;
    let is_toml = arguments
        .program
        .extension()
        .is_some_and(|extension| extension == "toml");
    // A wrong file is refused before anything is connected to.
    let train = if is_toml {
        if !arguments.arguments.is_empty() {
            bail!(
                "{} is a job file, and those take no arguments: write into it what the job is to do",
                arguments.program.display()
            );
        }
        let file = train_file::read(&arguments.program, None)?;
        // What the arguments say counts more.
        secrets = file.secrets.into_iter().chain(secrets).collect();
        files.extend(file.files);
        Some((file.spec, file.text))
    } else {
        None
    };
    if !arguments.program.is_file() {
        bail!(
            "{} is not a file: give a program, or a .toml job",
            arguments.program.display()
        );
    }
    if train.is_none() {
        require_executable(&arguments.program)?;
    }
    let cluster = connect(target).await?;
    let name = match (&arguments.name, &train) {
        (Some(name), _) => name.clone(),
        (None, Some((spec, _))) => spec.name.clone(),
        (None, None) => file_stem(&arguments)?,
    };
    let mut job = cluster.new_job(&name);
    job = match train {
        Some((_, text)) => job.builtin().args(["train".to_owned(), text]),
        None => job
            .program(&arguments.program)
            .args(arguments.arguments.clone()),
    };
    for (key, value) in env {
        job = job.env(key, value);
    }
    for (name, value) in secrets {
        job = job.secret(name, value);
    }
    for (path, name) in files {
        job = job.file(path, name);
    }
    if arguments.retry_errors {
        job = job.retry_errors();
    }
    if let Some(key) = &arguments.idempotency_key {
        job = job.idempotency_key(key);
    }
    if let Some(namespace) = &arguments.namespace {
        job = job.namespace(namespace);
    }
    let handle = job
        .cpus(arguments.cpus)
        .max_restarts(arguments.max_restarts)
        .on_upload(crate::upload::shown())
        .submit()
        .await?;
    let id = handle.id();
    if !arguments.follow {
        if arguments.format.json {
            print_json(
                &serde_json::json!({ "job": id.0, "driver": handle.driver().map(|d| d.0) }),
            )?;
        } else {
            println!("{id} submitted; follow it with `mobula jobs logs -f {id}`");
        }
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("{id} submitted");
    follow(&cluster, id, arguments.format.json).await
}

pub(crate) async fn follow(cluster: &Cluster, id: JobId, json: bool) -> anyhow::Result<ExitCode> {
    print_logs(cluster, id, true).await?;
    let job = cluster.job_handle(id).wait().await?;
    if json {
        print_json(&as_json(&job)?)?;
    } else if let Some(result) = &job.result_json {
        match &result_lines(id, result)[..] {
            [line] => println!("result: {line}"),
            lines => println!("result:\n  {}", lines.join("\n  ")),
        }
    }
    if job.state == "succeeded" {
        eprintln!("{id} succeeded");
        return Ok(ExitCode::SUCCESS);
    }
    let why = job.exit_reason.as_deref().unwrap_or(&job.state);
    eprintln!("{id}: {why}");
    Ok(ExitCode::FAILURE)
}

/// A program is run on every worker, so what cannot be one is refused here.
pub(crate) fn require_executable(path: &Path) -> anyhow::Result<()> {
    const ELF: &[u8; 4] = b"\x7fELF";
    let mut start = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(ELF.len() as u64).read_to_end(&mut start))
        .with_context(|| format!("the program {} cannot be read", path.display()))?;
    if start == ELF {
        return Ok(());
    }
    bail!(
        "{} is not a Linux program: give a binary that uses the SDK (`cargo build` makes it under \
         target/), or a .toml job",
        path.display()
    )
}

fn file_stem(arguments: &SubmitArguments) -> anyhow::Result<String> {
    let stem = arguments
        .program
        .file_stem()
        .context("the program has no file name")?;
    Ok(stem.to_string_lossy().into_owned())
}

fn parse_env(pairs: &[String]) -> anyhow::Result<BTreeMap<String, String>> {
    pairs
        .iter()
        .map(|pair| {
            pair.split_once('=')
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .with_context(|| format!("`{pair}` is not KEY=VALUE"))
        })
        .collect()
}

/// Files to ship and the names they get: `PATH`, or `PATH:NAME`.
fn parse_files(texts: &[String]) -> anyhow::Result<Vec<(PathBuf, String)>> {
    texts
        .iter()
        .map(|text| {
            let whole = Path::new(text);
            let (path, name) = match text.rsplit_once(':') {
                // A colon may be part of a file's own name.
                Some((path, name)) if !whole.exists() => (PathBuf::from(path), name.to_owned()),
                _ => {
                    let name = whole.file_name().unwrap_or_default().to_string_lossy();
                    (whole.to_owned(), name.into_owned())
                }
            };
            if !path.is_file() {
                bail!("{} is not a file that can be shipped", path.display());
            }
            Ok((path, name))
        })
        .collect()
}
