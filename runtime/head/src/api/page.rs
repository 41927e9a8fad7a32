//! Pages of a list: as many rows as fit into one message, and where the next page begins.
//!
//! Invariants:
//! 1. A page is well below what clients take in one message, whatever its rows hold.
//! 2. Pages in order of ids, each beginning after the last id of the one before, show every row that
//!    was there all the time exactly once; a row that comes or goes meanwhile is shown or not.

use mobula_core::error::Rejection;
use prost::Message;
use tonic::Status;

use super::rejected;

/// How large the rows of a page may be together, in bytes: clients take messages of 4 MiB, and one
/// row (a job with its result and its exit reason) has about 70 KiB at the most.
const PAGE_BYTES_MAX: usize = 1 << 20;

/// Rows that the scheduler gives at once.
const PAGE_ROWS: usize = mobula_scheduler::limits::PAGE_ROWS;

/// After which id the page of this token begins.
pub(super) fn after(token: &str) -> Result<Option<u64>, Status> {
    if token.is_empty() {
        return Ok(None);
    }
    token.parse().map(Some).map_err(|_| {
        let shown: String = token.chars().take(40).collect();
        rejected(&Rejection::invalid(format!(
            "`{}` is no page token: send back what the page before brought, or nothing for the first",
            shown.escape_debug()
        )))
    })
}

/// The page that begins with `found`, rows with their ids, of which the scheduler was asked for
/// `asked`; and the token of the next one, empty if there is none.
pub(super) fn of<Row: Message>(
    found: impl ExactSizeIterator<Item = (u64, Row)>,
    asked: u32,
) -> (Vec<Row>, String) {
    let asked = match usize::try_from(asked) {
        Ok(0) | Err(_) => PAGE_ROWS,
        Ok(asked) => asked.min(PAGE_ROWS),
    };
    let count = found.len();
    let mut rows = Vec::new();
    let mut bytes = 0;
    let mut last = None;
    for (id, row) in found {
        bytes += row.encoded_len();
        // At least one, so that each page brings the reader further.
        if bytes > PAGE_BYTES_MAX && last.is_some() {
            break;
        }
        last = Some(id);
        rows.push(row);
    }
    let is_last = rows.len() == count && count < asked;
    match last {
        Some(id) if !is_last => (rows, id.to_string()),
        _ => (rows, String::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mobula_wire::control::Job;

    fn job(id: u64, result_bytes: usize) -> (u64, Job) {
        let result_json = Some("x".repeat(result_bytes));
        let job = Job {
            id,
            result_json,
            ..Job::default()
        };
        (id, job)
    }

    fn ids(page: &[Job]) -> Vec<u64> {
        page.iter().map(|job| job.id).collect()
    }

    #[test]
    fn a_page_ends_where_its_bytes_or_rows_do_and_names_the_next() {
        let large = PAGE_BYTES_MAX / 2 - 100;
        let cases = [
            // How large each row is, how many are asked for; how many come, and the token.
            (vec![], 0, 0, ""),
            (vec![10, 10], 0, 2, ""),
            (vec![10, 10], 2, 2, "2"),
            (vec![large, large, 10], 0, 3, ""),
            (vec![large, large, large], 0, 2, "2"),
            (vec![3 * large, 10], 0, 1, "1"),
        ];
        for (sizes, asked, rows, token) in cases {
            let found: Vec<_> = (1..).zip(&sizes).map(|(id, size)| job(id, *size)).collect();
            let (page, next) = of(found.into_iter(), asked);
            let expected: Vec<u64> = (1..=rows).collect();
            assert_eq!((ids(&page), next.as_str()), (expected, token), "{sizes:?}");
        }
        assert_eq!(after("").unwrap(), None);
        assert_eq!(after("17").unwrap(), Some(17));
        assert!(after("job-17").is_err());
    }
}
