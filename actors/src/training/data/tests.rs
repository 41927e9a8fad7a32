use super::*;

fn csv(text: &str) -> Result<Dataset, DataError> {
    let spec = CsvSpec {
        files: Vec::new(),
        header: false,
        shape: None,
        classes: Some(10),
        targets: None,
        scale: None,
    };
    Dataset::from_csv("a.csv", text.as_bytes(), &spec)
}

#[test]
fn the_embedded_digits_load() {
    let digits = Dataset::digits().unwrap();
    let all = digits.all().unwrap();
    assert_eq!((digits.len(), all.features().len()), (1797, 1797 * 64));
    assert_eq!(all.labels()[..10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    assert_eq!(
        all.features()[2..6],
        [5.0 / 16.0, 13.0 / 16.0, 9.0 / 16.0, 1.0 / 16.0]
    );
    assert_eq!(
        digits.digest(),
        blake3::hash(EMBEDDED_DIGITS).to_hex().as_str()
    );
    let loaded = Dataset::load(&DataSpec::Digits, &Files::local()).unwrap();
    assert_eq!(loaded.all().unwrap(), all);
    assert_eq!(
        *digits.shape(),
        SampleShape::Classified {
            features: vec![8, 8],
            classes: 10
        }
    );
}

#[test]
fn bad_input_names_file_place_value_and_what_to_do() {
    let cases = [
        (String::new(), "a.csv holds no samples"),
        ("\n".into(), "a.csv holds no samples"),
        (
            "3,4,1\n3,1\n".into(),
            "a.csv:2: 2 columns where 3 are needed, as in a.csv:1",
        ),
        ("3,4,1\n\n3,4,1\n".into(), "a.csv:2: 0 columns where 3"),
        ("7\n".into(), "a.csv:1: 1 columns where 2"),
        ("3,x,1\n".into(), "a.csv:1: column 2 is \"x\", not a number"),
        (
            "3,4,1\n3,4,seven\n".into(),
            "a.csv:2: column 3 is \"seven\", not a whole number",
        ),
        (
            "3,4,1.5\n".into(),
            "a.csv:1: column 3 is \"1.5\", not a whole number",
        ),
        (
            "3,4,10\n".into(),
            "a.csv: row 1: label 10 is outside 0 to 9; correct the label",
        ),
        (
            "3,4,-1\n".into(),
            "a.csv: row 1: label -1 is outside 0 to 9",
        ),
        (
            "3,4,1\n3,NaN,1\n".into(),
            "a.csv: row 2, value 2: NaN is not finite; remove the row",
        ),
        (
            "inf,4,1\n".into(),
            "a.csv: row 1, value 1: inf is not finite",
        ),
    ];
    for (text, expected) in cases {
        let error = csv(&text).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}");
    }
    let error = Dataset::from_csv(
        "a.csv",
        b"3,\xff\n",
        &CsvSpec {
            files: Vec::new(),
            header: false,
            shape: None,
            classes: None,
            targets: None,
            scale: None,
        },
    )
    .unwrap_err()
    .to_string();
    assert!(error.starts_with("a.csv:1: not text"), "{error}");
}

#[test]
fn absent_and_truncated_files_are_named() {
    let load = |file: &str| {
        let spec = DataSpec::Csv(CsvSpec {
            files: vec![file.to_owned()],
            header: false,
            shape: Some(vec![8, 8]),
            classes: Some(10),
            targets: None,
            scale: Some(16.0),
        });
        Dataset::load(&spec, &Files::local())
    };
    let missing = load("/nonexistent/digits.csv").unwrap_err().to_string();
    assert!(
        missing.starts_with("cannot read data file /nonexistent/digits.csv: "),
        "{missing}"
    );
    let error = load("store:digits.csv").unwrap_err().to_string();
    assert!(error.contains("knows no object store"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.display().to_string()
    };
    let whole = load(&file("digits.csv.gz", EMBEDDED_DIGITS)).unwrap();
    assert_eq!(
        whole.all().unwrap(),
        Dataset::digits().unwrap().all().unwrap()
    );
    let error = load(&file(
        "cut.csv.gz",
        &EMBEDDED_DIGITS[..EMBEDDED_DIGITS.len() / 2],
    ));
    let error = error.unwrap_err();
    let DataError::Truncated { line, .. } = &error else {
        panic!("{error}")
    };
    assert!((400..1797).contains(line), "{error}");
    let mut flipped = EMBEDDED_DIGITS.to_vec();
    let last = flipped.len() - 6;
    flipped[last] ^= 1;
    let error = load(&file("flipped.csv.gz", &flipped)).unwrap_err();
    assert!(matches!(error, DataError::Truncated { .. }), "{error}");
    let error = load(&file("plain.csv.gz", b"1,2,3\n")).unwrap_err();
    assert!(matches!(error, DataError::NotGzip { .. }), "{error}");
    let error = load(&file("none.csv.gz", b"")).unwrap_err();
    assert!(error.to_string().contains("none.csv.gz"), "{error}");
}

#[test]
fn several_files_are_one_data_set_whose_digest_covers_their_bytes_and_how_they_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let spec = |files: Vec<String>, scale| {
        DataSpec::Csv(CsvSpec {
            files,
            header: true,
            shape: None,
            classes: None,
            targets: None,
            scale,
        })
    };
    let parts = vec![
        file("a.csv", "x,y,class\n1,2,0\n"),
        file("b.csv", "x,y,class\r\n4,6,2"),
    ];
    let loaded = Dataset::load(&spec(parts.clone(), Some(2.0)), &Files::local()).unwrap();
    let all = loaded.all().unwrap();
    assert_eq!(
        (all.features(), all.labels()),
        (&[0.5, 1.0, 2.0, 3.0][..], &[0, 2][..])
    );
    let shape = SampleShape::Classified {
        features: vec![2],
        classes: 3,
    };
    assert_eq!(*loaded.shape(), shape);
    let digest = |files: Vec<String>, scale| {
        let loaded = Dataset::load(&spec(files, scale), &Files::local()).unwrap();
        loaded.digest().to_owned()
    };
    let moved = file("c.csv", "x,y,class\n1,2,0\n");
    assert_eq!(
        digest(vec![moved, parts[1].clone()], Some(2.0)),
        loaded.digest()
    );
    assert_ne!(digest(parts.clone(), Some(3.0)), loaded.digest());
    assert_ne!(digest(parts[..1].to_vec(), Some(2.0)), loaded.digest());
    let ragged = vec![parts[0].clone(), file("d.csv", "x,y,class\n1,0\n")];
    let error = Dataset::load(&spec(ragged, None), &Files::local()).unwrap_err();
    assert!(
        error.to_string().contains("d.csv:2: 2 columns where 3"),
        "{error}"
    );
}

#[test]
fn the_last_columns_can_be_numbers_to_predict() {
    let spec = CsvSpec {
        files: Vec::new(),
        header: false,
        shape: None,
        classes: None,
        targets: Some(2),
        scale: None,
    };
    let data = Dataset::from_csv("a.csv", b"1,2,3\n4,5,6\n", &spec).unwrap();
    let samples = Samples::Measured {
        features: vec![4.0],
        targets: vec![5.0, 6.0],
    };
    assert_eq!(data.gather(&[1]).unwrap().samples, samples);
    assert_eq!(data.len(), 2);
}

#[test]
fn text_is_windows_of_bytes_that_overlap_by_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.txt");
    std::fs::write(&path, "abcdefgh").unwrap();
    let spec = |context| {
        DataSpec::Text(TextSpec {
            files: vec![path.display().to_string()],
            context,
        })
    };
    let text = Dataset::load(&spec(3), &Files::local()).unwrap();
    assert_eq!(text.len(), 2);
    let windows = "abcddefg".bytes().map(u32::from).collect();
    assert_eq!(text.all().unwrap().samples, Samples::Tokens { windows });
    let error = Dataset::load(&spec(8), &Files::local())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("8 bytes do not fill one window of 8"),
        "{error}"
    );
}

#[test]
fn the_split_is_seeded_and_covers_each_sample_once() {
    let digits = Dataset::digits().unwrap();
    let split = digits.split(7, 0.2);
    assert_eq!((split.train.len(), split.held_out.len()), (1438, 359));
    let held_out = |seed| digits.split(seed, 0.2).held_out.all().unwrap();
    assert_eq!(split.held_out.all().unwrap(), held_out(7));
    assert_ne!(held_out(7), held_out(8));
    let count = |set: &Dataset, label| {
        let all = set.all().unwrap();
        all.labels().iter().filter(|l| **l == label).count()
    };
    for label in 0..10 {
        let parts = count(&split.train, label) + count(&split.held_out, label);
        assert_eq!(parts, count(&digits, label));
    }
}

fn saved(folder: &tempfile::TempDir, name: &str, bytes: &[u8]) -> String {
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path.display().to_string()
}

fn floats(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

fn npy(features: Vec<String>, labels: Vec<String>, targets: Vec<String>) -> DataSpec {
    DataSpec::Npy(NpySpec {
        features,
        labels,
        targets,
        classes: None,
        scale: Some(2.0),
    })
}

#[test]
fn arrays_over_several_files_are_read_row_by_row() {
    let folder = tempfile::tempdir().unwrap();
    let first = floats(&[1.0, 2.0, 3.0, 4.0]);
    let features = vec![
        saved(&folder, "x0.npy", &npy::written("<f4", "(2, 1, 2)", &first)),
        saved(
            &folder,
            "x1.npy",
            &npy::written("<f4", "(1, 1, 2)", &floats(&[8.0, 6.0])),
        ),
    ];
    let labels = vec![
        saved(&folder, "y0.npy", &npy::written("|u1", "(2,)", &[0, 2])),
        saved(&folder, "y1.npy", &npy::written("<i2", "(1,)", &[1, 0])),
    ];
    let spec = npy(features.clone(), labels.clone(), vec![]);
    let data = Dataset::load(&spec, &Files::local()).unwrap();
    assert!(data.is_read_late());
    let shape = SampleShape::Classified {
        features: vec![1, 2],
        classes: 3,
    };
    assert_eq!(*data.shape(), shape);
    let batch = data.gather(&[2, 0]).unwrap();
    assert_eq!(
        (batch.features(), batch.labels()),
        (&[4.0, 3.0, 0.5, 1.0][..], &[1, 0][..])
    );
    // The file is cut while it is in use.
    std::fs::write(&features[1], b"").unwrap();
    assert!(matches!(data.gather(&[2]), Err(DataError::Changed { .. })));

    let targets = saved(&folder, "t.npy", &npy::written("<f8", "(2,)", &[0u8; 16]));
    let spec = npy(features[..1].to_vec(), vec![], vec![targets]);
    let data = Dataset::load(&spec, &Files::local()).unwrap();
    let shape = SampleShape::Measured {
        features: vec![1, 2],
        targets: 1,
    };
    assert_eq!(*data.shape(), shape);
}

#[test]
fn arrays_that_do_not_belong_together_are_refused_with_file_and_row() {
    let folder = tempfile::tempdir().unwrap();
    let save = |name: &str, descr: &str, shape: &str, body: &[u8]| {
        saved(&folder, name, &npy::written(descr, shape, body))
    };
    let x = save("x.npy", "<f4", "(2, 2)", &[0; 16]);
    let y = save("y.npy", "|u1", "(2,)", &[0, 1]);
    let nan = floats(&[0.0, 1.0, 2.0, f32::NAN]);
    let cases = [
        (npy(vec![], vec![y.clone()], vec![]), "no array of numbers"),
        (
            npy(vec![x.clone()], vec![], vec![]),
            "either labels or targets",
        ),
        (
            npy(vec![x.clone()], vec![y.clone(), y.clone()], vec![]),
            "1 arrays of numbers and 2 of what to predict",
        ),
        (
            npy(
                vec![save("nan.npy", "<f4", "(2, 2)", &nan)],
                vec![y.clone()],
                vec![],
            ),
            "nan.npy: row 2, value 2: NaN is not finite",
        ),
        (
            npy(
                vec![x.clone()],
                vec![save("y3.npy", "|u1", "(3,)", &[0; 3])],
                vec![],
            ),
            "it is about 3 samples",
        ),
        (
            npy(
                vec![x.clone()],
                vec![save("yf.npy", "<f4", "(2,)", &[0; 8])],
                vec![],
            ),
            "labels are whole numbers",
        ),
        (
            npy(
                vec![x.clone()],
                vec![save("neg.npy", "|i1", "(2,)", &[0, 255])],
                vec![],
            ),
            "neg.npy: row 2: label -1 is outside",
        ),
        (
            npy(
                vec![x.clone(), save("x3.npy", "<f4", "(2, 3)", &[0; 24])],
                vec![y.clone(), y.clone()],
                vec![],
            ),
            "x3.npy: its samples are [3]",
        ),
    ];
    for (spec, expected) in cases {
        let error = Dataset::load(&spec, &Files::local())
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn safetensors_as_another_program_writes_them_are_read() {
    use candle_core::{Device, Tensor};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    let images = Tensor::new(&[[1.0f32, 2.0], [4.0, 6.0]], &Device::Cpu).unwrap();
    let labels = Tensor::new(&[1u32, 0], &Device::Cpu).unwrap();
    let arrays = std::collections::HashMap::from([("images", images), ("labels", labels)]);
    candle_core::safetensors::save(&arrays, &path).unwrap();
    let spec = |features: &str| {
        DataSpec::Safetensors(SafetensorsSpec {
            files: vec![path.display().to_string()],
            features: features.into(),
            labels: Some("labels".into()),
            targets: None,
            classes: Some(2),
            scale: Some(2.0),
        })
    };
    let data = Dataset::load(&spec("images"), &Files::local()).unwrap();
    let batch = data.gather(&[1, 0]).unwrap();
    assert_eq!(
        (batch.features(), batch.labels()),
        (&[2.0, 3.0, 0.5, 1.0][..], &[0, 1][..])
    );
    let error = Dataset::load(&spec("pictures"), &Files::local())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("no array \"pictures\", but images, labels"),
        "{error}"
    );
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    let error = Dataset::load(&spec("images"), &Files::local()).map(drop);
    let error = error.and(Dataset::load(&spec("labels"), &Files::local()).map(drop));
    assert!(error.unwrap_err().to_string().contains("cut short"));
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_of_the_object_store_are_data_files_too() {
    use mobula_storage::blob::{BlobStore, S3Options};
    let store = BlobStore::open("memory://", &S3Options::default()).unwrap();
    store
        .put_if_absent("data/digits.csv.gz", EMBEDDED_DIGITS.into())
        .await
        .unwrap();
    let x = npy::written("<f4", "(2, 2)", &[0; 16]);
    store.put_if_absent("data/x.npy", x.into()).await.unwrap();
    let y = npy::written("|u1", "(2,)", &[0, 1]);
    store.put_if_absent("data/y.npy", y.into()).await.unwrap();
    let files = Files::with_store(store, tokio::runtime::Handle::current());
    let load = |spec: DataSpec| tokio::task::block_in_place(|| Dataset::load(&spec, &files));
    let digits = load(DataSpec::Csv(CsvSpec {
        files: vec!["store:data/digits.csv.gz".into()],
        header: false,
        shape: Some(vec![8, 8]),
        classes: Some(10),
        targets: None,
        scale: Some(16.0),
    }));
    assert_eq!(
        digits.unwrap().all().unwrap(),
        Dataset::digits().unwrap().all().unwrap()
    );
    let arrays = load(npy(
        vec!["store:data/x.npy".into()],
        vec!["store:data/y.npy".into()],
        vec![],
    ));
    assert_eq!(arrays.unwrap().len(), 2);
    let missing = load(npy(
        vec!["store:data/z.npy".into()],
        vec!["store:data/y.npy".into()],
        vec![],
    ));
    let error = missing.unwrap_err();
    assert!(
        error.to_string().contains("store:data/z.npy") && !error.may_pass(),
        "{error}"
    );
}
