//! The prediction log on processes: what is logged, what is not, and that others can read it.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::json;

use crate::python::python_with;
use crate::serving::served::{Served, request_of};
use crate::support::{text_of, wait_for};

const REQUESTS: usize = 120;

/// What duckdb reads in all files of a folder: rows, those with a confidence, the columns' names, and the type of times.
const QUERY: &str = "
import duckdb, json, sys
files = sys.argv[1] + '/*.parquet'
rows, confident = duckdb.sql(f\"select count(*), count(*) filter (confidence > 0 and confidence <= 1) from '{files}'\").fetchall()[0]
names = duckdb.sql(f\"select * from '{files}'\").columns
time = duckdb.sql(f\"select distinct typeof(answered_at) from '{files}'\").fetchall()
print(json.dumps([rows, confident, names, time]))
";

fn rows_in(folder: &Path) -> Vec<Row> {
    let mut rows = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let file = std::fs::File::open(entry.unwrap().path()).unwrap();
        let reader = SerializedFileReader::new(file).unwrap();
        let read = reader.get_row_iter(None).unwrap();
        rows.extend(read.map(|row| row.unwrap()));
    }
    rows
}

fn field<'a>(row: &'a Row, name: &str) -> &'a Field {
    row.get_column_iter()
        .find(|(known, _)| *known == name)
        .unwrap_or_else(|| panic!("no column {name} in {row:?}"))
        .1
}

#[test]
fn predictions_become_files_that_others_read_without_what_nobody_named() {
    let served = Served::up(1);
    let cluster = &served.cluster;
    let text = cluster.refused(&["drift", "log", "show", "digits"]);
    assert!(text.contains("mobula drift log set digits"), "{text}");
    let text = cluster.refused(&["drift", "log", "remove", "digits"]);
    assert!(text.contains("has no prediction log"), "{text}");
    let text = cluster.refused(&["drift", "log", "set", "digits", "--sample", "0"]);
    assert!(text.contains("`0` is not a share"), "{text}");
    let text = cluster.refused(&["drift", "log", "set", "digits", "--roll-every", "1ms"]);
    assert!(text.contains("write one at most each 1s"), "{text}");
    let text = cluster.refused(&["drift", "log", "set", "digits", "--roll-every", "1s"]);
    assert!(text.contains("keep 50000 at the most"), "{text}");
    let text = cluster.refused(&["drift", "log", "set", "nobody"]);
    assert!(text.contains("no endpoint is called `nobody`"), "{text}");

    let set = cluster.json(&[
        "drift",
        "log",
        "set",
        "digits",
        "--features",
        "pixel_3_4,pixel_9_9",
        "--hash-features",
        "pixel_0_0",
        "--roll-every",
        "1s",
        "--keep",
        "12h",
    ]);
    assert_eq!(
        (&set["sample"], &set["plain_ids"]),
        (&json!(1.0), &json!(false))
    );
    assert!(set.get("key").is_none(), "{set}");

    // The monitor hears of the policy a little later: what came before is not logged.
    let log_of = || {
        let shown = cluster.json(&["drift", "log", "show", "digits"]);
        shown["status"].is_object().then(|| shown["status"].clone())
    };
    wait_for("a log", || {
        served.classify(served.image(0));
        log_of()
    });
    for number in 0..REQUESTS {
        let mut request = request_of(served.image(number));
        request["id"] = json!(format!("user-{number}"));
        request["parameters"] = json!({"slice": "test"});
        assert_eq!(served.infer(&request).status, 200);
    }
    let status = wait_for("the files", || {
        // News of the log travel with those of requests too.
        let status = log_of()?;
        let rows = status["rows"].as_u64()?;
        (rows >= REQUESTS as u64 && status["rows_waiting"] == 0).then_some(status)
    });
    assert_eq!(
        (&status["rows_shed"], &status["last_error"]),
        (&json!(0), &json!(null))
    );
    // Images have no tenth row.
    assert_eq!(status["unknown_features"], 1, "{status}");

    let folder = cluster.dir().join("predictions");
    let to = folder.to_str().unwrap();
    let exported = cluster.json(&["drift", "log", "export", "digits", "--to", to]);
    assert!(exported["files"].as_u64().unwrap() >= 1, "{exported}");
    let rows = rows_in(&folder);
    assert!(rows.len() >= REQUESTS, "{}", rows.len());
    let named: Vec<&Row> = rows
        .iter()
        .filter(|row| matches!(field(row, "slice"), Field::Str(name) if name == "test"))
        .collect();
    assert_eq!(named.len(), REQUESTS);
    let ids: BTreeSet<String> = named
        .iter()
        .map(|row| field(row, "request").to_string())
        .collect();
    assert_eq!(ids.len(), REQUESTS, "each id has a hash of its own");
    assert!(!ids.iter().any(|id| id.contains("user-")), "{ids:?}");
    for row in &named {
        let names: Vec<&String> = row.get_column_iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), 9, "{names:?}");
        assert!(matches!(field(row, "input_pixel_3_4"), Field::Float(_)));
        assert!(matches!(field(row, "input_pixel_0_0"), Field::Str(hash) if hash.len() == 32));
        assert_eq!(*field(row, "version"), Field::Long(1));
    }

    if let Some(python) = python_with("predictions", &["duckdb"]) {
        let output = Command::new(python)
            .args(["-c", QUERY, to])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", text_of(&output));
        let read: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(
            (&read[0], &read[1]),
            (&json!(rows.len()), &json!(rows.len()))
        );
        let names = json!([
            "request",
            "row",
            "answered_at",
            "version",
            "class",
            "confidence",
            "slice",
            "input_pixel_0_0",
            "input_pixel_3_4"
        ]);
        assert_eq!(read[2], names);
        let time = read[3][0][0].as_str().unwrap();
        assert!(time.starts_with("TIMESTAMP"), "{read}");
    }

    cluster.ok(&["drift", "log", "remove", "digits"]);
    let text = cluster.refused(&["drift", "log", "show", "digits"]);
    assert!(
        text.contains("nothing is logged of endpoint `digits`"),
        "{text}"
    );
}
