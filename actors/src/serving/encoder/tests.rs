//! The models in `golden` and what transformers answers for them, in double precision, are made by
//! `runtime/cli/tests/programs/encoder_models.py`. The model of `minilm` comes from PyPI, for the tests of the command line.

mod files;

use serde_json::{Value, json};

use super::*;
use crate::serving::signature::{BATCH_OPERATIONS, TEXT_BYTES_MAX};

/// How far an answer may be from the golden one, relative to the larger of that and 1.
const TOLERANCE: f64 = 1e-5;

macro_rules! golden {
    ($name:literal, $file:literal) => {
        include_bytes!(concat!("golden/", $name, "/", $file)).as_slice()
    };
}

fn embedder() -> EncoderFiles {
    EncoderFiles {
        config: Bytes::from_static(golden!("embedder", "config.json")),
        weights: Bytes::from_static(golden!("embedder", "model.safetensors")),
        tokenizer: Bytes::from_static(golden!("embedder", "tokenizer.json")),
    }
}

fn classifier() -> EncoderFiles {
    EncoderFiles {
        config: Bytes::from_static(golden!("classifier", "config.json")),
        weights: Bytes::from_static(golden!("classifier", "model.safetensors")),
        tokenizer: Bytes::from_static(golden!("classifier", "tokenizer.json")),
    }
}

/// An encoder with rectifiers.
fn rectified() -> EncoderFiles {
    EncoderFiles {
        config: Bytes::from_static(golden!("rectified", "config.json")),
        weights: Bytes::from_static(golden!("rectified", "model.safetensors")),
        tokenizer: Bytes::from_static(golden!("rectified", "tokenizer.json")),
    }
}

fn golden() -> [(EncoderFiles, Vec<Value>); 3] {
    let cases = |bytes| serde_json::from_slice(bytes).unwrap();
    [
        (embedder(), cases(golden!("embedder", "cases.json"))),
        (classifier(), cases(golden!("classifier", "cases.json"))),
        (rectified(), cases(golden!("rectified", "cases.json"))),
    ]
}

fn texts(texts: &[&str]) -> Batch {
    let texts: Vec<Vec<u8>> = texts.iter().map(|text| text.as_bytes().to_vec()).collect();
    let rows = texts.len() as u64;
    Batch {
        rows: Some(rows),
        cells: vec![Cell {
            shape: vec![rows],
            data: TensorData::Bytes(texts),
        }],
    }
}

fn numbers(cell: &Cell) -> Vec<f64> {
    let TensorData::Fp32(values) = &cell.data else {
        unreachable!("outputs are FP32")
    };
    values.iter().map(|value| f64::from(*value)).collect()
}

fn bits(cells: &[Cell]) -> Vec<u32> {
    let values = |cell: &Cell| match &cell.data {
        TensorData::Fp32(values) => values.iter().map(|value| value.to_bits()).collect(),
        _ => Vec::new(),
    };
    cells.iter().flat_map(values).collect()
}

fn assert_near(found: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let near = (found - expected).abs() <= tolerance * expected.abs().max(1.0);
        assert!(near, "{what}: {found} instead of {expected}");
    }
}

/// Many texts of all lengths, in no order.
fn mixed(count: usize) -> Vec<String> {
    let words = ["the", "cat", "sat", "runs", "字", "sings", "x"];
    let text = |index: usize| {
        let length = index * 7 % 29;
        let words = (0..length).map(|at| words[(index + at * at) % words.len()]);
        words.collect::<Vec<_>>().join(" ")
    };
    (0..count).map(text).collect()
}

#[test]
fn answers_are_those_of_transformers() {
    for (files, cases) in golden() {
        let model = EncoderModel::load(&files).unwrap();
        let given: Vec<&str> = cases
            .iter()
            .map(|case| case["text"].as_str().unwrap())
            .collect();
        let rows = model.run(texts(&given)).unwrap().split().unwrap();
        assert_eq!(rows.len(), 9);
        for (case, row) in cases.iter().zip(rows) {
            let text = case["text"].as_str().unwrap();
            let tokens = model.text.tokens(text.as_bytes()).unwrap();
            assert_eq!(json!(tokens.ids), case["tokens"], "{text:?}");
            let expected = [&case["embedding"], &case["logits"]];
            let expected = expected.into_iter().filter_map(Value::as_array);
            assert_eq!(row.cells.len(), expected.clone().count());
            for (cell, expected) in row.cells.iter().zip(expected) {
                let expected: Vec<f64> = expected.iter().map(|v| v.as_f64().unwrap()).collect();
                assert_near(&numbers(cell), &expected, TOLERANCE, text);
            }
        }
    }
}

#[test]
fn a_description_is_read_off_the_files() {
    for (files, tensors) in [
        (embedder(), "text BYTES[-1] -> embedding FP32[-1, 32]"),
        (
            classifier(),
            "text BYTES[-1] -> embedding FP32[-1, 32], logits FP32[-1, 3]",
        ),
    ] {
        let model = EncoderModel::load(&files).unwrap();
        let good = model.describe().unwrap();
        let (inputs, outputs) = (&good.inputs, &good.outputs);
        let found = format!("{} -> {}", listed(inputs), listed(outputs));
        assert_eq!((found.as_str(), good.max_batch_size), (tensors, 128));
        assert_eq!(model.timely_rows(), 128);
        model.check_described(inputs, outputs, 1).unwrap();
        let mut other = outputs.clone();
        other[0].shape = vec![-1, 33];
        for (outputs, rows) in [(&other, 1), (outputs, 0), (outputs, 129)] {
            let error = model.check_described(inputs, outputs, rows).unwrap_err();
            assert!(matches!(error, EncoderError::Described { .. }), "{error}");
        }
    }
    let classes = EncoderModel::load(&classifier())
        .unwrap()
        .describe()
        .unwrap();
    assert_eq!(classes.outputs[1].labels, ["bad", "good", "neither"]);
}

#[test]
fn an_encoder_is_prepared_on_a_thread_of_its_own() {
    let here = std::thread::current().id();
    let (there, described) = EncoderModel::prepared(&embedder(), |model| {
        Ok((std::thread::current().id(), model.describe()?))
    })
    .unwrap();
    assert_ne!(there, here);
    assert_eq!(described.max_batch_size, 128);
    let mut cut = embedder();
    cut.weights = cut.weights.slice(..9);
    let refused = EncoderModel::prepared(&cut, |_| Ok(()));
    assert!(matches!(refused, Err(EncoderError::Malformed(_))));
    let panicked = EncoderModel::prepared::<()>(&embedder(), |_| panic!("not this"));
    assert_eq!(panicked, Err(EncoderError::Panicked("not this".to_owned())));
}

#[test]
fn a_large_encoder_takes_few_long_texts_at_once() {
    let mut config = BertConfig::read(&embedder().config).unwrap();
    config.hidden_size = 768;
    config.intermediate_size = 3072;
    config.num_hidden_layers = 12;
    // 85 million weights, and the attention over 512 tokens.
    assert_eq!(
        operations(&config, 512),
        2 * 512 * (84_934_656 + 12 * 2 * 512 * 768)
    );
    assert!(operations(&config, 512) > BATCH_OPERATIONS);
    assert_eq!(BATCH_OPERATIONS / operations(&config, 64), 3);
}

#[test]
fn a_row_is_answered_as_it_is_alone_whatever_it_is_batched_with() {
    let model = EncoderModel::load(&classifier()).unwrap();
    let given = mixed(90);
    let given: Vec<&str> = given.iter().map(String::as_str).collect();
    let together = model.run(texts(&given)).unwrap().split().unwrap();
    let backwards: Vec<&str> = given.iter().rev().copied().collect();
    let backwards = model.run(texts(&backwards)).unwrap().split().unwrap();
    for ((text, row), again) in given.iter().zip(&together).zip(backwards.iter().rev()) {
        let alone = model.run(texts(&[text])).unwrap().split().unwrap();
        for other in [&alone[0], again] {
            assert_eq!(bits(&row.cells), bits(&other.cells), "{text:?}");
        }
    }
}

#[test]
fn a_batch_that_is_computed_in_portions_has_the_same_bits() {
    let given = mixed(90);
    let given: Vec<&str> = given.iter().map(String::as_str).collect();
    for (files, _) in golden() {
        let mut model = EncoderModel::load(&files).unwrap();
        let whole = model.run(texts(&given)).unwrap();
        for tokens_max in [1, 50, 300] {
            model.tokens_max = tokens_max;
            let found = model.run(texts(&given)).unwrap();
            assert_eq!(bits(&found.cells), bits(&whole.cells));
        }
    }
}

#[test]
fn texts_that_are_no_input_are_named_by_their_rows() {
    let model = EncoderModel::load(&embedder()).unwrap();
    let long = "cat ".repeat(39);
    let mut batch = texts(&["a", &long, "b", "c"]);
    let TensorData::Bytes(given) = &mut batch.cells[0].data else {
        unreachable!("texts are BYTES")
    };
    given[3] = b"caf\xe9".to_vec();
    let Err(EncoderError::Rows(refused)) = model.run(batch) else {
        panic!("it was answered")
    };
    let rows: Vec<u64> = refused.iter().map(|refused| refused.row).collect();
    assert_eq!(rows, [1, 3]);
    for (refused, expected) in refused
        .iter()
        .zip(["41 tokens, the limit is 40", "from byte 3 on"])
    {
        assert!(refused.reason.contains(expected), "{refused:?}");
    }
    model.run(texts(&[&long[..38 * 4]])).unwrap();
    // The other tokenizer truncates, which is what its maker wants; but it has to look at all that it drops.
    let truncating = EncoderModel::load(&classifier()).unwrap();
    truncating.run(texts(&[&long])).unwrap();
    let mut longest = "cat ".repeat(TEXT_BYTES_MAX / 4);
    truncating.run(texts(&[&longest])).unwrap();
    longest.push('s');
    let Err(EncoderError::Rows(refused)) = truncating.run(texts(&["a", &longest])) else {
        panic!("it was answered")
    };
    let reason = "the text has 16385 bytes, the limit is 16384: send a shorter one".to_owned();
    assert_eq!(refused, [RefusedRow { row: 1, reason }]);
    let numbers = Batch {
        rows: Some(1),
        cells: vec![Cell {
            shape: vec![1],
            data: TensorData::Fp32(vec![0.5]),
        }],
    };
    let error = model.run(numbers).unwrap_err().to_string();
    assert!(error.contains("one BYTES a row"), "{error}");
}
