//! Exactly-once contexts of clients (Raft thesis §6.3), used by the head's apply loop.
//!
//! How the head uses it, around each command of a session:
//! `check` → [`Seen::Fresh`]: apply, then `record` the encoded outcome (a rejection too) in the
//! same write batch; [`Seen::Duplicate`]: answer from it; [`Seen::Expired`]: refuse.
//!
//! Invariants:
//! 1. Each (session, sequence number) takes effect at most once (I3): a number that is no longer
//!    in the window is refused, never executed.
//! 2. Sessions expire by log time, so every replica expires the same ones at the same entry.
//! 3. There are at most [`SESSIONS_MAX`] sessions with [`SESSION_WINDOW`] responses each, and what these have
//!    together is bounded ([`SESSION_ANSWERS_BYTES_MAX`]): where it would be more, the oldest leave the window.
//!    The newest never does, so a client with one command under way at a time notices nothing of it.
//! 4. At most [`SESSIONS_OF_HOLDER_MAX`] of them are open in one name (a table counts them), so that nobody
//!    takes all.

use mobula_core::control::{Reader, Txn};
use mobula_core::mutant::{Mutant, is_planted};
use mobula_core::{ErrorCode, Rejection, SessionId};
use serde::{Deserialize, Serialize};

use super::{Apply, check_name, overloaded, principal};
use crate::command::Response;
use crate::limits::{
    SESSION_ANSWERS_BYTES_MAX, SESSION_IDLE_MS, SESSION_TOUCH_MS, SESSION_WINDOW, SESSIONS_MAX,
    SESSIONS_OF_HOLDER_MAX, SWEEP_ROWS,
};
use crate::row::{self, Counter, SESSION_HOLDERS, SESSION_RESPONSES, SESSIONS, SESSIONS_BY_AGE};

/// How often a command that opens a session removes some that have expired. Others' are removed by what they open.
const SWEEP_ROUNDS_MAX: usize = 4;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SessionRow {
    client: String,
    used_ms: u64,
    highest_seq: u64,
    /// In whose name it counts.
    pub(crate) holder: String,
    /// Where the window begins: commands below this number are refused.
    kept_from: u64,
    /// What the responses in it have together.
    pub(crate) kept_bytes: u64,
}

/// The text that a session was opened with; `None` where there is no such session.
#[must_use]
pub fn owner(reader: &dyn Reader, session: SessionId) -> Option<String> {
    row::get::<SessionRow>(reader, SESSIONS, &session.to_key()).map(|row| row.client)
}

/// What the table knows about a command's (session, sequence number).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seen {
    /// It was never applied: apply it, then [`record`] its outcome.
    Fresh,
    /// It was applied before, with this outcome.
    Duplicate(Vec<u8>),
    /// The session is unknown, expired, or has moved on by more than its window: whether the
    /// command was applied is no longer known, so it must not be applied now.
    Expired,
}

/// Looks up a command before it is applied. `now_ms` is log time.
pub fn check(txn: &dyn Txn, session: SessionId, seq: u64, now_ms: u64) -> Seen {
    if session == SessionId::INTERNAL {
        return Seen::Fresh;
    }
    let Some(row) = row::get::<SessionRow>(txn, SESSIONS, &session.to_key()) else {
        return Seen::Expired;
    };
    if is_expired(&row, now_ms) || seq < row.kept_from {
        return Seen::Expired;
    }
    match txn.get(SESSION_RESPONSES, &row::pair(session.0, seq)) {
        Some(response) => Seen::Duplicate(response),
        None => Seen::Fresh,
    }
}

/// Keeps the outcome of a command that [`check`] called fresh. `now_ms` is log time.
pub fn record(txn: &mut dyn Txn, session: SessionId, seq: u64, now_ms: u64, response: Vec<u8>) {
    if session == SessionId::INTERNAL {
        return;
    }
    // The command itself may have closed the session.
    let Some(mut row) = row::get::<SessionRow>(txn, SESSIONS, &session.to_key()) else {
        return;
    };
    row.kept_bytes += response.len() as u64;
    txn.put(SESSION_RESPONSES, &row::pair(session.0, seq), response);
    if now_ms.saturating_sub(row.used_ms) >= SESSION_TOUCH_MS {
        txn.delete(SESSIONS_BY_AGE, &row::pair(row.used_ms, session.0));
        row::put(txn, SESSIONS_BY_AGE, &row::pair(now_ms, session.0), &());
        row.used_ms = now_ms;
    }
    if seq > row.highest_seq {
        let kept_from = row.kept_from.max(first_kept(seq));
        let end = if is_planted(Mutant::SessionWindowOfOne) {
            seq
        } else {
            kept_from
        };
        let left = row.kept_from..end.min(row.highest_seq.saturating_add(1));
        forget(txn, session, &mut row, left);
        row.kept_from = kept_from;
        row.highest_seq = seq;
    }
    while row.kept_bytes > SESSION_ANSWERS_BYTES_MAX && row.kept_from < row.highest_seq {
        let oldest = row.kept_from..row.kept_from + 1;
        forget(txn, session, &mut row, oldest);
        row.kept_from += 1;
    }
    row::put(txn, SESSIONS, &session.to_key(), &row);
}

/// The first number of a full window that ends with `highest_seq`.
fn first_kept(highest_seq: u64) -> u64 {
    highest_seq.saturating_sub(SESSION_WINDOW - 1)
}

/// Removes the responses to these numbers. By their numbers: a scan would walk over all that this
/// session's commands ever left there.
fn forget(
    txn: &mut dyn Txn,
    session: SessionId,
    row: &mut SessionRow,
    numbers: impl Iterator<Item = u64>,
) {
    for seq in numbers {
        let key = row::pair(session.0, seq);
        if let Some(response) = txn.get(SESSION_RESPONSES, &key) {
            row.kept_bytes -= response.len() as u64;
            txn.delete(SESSION_RESPONSES, &key);
        }
    }
}

fn is_expired(row: &SessionRow, now_ms: u64) -> bool {
    now_ms.saturating_sub(row.used_ms) > SESSION_IDLE_MS
}

pub(crate) fn open(apply: &mut Apply<'_>, client: String) -> Result<Response, Rejection> {
    check_name("the client's name", &client)?;
    let used_ms = apply.now_ms();
    let holder = match apply.origin {
        Some(origin) => principal::session_holder(apply.txn, &origin.principal),
        None => client.clone(),
    };
    sweep(apply.txn, used_ms);
    // A refusal undoes what was swept, so the holder's own must be reached now, behind whosever are older.
    let mut rounds = 1;
    while held_by(apply.txn, &holder) >= SESSIONS_OF_HOLDER_MAX {
        rounds += 1;
        if rounds > SWEEP_ROUNDS_MAX || sweep(apply.txn, used_ms) == 0 {
            return Err(Rejection::new(
                ErrorCode::Overloaded,
                format!(
                    "`{holder}` has {SESSIONS_OF_HOLDER_MAX} sessions open already, which is the limit \
                     for one principal or job: use a session for many commands, close it when it is \
                     over, or wait until idle ones expire (after {} minutes)",
                    SESSION_IDLE_MS / 60_000
                ),
            ));
        }
    }
    if Counter::Sessions.value(apply.txn) >= SESSIONS_MAX {
        return Err(overloaded(
            "sessions",
            SESSIONS_MAX,
            "close some, or wait until idle ones expire",
        ));
    }
    let session = SessionId(Counter::LastSession.increment(apply.txn));
    Counter::Sessions.increment(apply.txn);
    let held = held_by(apply.txn, &holder) + 1;
    row::put(apply.txn, SESSION_HOLDERS, holder.as_bytes(), &held);
    let row = SessionRow {
        client,
        used_ms,
        highest_seq: 0,
        holder,
        kept_from: 0,
        kept_bytes: 0,
    };
    row::put(apply.txn, SESSIONS, &session.to_key(), &row);
    row::put(
        apply.txn,
        SESSIONS_BY_AGE,
        &row::pair(used_ms, session.0),
        &(),
    );
    Ok(Response::SessionOpened { session })
}

/// How many sessions are open in this name.
fn held_by(reader: &dyn Reader, holder: &str) -> u64 {
    row::get(reader, SESSION_HOLDERS, holder.as_bytes()).unwrap_or(0)
}

pub(crate) fn close(
    apply: &mut Apply<'_>,
    session: SessionId,
    client: &str,
) -> Result<Response, Rejection> {
    if let Some(row) = row::get::<SessionRow>(apply.txn, SESSIONS, &session.to_key()) {
        if row.client != client {
            return Err(Rejection::new(
                ErrorCode::PermissionDenied,
                format!("{session} was opened by another client: only that one may close it"),
            ));
        }
        remove(apply.txn, session, row);
    }
    Ok(Response::Done)
}

/// Removes sessions that have expired, oldest first, a bounded number at a time; says how many.
fn sweep(txn: &mut dyn Txn, now_ms: u64) -> usize {
    let mut removed = 0;
    for (key, _) in txn.scan(SESSIONS_BY_AGE, &[], None, SWEEP_ROWS) {
        let used_ms = row::number_at(&key, 0);
        if now_ms.saturating_sub(used_ms) <= SESSION_IDLE_MS {
            break;
        }
        let session = SessionId(row::number_at(&key, 1));
        let row = row::get(txn, SESSIONS, &session.to_key());
        remove(
            txn,
            session,
            row.expect("the list by age names sessions that exist"),
        );
        removed += 1;
    }
    removed
}

fn remove(txn: &mut dyn Txn, session: SessionId, mut row: SessionRow) {
    // With the last: a client may use the largest number that there is.
    let all = row.kept_from..=row.highest_seq;
    forget(txn, session, &mut row, all);
    txn.delete(SESSIONS, &session.to_key());
    txn.delete(SESSIONS_BY_AGE, &row::pair(row.used_ms, session.0));
    Counter::Sessions.decrement(txn);
    let holder = row.holder.as_bytes();
    let left = held_by(txn, &row.holder).checked_sub(1);
    match left.expect("what is removed was counted before") {
        0 => txn.delete(SESSION_HOLDERS, holder),
        left => row::put(txn, SESSION_HOLDERS, holder, &left),
    }
}

/// How many sessions are open.
pub(crate) fn count(reader: &dyn Reader) -> u64 {
    Counter::Sessions.value(reader)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Command;
    use crate::memory_txn::MemoryTables;
    use mobula_core::control::{Applied, ApplyContext, Origin};

    const START_MS: u64 = 1_000;

    fn at(now_ms: u64) -> ApplyContext {
        ApplyContext {
            index: 1,
            term: 1,
            now_ms,
        }
    }

    fn opened(tables: &mut MemoryTables, now_ms: u64) -> SessionId {
        let context = at(now_ms);
        let mut apply = Apply::new(context, None, tables);
        match open(&mut apply, "test".into()).unwrap() {
            Response::SessionOpened { session } => session,
            other => panic!("unexpected {other:?}"),
        }
    }

    /// Closes the only session of tables that had `empty` rows before it.
    fn close_last(tables: &mut MemoryTables, session: SessionId, empty: usize) {
        let context = at(START_MS);
        close(&mut Apply::new(context, None, tables), session, "test").unwrap();
        // The two counters stay.
        assert_eq!(tables.row_count(), empty + 2);
    }

    #[test]
    fn a_number_takes_effect_once_and_out_of_order_numbers_are_fresh() {
        let mut tables = MemoryTables::default();
        let session = opened(&mut tables, START_MS);
        assert_eq!(check(&tables, session, 2, START_MS), Seen::Fresh);
        record(&mut tables, session, 2, START_MS, b"two".to_vec());
        assert_eq!(
            check(&tables, session, 2, START_MS),
            Seen::Duplicate(b"two".to_vec())
        );
        assert_eq!(check(&tables, session, 1, START_MS), Seen::Fresh);
    }

    #[test]
    fn a_session_keeps_its_window_only_whatever_numbers_it_skips() {
        let mut tables = MemoryTables::default();
        let empty = tables.row_count();
        let session = opened(&mut tables, START_MS);
        let rows = tables.row_count();
        let mut highest = 0;
        let mut seen: Vec<u64> = Vec::new();
        let ends = [u64::MAX - SESSION_WINDOW, u64::MAX - 1, u64::MAX];
        for seq in [1, 3, 2, 60, 66, 65, 130, 300, 290, 301, 364, 1000]
            .into_iter()
            .chain(ends)
        {
            if check(&tables, session, seq, START_MS) == Seen::Fresh {
                record(&mut tables, session, seq, START_MS, vec![1]);
                seen.push(seq);
            }
            highest = highest.max(seq);
            let kept = seen.iter().filter(|seen| highest - **seen < SESSION_WINDOW);
            assert_eq!(tables.row_count() - rows, kept.count(), "after {seq}");
        }
        close_last(&mut tables, session, empty);
    }

    #[test]
    fn what_left_the_window_is_refused_and_forgotten() {
        let mut tables = MemoryTables::default();
        let session = opened(&mut tables, START_MS);
        let rows = tables.row_count();
        for seq in 1..=3 * SESSION_WINDOW {
            assert_eq!(check(&tables, session, seq, START_MS), Seen::Fresh);
            record(&mut tables, session, seq, START_MS, vec![1]);
        }
        assert_eq!(
            check(&tables, session, 2 * SESSION_WINDOW, START_MS),
            Seen::Expired
        );
        let oldest_kept = 2 * SESSION_WINDOW + 1;
        assert_eq!(
            check(&tables, session, oldest_kept, START_MS),
            Seen::Duplicate(vec![1])
        );
        assert_eq!(tables.row_count() - rows, SESSION_WINDOW as usize);
    }

    #[test]
    fn large_responses_leave_the_window_earlier_but_for_the_newest() {
        let mut tables = MemoryTables::default();
        let empty = tables.row_count();
        let session = opened(&mut tables, START_MS);
        let rows = tables.row_count();
        let apply = |tables: &mut MemoryTables, seq: u64, response: &[u8]| {
            assert_eq!(check(tables, session, seq, START_MS), Seen::Fresh, "{seq}");
            record(tables, session, seq, START_MS, response.to_vec());
            tables.row_count() - rows
        };
        let third = vec![3; (SESSION_ANSWERS_BYTES_MAX / 3) as usize];
        for seq in 1..=9 {
            assert_eq!(apply(&mut tables, seq, &third), seq.min(3) as usize);
        }
        // Never executed again, whether its number was used before or not.
        assert_eq!(check(&tables, session, 6, START_MS), Seen::Expired);
        assert_eq!(check(&tables, session, 7, START_MS), Seen::Duplicate(third));
        let whole = vec![1; SESSION_ANSWERS_BYTES_MAX as usize + 1];
        assert_eq!(apply(&mut tables, 11, &whole), 1);
        assert_eq!(check(&tables, session, 10, START_MS), Seen::Expired);
        assert_eq!(
            check(&tables, session, 11, START_MS),
            Seen::Duplicate(whole)
        );
        // What is small has the whole window again.
        for seq in 12..12 + SESSION_WINDOW {
            let kept = usize::try_from(seq - 11).unwrap();
            assert_eq!(apply(&mut tables, seq, &[1]), kept);
        }
        close_last(&mut tables, session, empty);
    }

    #[test]
    fn an_idle_session_expires_and_use_keeps_it() {
        let mut tables = MemoryTables::default();
        let session = opened(&mut tables, START_MS);
        let later_ms = START_MS + SESSION_IDLE_MS;
        assert_eq!(check(&tables, session, 1, later_ms), Seen::Fresh);
        assert_eq!(check(&tables, session, 1, later_ms + 1), Seen::Expired);
        record(&mut tables, session, 1, later_ms, vec![1]);
        assert_eq!(
            check(&tables, session, 2, later_ms + SESSION_IDLE_MS),
            Seen::Fresh
        );
    }

    #[test]
    fn expired_sessions_leave_no_rows_and_unknown_ones_are_expired() {
        let mut tables = MemoryTables::default();
        let first = opened(&mut tables, START_MS);
        let rows = tables.row_count();
        record(&mut tables, first, 1, START_MS, vec![1]);
        opened(&mut tables, START_MS + SESSION_IDLE_MS + 1);
        assert_eq!(tables.row_count(), rows);
        assert_eq!(check(&tables, first, 1, START_MS), Seen::Expired);
        assert_eq!(check(&tables, SessionId(77), 1, START_MS), Seen::Expired);
        assert_eq!(
            check(&tables, SessionId::INTERNAL, 1, START_MS),
            Seen::Fresh
        );
    }

    #[test]
    fn only_its_client_closes_a_session() {
        let mut tables = MemoryTables::default();
        let session = opened(&mut tables, START_MS);
        let context = at(START_MS);
        let mut apply = Apply::new(context, None, &mut tables);
        assert!(close(&mut apply, session, "other").is_err());
        assert_eq!(close(&mut apply, session, "test").unwrap(), Response::Done);
        assert_eq!(count(&tables), 0);
    }

    /// Opens a session by a call in this name.
    fn open_as(
        tables: &mut MemoryTables,
        principal: &str,
        now_ms: u64,
    ) -> Result<Applied, Rejection> {
        let context = at(now_ms);
        let origin = Origin {
            principal: principal.to_owned(),
            call: "OpenSession".to_owned(),
        };
        let client = "test".to_owned();
        let payload = Command::OpenSession { client }.encode();
        tables.apply_from(&crate::Scheduler, &context, Some(&origin), &payload)
    }

    /// Has `principal` hold as many sessions as one may.
    fn fill(tables: &mut MemoryTables, principal: &str, now_ms: u64) {
        let origin = Origin {
            principal: principal.to_owned(),
            call: "OpenSession".to_owned(),
        };
        let context = at(now_ms);
        for _ in 0..SESSIONS_OF_HOLDER_MAX {
            let mut apply = Apply::new(context, Some(&origin), tables);
            open(&mut apply, "test".into()).unwrap();
        }
    }

    #[test]
    fn one_principal_does_not_take_all_sessions() {
        let mut tables = MemoryTables::default();
        fill(&mut tables, "greedy", START_MS);
        let refused = open_as(&mut tables, "greedy", START_MS).unwrap_err();
        assert_eq!(refused.code, ErrorCode::Overloaded);
        assert!(
            refused.message.starts_with("`greedy` has 5000"),
            "{refused}"
        );
        open_as(&mut tables, "modest", START_MS).unwrap();
        // One that is closed makes room for one.
        let context = at(START_MS);
        let first = SessionId(1);
        close(&mut Apply::new(context, None, &mut tables), first, "test").unwrap();
        open_as(&mut tables, "greedy", START_MS).unwrap();
        open_as(&mut tables, "greedy", START_MS).unwrap_err();
    }

    #[test]
    fn ones_own_expired_sessions_make_room_also_behind_those_of_others() {
        let mut tables = MemoryTables::default();
        let others = SWEEP_ROWS + 1;
        for _ in 0..others {
            open_as(&mut tables, "early", START_MS).unwrap();
        }
        fill(&mut tables, "greedy", START_MS + 1);
        let later_ms = START_MS + 1 + SESSION_IDLE_MS;
        // Not yet: only those of the others have expired, and they are no help.
        open_as(&mut tables, "greedy", later_ms).unwrap_err();
        open_as(&mut tables, "greedy", later_ms + 1).unwrap();
    }
}
