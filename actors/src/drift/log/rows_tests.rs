use bytes::Bytes;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;

use super::*;
use crate::serving::feed::ObservedRequest;

fn policy() -> LogPolicy {
    LogPolicy {
        sample_per_million: MILLION,
        features: LoggedFeatures::Named(vec!["age".to_owned()]),
        hashed_features: vec!["postcode".to_owned()],
        plain_ids: false,
        key: [7; 32],
        roll_rows: 100,
        roll_bytes: 1 << 20,
        roll_ms: 60_000,
        keep_ms: 86_400_000,
    }
}

fn features() -> Vec<String> {
    ["age", "income", "postcode"].map(str::to_owned).to_vec()
}

fn observation(ids: &[Option<&str>]) -> Observation {
    let count = ids.len();
    Observation {
        rows: (0..count)
            .flat_map(|row| [row as f32, 1e6 + row as f32, 12_345.0])
            .collect(),
        classes: (0..count as u32).collect(),
        confidences: vec![0.5; count],
        requests: ids
            .iter()
            .enumerate()
            .map(|(number, id)| ObservedRequest {
                id: id.map(str::to_owned),
                slice: (number == 0).then(|| "north".to_owned()),
                rows: 1,
            })
            .collect(),
        energies: vec![Some(-3.0); count],
        versions: vec![3; count],
    }
}

/// The columns of each row by name, as another program reads them.
fn read(bytes: Vec<u8>) -> Vec<Vec<(String, Field)>> {
    let reader = SerializedFileReader::new(Bytes::from(bytes)).unwrap();
    reader
        .get_row_iter(None)
        .unwrap()
        .map(|row| row.unwrap().into_columns())
        .collect()
}

fn field<'a>(row: &'a [(String, Field)], name: &str) -> &'a Field {
    &row.iter().find(|(known, _)| known == name).unwrap().1
}

fn logged(policy: &LogPolicy, observation: &Observation) -> Vec<Vec<(String, Field)>> {
    let layout = Layout::new(policy, &features());
    let mut rows = LogRows::new(&layout, 5);
    rows.add(policy, &layout, observation, 1_700_000_000_123);
    read(rows.to_parquet(&layout, "credit", 3).unwrap())
}

#[test]
fn a_file_has_what_the_policy_names_and_nothing_else() {
    let rows = logged(&policy(), &observation(&[Some("anna"), None]));
    let names: Vec<&str> = rows[0].iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(
        names,
        [
            "request",
            "row",
            "answered_at",
            "version",
            "class",
            "confidence",
            "slice",
            "input_age",
            "input_postcode"
        ]
    );
    let (first, second) = (&rows[0], &rows[1]);
    assert_eq!(*field(first, "version"), Field::Long(3));
    assert_eq!(
        *field(first, "answered_at"),
        Field::TimestampMillis(1_700_000_000_123)
    );
    assert_eq!(*field(second, "class"), Field::Int(1));
    assert_eq!(*field(second, "input_age"), Field::Float(1.0));
    assert_eq!(*field(first, "slice"), Field::Str("north".to_owned()));
    assert_eq!(
        (field(second, "slice"), field(second, "request")),
        (&Field::Null, &Field::Null)
    );
    // Equal values are equal hashes, and neither id nor postcode can be read.
    assert_eq!(
        field(first, "input_postcode"),
        field(second, "input_postcode")
    );
    let text = format!("{rows:?}");
    assert!(!text.contains("anna") && !text.contains("12345"), "{text}");
}

#[test]
fn ids_are_plain_if_the_policy_says_so_and_hashes_depend_on_its_key() {
    let one = observation(&[Some("anna")]);
    let plain = LogPolicy {
        plain_ids: true,
        ..policy()
    };
    let rows = logged(&plain, &one);
    assert_eq!(*field(&rows[0], "request"), Field::Str("anna".to_owned()));
    let other = LogPolicy {
        key: [8; 32],
        ..policy()
    };
    let (a, b) = (logged(&policy(), &one), logged(&other, &one));
    assert_ne!(field(&a[0], "request"), field(&b[0], "request"));
    assert_ne!(
        field(&a[0], "input_postcode"),
        field(&b[0], "input_postcode")
    );
}

#[test]
fn all_features_are_all_but_those_to_be_hashed_are_hashed() {
    let all = LogPolicy {
        features: LoggedFeatures::All,
        ..policy()
    };
    let rows = logged(&all, &observation(&[Some("a")]));
    assert_eq!(*field(&rows[0], "input_income"), Field::Float(1e6));
    assert!(matches!(field(&rows[0], "input_postcode"), Field::Str(hash) if hash.len() == 32));
    let layout = Layout::new(
        &LogPolicy {
            hashed_features: vec!["shoe_size".to_owned()],
            ..policy()
        },
        &features(),
    );
    assert_eq!((layout.unknown, layout.columns.len()), (1, 1));
}

#[test]
fn the_sample_depends_on_the_id_alone_and_has_its_share() {
    let ids: Vec<String> = (0..20_000).map(|number| format!("user-{number}")).collect();
    let names: Vec<Option<&str>> = ids.iter().map(|id| Some(id.as_str())).collect();
    let tenth = LogPolicy {
        sample_per_million: MILLION / 10,
        plain_ids: true,
        ..policy()
    };
    let layout = Layout::new(&tenth, &features());
    let chosen = |key: [u8; 32]| {
        let policy = LogPolicy {
            key,
            ..tenth.clone()
        };
        let mut rows = LogRows::new(&layout, 0);
        let left_out = rows.add(&policy, &layout, &observation(&names), 0);
        assert_eq!(left_out as usize + rows.count(), ids.len());
        rows.requests
    };
    let first = chosen([1; 32]);
    assert_eq!(first, chosen([2; 32]));
    assert!((1_850..2_150).contains(&first.len()), "{}", first.len());
    // Without an id the rows decide: the same ones the same way.
    let nameless = observation(&[None, None, None]);
    let mut rows = LogRows::new(&layout, 0);
    let once = rows.add(&tenth, &layout, &nameless, 0);
    assert_eq!(rows.add(&tenth, &layout, &nameless, 1), once);
}

#[test]
fn each_row_has_the_version_that_answered_it() {
    let tried = Observation {
        versions: vec![3, 4, 3],
        ..observation(&[Some("a"), Some("b"), Some("c")])
    };
    let versions: Vec<Field> = logged(&policy(), &tried)
        .iter()
        .map(|row| field(row, "version").clone())
        .collect();
    assert_eq!(versions, [3, 4, 3].map(Field::Long));
}

#[test]
fn requests_without_their_rows_are_left_out() {
    let mut cut = observation(&[Some("a"), Some("b")]);
    cut.rows.truncate(4);
    let layout = Layout::new(&policy(), &features());
    let mut rows = LogRows::new(&layout, 0);
    assert_eq!(rows.add(&policy(), &layout, &cut, 0), 1);
    assert_eq!(rows.count(), 1);
}
