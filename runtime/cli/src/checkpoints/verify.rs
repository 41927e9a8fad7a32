//! `mobula checkpoints verify`.

use std::process::ExitCode;

use mobula_actors::checkpoint::client::{Archive, Verdict};
use mobula_actors::checkpoint::state::Committed;
use mobula_core::id::JobId;
use serde::Serialize;

use crate::output::{print_json, size};

#[derive(Serialize)]
struct VerdictJson<'a> {
    step: u64,
    manifest: &'a str,
    size_bytes: u64,
    verdict: &'static str,
    reason: Option<String>,
}

pub(super) async fn verify(
    job: JobId,
    chosen: &[&Committed],
    archive: &Archive,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let mut verdicts = Vec::with_capacity(chosen.len());
    for one in chosen {
        let (verdict, reason) = match archive.verify(&one.checkpoint).await {
            Verdict::Whole => ("whole", None),
            Verdict::Damaged(reason) => ("damaged", Some(reason)),
            Verdict::Unknown(reason) => ("unknown", Some(reason)),
        };
        verdicts.push(VerdictJson {
            step: one.checkpoint.step,
            manifest: &one.checkpoint.manifest_path,
            size_bytes: one.checkpoint.size_bytes,
            verdict,
            reason,
        });
    }
    let bad = verdicts.iter().filter(|one| one.verdict != "whole").count();
    if json {
        print_json(&verdicts)?;
    } else {
        for one in &verdicts {
            match &one.reason {
                None => println!("step {}: whole, {} read", one.step, size(one.size_bytes)),
                Some(reason) => println!("step {}: {}: {reason}", one.step, one.verdict),
            }
        }
    }
    if bad == 0 {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!(
        "{bad} of {} checkpoints of {job} cannot be restored as they are; a job that restarts passes \
         over what is damaged",
        verdicts.len()
    );
    Ok(ExitCode::FAILURE)
}
