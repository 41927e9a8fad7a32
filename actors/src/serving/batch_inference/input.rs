//! The rows of a batch: each line of a file is one request.
//!
//! Invariants:
//! 1. A line takes no more memory than [`LINE_BYTES_MAX`]; a longer one is a row that cannot be sent.
//! 2. Blank lines are no rows, and rows are counted from 0: what a row's number is depends on nothing but the file.

use std::io::{self, BufRead, Read};

use serde_json::{Value, json};

use crate::serving::oip::Datatype;

/// The longest line, in bytes: several times what an endpoint takes, so that its own limit is what people meet.
pub const LINE_BYTES_MAX: u64 = 16 << 20;

/// What the lines of a file are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Format {
    /// Requests, as they would be posted.
    JsonLines,
    /// Values of the only input of a model, one row of it a line. The first line may name the columns.
    Csv {
        /// The input.
        input: String,
        /// Its type.
        datatype: Datatype,
        /// Values in a row; `None` for any number.
        values: Option<usize>,
    },
}

impl Format {
    /// CSV for a model that describes itself so.
    ///
    /// # Errors
    /// Why it is not for this model.
    pub fn csv(model: &str, metadata: &Value) -> Result<Self, String> {
        let inputs = metadata["inputs"].as_array().map_or(&[][..], Vec::as_slice);
        let [input] = inputs else {
            return Err(format!(
                "CSV is for models with one input, `{model}` has {}: send JSON lines",
                inputs.len()
            ));
        };
        let name = input["name"].as_str().unwrap_or_default();
        let shape = input["shape"].as_array().map_or(&[][..], Vec::as_slice);
        let [_, values] = shape else {
            return Err(format!(
                "CSV is for inputs with rows of values, `{name}` has {} dimensions: send JSON lines",
                shape.len()
            ));
        };
        let datatype = input["datatype"].as_str().unwrap_or_default();
        let known = Datatype::from_name(datatype).filter(|datatype| {
            !matches!(datatype, Datatype::Bytes | Datatype::Bool | Datatype::Bf16)
        });
        let known = known.ok_or_else(|| {
            format!("CSV is for numbers, `{name}` is {datatype}: send JSON lines")
        })?;
        Ok(Format::Csv {
            input: name.to_owned(),
            datatype: known,
            values: values
                .as_u64()
                .and_then(|values| usize::try_from(values).ok()),
        })
    }

    /// The request of a line.
    ///
    /// # Errors
    /// What is wrong with the line.
    pub fn request(&self, line: &[u8]) -> Result<Value, String> {
        let Format::Csv {
            input,
            datatype,
            values: expected,
        } = self
        else {
            let value: Value = serde_json::from_slice(line)
                .map_err(|error| format!("the line is no JSON: {error}"))?;
            return match value {
                Value::Object(_) => Ok(value),
                _ => Err("the line is no JSON object: write a request on each line".to_owned()),
            };
        };
        let values = numbers(line)?;
        if expected.is_some_and(|expected| expected != values.len()) {
            return Err(format!(
                "the line has {} values, the model takes {}",
                values.len(),
                expected.unwrap_or_default()
            ));
        }
        Ok(json!({"inputs": [{
            "name": input,
            "shape": [1, values.len()],
            "datatype": datatype.name(),
            "data": values,
        }]}))
    }

    /// Whether the first line of a file names columns.
    fn is_header(&self, line: &[u8]) -> bool {
        matches!(self, Format::Csv { .. }) && numbers(line).is_err()
    }
}

fn numbers(line: &[u8]) -> Result<Vec<Value>, String> {
    let text =
        std::str::from_utf8(line).map_err(|error| format!("the line is no text: {error}"))?;
    let number = |cell: &str| {
        let cell = cell.trim();
        serde_json::from_str::<Value>(cell)
            .ok()
            .filter(Value::is_number)
            .ok_or_else(|| format!("`{}` is no number", cell.escape_debug()))
    };
    text.split(',').map(number).collect()
}

/// A row: its bytes, or why it cannot be sent.
pub type Line = Result<Vec<u8>, String>;

/// Reads a file row by row.
pub struct Rows<R> {
    reader: R,
    format: Format,
    is_first: bool,
}

impl<R: BufRead> Rows<R> {
    /// The rows of what `reader` has.
    pub fn new(reader: R, format: Format) -> Self {
        Rows {
            reader,
            format,
            is_first: true,
        }
    }

    /// The next row; `None` at the end.
    pub fn next_row(&mut self) -> io::Result<Option<Line>> {
        loop {
            let mut line = Vec::new();
            let mut limited = (&mut self.reader).take(LINE_BYTES_MAX + 1);
            if limited.read_until(b'\n', &mut line)? == 0 {
                return Ok(None);
            }
            let is_first = std::mem::replace(&mut self.is_first, false);
            if line.len() as u64 > LINE_BYTES_MAX && !line.ends_with(b"\n") {
                self.skip_line()?;
                return Ok(Some(Err(format!(
                    "the line has more than {LINE_BYTES_MAX} bytes, the limit"
                ))));
            }
            let line = line.trim_ascii();
            let is_header = is_first && self.format.is_header(line);
            if !line.is_empty() && !is_header {
                return Ok(Some(Ok(line.to_vec())));
            }
        }
    }

    fn skip_line(&mut self) -> io::Result<()> {
        loop {
            let buffer = self.reader.fill_buf()?;
            let end = buffer.iter().position(|byte| *byte == b'\n');
            let (length, is_over) = match end {
                Some(at) => (at + 1, true),
                None => (buffer.len(), buffer.is_empty()),
            };
            self.reader.consume(length);
            if is_over {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str, format: Format) -> Vec<Line> {
        let mut rows = Rows::new(text.as_bytes(), format);
        std::iter::from_fn(|| rows.next_row().unwrap()).collect()
    }

    fn csv(values: Option<usize>) -> Format {
        Format::Csv {
            input: "x".into(),
            datatype: Datatype::Fp32,
            values,
        }
    }

    #[test]
    fn blank_lines_and_a_header_are_no_rows() {
        let rows_of = |text| rows(text, Format::JsonLines).len();
        assert_eq!(
            (rows_of("{}\n\n  \n{}"), rows_of(""), rows_of("\n")),
            (2, 0, 0)
        );
        assert_eq!(rows("a,b\n1,2\n3,x\n", csv(None)).len(), 2);
        assert_eq!(rows("1,2\n3,4", csv(None)).len(), 2);
    }

    #[test]
    fn a_line_that_is_too_long_is_a_row_of_its_own() {
        let long = "x".repeat(LINE_BYTES_MAX as usize + 5);
        let rows = rows(&format!("{{}}\n{long}\n{{}}\n{long}"), Format::JsonLines);
        let are_right: Vec<bool> = rows.iter().map(Result::is_ok).collect();
        assert_eq!(are_right, [true, false, true, false]);
    }

    #[test]
    fn csv_is_for_models_with_one_input_of_numbers() {
        let input = |datatype: &str, shape: Value| json!({"name": "x", "datatype": datatype, "shape": shape});
        let of = |inputs: Value| Format::csv("m", &json!({"inputs": inputs}));
        let image = of(json!([input("FP32", json!([-1, 64]))]));
        assert_eq!(image, Ok(csv(Some(64))));
        assert_eq!(of(json!([input("FP32", json!([-1, -1]))])), Ok(csv(None)));
        for (inputs, part) in [
            (json!([]), "has 0"),
            (json!([input("FP32", json!([-1]))]), "1 dimensions"),
            (json!([input("BYTES", json!([-1, 1]))]), "is BYTES"),
        ] {
            let error = of(inputs).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn lines_become_requests_or_say_why_not() {
        let request = csv(Some(2)).request(b"1, 2.5").unwrap();
        assert_eq!(
            request,
            json!({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2.5]}]})
        );
        for (format, line, part) in [
            (csv(Some(2)), "1", "1 values, the model takes 2"),
            (csv(None), "1,,2", "`` is no number"),
            (csv(None), "1,\"a\"", "no number"),
            (Format::JsonLines, "{", "no JSON"),
            (Format::JsonLines, "[1]", "no JSON object"),
        ] {
            let error = format.request(line.as_bytes()).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
