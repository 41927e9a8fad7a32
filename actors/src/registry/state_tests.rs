use super::*;
use crate::registry::provenance::tests::complete;
use crate::registry::search::{ModelView, VersionView};
use crate::registry::signer::tests::key;
use crate::registry::signer::{PrivateKey, Signer, sign};
use crate::registry::stages::{ModelState, Stage};
use crate::registry::statement::{self, Promotion};
use crate::registry::versions::TRAINING_JSON_BYTES_MAX;
use crate::registry::versions::tests::new_version;
use mobula_core::id::{JobId, NodeId};
use mobula_scheduler::memory_txn::MemoryTables;

/// A registry with keys, as commands make it.
pub(in crate::registry) struct World {
    pub(in crate::registry) tables: MemoryTables,
    /// Both have the role `release`, and are known.
    pub(in crate::registry) keys: [PrivateKey; 2],
    index: u64,
}

impl Default for World {
    fn default() -> Self {
        let mut world = World {
            tables: MemoryTables::default(),
            keys: [key(), key()],
            index: 0,
        };
        for number in 0..2 {
            let spki = world.keys[number].public_key().spki().to_vec();
            world.add_key(spki, Role::Release).unwrap();
        }
        world
    }
}

impl World {
    /// So many versions of `digits`, whose provenance is complete.
    pub(in crate::registry) fn with_versions(count: u64) -> Self {
        let mut world = World::default();
        for number in 1..=count {
            let mut version = new_version('1');
            version.digest = format!("{number:064x}");
            version.training_json = r#"{"steps":3}"#.to_owned();
            let provenance = Box::new(complete());
            let command = Command::RegisterRun {
                version,
                provenance,
            };
            let _: ModelVersion = world.apply(&command).unwrap();
        }
        world.index = 0;
        world
    }

    pub(in crate::registry) fn apply<A: serde::de::DeserializeOwned>(
        &mut self,
        command: &Command,
    ) -> Result<A, Rejection> {
        self.apply_as("ann", command)
    }

    /// The same in somebody's name.
    pub(in crate::registry) fn apply_as<A: serde::de::DeserializeOwned>(
        &mut self,
        principal: &str,
        command: &Command,
    ) -> Result<A, Rejection> {
        let origin = Origin {
            principal: principal.to_owned(),
            call: "test".to_owned(),
        };
        self.index += 1;
        let context = ApplyContext {
            index: self.index,
            term: 1,
            now_ms: self.index,
        };
        let payload = codec::encode_plain(command);
        let before = self.tables.clone();
        let applied = self
            .tables
            .apply_from(&Registry, &context, Some(&origin), &payload);
        if applied.is_err() {
            assert_eq!(self.tables, before);
        }
        Ok(codec::decode(&applied?.response, PAYLOAD_BYTES_MAX).unwrap())
    }

    pub(in crate::registry) fn ask<A: serde::de::DeserializeOwned>(
        &self,
        query: &Query,
    ) -> Result<A, Rejection> {
        let bytes = Registry.query(&self.tables, 0, &codec::encode_plain(query))?;
        assert!(bytes.len() < 4 << 20, "{} bytes", bytes.len());
        Ok(codec::decode(&bytes, 4 << 20).unwrap())
    }

    pub(in crate::registry) fn register(
        &mut self,
        new: NewVersion,
    ) -> Result<ModelVersion, Rejection> {
        self.apply(&Command::Register(new))
    }

    pub(in crate::registry) fn add_key(
        &mut self,
        spki: Vec<u8>,
        role: Role,
    ) -> Result<keys::KeyRecord, Rejection> {
        let (roles, owner) = ([role].into(), "someone".to_owned());
        self.apply(&Command::AddKey { spki, roles, owner })
    }

    pub(in crate::registry) fn revoke(&mut self, key: String) -> keys::KeyRecord {
        let reason = "lost".to_owned();
        self.apply(&Command::RevokeKey { key, reason }).unwrap()
    }

    pub(in crate::registry) fn state(&self) -> ModelState {
        stages::model_state(&self.tables, "digits")
    }

    pub(in crate::registry) fn alias(
        &mut self,
        alias: &str,
        version: Option<u64>,
    ) -> Result<ModelState, Rejection> {
        self.alias_at(alias, version, self.state().revision)
    }

    pub(in crate::registry) fn alias_at(
        &mut self,
        alias: &str,
        version: Option<u64>,
        expected_revision: u64,
    ) -> Result<ModelState, Rejection> {
        let command = Command::Alias {
            model: "digits".to_owned(),
            alias: alias.to_owned(),
            version,
            expected_revision,
        };
        self.apply(&command)
    }

    pub(in crate::registry) fn tag(
        &mut self,
        version: u64,
        tag: &str,
        value: Option<&str>,
    ) -> Result<VersionView, Rejection> {
        let command = Command::Tag {
            model: "digits".to_owned(),
            version,
            tag: tag.to_owned(),
            value: value.map(str::to_owned),
        };
        self.apply(&command)
    }

    /// What would have to be sent, signed by these keys.
    pub(in crate::registry) fn change(
        &self,
        version: u64,
        to: Stage,
        signers: &[&dyn Signer],
    ) -> StageChange {
        let found = find(&self.tables, "digits", Some(version)).unwrap();
        let origin = stages::provenance(&self.tables, "digits", version);
        let state = self.state();
        let edge = Promotion {
            version: &found,
            provenance: origin.as_ref(),
            from: stages::standing(&self.tables, &found).stage,
            to,
            replaces: state.production.filter(|_| to == Stage::Production),
            revision: state.revision,
            reason: "why not",
        };
        let signed = |payload: Vec<u8>| {
            let mut envelope = Envelope {
                payload,
                signatures: Vec::new(),
            };
            for signer in signers {
                sign(*signer, &mut envelope).unwrap();
            }
            envelope
        };
        let provenance = origin.as_ref().filter(|_| to == Stage::Production);
        StageChange {
            model: "digits".to_owned(),
            version,
            to,
            expected_revision: state.revision,
            reason: "why not".to_owned(),
            promotion: signed(statement::promotion(&edge)),
            provenance: provenance.map(|origin| signed(statement::provenance(&found, origin))),
        }
    }

    /// Changes a stage with as many signatures as are needed.
    pub(in crate::registry) fn promote(
        &mut self,
        version: u64,
        to: Stage,
    ) -> Result<VersionView, Rejection> {
        let [one, two] = &self.keys;
        let change = match self.state().policy.signatures {
            1 => self.change(version, to, &[one]),
            _ => self.change(version, to, &[one, two]),
        };
        self.apply(&Command::Stage(change))
    }
}

#[test]
fn lists_come_in_pages_that_the_api_carries() {
    let mut world = World::default();
    let count = PAGE_ROWS as u64 + 10;
    for number in 0..count {
        let mut new = new_version('1');
        new.digest = format!("{number:064x}");
        new.training_json = "x".repeat(TRAINING_JSON_BYTES_MAX);
        world.register(new.clone()).unwrap();
        new.model = format!("m{number:04}");
        world.register(new).unwrap();
    }
    let ask = |query: &Query| -> Vec<ModelVersion> { world.ask(query).unwrap() };
    let versions = |after| {
        ask(&Query::Versions {
            model: "digits".into(),
            after,
        })
    };
    let first = versions(0);
    let last = first.last().unwrap().version;
    assert_eq!((first.len(), last), (PAGE_ROWS, PAGE_ROWS as u64));
    assert_eq!(versions(last).last().unwrap().version, count);
    assert_eq!(versions(count), []);
    let first = ask(&Query::List { after: None });
    let last = first.last().unwrap().description.model.clone();
    let rest = ask(&Query::List { after: Some(last) });
    assert_eq!(
        (first.len(), first.len() + rest.len()),
        (PAGE_ROWS, count as usize + 1)
    );
}

#[test]
fn a_job_registers_what_came_of_itself_and_decides_only_what_is_signed() {
    let of_3 = new_version('1');
    let host = |job| Caller::Host {
        job: JobId(job),
        node: NodeId(1),
    };
    let may = |caller: &Caller, command: &Command| {
        let payload = codec::encode_plain(command);
        Registry.authorize(caller, &payload).map_err(|why| why.code)
    };
    let run = Command::RegisterRun {
        version: of_3.clone(),
        provenance: Box::new(complete()),
    };
    for register in [Command::Register(of_3), run] {
        assert_eq!(may(&host(3), &register), Ok(()));
        assert_eq!(may(&Caller::Client, &register), Ok(()));
        let refused = Err(ErrorCode::PermissionDenied);
        assert_eq!(may(&host(4), &register), refused);
        assert_eq!(may(&Caller::Node(NodeId(1)), &register), refused);
    }
    let key = Command::RevokeKey {
        key: "k".to_owned(),
        reason: String::new(),
    };
    assert_eq!(may(&Caller::Client, &key), Ok(()));
    // What is signed counts by its signatures.
    let stage = Command::Stage(World::with_versions(1).change(1, Stage::Staging, &[]));
    assert_eq!(may(&host(3), &stage), Ok(()));
    let node = may(&Caller::Node(NodeId(1)), &stage);
    assert_eq!(node, Err(ErrorCode::PermissionDenied));
    for caller in [host(3), host(JobId::SYSTEM.0), Caller::Node(NodeId(1))] {
        assert_eq!(may(&caller, &key), Err(ErrorCode::PermissionDenied));
    }
}

#[test]
fn commands_keep_their_tags_and_say_what_they_are_about() {
    let world = World::with_versions(1);
    let commands = [
        Command::Register(new_version('1')),
        Command::RegisterRun {
            version: new_version('1'),
            provenance: Box::new(complete()),
        },
        Command::Stage(world.change(1, Stage::Staging, &[])),
        Command::Alias {
            model: "digits".to_owned(),
            alias: "champion".to_owned(),
            version: None,
            expected_revision: 0,
        },
        Command::Tag {
            model: "digits".to_owned(),
            version: 1,
            tag: "team".to_owned(),
            value: None,
        },
        Command::SetPolicy {
            model: "digits".to_owned(),
            policy: Policy::default(),
            expected_revision: 0,
            envelope: None,
        },
        Command::AddKey {
            spki: Vec::new(),
            roles: BTreeSet::new(),
            owner: "ann".to_owned(),
        },
        Command::RevokeKey {
            key: "k".to_owned(),
            reason: String::new(),
        },
    ];
    let subjects = [
        "a version of digits",
        "a version of digits",
        "digits:1 to staging",
        "alias champion of digits",
        "tag team of digits:1",
        "policy of digits",
        "a key of ann",
        "key k",
    ];
    for (tag, (command, subject)) in commands.iter().zip(subjects).enumerate() {
        let bytes = codec::encode_plain(command);
        assert_eq!(bytes[..4], u32::try_from(tag).unwrap().to_le_bytes());
        let again: Command = codec::decode(&bytes, PAYLOAD_BYTES_MAX).unwrap();
        assert_eq!(&again, command);
        assert_eq!(Registry.subject(&bytes, None), subject);
    }
    assert_eq!(Registry.subject(&[9, 9], None), "registry");
}

#[test]
fn a_model_is_shown_with_what_was_decided() {
    let mut world = World::with_versions(2);
    world.alias("champion", Some(2)).unwrap();
    let model = || "digits".to_owned();
    let view: ModelView = world.ask(&Query::Model { model: model() }).unwrap();
    assert_eq!((view.newest, view.state.revision), (2, 1));
    assert_eq!(view.aliases[0].0, "champion");
    let key_pages: Vec<keys::KeyRecord> = world.ask(&Query::Keys { after: None }).unwrap();
    assert_eq!(key_pages.len(), 2);
    let after = key_pages.last().map(|key| key.id.clone());
    let rest: Vec<keys::KeyRecord> = world.ask(&Query::Keys { after }).unwrap();
    assert_eq!(rest, []);
}
