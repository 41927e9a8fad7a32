//! Every decoder that reads what another process, a disk or a user wrote, by name: what the fuzz targets
//! and the workspace's own test (`runtime/cli/tests/it/any_bytes.rs`, which includes this file) feed.
//!
//! Invariants, of each decoder on any bytes:
//! 1. It gives a value or an error: it does not panic, hang, or allocate far beyond its input.
//! 2. What it accepts it can write again, and reads the same from that.

#![allow(
    unreachable_pub,
    reason = "a test of the workspace includes this file as a private module"
)]

use mobula_core::codec;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// One decoder.
#[derive(Clone, Copy)]
pub struct Decoder {
    /// Its name, which is that of its fuzz target.
    pub name: &'static str,
    /// Feeds it.
    pub run: fn(&[u8]),
    /// Inputs that it accepts, to begin from.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// Those of values, requests and identities, which need little to be built; what processes say to each other
/// is in `wire_decoders`.
pub const DECODERS: &[Decoder] = &[
    Decoder {
        name: "core_values",
        run: core_values,
        seeds: core_values_seeds,
    },
    Decoder {
        name: "core_config",
        run: core_config,
        seeds: core_config_seeds,
    },
    Decoder {
        name: "scheduler",
        run: scheduler,
        seeds: scheduler_seeds,
    },
    Decoder {
        name: "identity",
        run: identity,
        seeds: identity_seeds,
    },
];

pub(crate) fn no_seeds() -> Vec<Vec<u8>> {
    Vec::new()
}

/// Reads a message of our codec; what is accepted is read the same from what is written.
pub(crate) fn message<T: Serialize + DeserializeOwned>(bytes: &[u8]) {
    const LIMIT_BYTES: usize = 8 << 20;
    let Ok(value) = codec::decode::<T>(bytes, LIMIT_BYTES) else {
        return;
    };
    let written = codec::encode_plain(&value);
    let again: T = codec::decode(&written, LIMIT_BYTES.max(written.len()))
        .expect("what was written is read again");
    assert_eq!(codec::encode_plain(&again), written);
}

/// Lets the first byte choose among `decoders`, so that one target covers a family.
pub(crate) fn one_of(bytes: &[u8], decoders: &[fn(&[u8])]) {
    if let Some((choice, rest)) = bytes.split_first() {
        decoders[usize::from(*choice) % decoders.len()](rest);
    }
}

pub(crate) fn seed_of<T: Serialize>(choice: u8, value: &T) -> Vec<u8> {
    [vec![choice], codec::encode_plain(value)].concat()
}

fn core_values(bytes: &[u8]) {
    use mobula_core::{CallError, ExitReason};
    one_of(
        bytes,
        &[
            message::<mobula_core::spec::JobSpec>,
            message::<mobula_core::spec::ActorSpec>,
            message::<mobula_core::order::Order>,
            message::<mobula_core::order::WorkerEvent>,
            message::<mobula_core::span::Span>,
            message::<mobula_core::object::ObjectError>,
            message::<CallError>,
            message::<ExitReason>,
        ],
    );
}

fn core_values_seeds() -> Vec<Vec<u8>> {
    use mobula_core::id::JobId;
    let span = mobula_core::span::Span::new("run", "actor", JobId(1), 1, 2).with("a", "b");
    let error = mobula_core::CallError::BadCall("no such method".into());
    vec![seed_of(4, &span), seed_of(6, &error)]
}

fn core_config(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = mobula_core::config::Config::from_toml(text, "fuzz.toml");
        let _ = text.parse::<mobula_core::id::JobId>();
    }
}

fn core_config_seeds() -> Vec<Vec<u8>> {
    vec![b"[worker]\nname = \"a\"\n[worker.resources]\ngpu = 1.5\n".to_vec()]
}

fn scheduler(bytes: &[u8]) {
    use mobula_scheduler::{Command, Query, QueryResponse, Response};
    one_of(
        bytes,
        &[
            |bytes| {
                if let Ok(command) = Command::decode(bytes) {
                    assert_eq!(Command::decode(&command.encode()).as_ref(), Ok(&command));
                }
            },
            |bytes| {
                if let Ok(query) = Query::decode(bytes) {
                    assert_eq!(Query::decode(&query.encode()).as_ref(), Ok(&query));
                }
            },
            |bytes| drop(Response::decode(bytes)),
            |bytes| drop(QueryResponse::decode(bytes)),
        ],
    );
}

fn scheduler_seeds() -> Vec<Vec<u8>> {
    use mobula_core::id::JobId;
    use mobula_scheduler::{Command, Query};
    let stop = Command::StopJob { job: JobId(3) };
    let list = Query::ListJobs {
        after: Some(JobId(3)),
        limit: 4,
    };
    vec![
        [vec![0], stop.encode()].concat(),
        [vec![1], list.encode()].concat(),
    ]
}

/// A certificate of a cluster of its own, made once: making keys is slow.
fn authority() -> &'static str {
    use std::sync::OnceLock;
    static PEM: OnceLock<String> = OnceLock::new();
    PEM.get_or_init(|| {
        let ca = mobula_net::identity::ClusterCa::create("c-1").expect("a key can be made");
        ca.certificate_pem().to_owned()
    })
}

fn identity(bytes: &[u8]) {
    use mobula_net::identity::{Identity, PrivateKey, Token, ca_key_hash, peer_identity};
    use rustls_pki_types::CertificateDer;
    use rustls_pki_types::pem::PemObject;
    one_of(
        bytes,
        &[
            |bytes| {
                let certificate = CertificateDer::from(bytes.to_vec());
                let _ = ca_key_hash(&certificate);
                let _ = peer_identity(&[certificate]);
            },
            |bytes| {
                if let Ok(certificate) = CertificateDer::from_pem_slice(bytes) {
                    let _ = ca_key_hash(&certificate);
                    let _ = peer_identity(&[certificate]);
                }
            },
            |bytes| {
                if let Ok(text) = std::str::from_utf8(bytes)
                    && let Ok(token) = Token::parse(text)
                {
                    assert!(Token::parse(&token.to_text()).is_ok());
                }
            },
            |bytes| {
                if let Ok(text) = std::str::from_utf8(bytes)
                    && let Ok(identity) = Identity::parse(text)
                {
                    assert_eq!(Identity::parse(&identity.to_string()), Ok(identity));
                }
            },
            |bytes| {
                if let Ok(text) = std::str::from_utf8(bytes) {
                    let _ = PrivateKey::from_pem(text);
                }
            },
        ],
    );
}

fn identity_seeds() -> Vec<Vec<u8>> {
    use mobula_net::identity::{Role, Token, ca_key_hash};
    use rustls_pki_types::CertificateDer;
    use rustls_pki_types::pem::PemObject;
    let pem = authority().as_bytes();
    let der = CertificateDer::from_pem_slice(pem).expect("it was just made");
    let hash = ca_key_hash(&der).expect("it is a certificate");
    let token = Token::generate(Role::Client, hash).to_text();
    vec![
        [&[0], der.as_ref()].concat(),
        [&[1], pem].concat(),
        [&[2], token.as_bytes()].concat(),
    ]
}
