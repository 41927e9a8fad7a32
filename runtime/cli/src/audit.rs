//! `mobula audit`: who changed what.

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_core::clock::Clock;
use mobula_head::audit::{Verifier, ends_of, record_of};
use mobula_wire::control::{AuditRecord, ListAuditReply, ListAuditRequest};
use serde_json::json;

use crate::args::{AuditArguments, Target};
use crate::clock::SystemClock;
use crate::connect::connect;
use crate::output::{age, print_json, print_table};

/// How often is looked for new records.
const FOLLOW_INTERVAL: Duration = Duration::from_millis(500);

/// Records that are shown where nothing else is said.
const SHOWN_DEFAULT: u64 = 100;

pub(crate) async fn run(target: &Target, arguments: AuditArguments) -> anyhow::Result<()> {
    let cluster = connect(target).await?;
    if arguments.verify {
        return verify(&cluster, arguments.format.json).await;
    }
    let (since, limit) = match (arguments.since, arguments.limit) {
        (Some(since), limit) => (since, limit.unwrap_or(u64::MAX)),
        // The newest ones.
        (None, limit) => {
            let limit = limit.unwrap_or(SHOWN_DEFAULT);
            let next = page(&cluster, u64::MAX, 1).await?.next;
            (next.saturating_sub(limit), limit)
        }
    };
    if arguments.follow {
        return follow(&cluster, since, arguments.format.json).await;
    }
    let mut records = Vec::new();
    let mut from = since;
    while (records.len() as u64) < limit {
        let left = limit - records.len() as u64;
        let found = page(&cluster, from, u32::try_from(left).unwrap_or(0)).await?;
        let Some(last) = found.records.last() else {
            break;
        };
        from = last.sequence + 1;
        records.extend(found.records);
    }
    if arguments.format.json {
        return print_json(&records);
    }
    let now_ms = SystemClock.now_ms();
    let rows: Vec<Vec<String>> = records.iter().map(|record| row(record, now_ms)).collect();
    print_table(&["NO", "AGE", "WHO", "CALL", "SUBJECT", "OUTCOME"], &rows);
    Ok(())
}

async fn page(cluster: &Cluster, since: u64, limit: u32) -> anyhow::Result<ListAuditReply> {
    let request = ListAuditRequest { since, limit };
    let reply = cluster
        .control()
        .read("read the audit log", |mut client| async move {
            client.list_audit(request).await
        })
        .await?;
    Ok(reply)
}

fn row(record: &AuditRecord, now_ms: u64) -> Vec<String> {
    let outcome = if record.refused.is_empty() {
        "done".to_owned()
    } else {
        format!("refused: {}", record.refused)
    };
    vec![
        record.sequence.to_string(),
        age(record.time_ms, now_ms),
        record.principal.clone(),
        record.call.clone(),
        record.subject.clone(),
        outcome,
    ]
}

/// Prints records as they come, one a line, until it is interrupted.
async fn follow(cluster: &Cluster, mut from: u64, as_json: bool) -> anyhow::Result<()> {
    loop {
        let found = page(cluster, from, 0).await?;
        if from < found.first && from > 0 && found.first > 1 {
            eprintln!(
                "records {from} to {} were dropped before they could be read",
                found.first - 1
            );
        }
        let mut output = std::io::stdout().lock();
        for record in &found.records {
            if as_json {
                writeln!(output, "{}", serde_json::to_string(record)?)?;
            } else {
                writeln!(output, "{}", row(record, SystemClock.now_ms()).join("  "))?;
            }
        }
        output.flush()?;
        drop(output);
        match found.records.last() {
            Some(last) => from = last.sequence + 1,
            None => tokio::time::sleep(FOLLOW_INTERVAL).await,
        }
    }
}

/// Reads all records that are kept and follows their chain.
async fn verify(cluster: &Cluster, as_json: bool) -> anyhow::Result<()> {
    let unreadable = |why: String| anyhow::anyhow!("the audit log cannot be read: {why}");
    let mut found = page(cluster, 0, 0).await?;
    let mut verifier = Verifier::new(&ends_of(&found).map_err(unreadable)?);
    let first = verifier.next();
    loop {
        for message in &found.records {
            let record = record_of(message).map_err(unreadable)?;
            verifier.push(&record).context(
                "the audit log was changed: compare it with what other heads and backups hold",
            )?;
        }
        let ends = ends_of(&found).map_err(unreadable)?;
        if verifier.next() >= ends.next || found.records.is_empty() {
            verifier.finish(&ends)?;
            break;
        }
        found = page(cluster, verifier.next(), 0).await?;
        if found.first > verifier.next() {
            bail!("the log goes on faster than it can be read here: try again");
        }
    }
    let count = verifier.next() - first;
    if as_json {
        return print_json(&json!({ "first": first, "records": count, "intact": true }));
    }
    println!("{count} records from {first} on: each has the hash that it should");
    Ok(())
}
