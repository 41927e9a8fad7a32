use super::*;
use crate::registry::provenance::tests::complete;
use crate::registry::provenance::{CheckpointOrigin, Code, Parent};
use crate::registry::state::Query;
use crate::registry::state::tests::World;
use crate::registry::versions::tests::new_version;
use crate::registry::versions::{TRAINING_JSON_BYTES_MAX, register};
use mobula_core::codec;
use mobula_core::control::{ApplyContext, StateModule};

fn all(world: &World, filter: &Filter) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    let mut after = None;
    loop {
        let query = Query::Search {
            filter: filter.clone(),
            after,
        };
        let bytes = crate::registry::Registry
            .query(&world.tables, 0, &codec::encode_plain(&query))
            .unwrap();
        assert!(bytes.len() < 4 << 20, "{} bytes", bytes.len());
        let page: Page = codec::decode(&bytes, 4 << 20).unwrap();
        let versions = page.found.into_iter().map(|view| view.version);
        found.extend(versions.map(|one| (one.description.model, one.version)));
        after = page.next;
        if after.is_none() {
            return found;
        }
    }
}

#[test]
fn conditions_are_read_and_hold_as_they_read() {
    for (text, holds) in [
        ("accuracy>=0.97", true),
        ("accuracy>0.97", false),
        ("accuracy<=0.97", true),
        ("accuracy < 1", true),
        ("accuracy=0.97", true),
        ("accuracy=0.96", false),
        ("loss<1", false),
    ] {
        let condition: MetricCondition = text.parse().unwrap();
        let version = ModelVersion {
            version: 1,
            registered_ms: 0,
            description: new_version('1'),
        };
        assert_eq!(condition.holds(&version), holds, "{text}");
    }
    for text in ["accuracy", "accuracy>=", ">=1", "accuracy>=nan", ""] {
        assert!(text.parse::<MetricCondition>().is_err(), "{text}");
    }
}

#[test]
fn versions_are_found_by_all_that_is_known_of_them() {
    let mut world = World::with_versions(3);
    let mut face = new_version('9');
    face.model = "faces".to_owned();
    face.job = 4;
    face.dataset_blake3 = "e".repeat(64);
    face.metrics = [("accuracy".to_owned(), 0.5)].into();
    world.register(face).unwrap();
    world.promote(2, Stage::Staging).unwrap();
    world.tag(3, "team", Some("vision")).unwrap();
    let digits = |versions: &[u64]| -> Vec<(String, u64)> {
        versions.iter().map(|v| ("digits".to_owned(), *v)).collect()
    };
    let none = Filter::default();
    assert_eq!(all(&world, &none).len(), 4);
    let model = Some("digits".to_owned());
    let filter = Filter {
        model,
        ..none.clone()
    };
    assert_eq!(all(&world, &filter), digits(&[1, 2, 3]));
    let stage = Some(Stage::Staging);
    let filter = Filter {
        stage,
        ..none.clone()
    };
    assert_eq!(all(&world, &filter), digits(&[2]));
    for value in [None, Some("vision".to_owned())] {
        let tags = vec![("team".to_owned(), value)];
        let filter = Filter {
            tags,
            ..none.clone()
        };
        assert_eq!(all(&world, &filter), digits(&[3]));
    }
    let tags = vec![("team".to_owned(), Some("text".to_owned()))];
    let filter = Filter {
        tags,
        ..none.clone()
    };
    assert_eq!(all(&world, &filter), []);
    let metrics = vec!["accuracy>=0.9".parse().unwrap()];
    let filter = Filter {
        metrics,
        ..none.clone()
    };
    assert_eq!(all(&world, &filter), digits(&[1, 2, 3]));
    let faces = [("faces".to_owned(), 1)];
    let filter = Filter {
        job: Some(4),
        ..none.clone()
    };
    assert_eq!(all(&world, &filter), faces);
    let dataset_blake3 = Some("e".repeat(64));
    let filter = Filter {
        dataset_blake3,
        ..none.clone()
    };
    assert_eq!(all(&world, &filter), faces);
    let tags = vec![("a".to_owned(), None); CONDITIONS_MAX + 1];
    let filter = Filter { tags, ..none };
    let error = page(&world.tables, &filter, None).unwrap_err();
    assert!(error.message.contains("17 conditions"), "{error}");
}

#[test]
fn pages_are_bounded_and_none_is_left_out_or_found_twice() {
    let mut world = World::default();
    let count = SCAN_ROWS_MAX as u64 + 300;
    for number in 0..count {
        let mut new = new_version('1');
        new.digest = format!("{number:064x}");
        // One in a hundred, so that a page ends by what was looked at.
        new.metrics = [("number".to_owned(), (number % 100) as f64)].into();
        let context = ApplyContext {
            index: number,
            term: 1,
            now_ms: 0,
        };
        register(&context, &mut world.tables, new, None).unwrap();
    }
    let everything: Vec<u64> = (1..=count).collect();
    let found = all(&world, &Filter::default());
    assert_eq!(
        found.iter().map(|(_, v)| *v).collect::<Vec<_>>(),
        everything
    );
    let metrics = vec!["number=7".parse().unwrap()];
    let filter = Filter {
        metrics,
        ..Filter::default()
    };
    assert_eq!(all(&world, &filter).len() as u64, (count + 92) / 100);
    let page = page(&world.tables, &filter, None).unwrap();
    assert_eq!(page.next, Some(("digits".to_owned(), SCAN_ROWS_MAX as u64)));
}

#[test]
fn a_version_is_meant_by_number_alias_or_as_the_newest() {
    let mut world = World::with_versions(3);
    world.alias("champion", Some(2)).unwrap();
    let select = |selector| {
        let found = super::select(&world.tables, "digits", &selector);
        found.map(|version| version.version)
    };
    assert_eq!(select(Selector::Newest).unwrap(), 3);
    assert_eq!(select(Selector::Number(1)).unwrap(), 1);
    assert_eq!(select(Selector::Alias("champion".to_owned())).unwrap(), 2);
    assert!(select(Selector::Alias("other".to_owned())).is_err());
    let version = find(&world.tables, "digits", Some(2)).unwrap();
    assert_eq!(view(&world.tables, version).aliases, ["champion"]);
}

#[test]
fn the_largest_page_is_one_that_the_api_carries() {
    let name = |number: usize| format!("{number:064}");
    let origin = || CheckpointOrigin {
        manifest: "m".repeat(512),
        digest: "5".repeat(64),
    };
    let mut new = new_version('1');
    new.training_json = "x".repeat(TRAINING_JSON_BYTES_MAX);
    new.metrics = (0..64).map(|number| (name(number), 0.5)).collect();
    let fact = |number: usize| (format!("{number:0512}"), "v".repeat(512));
    let view = VersionView {
        standing: Standing {
            stage: Stage::Candidate,
            since_ms: 0,
            was_production: false,
            tags: (0..32)
                .map(|number| (name(number), "v".repeat(256)))
                .collect(),
        },
        provenance: Some(Provenance {
            code: Some(Code {
                reference: "r".repeat(512),
                blake3: "6".repeat(64),
            }),
            environment: (0..16).map(fact).collect(),
            parent: Some(Parent::Checkpoint(origin())),
            checkpoint: Some(origin()),
            ..complete()
        }),
        aliases: (0..64).map(name).collect(),
        endpoints: (0..ENDPOINTS_SHOWN_MAX).map(name).collect(),
        version: ModelVersion {
            version: 1,
            registered_ms: 0,
            description: new,
        },
    };
    view.provenance.as_ref().unwrap().check().unwrap();
    let page = Page {
        found: vec![view; PAGE_ROWS],
        next: Some((name(1), 1)),
    };
    let bytes = codec::encode_plain(&page).len();
    assert!(bytes < 4 << 20, "{bytes} bytes");
}
