//! Text encoders of the BERT family, from the files that Hugging Face's transformers write.
//!
//! Invariants:
//! 1. Files are checked before anything is computed from them: a file that is cut off, a tensor that is missing, has another
//!    shape or belongs to nothing, and a tokenizer with tokens that the model does not know are refused by name.
//! 2. A row is answered as it is alone, bit for bit, whatever it is batched with.
//! 3. A text that is no input is named by its row, before anything is computed, so that the other rows can be answered.
//! 4. A panic of a library while it reads the files is an error of the model, and so is an encoder that is not ready in
//!    time (`limited`): a tokenizer's own patterns may have no end.
//! 5. What a text costs before its tokens are counted is bounded (`text`).

mod bert;
mod config;
mod error;
mod portions;
mod text;
mod weights;

use bytes::Bytes;

use self::bert::{Bert, Texts};
use self::config::{BertConfig, CONFIG_BYTES_MAX};
pub use self::error::EncoderError;
use self::portions::{portions, tokens_at_once};
use self::text::{TOKENIZER_BYTES_MAX, TextReader, Tokens};
use self::weights::Weights;
use super::fleet::BATCH_ROWS_MAX;
use super::limited::{self, Preparation};
use super::oip::{Datatype, TensorData, TensorMetadata};
use super::replica::RefusedRow;
use super::rows::{BATCH_BYTES_MAX, Batch, Cell};
use super::signature::{Described, listed, timely_rows};
use crate::panics::caught;

/// The file with the description of the network.
pub const CONFIG_FILE: &str = "config.json";
/// The file with the weights.
pub const WEIGHTS_FILE: &str = "model.safetensors";
/// The file with the tokenizer.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// The largest weights: with the other files they have to fit into a version's file.
const WEIGHTS_BYTES_MAX: u64 = 300 << 20;

/// The files of an encoder, and how large each may be.
pub const FILES: [(&str, u64); 3] = [
    (CONFIG_FILE, CONFIG_BYTES_MAX),
    (WEIGHTS_FILE, WEIGHTS_BYTES_MAX),
    (TOKENIZER_FILE, TOKENIZER_BYTES_MAX),
];

/// The input.
const TEXT: &str = "text";

/// What is done with an encoder before it is ready.
const PREPARATION: Preparation = Preparation {
    doing: "being read and tried",
    remedy: "a file may be damaged, or the network too large; copy the files again, or use a smaller model",
};

/// The files of an encoder.
#[derive(Debug, Clone)]
pub struct EncoderFiles {
    /// `config.json`.
    pub config: Bytes,
    /// `model.safetensors`.
    pub weights: Bytes,
    /// `tokenizer.json`.
    pub tokenizer: Bytes,
}

/// An encoder that is ready to answer.
pub struct EncoderModel {
    bert: Bert,
    text: TextReader,
    hidden: usize,
    /// Tokens that are computed at once, unless one text has more.
    tokens_max: usize,
    labels: Vec<String>,
    /// Floating-point operations for the longest text.
    row_operations: u64,
}

impl EncoderModel {
    /// Reads an encoder and has `prepare` do with it what is to be done before it is used, within a time.
    pub fn prepared<T: Send + 'static>(
        files: &EncoderFiles,
        prepare: impl FnOnce(Self) -> Result<T, EncoderError> + Send + 'static,
    ) -> Result<T, EncoderError> {
        let read = files.clone();
        limited::prepared(
            &[&files.config, &files.weights, &files.tokenizer],
            PREPARATION,
            move || prepare(Self::load(&read)?),
        )?
    }

    /// Reads an encoder, and checks that its files fit each other, in whatever time that takes.
    pub fn load(files: &EncoderFiles) -> Result<Self, EncoderError> {
        check_sizes(files)?;
        guarded(|| {
            let config = BertConfig::read(&files.config)?;
            let text = TextReader::read(&files.tokenizer, &config)?;
            let weights = Weights::open(&files.weights)?;
            let bert = Bert::load(&weights, &config)?;
            weights.finish()?;
            let labels = bert.classes().map(|classes| config.labels(classes));
            Ok(EncoderModel {
                hidden: config.hidden_size,
                tokens_max: tokens_at_once((3 * config.hidden_size).max(config.intermediate_size)),
                labels: labels.transpose()?.unwrap_or_default(),
                row_operations: operations(&config, text.length_max()),
                bert,
                text,
            })
        })
    }

    /// What it takes and gives, after it has answered once. The rows of a batch are as many as a call holds.
    pub fn describe(&self) -> Result<Described, EncoderError> {
        self.warm_up()?;
        let tensor = |name: &str, datatype, shape: &[usize], labels| TensorMetadata {
            name: name.to_owned(),
            datatype,
            shape: [-1]
                .into_iter()
                .chain(shape.iter().map(|size| *size as i64))
                .collect(),
            labels,
        };
        let classes = self.bert.classes();
        let embedding = tensor("embedding", Datatype::Fp32, &[self.hidden], Vec::new());
        let logits = classes
            .map(|classes| tensor("logits", Datatype::Fp32, &[classes], self.labels.clone()));
        let row_bytes = (self.hidden + classes.unwrap_or(0)) * size_of::<f32>();
        let max_batch_size = (BATCH_BYTES_MAX / row_bytes).clamp(1, BATCH_ROWS_MAX);
        Ok(Described {
            inputs: vec![tensor(TEXT, Datatype::Bytes, &[], Vec::new())],
            outputs: [embedding].into_iter().chain(logits).collect(),
            max_batch_size: max_batch_size as u32,
        })
    }

    /// How many rows of the longest texts a replica answers in time, by a rule of thumb; at least one.
    #[must_use]
    pub fn timely_rows(&self) -> u32 {
        timely_rows(self.row_operations)
    }

    /// Refuses a description that is not of this encoder.
    pub fn check_described(
        &self,
        inputs: &[TensorMetadata],
        outputs: &[TensorMetadata],
        max_batch_size: u32,
    ) -> Result<(), EncoderError> {
        let found = self.describe()?;
        let is_so = listed(inputs) == listed(&found.inputs)
            && listed(outputs) == listed(&found.outputs)
            && (1..=found.max_batch_size).contains(&max_batch_size);
        if is_so {
            return Ok(());
        }
        let said = |inputs, outputs, rows| {
            let (inputs, outputs) = (listed(inputs), listed(outputs));
            format!("{inputs} to {outputs} in up to {rows} rows")
        };
        Err(EncoderError::Described {
            said: said(inputs, outputs, max_batch_size),
            found: said(&found.inputs, &found.outputs, found.max_batch_size),
        })
    }

    /// Encodes a short text, so that the first request finds an encoder that has run, and one whose answers are numbers.
    fn warm_up(&self) -> Result<(), EncoderError> {
        let text = Cell {
            shape: vec![1],
            data: TensorData::Bytes(vec![b"a".to_vec()]),
        };
        let answer = self.run(Batch {
            rows: Some(1),
            cells: vec![text],
        })?;
        let is_number = |cell: &Cell| match &cell.data {
            TensorData::Fp32(values) => values.iter().all(|value| value.is_finite()),
            _ => false,
        };
        if answer.cells.iter().all(is_number) {
            return Ok(());
        }
        Err(EncoderError::Run(
            "it answers a short text with what is no number: the weights are damaged".to_owned(),
        ))
    }

    /// The outputs of a batch.
    pub fn run(&self, batch: Batch) -> Result<Batch, EncoderError> {
        let texts = match batch.cells.as_slice() {
            [
                Cell {
                    data: TensorData::Bytes(texts),
                    ..
                },
            ] if batch.rows == Some(texts.len() as u64) => texts,
            cells => {
                let types = cells.iter().map(|cell| cell.data.datatype().to_string());
                return Err(EncoderError::Run(format!(
                    "{:?} of {:?} rows were given, it takes one BYTES a row",
                    types.collect::<Vec<_>>(),
                    batch.rows
                )));
            }
        };
        let tokens = self.tokens(texts)?;
        let lengths: Vec<usize> = tokens.iter().map(|tokens| tokens.ids.len()).collect();
        let classes = self.bert.classes();
        let (mut embeddings, mut logits) = (Vec::new(), Vec::new());
        for portion in portions(&lengths, self.tokens_max) {
            let encoded = self.bert.encode(&joined(&tokens[portion]));
            embeddings.extend(encoded.embeddings);
            logits.extend(encoded.logits.into_iter().flatten());
        }
        let rows = texts.len() as u64;
        let cell = |values, width: usize| Cell {
            shape: vec![rows, width as u64],
            data: TensorData::Fp32(values),
        };
        let logits = classes.map(|classes| cell(logits, classes));
        Ok(Batch {
            rows: Some(rows),
            cells: [cell(embeddings, self.hidden)]
                .into_iter()
                .chain(logits)
                .collect(),
        })
    }

    /// The tokens of each text; or all the texts that have none.
    fn tokens(&self, texts: &[Vec<u8>]) -> Result<Vec<Tokens>, EncoderError> {
        let mut tokens = Vec::with_capacity(texts.len());
        let mut refused = Vec::new();
        for (row, text) in texts.iter().enumerate() {
            match self.text.tokens(text) {
                Ok(of_text) => tokens.push(of_text),
                Err(reason) => refused.push(RefusedRow {
                    row: row as u64,
                    reason,
                }),
            }
        }
        match refused.is_empty() {
            true => Ok(tokens),
            false => Err(EncoderError::Rows(refused)),
        }
    }
}

fn check_sizes(files: &EncoderFiles) -> Result<(), EncoderError> {
    let given = [&files.config, &files.weights, &files.tokenizer];
    for ((file, limit_bytes), bytes) in FILES.into_iter().zip(given) {
        let size_bytes = bytes.len() as u64;
        if size_bytes > limit_bytes {
            return Err(EncoderError::TooLarge {
                file,
                size_bytes,
                limit_bytes,
                remedy: match file {
                    WEIGHTS_FILE => "save the weights as F16 or BF16, or use a smaller model",
                    _ => "this is no file of an encoder",
                },
            });
        }
    }
    Ok(())
}

/// The floating-point operations for a text of so many tokens: two for each weight and token, and those of the attention.
fn operations(config: &BertConfig, tokens: usize) -> u64 {
    let (hidden, tokens) = (config.hidden_size as u64, tokens as u64);
    let weights = 4 * hidden * hidden + 2 * hidden * config.intermediate_size as u64;
    let attention = (2 * tokens).saturating_mul(hidden);
    let of_token = 2 * weights.saturating_add(attention).min(u64::MAX / 2);
    of_token
        .saturating_mul(tokens)
        .saturating_mul(config.num_hidden_layers as u64)
}

/// The tokens of texts, one text after the other.
fn joined(tokens: &[Tokens]) -> Texts {
    let mut texts = Texts::default();
    for text in tokens {
        texts.ids.extend(&text.ids);
        texts.type_ids.extend(&text.type_ids);
        texts.lengths.push(text.ids.len());
    }
    texts
}

/// Runs what reads files, which may panic on bytes that it did not expect.
fn guarded<T>(work: impl FnOnce() -> Result<T, EncoderError>) -> Result<T, EncoderError> {
    caught(work).unwrap_or_else(|text| Err(EncoderError::Panicked(text)))
}

#[cfg(test)]
mod tests;
