//! The audit log, page by page.

use mobula_core::control::Caller;
use mobula_core::error::{ErrorCode, Rejection};
use mobula_wire::control as api;
use tonic::Status;

use super::rejected;
use crate::audit::{self, AuditRecord, ChainHash, Ends, PAGE_RECORDS, StoredRecord};
use crate::context::HeadContext;

fn only_admins(caller: &Caller) -> Result<(), Status> {
    match caller {
        Caller::Client | Caller::Head => Ok(()),
        Caller::Node(_) | Caller::Host { .. } => Err(rejected(&Rejection::new(
            ErrorCode::PermissionDenied,
            "the audit log tells of all jobs and everybody's calls: it is for client tokens, not for \
             jobs or workers",
        ))),
    }
}

pub(super) async fn list(
    context: &HeadContext,
    caller: &Caller,
    request: api::ListAuditRequest,
) -> Result<api::ListAuditReply, Status> {
    only_admins(caller)?;
    let asked = usize::try_from(request.limit).unwrap_or(PAGE_RECORDS);
    let limit = match asked {
        0 => PAGE_RECORDS,
        asked => asked.min(PAGE_RECORDS),
    };
    let reader = context.raft.read().await?;
    let ends = audit::ends(&reader);
    let records = audit::page(&reader, request.since, limit);
    Ok(api::ListAuditReply {
        records: records.into_iter().map(message).collect(),
        first: ends.first,
        anchor: hex(&ends.anchor),
        next: ends.next,
        last_hash: hex(&ends.last_hash),
    })
}

fn hex(hash: &ChainHash) -> String {
    blake3::Hash::from_bytes(*hash).to_hex().to_string()
}

fn message(stored: StoredRecord) -> api::AuditRecord {
    let record = stored.record;
    api::AuditRecord {
        sequence: record.sequence,
        index: record.index,
        time_ms: record.time_ms,
        principal: record.principal,
        call: record.call,
        subject: record.subject,
        refused: record.refused,
        session: record.session,
        stamp: record.stamp,
        hash: hex(&stored.hash),
    }
}

/// A hash that is none.
fn not_a_hash(text: &str) -> String {
    let shown: String = text.chars().take(80).collect();
    format!("`{}` is no hash", shown.escape_debug())
}

fn from_hex(text: &str) -> Result<ChainHash, String> {
    let hash = blake3::Hash::from_hex(text).map_err(|_| not_a_hash(text))?;
    Ok(*hash.as_bytes())
}

/// The record that a message tells.
pub fn record_of(message: &api::AuditRecord) -> Result<StoredRecord, String> {
    Ok(StoredRecord {
        record: AuditRecord {
            sequence: message.sequence,
            index: message.index,
            time_ms: message.time_ms,
            principal: message.principal.clone(),
            call: message.call.clone(),
            subject: message.subject.clone(),
            refused: message.refused.clone(),
            session: message.session,
            stamp: message.stamp,
        },
        hash: from_hex(&message.hash)?,
    })
}

/// Where the chain begins and ends, as a message tells.
pub fn ends_of(message: &api::ListAuditReply) -> Result<Ends, String> {
    Ok(Ends {
        first: message.first,
        anchor: from_hex(&message.anchor)?,
        next: message.next,
        last_hash: from_hex(&message.last_hash)?,
    })
}
