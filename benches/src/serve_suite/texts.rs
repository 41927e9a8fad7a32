//! How many texts an encoder answers: by itself on one thread, in rows that `texts.py` has for PyTorch under the same names, and
//! behind an endpoint.

use std::path::Path;
use std::time::{Duration, Instant};

use mobula_actors::serving::encoder::{
    CONFIG_FILE, EncoderFiles, EncoderModel, TOKENIZER_FILE, WEIGHTS_FILE,
};
use mobula_actors::serving::oip::TensorData;
use mobula_actors::serving::rows::{Batch, Cell};
use mobula_benches::results::Results;

use crate::Outcome;

/// Tokens of a text that an endpoint is asked for: a question, say.
const TOKENS_OF_A_QUESTION: usize = 8;

/// Fewest and most tokens of texts of many lengths.
const MIXED: (usize, usize) = (3, 128);

/// A text of so many tokens, with the two that the tokenizer adds.
fn text(tokens: usize) -> String {
    vec!["the"; tokens - 2].join(" ")
}

/// A text as short as questions are.
pub(crate) fn question() -> String {
    text(TOKENS_OF_A_QUESTION)
}

/// What the rows are called, and the tokens of each text.
fn batches() -> Vec<(String, Vec<usize>)> {
    let equal = [(1, 8), (1, 128), (32, 16), (32, 128)].map(|(count, tokens)| {
        let name = format!("{count} text(s) of {tokens} tokens");
        (name, vec![tokens; count])
    });
    let (fewest, most) = MIXED;
    let mixed = (0..32).map(|text| fewest + text * 37 % (most - fewest + 1));
    let mixed = (
        format!("32 texts of {fewest} to {most} tokens"),
        mixed.collect(),
    );
    equal.into_iter().chain([mixed]).collect()
}

/// Encodes batches in this process, on one thread, from texts to embeddings.
pub(crate) fn by_themselves(folder: &Path, length: Duration, results: &mut Results) -> Outcome {
    let bytes = |name: &str| std::fs::read(folder.join(name)).map(Into::into);
    let model = EncoderModel::load(&EncoderFiles {
        config: bytes(CONFIG_FILE)?,
        weights: bytes(WEIGHTS_FILE)?,
        tokenizer: bytes(TOKENIZER_FILE)?,
    })?;
    for (name, tokens) in batches() {
        let texts: Vec<Vec<u8>> = tokens
            .iter()
            .map(|tokens| text(*tokens).into_bytes())
            .collect();
        let run = || -> Outcome<Duration> {
            let begun = Instant::now();
            let rows = texts.len() as u64;
            let cell = Cell {
                shape: vec![rows],
                data: TensorData::Bytes(texts.clone()),
            };
            model.run(Batch {
                rows: Some(rows),
                cells: vec![cell],
            })?;
            Ok(begun.elapsed())
        };
        let end = Instant::now() + length / 5;
        while Instant::now() < end {
            run()?;
        }
        let mut times = Vec::new();
        let end = Instant::now() + length;
        while times.is_empty() || Instant::now() < end {
            times.push(run()?);
        }
        times.sort();
        let median = times[times.len() / 2].as_secs_f64();
        results.figure(&name, texts.len() as f64 / median, "/s");
    }
    Ok(())
}
