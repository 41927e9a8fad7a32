//! Where the answers of a batch go: one line a row, in the order of the rows.
//!
//! Invariants:
//! 1. The lines that are there are the progress: each row has one, whether it was answered or not, and line n is row n's.
//! 2. A run goes on with an output only if its record says that it is of the same input and endpoint.
//! 3. A last line that a killed run left unfinished is taken back before the next one is written.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What a run is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The endpoint, or the graph.
    pub endpoint: String,
    /// BLAKE3 of the input, in hex.
    pub input_blake3: String,
    /// Its size.
    pub input_bytes: u64,
}

/// Why a run cannot begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// There is something that no run has written.
    #[error(
        "{} is there already, and no record of a run beside it: choose another output, or remove it", path.display()
    )]
    Foreign {
        /// The output.
        path: PathBuf,
    },
    /// It is of another run.
    #[error(
        "{} is of another run (endpoint `{}`, input of {} bytes with BLAKE3 {}): choose another output, or remove it \
         and {}", path.display(), known.endpoint, known.input_bytes, known.input_blake3, record.display()
    )]
    OtherRun {
        /// The output.
        path: PathBuf,
        /// Its record.
        record: PathBuf,
        /// What it is of.
        known: Box<Record>,
    },
    /// The record or a line is not what a run writes.
    #[error("{} is damaged: {reason}; remove it and its record, and begin anew", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// An output that is written to.
#[derive(Debug)]
pub struct Output {
    path: PathBuf,
    file: File,
    rows: u64,
}

/// Where the record of an output lies.
#[must_use]
pub fn record_of(output: &Path) -> PathBuf {
    let mut name = output.as_os_str().to_owned();
    name.push(".run");
    PathBuf::from(name)
}

fn file_error(path: &Path) -> impl Fn(io::Error) -> OutputError + '_ {
    |source| OutputError::File {
        path: path.to_owned(),
        source,
    }
}

impl Output {
    /// Begins an output, or goes on with one of the same run.
    pub fn open(path: &Path, record: &Record) -> Result<Self, OutputError> {
        let record_path = record_of(path);
        match std::fs::read(&record_path) {
            Ok(bytes) => {
                let known: Record =
                    serde_json::from_slice(&bytes).map_err(|error| OutputError::Damaged {
                        path: record_path.clone(),
                        reason: error.to_string(),
                    })?;
                if known != *record {
                    return Err(OutputError::OtherRun {
                        path: path.to_owned(),
                        record: record_path,
                        known: Box::new(known),
                    });
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if path.exists() {
                    return Err(OutputError::Foreign {
                        path: path.to_owned(),
                    });
                }
                write_record(&record_path, record)?;
            }
            Err(source) => return Err(file_error(&record_path)(source)),
        }
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path);
        let file = opened.map_err(file_error(path))?;
        let mut output = Output {
            path: path.to_owned(),
            file,
            rows: 0,
        };
        output.rows = output.recover()?;
        Ok(output)
    }

    /// Rows that are answered.
    #[must_use]
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Writes the next row's line; `answer` is an object, to which the row's number is added.
    pub fn write(&mut self, mut answer: serde_json::Map<String, Value>) -> Result<(), OutputError> {
        answer.insert("row".to_owned(), Value::from(self.rows));
        let mut line = serde_json::to_vec(&answer).expect("a JSON value has a JSON form");
        line.push(b'\n');
        // In one write: a run that is killed leaves whole lines, and at most one that is not.
        self.file.write_all(&line).map_err(file_error(&self.path))?;
        self.rows += 1;
        Ok(())
    }

    /// Has all that was written on the disk.
    pub fn finish(&self) -> Result<(), OutputError> {
        self.file.sync_all().map_err(file_error(&self.path))
    }

    /// Takes an unfinished line back; how many rows there are.
    fn recover(&mut self) -> Result<u64, OutputError> {
        let (rows, end, last) = whole_lines(&mut self.file).map_err(file_error(&self.path))?;
        if let Some(last) = last {
            let row = serde_json::from_slice::<Value>(&last)
                .ok()
                .and_then(|line| line["row"].as_u64());
            if row != Some(rows - 1) {
                return Err(OutputError::Damaged {
                    path: self.path.clone(),
                    reason: format!("line {rows} is not that of row {}", rows - 1),
                });
            }
        }
        let set = self
            .file
            .set_len(end)
            .and_then(|()| self.file.seek(SeekFrom::End(0)));
        set.map_err(file_error(&self.path))?;
        Ok(rows)
    }
}

/// How many whole lines there are, where the last one ends, and what it says.
fn whole_lines(file: &mut File) -> io::Result<(u64, u64, Option<Vec<u8>>)> {
    file.seek(SeekFrom::Start(0))?;
    let mut reader = BufReader::new(&mut *file);
    let (mut rows, mut end, mut last) = (0, 0, None);
    loop {
        let mut line = Vec::new();
        let length = reader.read_until(b'\n', &mut line)?;
        if !line.ends_with(b"\n") {
            return Ok((rows, end, last));
        }
        rows += 1;
        end += length as u64;
        last = Some(line);
    }
}

fn write_record(path: &Path, record: &Record) -> Result<(), OutputError> {
    let beside = path.with_extension("run.new");
    let text = serde_json::to_vec_pretty(record).expect("a record has a JSON form");
    std::fs::write(&beside, text)
        .and_then(|()| std::fs::rename(&beside, path))
        .map_err(file_error(path))
}

/// What a run of this input is.
pub fn describe(endpoint: &str, input: &Path) -> Result<Record, OutputError> {
    let mut file = File::open(input).map_err(file_error(input))?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut input_bytes = 0;
    loop {
        let length = file.read(&mut buffer).map_err(file_error(input))?;
        if length == 0 {
            break;
        }
        hasher.update(&buffer[..length]);
        input_bytes += length as u64;
    }
    Ok(Record {
        endpoint: endpoint.to_owned(),
        input_blake3: hasher.finalize().to_hex().to_string(),
        input_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record() -> Record {
        Record {
            endpoint: "digits".into(),
            input_blake3: "a".repeat(64),
            input_bytes: 9,
        }
    }

    fn write(output: &mut Output, answer: u64) {
        let answer = Value::from(answer);
        let object = serde_json::Map::from_iter([("answer".to_owned(), answer)]);
        output.write(object).unwrap();
    }

    #[test]
    fn a_killed_run_goes_on_behind_its_last_whole_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.jsonl");
        let mut first = Output::open(&path, &record()).unwrap();
        write(&mut first, 7);
        write(&mut first, 8);
        // What a kill in the middle of a write leaves, wherever it comes.
        first.file.write_all(br#"{"answer":9,"ro"#).unwrap();
        drop(first);
        let mut second = Output::open(&path, &record()).unwrap();
        assert_eq!(second.rows(), 2);
        write(&mut second, 9);
        second.finish().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            "{\"answer\":7,\"row\":0}\n{\"answer\":8,\"row\":1}\n{\"answer\":9,\"row\":2}\n"
        );
        assert_eq!(Output::open(&path, &record()).unwrap().rows(), 3);
    }

    #[test]
    fn what_is_of_another_run_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out.jsonl");
        std::fs::write(&path, "somebody's\n").unwrap();
        let error = Output::open(&path, &record()).unwrap_err();
        assert!(matches!(error, OutputError::Foreign { .. }), "{error}");
        std::fs::remove_file(&path).unwrap();
        drop(Output::open(&path, &record()).unwrap());
        let other = Record {
            endpoint: "other".into(),
            ..record()
        };
        let error = Output::open(&path, &other).unwrap_err();
        assert!(error.to_string().contains("endpoint `digits`"), "{error}");
        std::fs::write(&path, "{\"row\":4}\n").unwrap();
        let error = Output::open(&path, &record()).unwrap_err();
        assert!(
            error.to_string().contains("line 1 is not that of row 0"),
            "{error}"
        );
    }
}
