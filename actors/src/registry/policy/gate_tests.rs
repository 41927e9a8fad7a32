use std::collections::BTreeSet;

use super::*;
use crate::registry::envelope::Envelope;
use crate::registry::keys::{KeyRecord, Role};
use crate::registry::policy::approvals::{ApprovalChange, Approvals};
use crate::registry::policy::data::{DataRecord, LabelChange};
use crate::registry::policy::file::PolicyFile;
use crate::registry::search::VersionView;
use crate::registry::signer::tests::key;
use crate::registry::signer::{PrivateKey, Signer, sign};
use crate::registry::state::tests::World;
use crate::registry::state::{Command, Query};
use crate::registry::statement::{self, KeyChange};

/// What versions of [`World`] are trained on.
fn data() -> String {
    "b".repeat(64)
}

fn signed(payload: Vec<u8>, signer: &dyn Signer) -> Envelope {
    let signatures = Vec::new();
    let mut envelope = Envelope {
        payload,
        signatures,
    };
    sign(signer, &mut envelope).unwrap();
    envelope
}

fn label(world: &mut World, data: &str, labels: &[&str]) -> Result<DataRecord, Rejection> {
    let known = data::find(&world.tables, data);
    world.apply(&Command::LabelData(LabelChange {
        data: data.to_owned(),
        name: "faces".to_owned(),
        labels: labels.iter().map(|&label| label.to_owned()).collect(),
        expected_revision: known.map_or(0, |known| known.revision),
        envelope: None,
    }))
}

/// A key that approves.
fn approver(world: &mut World) -> PrivateKey {
    let approver = key();
    let spki = approver.public_key().spki().to_vec();
    world.add_key(spki, Role::Approve).unwrap();
    approver
}

fn approval(world: &World, subject: &Subject, signer: &dyn Signer) -> Command {
    let revision = approvals::of(&world.tables, subject).revision;
    let file = match subject {
        Subject::Train { .. } => None,
        Subject::Promote { model, version, .. } | Subject::Deploy { model, version } => {
            let found = find(&world.tables, model, Some(*version)).unwrap();
            Some(found.description.digest)
        }
    };
    let payload = statement::approval(subject, file.as_deref(), "looked at", revision);
    Command::Approve(ApprovalChange {
        subject: subject.clone(),
        expected_revision: revision,
        reason: "looked at".to_owned(),
        envelope: Some(signed(payload, signer)),
    })
}

fn approve(world: &mut World, principal: &str, subject: &Subject, signer: &dyn Signer) {
    let command = approval(world, subject, signer);
    let _: Approvals = world.apply_as(principal, &command).unwrap();
}

fn to_staging(version: u64) -> Subject {
    Subject::Promote {
        model: "digits".to_owned(),
        version,
        to: Stage::Staging,
    }
}

fn newest_event(world: &World) -> serde_json::Value {
    let event = events::page(&world.tables, 0).events.pop().unwrap();
    serde_json::from_str(&event.text).unwrap()
}

#[test]
fn a_version_of_labelled_data_waits_for_another_persons_approval() {
    let mut world = World::with_versions(1);
    let approver = approver(&mut world);
    label(&mut world, &data(), &["pii"]).unwrap();
    let refused = |world: &mut World, expected: &str| {
        let error = world.promote(1, Stage::Staging).unwrap_err();
        assert_eq!(error.code, ErrorCode::PermissionDenied);
        let begin = "policy pii-needs-approval forbids to promote digits:1 to staging; ";
        assert!(error.message.starts_with(begin), "{error}");
        assert!(error.message.contains(expected), "{error}");
    };
    refused(
        &mut world,
        "asked in the name of ann, labels pii, approvals that count 0",
    );
    refused(&mut world, "mobula approvals add");
    // What one asks for oneself, and what is approved of something else.
    approve(&mut world, "ann", &to_staging(1), &approver);
    refused(&mut world, "approved in the name of ann, who asks for it");
    let deploy = Subject::Deploy {
        model: "digits".to_owned(),
        version: 1,
    };
    approve(&mut world, "eve", &deploy, &approver);
    refused(&mut world, "approvals that count 0");

    approve(&mut world, "eve", &to_staging(1), &approver);
    let view: VersionView = world.promote(1, Stage::Staging).unwrap();
    assert_eq!(view.standing.stage, Stage::Staging);
    let event = newest_event(&world);
    let gate = &event["gate"];
    assert_eq!(
        gate["policies"][0]["id"], "allowed-unless-forbidden",
        "{event}"
    );
    assert_eq!(gate["approvers"][0], approver.public_key().id(), "{event}");
    assert_eq!(gate["principal"], "ann");
    // To archive it is always allowed.
    world.promote(1, Stage::Archived).unwrap();
}

#[test]
fn who_signs_a_promotion_does_not_approve_it_too() {
    let mut world = World::with_versions(1);
    label(&mut world, &data(), &["pii"]).unwrap();
    let both = key();
    let id = both.public_key().id();
    let command = Command::AddKey {
        spki: both.public_key().spki().to_vec(),
        roles: [Role::Stage, Role::Approve].into(),
        owner: "bob".to_owned(),
    };
    let _: KeyRecord = world.apply(&command).unwrap();
    approve(&mut world, "eve", &to_staging(1), &both);
    let change = world.change(1, Stage::Staging, &[&both]);
    let error = world
        .apply::<VersionView>(&Command::Stage(change))
        .unwrap_err();
    assert!(
        error.message.contains("also signs what is asked for"),
        "{error}"
    );
    world.promote(1, Stage::Staging).unwrap();
    // A key that was revoked approves nothing any more.
    approve(
        &mut world,
        "eve",
        &Subject::Deploy {
            model: "digits".to_owned(),
            version: 1,
        },
        &both,
    );
    let deploy = |world: &World| {
        let request = Request::Deploy {
            model: "digits".to_owned(),
            version: 1,
            endpoint: "digits".to_owned(),
            rollout: true,
        };
        let principal = "ann".to_owned();
        world
            .ask::<Decision>(&Query::Explain { principal, request })
            .unwrap()
    };
    assert!(deploy(&world).permitted);
    world.revoke(id);
    let refusal = deploy(&world).refusal().unwrap();
    assert!(refusal.contains("was revoked"), "{refusal}");
}

#[test]
fn an_approval_is_signed_once_by_a_key_with_the_role_and_can_be_withdrawn() {
    let mut world = World::with_versions(1);
    let approver = approver(&mut world);
    let subject = to_staging(1);
    let stage = &world.keys[0];
    let by_stage = approval(&world, &subject, stage);
    let error = world.apply::<Approvals>(&by_stage).unwrap_err();
    assert!(
        error.message.contains("lacks the role `approve`"),
        "{error}"
    );
    let command = approval(&world, &subject, &approver);
    let _: Approvals = world.apply_as("eve", &command).unwrap();
    let withdraw = Command::Approve(ApprovalChange {
        subject: subject.clone(),
        expected_revision: 1,
        reason: "a mistake".to_owned(),
        envelope: None,
    });
    let left: Approvals = world.apply(&withdraw).unwrap();
    assert_eq!((left.revision, left.approvals), (2, vec![]));
    // The same statement once more, for the old revision and for the new one.
    let error = world.apply_as::<Approvals>("eve", &command).unwrap_err();
    assert_eq!(error.code, ErrorCode::Fenced);
    let Command::Approve(mut again) = command else {
        unreachable!("it is an approval")
    };
    again.expected_revision = 2;
    let error = world
        .apply_as::<Approvals>("eve", &Command::Approve(again))
        .unwrap_err();
    assert!(
        error
            .message
            .contains("approval that was signed is not the one"),
        "{error}"
    );
    let archived = Subject::Promote {
        model: "digits".to_owned(),
        version: 1,
        to: Stage::Archived,
    };
    let command = approval(&world, &archived, &approver);
    let error = world.apply::<Approvals>(&command).unwrap_err();
    assert!(error.message.contains("needs no approval"), "{error}");
}

/// What a job reads, in files.
fn set(digest: char, files: &[char]) -> DataSet {
    let hex = |digest: char| digest.to_string().repeat(64);
    DataSet {
        digest: hex(digest),
        files: files.iter().map(|&file| hex(file)).collect(),
    }
}

fn train(world: &mut World, job: u64, data: DataSet, parent: Option<u64>) -> Decision {
    world.apply(&Command::Train { job, data, parent }).unwrap()
}

fn of_file(digest: char) -> Subject {
    Subject::Train {
        data: digest.to_string().repeat(64),
    }
}

#[test]
fn a_label_of_a_file_holds_however_the_file_is_read_and_for_what_comes_of_it() {
    let mut world = World::with_versions(0);
    let approver = approver(&mut world);
    label(&mut world, &"f".repeat(64), &["pii"]).unwrap();
    assert!(train(&mut world, 1, set('a', &['e']), None).permitted);
    let refused = train(&mut world, 2, set('b', &['e', 'f']), None);
    assert!(!refused.permitted, "{refused:?}");
    assert_eq!(refused.principal, "job-2");
    let event = newest_event(&world);
    assert_eq!(
        (&event["event"], &event["job"]),
        (&"gate_decided".into(), &2.into())
    );
    assert_eq!(event["gate"]["policies"][0]["id"], "pii-needs-approval");
    // One of its files is not all of it.
    approve(&mut world, "eve", &of_file('f'), &approver);
    assert!(!train(&mut world, 2, set('b', &['e', 'f']), None).permitted);
    approve(&mut world, "eve", &of_file('e'), &approver);
    assert!(train(&mut world, 2, set('b', &['e', 'f']), None).permitted);

    // A job that begins with its checkpoint has the label too, and so has what it registers.
    assert!(!train(&mut world, 3, set('c', &['d']), Some(2)).permitted);
    approve(&mut world, "eve", &of_file('c'), &approver);
    assert!(train(&mut world, 3, set('c', &['d']), Some(2)).permitted);
    let mut version = crate::registry::versions::tests::new_version('1');
    (version.job, version.dataset_blake3) = (3, "c".repeat(64));
    world.register(version).unwrap();
    let error = world.promote(1, Stage::Staging).unwrap_err();
    assert!(error.message.contains("labels pii"), "{error}");
    let wrong = Command::Train {
        job: 4,
        data: set('z', &[]),
        parent: None,
    };
    let error = world.apply::<Decision>(&wrong).unwrap_err();
    assert!(error.message.contains("lower-case hexadecimal"), "{error}");
}

#[test]
fn jobs_that_train_are_remembered_up_to_a_bound() {
    let mut world = World::default();
    let own = vec![set('a', &[])];
    for job in 1..=10_003 {
        data::remember(&mut world.tables, job, own.clone());
    }
    data::remember(&mut world.tables, 10_003, own);
    let parents = |parent| data::origins(&world.tables, &set('b', &[]), Some(parent)).unwrap();
    let known: Vec<usize> = [3, 4, 10_003].map(|parent| parents(parent).len()).to_vec();
    assert_eq!(known, [1, 2, 2]);
}

#[test]
fn labels_are_taken_away_and_policies_set_with_an_admins_signature() {
    let mut world = World::with_versions(1);
    let set_file = |world: &mut World, text: &str, revision, envelope| {
        let command = Command::SetPolicyFile {
            text: text.to_owned(),
            expected_revision: revision,
            envelope,
        };
        world.apply::<PolicyFile>(&command)
    };
    let closed = r#"@id("closed") forbid (principal, action == Action::"Promote", resource);"#;
    assert_eq!(set_file(&mut world, closed, 0, None).unwrap().revision, 1);
    assert_eq!(newest_event(&world)["policies"][0], "closed");
    let error = world.promote(1, Stage::Staging).unwrap_err();
    assert!(
        error.message.starts_with("policy closed forbids"),
        "{error}"
    );
    assert_eq!(
        set_file(&mut world, "", 0, None).unwrap_err().code,
        ErrorCode::Fenced
    );
    let error = set_file(&mut world, "permit", 1, None).unwrap_err();
    assert!(error.message.contains("line 1, column 7"), "{error}");
    label(&mut world, &data(), &["pii"]).unwrap();
    label(&mut world, &data(), &[]).unwrap();
    label(&mut world, &data(), &["pii"]).unwrap();

    let admin = key();
    world
        .add_key(admin.public_key().spki().to_vec(), Role::Admin)
        .unwrap();
    let unsigned = |error: Rejection| {
        assert_eq!(error.code, ErrorCode::PermissionDenied);
        assert!(
            error
                .message
                .contains("signed by a key with the role `admin`"),
            "{error}"
        );
    };
    unsigned(set_file(&mut world, "", 1, None).unwrap_err());
    unsigned(label(&mut world, &data(), &["public"]).unwrap_err());
    label(&mut world, &data(), &["pii", "public"]).unwrap();
    let release = &world.keys[0];
    let by_release = signed(statement::policy_file("", 1), release);
    let error = set_file(&mut world, "", 1, Some(by_release)).unwrap_err();
    assert!(error.message.contains("lacks the role `admin`"), "{error}");
    let other = signed(statement::policy_file("// other", 1), &admin);
    let error = set_file(&mut world, "", 1, Some(other)).unwrap_err();
    assert!(error.message.contains("is not the one"), "{error}");
    let by_admin = signed(statement::policy_file("", 1), &admin);
    assert_eq!(
        set_file(&mut world, "", 1, Some(by_admin))
            .unwrap()
            .revision,
        2
    );
    let labels: BTreeSet<String> = ["public".to_owned()].into();
    let change = LabelChange {
        data: data(),
        name: "faces".to_owned(),
        labels: labels.clone(),
        expected_revision: 4,
        envelope: Some(signed(
            statement::labels(&data(), "faces", &labels, 4),
            &admin,
        )),
    };
    let record: DataRecord = world.apply(&Command::LabelData(change)).unwrap();
    assert_eq!(record.labels, labels);
    world.promote(1, Stage::Staging).unwrap();
}

#[test]
fn after_the_first_admin_keys_are_added_and_revoked_by_admins() {
    let mut world = World::default();
    let [first, second, wanted] = [key(), key(), key()];
    let spki = |key: &PrivateKey| key.public_key().spki().to_vec();
    world.add_key(spki(&first), Role::Admin).unwrap();
    let error = world.add_key(spki(&wanted), Role::Release).unwrap_err();
    assert!(
        error.message.contains("needs the enrolment signed"),
        "{error}"
    );
    let enrol = |signer: &PrivateKey,
                 key: &PrivateKey,
                 roles: BTreeSet<Role>,
                 signed_roles: &BTreeSet<Role>| {
        let owner = "carl".to_owned();
        let id = key.public_key().id();
        let change = KeyChange::Enrol {
            roles: signed_roles,
            owner: &owner,
        };
        let envelope = signed(statement::key(&id, &change), signer);
        Command::EnrolKey {
            spki: spki(key),
            roles,
            owner,
            envelope,
        }
    };
    let (release, admin): (BTreeSet<Role>, BTreeSet<Role>) =
        ([Role::Release].into(), [Role::Admin].into());
    let error = world
        .apply::<KeyRecord>(&enrol(&first, &wanted, admin.clone(), &release))
        .unwrap_err();
    assert!(
        error
            .message
            .contains("enrolment that was signed is not the one"),
        "{error}"
    );
    let other = enrol(&wanted, &wanted, release.clone(), &release);
    assert!(
        world
            .apply::<KeyRecord>(&other)
            .unwrap_err()
            .message
            .contains("is not known")
    );
    let _: KeyRecord = world
        .apply(&enrol(&first, &wanted, release.clone(), &release))
        .unwrap();
    assert_eq!(newest_event(&world)["signers"][0], first.public_key().id());

    let revoke = |signer: &PrivateKey, key: &PrivateKey| {
        let (key, reason) = (key.public_key().id(), "lost".to_owned());
        let change = KeyChange::Revoke { reason: &reason };
        let envelope = signed(statement::key(&key, &change), signer);
        Command::RevokeKeySigned {
            key,
            reason,
            envelope,
        }
    };
    let plain = Command::RevokeKey {
        key: wanted.public_key().id(),
        reason: "lost".to_owned(),
    };
    let error = world.apply::<KeyRecord>(&plain).unwrap_err();
    assert!(
        error.message.contains("needs the revocation signed"),
        "{error}"
    );
    let error = world
        .apply::<KeyRecord>(&revoke(&first, &first))
        .unwrap_err();
    assert!(
        error.message.contains("is the last with the role `admin`"),
        "{error}"
    );
    let _: KeyRecord = world
        .apply(&enrol(&first, &second, admin.clone(), &admin))
        .unwrap();
    let gone: KeyRecord = world.apply(&revoke(&second, &first)).unwrap();
    assert!(gone.revoked.is_some());
    // A revoked admin is no reason to ask nobody.
    let error = world
        .apply::<KeyRecord>(&revoke(&first, &wanted))
        .unwrap_err();
    assert!(error.message.contains("was revoked"), "{error}");
}
