use std::sync::Mutex;

use super::super::fleet::Fleet;
use super::super::oip::{OipError, TensorData};
use super::super::rows::{BATCH_BYTES_MAX, Cell};
use super::*;

/// Answers each text with its length, refuses those that begin with `bad` and fails on those that begin with `hard`.
#[derive(Clone, Default)]
struct Reader {
    /// The rows of each batch that it was asked.
    asked: Arc<Mutex<Vec<usize>>>,
    /// Names rows that are not there.
    lies: bool,
}

impl Backend for Reader {
    async fn infer(&self, rows: Batch) -> Result<Inference, BackendFailure> {
        let TensorData::Bytes(texts) = &rows.cells[0].data else {
            unreachable!("the rows are texts")
        };
        self.asked.lock().unwrap().push(texts.len());
        if texts.iter().any(|text| text.starts_with(b"late")) {
            return Err(BackendFailure::Late);
        }
        let bad = texts.iter().enumerate();
        let bad = bad.filter(|(_, text)| text.starts_with(b"bad"));
        let refused: Vec<RefusedRow> = bad
            .map(|(row, _)| RefusedRow {
                row: row as u64 + if self.lies { 100 } else { 0 },
                reason: "it is bad".to_owned(),
            })
            .collect();
        if !refused.is_empty() {
            return Err(BackendFailure::RowsRefused(refused));
        }
        let hard = texts.iter().position(|text| text.starts_with(b"hard"));
        if let Some(row) = hard {
            return Err(BackendFailure::RowsFailed(vec![RefusedRow {
                row: row as u64,
                reason: "it is hard".to_owned(),
            }]));
        }
        let lengths = texts.iter().map(|text| text.len() as i64).collect();
        Ok(Inference {
            outputs: Batch {
                rows: rows.rows,
                cells: vec![Cell {
                    shape: vec![texts.len() as u64],
                    data: TensorData::Int64(lengths),
                }],
            },
            computed_ns: 1,
            memory_percent: Some(60),
            energies: Vec::new(),
        })
    }
}

fn fleet(count: u32, reader: &Reader) -> Fleet<Reader> {
    let fleet = Fleet::new(count);
    for (_, berth) in fleet.berths() {
        berth.open(reader.clone());
    }
    fleet
}

async fn lengths(fleet: &Fleet<Reader>, texts: &[&str]) -> Result<Vec<i64>, OipError> {
    let row = |text: &&str| Row {
        cells: vec![Cell {
            shape: Vec::new(),
            data: TensorData::Bytes(vec![text.as_bytes().to_vec()]),
        }],
        batch_rows_max: Some(8),
        energy: None,
    };
    let answer = fleet
        .infer("reader", texts.iter().map(row).collect())
        .await?;
    let length = |row: &Row| match &row.cells[0].data {
        TensorData::Int64(length) => length[0],
        other => unreachable!("lengths are whole numbers, not {other:?}"),
    };
    Ok(answer.outputs.iter().map(length).collect())
}

#[tokio::test]
async fn a_row_that_is_refused_costs_nobody_else_an_answer() {
    let reader = Reader::default();
    let fleet = fleet(1, &reader);
    // The three requests are one batch, which is asked again without what was refused.
    let (first, bad, last) = tokio::join!(
        lengths(&fleet, &["a", "ab"]),
        lengths(&fleet, &["abc", "bad"]),
        lengths(&fleet, &["abcd"]),
    );
    assert_eq!(*reader.asked.lock().unwrap(), [5, 4]);
    assert_eq!(first.unwrap(), [1, 2]);
    assert_eq!(last.unwrap(), [4]);
    let error = bad.unwrap_err();
    let expected = OipError::RowRefused {
        row: 1,
        reason: "it is bad".to_owned(),
    };
    assert_eq!(error, expected);
    assert_eq!(error.status(), 400);
    // Where nothing is left, nothing is asked again.
    lengths(&fleet, &["bad", "bad too"]).await.unwrap_err();
    assert_eq!(*reader.asked.lock().unwrap(), [5, 4, 2]);
}

#[tokio::test]
async fn a_row_that_breaks_the_model_costs_its_own_request_the_answer() {
    let reader = Reader::default();
    let fleet = fleet(1, &reader);
    let (first, hard, last) = tokio::join!(
        lengths(&fleet, &["a", "ab"]),
        lengths(&fleet, &["abc", "hard"]),
        lengths(&fleet, &["abcd"]),
    );
    assert_eq!(*reader.asked.lock().unwrap(), [5, 4]);
    assert_eq!(first.unwrap(), [1, 2]);
    assert_eq!(last.unwrap(), [4]);
    // Whether the row or the model is to blame, nobody knows: it counts as a failure of the version.
    let error = hard.unwrap_err();
    assert_eq!(error.status(), 500, "{error}");
    assert!(error.to_string().contains("it is hard"), "{error}");
}

#[tokio::test]
async fn a_deadline_that_has_passed_at_the_replica_does_not_close_it() {
    let reader = Reader::default();
    let fleet = fleet(1, &reader);
    let row = Row {
        cells: vec![Cell {
            shape: Vec::new(),
            data: TensorData::Bytes(vec![b"late".to_vec()]),
        }],
        batch_rows_max: Some(8),
        energy: None,
    };
    for _ in 0..10 {
        let limit = Duration::from_millis(50);
        let asked = fleet.infer_within("reader", vec![row.clone()], Some(limit));
        assert_eq!(asked.await.unwrap_err().status(), 504);
        assert_eq!(fleet.open_count(), 1);
    }
    assert_eq!(lengths(&fleet, &["abc"]).await.unwrap(), [3]);
    assert_eq!(fleet.traffic().counts().ejections, 0);
}

#[tokio::test(start_paused = true)]
async fn what_a_replica_said_of_its_memory_is_forgotten_when_it_is_old() {
    let reader = Reader::default();
    let fleet = fleet(1, &reader);
    lengths(&fleet, &["abc"]).await.unwrap();
    assert_eq!(fleet.memory_percent(), 60);
    tokio::time::advance(Duration::from_secs(11)).await;
    assert_eq!(fleet.memory_percent(), 0);
}

#[tokio::test]
async fn a_row_that_is_refused_does_not_speak_against_the_replica() {
    let reader = Reader::default();
    let fleet = fleet(2, &reader);
    for _ in 0..40 {
        let error = lengths(&fleet, &["bad"]).await.unwrap_err();
        assert!(
            matches!(error, OipError::RowRefused { row: 0, .. }),
            "{error}"
        );
    }
    assert_eq!(fleet.traffic().counts().ejections, 0);
    // No other replica was asked for a second time.
    assert_eq!(reader.asked.lock().unwrap().len(), 40);
}

#[tokio::test]
async fn a_replica_that_refuses_rows_which_are_not_there_has_failed() {
    let reader = Reader {
        lies: true,
        ..Reader::default()
    };
    let fleet = fleet(1, &reader);
    for texts in [&["bad"][..], &["bad", "a"]] {
        let error = lengths(&fleet, texts).await.unwrap_err();
        assert_eq!(error.status(), 500, "{error}");
    }
}

/// Answers each text with so many bytes, and remembers of how many rows each call was.
#[derive(Clone)]
struct Verbose {
    bytes_per_row: usize,
    asked: Arc<Mutex<Vec<usize>>>,
}

impl Backend for Verbose {
    async fn infer(&self, rows: Batch) -> Result<Inference, BackendFailure> {
        let count = rows.rows.unwrap();
        self.asked.lock().unwrap().push(count as usize);
        let size_bytes = count as usize * self.bytes_per_row;
        if size_bytes > BATCH_BYTES_MAX {
            return Err(BackendFailure::OutputsTooLarge(size_bytes as u64));
        }
        let cell = Cell {
            shape: vec![count, self.bytes_per_row as u64],
            data: TensorData::Uint8(vec![7; size_bytes]),
        };
        Ok(Inference {
            outputs: Batch {
                rows: Some(count),
                cells: vec![cell],
            },
            computed_ns: 1,
            memory_percent: None,
            energies: Vec::new(),
        })
    }
}

/// Asks for as many rows at once; the status if that is refused, and of how many rows each call to the replica was.
async fn asked_for(fleet: &Fleet<Verbose>, verbose: &Verbose, rows: usize) -> (u16, Vec<usize>) {
    let answered = fleet.infer("verbose", vec![Row::numbers(vec![0.5], 128); rows]);
    let status = match answered.await {
        Ok(answer) => {
            let size = |row: &Row| row.size_bytes() == verbose.bytes_per_row;
            assert!(answer.outputs.len() == rows && answer.outputs.iter().all(size));
            200
        }
        Err(error) => error.status(),
    };
    (status, std::mem::take(&mut verbose.asked.lock().unwrap()))
}

#[tokio::test]
async fn outputs_that_are_too_large_for_one_answer_come_in_several() {
    let verbose = Verbose {
        bytes_per_row: BATCH_BYTES_MAX / 10,
        asked: Arc::default(),
    };
    let fleet = Fleet::new(1);
    for (_, berth) in fleet.berths() {
        berth.open(verbose.clone());
    }
    assert_eq!(
        asked_for(&fleet, &verbose, 25).await,
        (200, vec![25, 10, 10, 5])
    );
    // What was learnt is not tried again, and holds nobody back who asks for less.
    assert_eq!(
        asked_for(&fleet, &verbose, 25).await,
        (200, vec![10, 10, 5])
    );
    assert_eq!(asked_for(&fleet, &verbose, 3).await, (200, vec![3]));
    assert_eq!(fleet.open_count(), 1);

    // One row that has no room is refused, and says so; so is a request of more than a router holds.
    let huge = Verbose {
        bytes_per_row: BATCH_BYTES_MAX + 1,
        asked: Arc::default(),
    };
    let large = Verbose {
        bytes_per_row: BATCH_BYTES_MAX,
        asked: Arc::default(),
    };
    for (verbose, rows) in [(huge, 2), (large, 30)] {
        let fleet = Fleet::new(1);
        for (_, berth) in fleet.berths() {
            berth.open(verbose.clone());
        }
        assert_eq!(asked_for(&fleet, &verbose, rows).await.0, 500);
        assert_eq!(fleet.open_count(), 1);
    }
}
