use proptest::prelude::*;

use super::*;
use crate::registry::aliases;
use crate::registry::envelope::Signature;
use crate::registry::merkle;
use crate::registry::signer::tests::key;
use crate::registry::signer::{PrivateKey, Signer, sign};
use crate::registry::state::tests::World;
use crate::registry::state::{Command, Query};
use crate::registry::versions::tests::new_version;
use crate::registry::{events, search};

fn stage_of(world: &World, version: u64) -> Stage {
    let found = find(&world.tables, "digits", Some(version)).unwrap();
    standing(&world.tables, &found).stage
}

#[test]
fn every_edge_is_either_taken_or_refused_with_what_is_possible() {
    // How a version gets into each stage, and whether it has been in production by then.
    let ways: [(&[Stage], bool); 5] = [
        (&[], false),
        (&[Stage::Staging], false),
        (&[Stage::Staging, Stage::Production], true),
        (&[Stage::Archived], false),
        (&[Stage::Staging, Stage::Production, Stage::Archived], true),
    ];
    for (way, was_production) in ways {
        for to in Stage::ALL {
            let mut world = World::with_versions(1);
            for stage in way {
                world.promote(1, *stage).unwrap();
            }
            let from = stage_of(&world, 1);
            let expected = match (from, to) {
                (Stage::Candidate, Stage::Staging | Stage::Archived)
                | (Stage::Staging, Stage::Production | Stage::Archived)
                | (Stage::Production, Stage::Archived)
                | (Stage::Archived, Stage::Staging) => true,
                (Stage::Archived, Stage::Production) => was_production,
                _ => false,
            };
            let outcome = world.promote(1, to);
            assert_eq!(
                outcome.is_ok(),
                expected,
                "{from:?} to {to:?} after {way:?}"
            );
            if let Err(error) = outcome {
                assert_eq!(error.code, ErrorCode::FailedPrecondition);
                assert!(
                    error.message.contains("from there it can become"),
                    "{error}"
                );
                assert_eq!(stage_of(&world, 1), from);
            }
        }
    }
}

#[test]
fn the_next_in_production_archives_the_one_before_in_the_same_entry() {
    let mut world = World::with_versions(2);
    for version in [1, 2] {
        world.promote(version, Stage::Staging).unwrap();
    }
    world.promote(1, Stage::Production).unwrap();
    let shown = world.promote(2, Stage::Production).unwrap();
    assert_eq!(shown.standing.stage, Stage::Production);
    assert_eq!(stage_of(&world, 1), Stage::Archived);
    assert_eq!(world.state().production, Some(2));
    // Back, in one entry.
    world.promote(1, Stage::Production).unwrap();
    assert_eq!(stage_of(&world, 2), Stage::Archived);
    assert_eq!(world.state().production, Some(1));
    world.promote(1, Stage::Archived).unwrap();
    assert_eq!(world.state().production, None);
}

#[test]
fn what_was_decided_on_another_revision_is_fenced_and_no_envelope_counts_twice() {
    let mut world = World::with_versions(2);
    let change = world.change(1, Stage::Staging, &[&world.keys[0]]);
    world.alias("champion", Some(2)).unwrap();
    let fenced = |world: &mut World, change: &StageChange| {
        let outcome = world.apply::<search::VersionView>(&Command::Stage(change.clone()));
        outcome.unwrap_err()
    };
    let error = fenced(&mut world, &change);
    assert_eq!(error.code, ErrorCode::Fenced);
    assert!(error.message.contains("is at revision 1"), "{error}");
    // The same signatures for the present revision: they are for the earlier one.
    let mut moved = change;
    moved.expected_revision = 1;
    let error = fenced(&mut world, &moved);
    assert!(error.message.contains("is not the one"), "{error}");

    let edge = world.change(1, Stage::Staging, &[&world.keys[0]]);
    world
        .apply::<search::VersionView>(&Command::Stage(edge.clone()))
        .unwrap();
    world.promote(1, Stage::Archived).unwrap();
    assert_eq!(fenced(&mut world, &edge).code, ErrorCode::Fenced);
}

#[test]
fn signatures_for_another_version_stage_or_reason_do_not_count() {
    let mut world = World::with_versions(2);
    let good = world.change(1, Stage::Staging, &[&world.keys[0]]);
    let changes = [
        StageChange {
            version: 2,
            ..good.clone()
        },
        StageChange {
            to: Stage::Archived,
            ..good.clone()
        },
        StageChange {
            reason: "another".to_owned(),
            ..good.clone()
        },
    ];
    for change in changes {
        let error = world
            .apply::<search::VersionView>(&Command::Stage(change))
            .unwrap_err();
        assert!(error.message.contains("is not the one"), "{error}");
    }
    let long = StageChange {
        reason: "x".repeat(513),
        ..good
    };
    let error = world.apply::<search::VersionView>(&Command::Stage(long));
    assert!(error.unwrap_err().message.contains("513 bytes"));
}

#[test]
fn forged_revoked_unknown_repeated_and_weak_keys_are_refused_each_with_its_reason() {
    let mut world = World::with_versions(1);
    let stranger = key();
    let staging = key();
    let spki = staging.public_key().spki().to_vec();
    world.add_key(spki, Role::Stage).unwrap();
    let apply = |world: &mut World, change: StageChange| {
        world.apply::<search::VersionView>(&Command::Stage(change))
    };
    let none = world.change(1, Stage::Staging, &[]);
    let unknown = world.change(1, Stage::Staging, &[&stranger]);
    let repeated = world.change(1, Stage::Staging, &[&world.keys[0], &world.keys[0]]);
    let mut forged = world.change(1, Stage::Staging, &[&world.keys[0]]);
    forged.promotion.signatures = vec![Signature {
        key: world.keys[1].public_key().id(),
        bytes: forged.promotion.signatures[0].bytes.clone(),
    }];
    for (change, expected) in [
        (none, "0 of the 1 different keys"),
        (unknown, "is not known"),
        (repeated, "signed more than once"),
        (forged, "is not genuine"),
    ] {
        let error = apply(&mut world, change).unwrap_err();
        assert!(error.message.contains(expected), "{error}");
    }
    let by_staging = world.change(1, Stage::Staging, &[&staging]);
    apply(&mut world, by_staging).unwrap();
    let weak = world.change(1, Stage::Production, &[&staging]);
    let error = apply(&mut world, weak).unwrap_err();
    assert!(
        error.message.contains("lacks the role `release`"),
        "{error}"
    );
    let id = world.keys[0].public_key().id();
    world.revoke(id.clone());
    let revoked = world.change(1, Stage::Production, &[&world.keys[0]]);
    let error = apply(&mut world, revoked).unwrap_err();
    assert!(error.message.contains("was revoked (lost)"), "{error}");
    // For good.
    let spki = world.keys[0].public_key().spki().to_vec();
    let error = world.add_key(spki, Role::Release).unwrap_err();
    assert!(error.message.contains("stays so"), "{error}");
    assert_eq!(stage_of(&world, 1), Stage::Staging);
}

#[test]
fn production_needs_every_field_and_its_provenance_signed() {
    let mut world = World::with_versions(1);
    world.register(new_version('9')).unwrap();
    world.promote(2, Stage::Staging).unwrap();
    let error = world.promote(2, Stage::Production).unwrap_err();
    assert_eq!(error.code, ErrorCode::FailedPrecondition);
    for field in [
        "artifact_sha256",
        "code",
        "environment",
        "seed",
        "run_record",
    ] {
        assert!(error.message.contains(field), "{error}");
    }
    assert!(!error.message.contains("metrics"), "{error}");

    world.promote(1, Stage::Staging).unwrap();
    let good = world.change(1, Stage::Production, &[&world.keys[0]]);
    let unsigned = StageChange {
        provenance: None,
        ..good.clone()
    };
    let mut forged = good.clone();
    forged.provenance.as_mut().unwrap().signatures[0].bytes[9] ^= 1;
    for (change, expected) in [
        (unsigned, "send that envelope too"),
        (forged, "is not genuine"),
    ] {
        let error = world
            .apply::<search::VersionView>(&Command::Stage(change))
            .unwrap_err();
        assert!(error.message.contains(expected), "{error}");
    }
    world
        .apply::<search::VersionView>(&Command::Stage(good.clone()))
        .unwrap();
    // It stays with the version when it leaves.
    world.promote(1, Stage::Archived).unwrap();
    let edge: Option<SignedEdge> = world
        .ask(&Query::Signed {
            model: "digits".to_owned(),
            version: 1,
        })
        .unwrap();
    let edge = edge.unwrap();
    let provenance = edge.provenance.map(|signed| signed.envelope);
    assert_eq!(provenance, good.provenance);
}

fn set_policy(
    world: &mut World,
    policy: Policy,
    signers: &[&PrivateKey],
) -> Result<ModelState, Rejection> {
    let revision = world.state().revision;
    let mut envelope = Envelope {
        payload: statement::policy("digits", &policy, revision),
        signatures: Vec::new(),
    };
    for signer in signers {
        sign(*signer, &mut envelope).unwrap();
    }
    world.apply(&Command::SetPolicy {
        model: "digits".to_owned(),
        policy,
        expected_revision: revision,
        envelope: (!signers.is_empty()).then_some(envelope),
    })
}

#[test]
fn a_model_of_high_risk_needs_different_keys_also_to_become_harmless() {
    let mut world = World::with_versions(1);
    let [one, two] = world.keys;
    world.keys = [key(), key()];
    let high = Policy {
        risk: Risk::High,
        signatures: 2,
    };
    let alone = Policy {
        signatures: 1,
        ..high
    };
    let crowd = Policy {
        signatures: 3,
        ..high
    };
    for (policy, expected) in [(alone, "ask for 2 to 8"), (crowd, "2 keys have the role")] {
        let error = set_policy(&mut world, policy, &[]).unwrap_err();
        assert!(error.message.contains(expected), "{error}");
    }
    set_policy(&mut world, high, &[]).unwrap();
    for (signers, expected) in [
        (&[&one][..], "1 of the 2 different keys"),
        (&[&one, &one], "signed more than once"),
    ] {
        let signers: Vec<&dyn Signer> = signers.iter().map(|key| *key as &dyn Signer).collect();
        let change = world.change(1, Stage::Staging, &signers);
        let error = world
            .apply::<search::VersionView>(&Command::Stage(change))
            .unwrap_err();
        assert!(error.message.contains(expected), "{error}");
    }
    let change = world.change(1, Stage::Staging, &[&one, &two]);
    world
        .apply::<search::VersionView>(&Command::Stage(change))
        .unwrap();

    let normal = Policy::default();
    for (signers, expected) in [
        (&[][..], "less is signed by as many"),
        (&[&one], "1 of the 2 different keys"),
    ] {
        let error = set_policy(&mut world, normal, signers).unwrap_err();
        assert!(error.message.contains(expected), "{error}");
    }
    let state = set_policy(&mut world, normal, &[&one, &two]).unwrap();
    assert_eq!(state.policy, normal);
}

/// One of the things that people do, well or badly.
#[derive(Debug, Clone)]
enum Step {
    Register(u64),
    Promote(u64, Stage, usize),
    Stale(u64, Stage),
    Alias(bool, Option<u64>),
    Tag(u64, bool),
    Revoke,
    Risk(bool),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let version = 1..5_u64;
    let stage = (0..4_usize).prop_map(|index| Stage::ALL[index]);
    let step = prop_oneof![
        1 => (0..8_u64).prop_map(Step::Register),
        8 => (version.clone(), stage.clone(), 0..4_usize)
            .prop_map(|(version, stage, signers)| Step::Promote(version, stage, signers)),
        1 => (version.clone(), stage).prop_map(|(version, stage)| Step::Stale(version, stage)),
        2 => (any::<bool>(), proptest::option::of(version.clone()))
            .prop_map(|(which, version)| Step::Alias(which, version)),
        1 => (version, any::<bool>()).prop_map(|(version, set)| Step::Tag(version, set)),
        1 => Just(Step::Revoke),
        1 => any::<bool>().prop_map(Step::Risk),
    ];
    proptest::collection::vec(step, 1..60)
}

/// What holds at every index of the log.
fn check(world: &World) {
    let newest = find(&world.tables, "digits", None).unwrap().version;
    let in_production: Vec<u64> = (1..=newest)
        .filter(|version| stage_of(world, *version) == Stage::Production)
        .collect();
    let expected: Vec<u64> = world.state().production.into_iter().collect();
    assert_eq!(in_production, expected);
    for version in in_production {
        let found = find(&world.tables, "digits", Some(version)).unwrap();
        let origin = provenance(&world.tables, "digits", version);
        assert_eq!(missing(&found, origin.as_ref()), Vec::<&str>::new());
        let edge = signed(&world.tables, "digits", version).unwrap();
        assert!(edge.promotion.signatures.len() >= edge.signatures as usize);
    }
    for (_, alias) in aliases::of_model(&world.tables, "digits") {
        find(&world.tables, "digits", Some(alias.version)).unwrap();
    }
    let page = events::page(&world.tables, 0);
    let mut tree = merkle::Frontier::default();
    let mut chain = [0; 32];
    for event in &page.events {
        assert_eq!(merkle::leaf(event.text.as_bytes()), event.leaf);
        chain = merkle::chained(&chain, &event.leaf);
        assert_eq!(chain, event.chain);
        tree.push(event.leaf);
    }
    assert_eq!((tree.root(), chain), (page.root, page.ends.chain));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn whatever_people_do_the_invariants_hold_at_every_index(steps in steps()) {
        let mut world = World::with_versions(2);
        for step in steps {
            let newest = find(&world.tables, "digits", None).unwrap().version;
            let revision = world.state().revision;
            let entries = events::ends(&world.tables).size;
            let succeeded = match step {
                Step::Register(number) => {
                    let mut version = new_version('1');
                    version.digest = format!("{number:064x}");
                    world.register(version).is_ok()
                }
                Step::Promote(version, to, signers) => {
                    let [one, two] = &world.keys;
                    let signers: &[&dyn Signer] = match signers {
                        0 => &[],
                        1 => &[one],
                        2 => &[one, two],
                        _ => &[one, one],
                    };
                    let change = world.change(version.min(newest), to, signers);
                    world.apply::<search::VersionView>(&Command::Stage(change)).is_ok()
                }
                Step::Stale(version, to) => {
                    let mut change = world.change(version.min(newest), to, &[&world.keys[0]]);
                    change.expected_revision += 1;
                    let stale = world.apply::<search::VersionView>(&Command::Stage(change));
                    prop_assert_eq!(stale.unwrap_err().code, ErrorCode::Fenced);
                    false
                }
                Step::Alias(which, version) => {
                    world.alias(if which { "champion" } else { "challenger" }, version).is_ok()
                }
                Step::Tag(version, set) => {
                    world.tag(version, "team", set.then_some("vision")).is_ok()
                }
                Step::Revoke => {
                    world.revoke(world.keys[1].public_key().id());
                    true
                }
                Step::Risk(high) => {
                    let policy = Policy {
                        risk: if high { Risk::High } else { Risk::Normal },
                        signatures: if high { 2 } else { 1 },
                    };
                    set_policy(&mut world, policy, &[]).is_ok()
                }
            };
            check(&world);
            if !succeeded {
                prop_assert_eq!(world.state().revision, revision);
                prop_assert_eq!(events::ends(&world.tables).size, entries);
            }
        }
    }
}
