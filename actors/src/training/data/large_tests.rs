//! Data sets beyond the limits of memory, disk and lines, with limits that are small.

use std::io::Write;
use std::time::Duration;

use flate2::Compression;
use flate2::write::GzEncoder;

use super::*;

/// Limits of this module's tests: nothing but a row or two is held in memory.
fn small() -> Limits {
    Limits {
        memory_bytes: 16,
        ..Limits::default()
    }
}

fn saved(folder: &tempfile::TempDir, name: &str, bytes: &[u8]) -> String {
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path.display().to_string()
}

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(text).unwrap();
    encoder.finish().unwrap()
}

/// Lines of `columns` numbers and a class.
fn lines(count: usize, columns: usize) -> String {
    let mut text = String::new();
    for row in 0..count {
        for column in 0..columns {
            let number = (row * 31 + column * 7) as f32 / 9.0 - 40.0;
            text.push_str(&format!("{number},"));
        }
        text.push_str(&format!("{}\n", row % 3));
    }
    text
}

fn csv(files: Vec<String>, targets: Option<usize>) -> DataSpec {
    DataSpec::Csv(CsvSpec {
        files,
        header: false,
        shape: None,
        classes: None,
        targets,
        scale: Some(3.0),
    })
}

fn load(spec: &DataSpec, limits: Limits) -> Result<Dataset, DataError> {
    Dataset::load_into(spec, &Files::local(), &Room::new(limits))
}

/// Loads it in memory and from disk, where all must be as it is in memory; the latter is returned.
fn loaded_both_ways(spec: &DataSpec) -> Dataset {
    let memory = Dataset::load(spec, &Files::local()).unwrap();
    let disk = load(spec, small()).unwrap();
    assert!(!memory.is_read_late() && disk.is_read_late());
    assert_eq!((memory.len(), memory.shape()), (disk.len(), disk.shape()));
    assert_eq!(memory.digest(), disk.digest());
    assert_eq!(memory.file_digests(), disk.file_digests());
    assert_eq!(memory.all().unwrap(), disk.all().unwrap());
    let some = [disk.len() - 1, 0, disk.len() / 2, 0];
    assert_eq!(memory.gather(&some).unwrap(), disk.gather(&some).unwrap());
    let held_out = |data: &Dataset| data.split(7, 0.2).held_out.all().unwrap();
    assert_eq!(held_out(&memory), held_out(&disk));
    disk
}

#[test]
fn a_table_on_disk_has_the_bits_shape_and_digest_of_one_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let text = lines(100, 5);
    let files = vec![
        saved(&folder, "a.csv", text.as_bytes()),
        saved(&folder, "b.csv.gz", &gzip(text.as_bytes())),
    ];
    let classified = loaded_both_ways(&csv(files.clone(), None));
    assert_eq!(classified.len(), 200);
    let stored = |file: &String| blake3::hash(&std::fs::read(file).unwrap());
    let stored: Vec<String> = files
        .iter()
        .map(|file| stored(file).to_hex().to_string())
        .collect();
    assert_eq!(classified.file_digests(), stored);
    loaded_both_ways(&csv(files, Some(2)));
}

#[test]
fn a_table_on_disk_is_refused_with_the_words_of_one_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let good = lines(20, 3);
    for bad in ["1,2,0\n", "1,2,x,0\n", "1,NaN,2,0\n", "1,2,3,-1\n"] {
        let file = saved(&folder, "bad.csv", format!("{good}{bad}").as_bytes());
        let spec = csv(vec![file], None);
        let memory = load(&spec, Limits::default()).unwrap_err().to_string();
        let disk = load(&spec, small()).unwrap_err().to_string();
        assert_eq!(memory, disk);
        assert!(
            disk.contains("bad.csv:21") || disk.contains("row 21"),
            "{disk}"
        );
    }
}

#[test]
fn a_compressed_stream_is_not_unpacked_beyond_the_limit_of_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let file = saved(
        &folder,
        "bomb.csv.gz",
        &gzip("0,0\n".repeat(5000).as_bytes()),
    );
    let limits = Limits {
        disk_bytes: 10_000,
        ..small()
    };
    // 5000 numbers of four bytes.
    let spec = csv(vec![file], None);
    let error = load(&spec, limits.clone()).unwrap_err();
    assert!(matches!(error, DataError::TooLarge { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("bomb.csv.gz") && text.contains("10000 bytes"),
        "{text}"
    );
    let enough = Limits {
        disk_bytes: 20_000,
        ..limits.clone()
    };
    assert_eq!(load(&spec, enough).unwrap().len(), 5000);
    // What is to know of each row is in memory whatever the numbers take.
    let few = Limits {
        samples: 4999,
        ..Limits::default()
    };
    let error = load(&spec, few).unwrap_err().to_string();
    assert!(error.contains("more than 4999 rows"), "{error}");
    let nowhere = Limits {
        folder: Some(folder.path().join("nowhere")),
        ..small()
    };
    let error = load(&spec, nowhere).unwrap_err().to_string();
    assert!(
        error.contains("nowhere") && error.contains("TMPDIR"),
        "{error}"
    );
}

#[test]
fn a_line_beyond_the_limit_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let limits = || Limits {
        line_bytes: 8,
        ..Limits::default()
    };
    // As long as it may be, with and without its end.
    let file = saved(&folder, "a.csv", b"1,2,3,00\n1,2,3,01");
    assert_eq!(load(&csv(vec![file], None), limits()).unwrap().len(), 2);
    for (name, bytes) in [
        ("b.csv", b"1,2,3,0\n1,2,3,000\n1,2,3,0\n".to_vec()),
        ("c.csv.gz", gzip(b"1,2,3,0\n1,2,3,000")),
    ] {
        let file = saved(&folder, name, &bytes);
        let error = load(&csv(vec![file], None), limits()).unwrap_err();
        assert!(
            matches!(error, DataError::LongLine { line: 2, .. }),
            "{error}"
        );
        let text = error.to_string();
        assert!(
            text.contains(&format!("{name}:2: ")) && text.contains("more than 8 bytes"),
            "{text}"
        );
    }
}

#[test]
fn a_text_is_the_same_in_one_file_and_in_many() {
    let folder = tempfile::tempdir().unwrap();
    let text = b"the quick brown fox jumps over it";
    let spec = |files: Vec<String>| DataSpec::Text(TextSpec { files, context: 4 });
    let whole = spec(vec![saved(&folder, "whole.txt", text)]);
    let whole = Dataset::load(&whole, &Files::local()).unwrap();
    // In the midst of windows and at their borders, within one window, and with nothing.
    let cuts = [0, 0, 1, 6, 7, 8, 8, 20, text.len(), text.len()];
    let parts: Vec<String> = cuts
        .windows(2)
        .enumerate()
        .map(|(index, cut)| saved(&folder, &index.to_string(), &text[cut[0]..cut[1]]))
        .collect();
    let parts = Dataset::load(&spec(parts), &Files::local()).unwrap();
    assert!(parts.is_read_late());
    assert_eq!((parts.len(), whole.len()), (8, 8));
    assert_eq!(parts.all().unwrap(), whole.all().unwrap());
    let windows = |number: usize| text[number * 4..][..5].iter().copied().map(u32::from);
    let samples = Samples::Tokens {
        windows: windows(7).chain(windows(1)).collect(),
    };
    assert_eq!(parts.gather(&[7, 1]).unwrap().samples, samples);
}

#[test]
fn a_text_that_is_written_to_is_not_read_any_more_and_one_that_is_replaced_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = saved(&folder, "a.txt", b"abcdefgh");
    let spec = DataSpec::Text(TextSpec {
        files: vec![path.clone()],
        context: 3,
    });
    let text = Dataset::load(&spec, &Files::local()).unwrap();
    let before = text.all().unwrap();
    let other = saved(&folder, "b.txt", b"ABCDEFGH");
    std::fs::rename(other, &path).unwrap();
    assert_eq!(text.all().unwrap(), before);

    let text = Dataset::load(&spec, &Files::local()).unwrap();
    // As many bytes, and later, however coarse the file system's clock is.
    let mut file = std::fs::File::options().write(true).open(&path).unwrap();
    let later = file.metadata().unwrap().modified().unwrap() + Duration::from_secs(1);
    file.write_all(b"x").unwrap();
    file.set_modified(later).unwrap();
    let error = text.gather(&[0]).unwrap_err();
    assert!(matches!(error, DataError::Changed { .. }), "{error}");
}

#[test]
fn lines_of_a_file_that_is_written_to_are_not_read() {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in [
        ("a.csv", b"1,2,0\n".to_vec()),
        ("a.csv.gz", gzip(b"1,2,0\n")),
    ] {
        let path = saved(&folder, name, &bytes);
        let room = Room::new(Limits::default());
        let opened = Files::local().open(&path, &room).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        let later = file.metadata().unwrap().modified().unwrap() + Duration::from_secs(1);
        file.set_modified(later).unwrap();
        let mut table = Table::new(table::TableSpec::default(), &room);
        let error = csv::read(&path, opened.reader(&path, 0), false, 100, &mut table);
        let error = error.unwrap_err();
        assert!(matches!(error, DataError::Changed { .. }), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_too_large_for_memory_is_copied_to_disk_and_read_like_a_file() {
    use mobula_storage::blob::{BlobStore, S3Options};
    let folder = tempfile::tempdir().unwrap();
    let text = lines(50, 3);
    let bodies = [
        ("rows.csv", text.clone().into_bytes()),
        ("rows.csv.gz", gzip(text.as_bytes())),
        ("x.npy", npy::written("<f4", "(2, 8)", &[0x3f; 64])),
        ("y.npy", npy::written("|u1", "(2,)", &[0, 1])),
        ("a.txt", text.into_bytes()),
    ];
    let store = BlobStore::open("memory://", &S3Options::default()).unwrap();
    for (name, body) in &bodies {
        saved(&folder, name, body);
        store
            .put_if_absent(name, body.clone().into())
            .await
            .unwrap();
    }
    let local = |name: &str| folder.path().join(name).display().to_string();
    let blob = |name: &str| format!("store:{name}");
    let specs = |named: &dyn Fn(&str) -> String| {
        [
            csv(vec![named("rows.csv"), named("rows.csv.gz")], None),
            DataSpec::Npy(NpySpec {
                features: vec![named("x.npy")],
                labels: vec![named("y.npy")],
                targets: vec![],
                classes: None,
                scale: None,
            }),
            DataSpec::Text(TextSpec {
                files: vec![named("a.txt")],
                context: 16,
            }),
        ]
    };
    let files = Files::with_store(store, tokio::runtime::Handle::current());
    tokio::task::block_in_place(|| {
        for (here, there) in specs(&local).iter().zip(&specs(&blob)) {
            let here = Dataset::load(here, &Files::local()).unwrap();
            let room = Room::new(small());
            let there_on_disk = Dataset::load_into(there, &files, &room).unwrap();
            assert!(there_on_disk.is_read_late());
            assert_eq!(here.all().unwrap(), there_on_disk.all().unwrap());
            assert_eq!(here.digest(), there_on_disk.digest());
            assert_eq!(here.file_digests(), there_on_disk.file_digests());
            let in_memory = Dataset::load(there, &files).unwrap();
            assert_eq!(here.all().unwrap(), in_memory.all().unwrap());
            assert_eq!(here.digest(), in_memory.digest());
            // Not more of the disk than it may have.
            let room = Room::new(Limits {
                disk_bytes: 64,
                ..small()
            });
            let error = Dataset::load_into(there, &files, &room).unwrap_err();
            assert!(matches!(error, DataError::TooLarge { .. }), "{error}");
            assert!(error.to_string().contains("store:"), "{error}");
        }
    });
}
