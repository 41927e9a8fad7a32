//! Who is who: the cluster's certificate authority, the names in certificates, and the tokens with
//! which newcomers ask for one.
//!
//! Invariants:
//! 1. A certificate's name is decided by the CA, never by the request: of a request only the public
//!    key is taken, after its signature has proved that the asker holds the private key.
//! 2. Every certificate has a stated begin and end. Connections do not outlive them.
//! 3. No secret is ever printed: `Debug` of keys, tokens and credentials leaves them out, and key
//!    files are readable by their owner only.

mod at_rest;
mod ca;
mod certificate;
mod current;
mod files;
mod sealed;
mod token;

pub use at_rest::AtRest;
pub use ca::{ClusterCa, Validity};
pub(crate) use certificate::not_after;
pub use certificate::{
    CaKeyHash, CertificateError, Credentials, PrivateKey, ca_key_hash, peer_identity,
};
pub use current::CurrentCredentials;
pub use files::FileError;
pub use sealed::{SealError, SecretReader, seal};
pub use token::{Token, TokenError};

use std::fmt;
use std::str::FromStr;

use mobula_core::id::Incarnation;
use mobula_core::namespace::Namespace;
use serde::{Deserialize, Serialize};

/// The longest text that may be one part of an identity, in bytes; a domain name's label may be 63,
/// and job-scoped host names fit easily.
const PART_BYTES_MAX: usize = 63;

/// What a process is in the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Role {
    /// A control-plane replica.
    Head,
    /// A worker's agent.
    Node,
    /// A process that runs actors of one job.
    Host,
    /// A driver outside the cluster, or the command line.
    Client,
}

impl Role {
    /// The word for it in names and tokens.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Role::Head => "head",
            Role::Node => "node",
            Role::Host => "host",
            Role::Client => "client",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        match text {
            "head" => Ok(Role::Head),
            "node" => Ok(Role::Node),
            "host" => Ok(Role::Host),
            "client" => Ok(Role::Client),
            other => Err(IdentityError::Role {
                text: other.to_owned(),
            }),
        }
    }
}

/// Who a certificate says that a process is.
///
/// Its name there is `spiffe://<cluster>/<role>/<id>/<incarnation>`, for a process that belongs to a
/// job with `/job/<job>` behind it. The namespace that the job is in stands beside it, as a second name:
/// `spiffe://<cluster>/namespace/<name>/<incarnation>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// The cluster.
    pub cluster: String,
    /// What it is there.
    pub role: Role,
    /// Which one of its role.
    pub id: String,
    /// Which life of it: the fencing token.
    pub incarnation: u64,
    /// The job it belongs to, if to one.
    pub job: Option<u64>,
    /// The namespace that its job is in, if in one.
    pub namespace: Option<Namespace>,
}

/// Why a text is not an identity, or an identity not a valid name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// No such role.
    #[error("`{text}` is not a role: expected head, node, host or client")]
    Role {
        /// What was given.
        text: String,
    },
    /// A part has characters or a length that names may not have.
    #[error(
        "{part} `{text}` cannot be part of a name: expected 1 to {PART_BYTES_MAX} of a-z, 0-9, \
         `-`, `_` and `.`"
    )]
    Part {
        /// Which part.
        part: &'static str,
        /// What was given.
        text: String,
    },
    /// The text is not of the expected form.
    #[error(
        "`{text}` is not a name: expected spiffe://<cluster>/<role>/<id>/<incarnation>[/job/<job>]"
    )]
    Form {
        /// What was given.
        text: String,
    },
    /// A second name that is not that of a namespace of the same cluster, or whose bearer has no job.
    #[error(
        "`{text}` is not a namespace of the job beside it: expected \
         spiffe://<cluster>/namespace/<name>/<incarnation>"
    )]
    Namespace {
        /// What was given.
        text: String,
    },
}

impl Identity {
    /// A name without a job.
    pub fn new(
        cluster: impl Into<String>,
        role: Role,
        id: impl Into<String>,
        incarnation: u64,
    ) -> Self {
        Identity {
            cluster: cluster.into(),
            role,
            id: id.into(),
            incarnation,
            job: None,
            namespace: None,
        }
    }

    /// The same name, as part of `job`.
    #[must_use]
    pub fn with_job(self, job: u64) -> Self {
        Identity {
            job: Some(job),
            ..self
        }
    }

    /// The same name, with the namespace that its job is in.
    #[must_use]
    pub fn with_namespace(self, namespace: Option<Namespace>) -> Self {
        Identity { namespace, ..self }
    }

    /// The second name in its certificate, if it has one; an error if its parts cannot be parts of a
    /// name, or if there is no job that could be in the namespace.
    pub fn namespace_uri(&self) -> Result<Option<String>, IdentityError> {
        let Some(Namespace { name, incarnation }) = &self.namespace else {
            return Ok(None);
        };
        check_part("cluster", &self.cluster)?;
        check_part("namespace", name)?;
        let text = format!(
            "spiffe://{}/namespace/{name}/{}",
            self.cluster, incarnation.0
        );
        match self.job {
            Some(_) => Ok(Some(text)),
            None => Err(IdentityError::Namespace { text }),
        }
    }

    /// The identity whose second name is `uri`, as [`Identity::namespace_uri`] wrote it.
    pub(crate) fn in_namespace(self, uri: &str) -> Result<Self, IdentityError> {
        let form = || IdentityError::Namespace {
            text: uri.chars().take(256).collect(),
        };
        let parts: Vec<&str> = uri
            .strip_prefix("spiffe://")
            .ok_or_else(form)?
            .split('/')
            .collect();
        let [_, "namespace", name, incarnation] = parts[..] else {
            return Err(form());
        };
        let namespace = Namespace {
            name: name.to_owned(),
            incarnation: Incarnation(incarnation.parse().map_err(|_| form())?),
        };
        let identity = self.with_namespace(Some(namespace));
        // One name, one spelling, and of this cluster.
        match identity.namespace_uri()? {
            Some(text) if text == uri => Ok(identity),
            _ => Err(form()),
        }
    }

    /// The name as it stands in a certificate; an error if its parts cannot be parts of a name.
    pub fn to_uri(&self) -> Result<String, IdentityError> {
        check_part("cluster", &self.cluster)?;
        check_part("id", &self.id)?;
        Ok(self.to_string())
    }

    /// Reads what [`Identity::to_uri`] wrote, and nothing else. A namespace is not part of it.
    pub fn parse(uri: &str) -> Result<Self, IdentityError> {
        let form = || IdentityError::Form {
            text: uri.chars().take(256).collect(),
        };
        let parts: Vec<&str> = uri
            .strip_prefix("spiffe://")
            .ok_or_else(form)?
            .split('/')
            .collect();
        let (cluster, role, id, incarnation, job) = match parts[..] {
            [cluster, role, id, incarnation] => (cluster, role, id, incarnation, None),
            [cluster, role, id, incarnation, "job", job] => {
                (cluster, role, id, incarnation, Some(job))
            }
            _ => return Err(form()),
        };
        check_part("cluster", cluster)?;
        check_part("id", id)?;
        let identity = Identity {
            cluster: cluster.to_owned(),
            role: role.parse()?,
            id: id.to_owned(),
            incarnation: incarnation.parse().map_err(|_| form())?,
            job: job.map(str::parse).transpose().map_err(|_| form())?,
            namespace: None,
        };
        // One name, one spelling: `+1` and `01` parse as numbers but are not how we write them.
        if identity.to_string() == uri {
            Ok(identity)
        } else {
            Err(form())
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Identity {
            cluster,
            role,
            id,
            incarnation,
            job,
            namespace: _,
        } = self;
        write!(f, "spiffe://{cluster}/{role}/{id}/{incarnation}")?;
        match job {
            Some(job) => write!(f, "/job/{job}"),
            None => Ok(()),
        }
    }
}

pub(crate) fn check_part(part: &'static str, text: &str) -> Result<(), IdentityError> {
    let allowed = |byte: u8| {
        byte.is_ascii_lowercase() || byte.is_ascii_digit() || matches!(byte, b'-' | b'_' | b'.')
    };
    if (1..=PART_BYTES_MAX).contains(&text.len()) && text.bytes().all(allowed) {
        Ok(())
    } else {
        Err(IdentityError::Part {
            part,
            text: text.chars().take(256).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_parse_what_they_print() {
        let node = Identity::new("demo", Role::Node, "node-3", 17);
        assert_eq!(node.to_uri().unwrap(), "spiffe://demo/node/node-3/17");
        let host = Identity::new("demo", Role::Host, "host-9", 2).with_job(4);
        assert_eq!(host.to_uri().unwrap(), "spiffe://demo/host/host-9/2/job/4");
        for identity in [node, host] {
            assert_eq!(
                Identity::parse(&identity.to_uri().unwrap()).unwrap(),
                identity
            );
        }
    }

    #[test]
    fn other_texts_are_no_names() {
        for text in [
            "",
            "https://demo/node/node-3/17",
            "spiffe://demo/node/node-3",
            "spiffe://demo/king/node-3/17",
            "spiffe://demo/node/node-3/017",
            "spiffe://demo/node/node-3/+17",
            "spiffe://demo/node/no de/17",
            "spiffe://demo/node//17",
            "spiffe:///node/node-3/17",
            "spiffe://demo/node/node-3/17/job/",
            "spiffe://demo/node/node-3/17/extra",
        ] {
            assert!(Identity::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_namespace_is_a_second_name_of_a_process_with_a_job() {
        let host = Identity::new("demo", Role::Host, "host-9", 2).with_job(4);
        let namespace = Namespace {
            name: "shop".to_owned(),
            incarnation: Incarnation(7),
        };
        let inside = host.clone().with_namespace(Some(namespace.clone()));
        let uri = inside.namespace_uri().unwrap().unwrap();
        assert_eq!(uri, "spiffe://demo/namespace/shop/7");
        assert_eq!(host.clone().in_namespace(&uri).unwrap(), inside);
        assert_eq!(host.namespace_uri().unwrap(), None);
        for bad in [
            "spiffe://other/namespace/shop/7",
            "spiffe://demo/namespace/shop/07",
            "spiffe://demo/namespace/shop",
            "spiffe://demo/namespace//7",
            "spiffe://demo/namespace/Shop/7",
            "spiffe://demo/host/shop/7",
            "https://demo/namespace/shop/7",
            "",
        ] {
            assert!(host.clone().in_namespace(bad).is_err(), "{bad}");
        }
        let node = Identity::new("demo", Role::Node, "node-3", 17);
        assert!(node.clone().in_namespace(&uri).is_err());
        let node = node.with_namespace(Some(namespace));
        assert!(matches!(
            node.namespace_uri(),
            Err(IdentityError::Namespace { .. })
        ));
    }

    #[test]
    fn parts_cannot_smuggle_separators() {
        let identity = Identity::new("demo", Role::Node, "a/head/b", 1);
        assert!(matches!(
            identity.to_uri(),
            Err(IdentityError::Part { part: "id", .. })
        ));
    }

    proptest! {
        #[test]
        fn any_text_parses_or_is_refused(text in "\\PC*") {
            if let Ok(identity) = Identity::parse(&text) {
                prop_assert_eq!(identity.to_string(), text);
            }
        }
    }
}
