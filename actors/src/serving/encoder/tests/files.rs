//! Files that are refused, and what is said of them.

use super::*;

fn refusal(files: &EncoderFiles) -> String {
    match EncoderModel::load(files) {
        Ok(_) => panic!("it was taken"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn every_cut_is_refused() {
    let whole = embedder();
    // Beyond the list of tensors only the number of bytes counts, so a few places stand for all.
    let length = whole.weights.len();
    let places = (0..200).chain([length / 2, length - 1]);
    for place in places {
        let mut files = whole.clone();
        files.weights = whole.weights.slice(..place);
        assert!(refusal(&files).contains("cut off"), "{place} bytes");
    }
    for place in 0..whole.config.len() - 2 {
        let mut files = whole.clone();
        files.config = whole.config.slice(..place);
        assert!(
            refusal(&files).contains("describes no encoder"),
            "{place} bytes"
        );
    }
    for place in 0..whole.tokenizer.len() {
        let mut files = whole.clone();
        files.tokenizer = whole.tokenizer.slice(..place);
        assert!(refusal(&files).contains("is no tokenizer"), "{place} bytes");
    }
}

/// The file with another list of tensors before the same bytes.
fn relisted(weights: &Bytes, change: impl FnOnce(&mut Value)) -> Bytes {
    let (length, rest) = weights.split_at(size_of::<u64>());
    let length = u64::from_le_bytes(length.try_into().unwrap());
    let (list, tensors) = rest.split_at(length as usize);
    let mut list: Value = serde_json::from_slice(list).unwrap();
    change(&mut list);
    let list = list.to_string();
    let length = (list.len() as u64).to_le_bytes();
    [&length, list.as_bytes(), tensors].concat().into()
}

fn reweighted(files: EncoderFiles, change: impl FnOnce(&mut Value)) -> String {
    refusal(&EncoderFiles {
        weights: relisted(&files.weights, change),
        ..files
    })
}

fn rename(list: &mut Value, from: &str, to: &str) {
    let list = list.as_object_mut().unwrap();
    let tensor = list.remove(from).unwrap();
    list.insert(to.to_owned(), tensor);
}

#[test]
fn what_is_wrong_with_the_weights_is_named() {
    let query = "encoder.layer.1.attention.self.query.weight";
    let cases = [
        (
            reweighted(embedder(), |list| rename(list, query, "another")),
            vec!["no tensor", query],
        ),
        (
            reweighted(embedder(), |list| {
                list[query]["shape"] = json!([16, 64]);
            }),
            vec![query, "[16, 64]", "makes it [32, 32]"],
        ),
        (
            reweighted(embedder(), |list| {
                list[query]["shape"] = json!([32, 33]);
            }),
            vec!["no file of tensors"],
        ),
        (
            reweighted(embedder(), |list| list[query]["dtype"] = json!("U32")),
            vec![query, "U32", "F16 or BF16"],
        ),
        (
            reweighted(classifier(), |list| {
                rename(list, "bert.pooler.dense.bias", "cls.predictions.bias");
            }),
            vec!["no tensor", "bert.pooler.dense.bias"],
        ),
        (
            reweighted(classifier(), |list| {
                rename(list, "classifier.weight", "qa_outputs.weight");
            }),
            vec!["belongs to no part", "classifier.bias"],
        ),
        (
            reweighted(classifier(), |list| {
                list["classifier.weight"]["shape"] = json!([6, 16]);
            }),
            vec!["classifier.weight", "[6, 16]"],
        ),
    ];
    for (error, expected) in cases {
        for expected in expected {
            assert!(error.contains(expected), "{expected:?} is not in {error:?}");
        }
    }
    let mut damaged = embedder();
    let mut bytes = damaged.weights.to_vec();
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    damaged.weights = bytes.into();
    let error = EncoderModel::load(&damaged)
        .unwrap()
        .describe()
        .unwrap_err();
    assert!(error.to_string().contains("no number"), "{error}");
}

fn changed(bytes: &Bytes, change: impl FnOnce(&mut Value)) -> Bytes {
    let mut value: Value = serde_json::from_slice(bytes).unwrap();
    change(&mut value);
    value.to_string().into()
}

#[test]
fn what_is_wrong_with_the_description_is_named() {
    for (key, value, expected) in [
        ("model_type", json!("roberta"), "of type \"roberta\""),
        ("is_decoder", json!(true), "a decoder"),
        (
            "position_embedding_type",
            json!("relative_key"),
            "\"absolute\"",
        ),
        ("hidden_act", json!("swish"), "swish"),
        ("hidden_size", json!(-1), "-1"),
        (
            "hidden_size",
            json!(33),
            "which 4 attention heads do not divide",
        ),
        ("num_hidden_layers", json!(0), "num_hidden_layers = 0"),
        (
            "vocab_size",
            json!(1u64 << 40),
            "vocab_size = 1099511627776",
        ),
        (
            "max_position_embeddings",
            json!(4097),
            "makes it [4097, 32]",
        ),
        ("layer_norm_eps", json!(0.0), "layer_norm_eps = 0"),
        ("layer_norm_eps", json!(1e-50), "more than 1e-45"),
        // Sizes that lie about the weights, and layers that are left out.
        ("num_hidden_layers", json!(3), "encoder.layer.2."),
        ("num_hidden_layers", json!(1), "belongs to no part"),
        ("vocab_size", json!(117), "makes it [117, 32]"),
        ("vocab_size", json!(115), "115 tokens"),
        (
            "id2label",
            json!({"0": "x", "2": "y", "3": "z"}),
            "names 3 classes",
        ),
        ("id2label", json!({"0": "x"}), "names 1 classes"),
    ] {
        let mut files = classifier();
        files.config = changed(&files.config, |config| config[key] = value.clone());
        let error = refusal(&files);
        assert!(error.contains(expected), "{key} {value}: {error}");
    }
    let mut unnamed = classifier();
    unnamed.config = changed(&unnamed.config, |config| {
        config.as_object_mut().unwrap().remove("id2label");
    });
    let described = EncoderModel::load(&unnamed).unwrap().describe().unwrap();
    assert!(described.outputs[1].labels.is_empty());
}

#[test]
fn what_is_wrong_with_the_tokenizer_is_named() {
    let mut files = classifier();
    let whole = files.tokenizer.clone();
    files.tokenizer = changed(&whole, |tokenizer| {
        tokenizer["model"]["vocab"]["surplus"] = json!(116);
    });
    assert!(refusal(&files).contains("numbers \"surplus\" 116"));
    files.tokenizer = changed(&whole, |tokenizer| {
        tokenizer["truncation"]["max_length"] = json!(41);
    });
    assert!(refusal(&files).contains("at 41 tokens, the model takes 40"));
    files.tokenizer = changed(&whole, |tokenizer| {
        tokenizer["post_processor"]["single"][0]["SpecialToken"]["id"] = json!("[CLR]");
    });
    let error = refusal(&files);
    assert!(
        error.contains("tokenizer.json fails on the text \"a\": the tokenizer does not take"),
        "{error}"
    );
    files.tokenizer = changed(&whole, |tokenizer| {
        tokenizer["post_processor"]["single"][1]["Sequence"]["type_id"] = json!(2);
    });
    let error = refusal(&files);
    assert!(
        error.contains("the number 2, the model knows 2 types of tokens"),
        "{error}"
    );
    files.tokenizer = changed(&whole, |tokenizer| {
        tokenizer["post_processor"]["special_tokens"]["[CLS]"]["ids"] = json!([116]);
    });
    let error = refusal(&files);
    assert!(
        error.contains("the number 116, the model knows 116 tokens"),
        "{error}"
    );
    let words = |limit: u64| {
        changed(&whole, |tokenizer| {
            tokenizer["model"]["max_input_chars_per_word"] = json!(limit);
        })
    };
    files.tokenizer = words(257);
    let error = refusal(&files);
    assert!(
        error.contains("words of up to 257 characters into pieces, the limit is 256"),
        "{error}"
    );
    files.tokenizer = words(256);
    EncoderModel::load(&files).unwrap();
    files.tokenizer = vec![b' '; TOKENIZER_BYTES_MAX as usize + 1].into();
    let error = refusal(&files);
    assert!(
        error.contains("16777217 bytes, the limit is 16777216"),
        "{error}"
    );
}
