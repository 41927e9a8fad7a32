//! Endpoints of models that were trained here and name no classes: of text, and of numbers to predict.

use serde_json::{Value, json};

use super::imported::{Imported, assert_near};
use super::served::output;

/// Trains a job whose data lie beside its file, and deploys what it registers.
fn trained(imported: &Imported, name: &str, job: &str) -> (Value, Value) {
    let text = format!(
        "name = \"{name}\"\nregister = \"{name}\"\nseed = 7\nglobal_batch = 16\nvirtual_shards = 4\n\
         workers = {{ min = 1, max = 1 }}\n{job}"
    );
    let file = imported.cluster.dir().join(format!("{name}.toml"));
    std::fs::write(&file, text).unwrap();
    let reply = imported.cluster.json(&["train", file.to_str().unwrap()]);
    let result = imported.cluster.result_of(&format!("job-{}", reply["job"]));
    (result, imported.deploy(name))
}

#[test]
fn a_transformer_says_which_byte_comes_next() {
    let imported = Imported::up();
    let words = "the cat sat on the mat and the dog sat on the cat. ".repeat(40);
    std::fs::write(imported.cluster.dir().join("words.txt"), words).unwrap();
    let job = "steps = 120\nlearning_rate = 0.01\n[dataset.text]\nfiles = [\"words.txt\"]\ncontext = 16\n\
               [model.transformer]\nlayers = 1\nwidth = 32\nheads = 2\n";
    let (_, deployment) = trained(&imported, "words", job);
    let ask = |texts: &[&str]| {
        let input =
            json!({"name": "text", "datatype": "BYTES", "shape": [texts.len()], "data": texts});
        imported.infer(&deployment, &json!({"inputs": [input]}))
    };
    let texts = ["the cat sat on th", "the c", "the dog sat on the ca"];
    let (status, answer) = ask(&texts);
    assert_eq!(status, 200, "{answer}");
    let next = output(&answer, "next");
    assert_eq!(next["shape"], json!([3, 256]), "{answer}");
    let next = next["data"].as_array().unwrap();
    let most_probable = |row: &[Value]| {
        let probability = |byte: &usize| row[*byte].as_f64().unwrap();
        let best = (0..256).max_by(|a, b| probability(a).total_cmp(&probability(b)));
        char::from(best.unwrap() as u8)
    };
    let found: String = next.chunks(256).map(most_probable).collect();
    assert_eq!(found, "eat");
    let (status, refused) = ask(&["a", ""]);
    assert_eq!(status, 400, "{refused}");
    let words = refused["error"].as_str().unwrap();
    assert!(
        words.contains("row 1") && words.contains("the text is empty"),
        "{words}"
    );
    // There is nothing to compare requests with: its monitor lives, and says nothing.
    let status = ["drift", "status", "--endpoint", "words"];
    let said = imported.cluster.refused(&status);
    assert!(said.contains("answered with classes"), "{said}");
    let actors = imported.cluster.json(&["actors", "list"]);
    let is_monitor = |actor: &&Value| actor["name"] == "drift/words/v1/monitor";
    let monitor = actors.as_array().unwrap().iter().find(is_monitor).unwrap();
    assert_eq!(
        (&monitor["state"], &monitor["restarts"]),
        (&json!("running"), &json!(0))
    );
}

#[test]
fn a_model_of_numbers_predicts_them() {
    let imported = Imported::up();
    // y = 2a - b, which one layer can learn.
    let rows: String = (0..400)
        .map(|index| {
            let (a, b) = (f64::from(index % 20) / 20.0, f64::from(index / 20) / 20.0);
            format!("{a},{b},{}\n", 2.0 * a - b)
        })
        .collect();
    std::fs::write(imported.cluster.dir().join("plane.csv"), rows).unwrap();
    let job = "steps = 600\nlearning_rate = 0.02\n[dataset.csv]\nfiles = [\"plane.csv\"]\ntargets = 1\n\
               [model.mlp]\nhidden = []\n";
    let (result, deployment) = trained(&imported, "plane", job);
    assert!(result["held_out_loss"].as_f64().unwrap() < 1e-6, "{result}");
    let input = json!({"name": "image", "datatype": "FP32", "shape": [2, 2], "data": [0.5, 0.25, 1.0, 1.0]});
    let (status, answer) = imported.infer(&deployment, &json!({"inputs": [input]}));
    assert_eq!(status, 200, "{answer}");
    let found = output(&answer, "prediction");
    assert_eq!(found["shape"], json!([2, 1]));
    let rounded: Vec<f64> = found["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|value| (value.as_f64().unwrap() * 100.0).round() / 100.0)
        .collect();
    assert_near(&json!(rounded), &json!([0.75, 1.0]));
}
