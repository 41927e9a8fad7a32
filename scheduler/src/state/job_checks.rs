//! Whether a job may be submitted as it is, whatever else is in the tables.

use mobula_core::Rejection;
use mobula_core::spec::{JobSpec, Program, RestartPolicy};

use super::{check_name, group};
use crate::limits::{GRACE_MS_MAX, JOB_SPEC_BYTES_MAX, JOB_SPEC_ENTRIES_MAX};

/// Refuses a job that could not run, or whose row would be too large to read back.
pub(super) fn check_spec(spec: &JobSpec) -> Result<(), Rejection> {
    check_name("the job's name", &spec.name)?;
    if let Some(key) = &spec.idempotency_key {
        check_name("the idempotency key", key)?;
    }
    let env_bytes: usize = spec
        .env
        .iter()
        .map(|(key, value)| key.len() + value.len())
        .sum();
    let secret_bytes: usize = spec
        .secrets
        .iter()
        .map(|(name, secret)| name.len() + secret.size_bytes())
        .sum();
    let size = spec.args.iter().map(String::len).sum::<usize>() + env_bytes + secret_bytes;
    if size > JOB_SPEC_BYTES_MAX {
        return Err(Rejection::invalid(format!(
            "arguments, environment and secrets of job `{}` have {size} bytes, the limit is \
             {JOB_SPEC_BYTES_MAX}: pass a file or an object instead",
            spec.name
        )));
    }
    let entries = spec.args.len().max(spec.env.len() + spec.secrets.len());
    if entries > JOB_SPEC_ENTRIES_MAX {
        return Err(Rejection::invalid(format!(
            "job `{}` has {entries} arguments or environment variables and secrets, the limit is \
             {JOB_SPEC_ENTRIES_MAX}: pass a file or an object instead",
            spec.name
        )));
    }
    mobula_core::spec::check_files(&spec.files)
        .map_err(|why| Rejection::invalid(format!("files of job `{}`: {why}", spec.name)))?;
    for file in &spec.files {
        check_blake3(&format!("the hash of file `{}`", file.name), &file.blake3)?;
    }
    if let Program::Artifact { blake3, .. } = &spec.program {
        check_blake3("the program's hash", blake3)?;
    }
    check_process_text(spec)?;
    check_restart("the driver", &spec.restart)?;
    group::check_placement("the driver", &spec.resources, &spec.placement)
}

fn check_blake3(what: &str, hash: &str) -> Result<(), Rejection> {
    let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if hash.len() == 64 && hash.bytes().all(is_hex) {
        return Ok(());
    }
    let shown: String = hash.chars().take(80).collect();
    Err(Rejection::invalid(format!(
        "{what} is `{shown}`, not BLAKE3: expected 64 lower-case hexadecimal digits"
    )))
}

/// Refuses what no process can be started with; each worker would find that out in turn.
fn check_process_text(spec: &JobSpec) -> Result<(), Rejection> {
    let variable = |name: &&String| name.is_empty() || name.contains(['=', '\0']);
    if let Some(name) = spec.env.keys().chain(spec.secrets.keys()).find(variable) {
        return Err(Rejection::invalid(format!(
            "`{}` cannot name an environment variable: give it a name without `=` and NUL",
            name.escape_debug()
        )));
    }
    if let Some(name) = spec
        .secrets
        .keys()
        .find(|name| spec.env.contains_key(*name))
    {
        return Err(Rejection::invalid(format!(
            "`{name}` is both a secret and a variable of the environment: name one of them \
             differently"
        )));
    }
    let texts = spec.args.iter().chain(spec.env.values());
    if let Some(text) = texts.into_iter().find(|text| text.contains('\0')) {
        return Err(Rejection::invalid(format!(
            "the argument or environment value `{}` contains NUL, which ends a text for the \
             operating system: leave it out",
            text.escape_debug()
        )));
    }
    Ok(())
}

/// Refuses a back-off that nobody lives to see the end of.
pub(super) fn check_restart(what: &str, restart: &RestartPolicy) -> Result<(), Rejection> {
    let longest = restart.backoff_max_ms;
    if longest > GRACE_MS_MAX {
        return Err(Rejection::invalid(format!(
            "{what} waits up to {longest} ms before a restart, the limit is {GRACE_MS_MAX} ms (one \
             day): lower backoff_max_ms"
        )));
    }
    Ok(())
}
