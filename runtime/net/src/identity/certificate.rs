//! Private keys, certificates with what we read from them, and the two together as credentials.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{KeyPair, PublicKeyData};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::{FileError, Identity, IdentityError, files};

const CREDENTIALS_FILE: &str = "credentials.pem";

/// Why a certificate, request or key is not good.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// The text or bytes are not what they should be.
    #[error("cannot read the {what}: {reason}")]
    Malformed {
        /// What it should be.
        what: &'static str,
        /// What was found.
        reason: String,
    },
    /// The certificate names nobody, or more than one and a namespace.
    #[error(
        "the certificate has {count} mobula names, expected one, and one of a namespace at most"
    )]
    NameCount {
        /// How many it has.
        count: usize,
    },
    /// Its name is not one of ours.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The request is not signed by the key in it.
    #[error("the certificate request is not signed by its own key; make a new one")]
    RequestSignature,
    /// A CA certifies its own cluster only.
    #[error("the CA of cluster `{ca}` does not certify names of cluster `{requested}`")]
    OtherCluster {
        /// The CA's cluster.
        ca: String,
        /// The cluster in the name.
        requested: String,
    },
    /// The certificate is not the CA's work.
    #[error("the certificate of {identity} is not signed by the given CA")]
    NotSignedByCa {
        /// Whom it names.
        identity: String,
    },
    /// The key is another one's.
    #[error("the private key is not the one that {identity} is certified for")]
    KeyMismatch {
        /// Whom the certificate names.
        identity: String,
    },
    /// The crypto library refused.
    #[error("cannot {action}: {source}")]
    Crypto {
        /// What was tried.
        action: &'static str,
        /// What it answered.
        source: rcgen::Error,
    },
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
}

pub(super) fn malformed(what: &'static str, reason: impl fmt::Display) -> CertificateError {
    CertificateError::Malformed {
        what,
        reason: reason.to_string(),
    }
}

/// BLAKE3 of the CA's public key (its SubjectPublicKeyInfo in DER): what a token pins. The key is
/// hashed, not the certificate, so that the CA certificate can be renewed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CaKeyHash(pub(super) [u8; 32]);

impl CaKeyHash {
    /// The hash itself.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for CaKeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        blake3::Hash::from_bytes(self.0).to_hex().fmt(f)
    }
}

impl fmt::Debug for CaKeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CaKeyHash({self})")
    }
}

impl FromStr for CaKeyHash {
    type Err = CertificateError;

    fn from_str(text: &str) -> Result<Self, CertificateError> {
        blake3::Hash::from_hex(text)
            .map(|hash| CaKeyHash(*hash.as_bytes()))
            .map_err(|error| malformed("CA key hash", error))
    }
}

/// The hash by which `certificate`'s key is pinned.
pub fn ca_key_hash(certificate: &CertificateDer<'_>) -> Result<CaKeyHash, CertificateError> {
    let certificate = parse(certificate)?;
    Ok(CaKeyHash(
        *blake3::hash(certificate.public_key().raw).as_bytes(),
    ))
}

/// Whom a verified chain (its own certificate first) names.
pub fn peer_identity(chain: &[CertificateDer<'_>]) -> Result<Identity, CertificateError> {
    let leaf = chain
        .first()
        .ok_or_else(|| malformed("certificate chain", "it is empty"))?;
    identity_of(&parse(leaf)?)
}

pub(crate) fn not_after(leaf: &CertificateDer<'_>) -> Result<SystemTime, CertificateError> {
    Ok(system_time(parse(leaf)?.validity().not_after.timestamp()))
}

fn parse<'a>(der: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, CertificateError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok((rest, _)) => Err(malformed(
            "certificate",
            format_args!("{} bytes follow it", rest.len()),
        )),
        Err(error) => Err(malformed("certificate", error)),
    }
}

fn identity_of(certificate: &X509Certificate<'_>) -> Result<Identity, CertificateError> {
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| malformed("certificate's names", error))?
        .map(|extension| extension.value.general_names.as_slice())
        .unwrap_or_default();
    let uris: Vec<&str> = names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    match uris[..] {
        [uri] => Ok(Identity::parse(uri)?),
        [uri, namespace] => Ok(Identity::parse(uri)?.in_namespace(namespace)?),
        _ => Err(CertificateError::NameCount { count: uris.len() }),
    }
}

fn system_time(unix_seconds: i64) -> SystemTime {
    let seconds = u64::try_from(unix_seconds).unwrap_or(0);
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

/// An ECDSA P-256 private key. Never printed by `Debug`.
#[derive(Clone)]
pub struct PrivateKey {
    pem: Arc<str>,
    pair: Arc<KeyPair>,
}

impl PrivateKey {
    /// A new key from the system's random source.
    pub fn generate() -> Result<Self, CertificateError> {
        let pair = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(|source| {
            CertificateError::Crypto {
                action: "generate a key",
                source,
            }
        })?;
        Ok(PrivateKey {
            pem: pair.serialize_pem().into(),
            pair: Arc::new(pair),
        })
    }

    /// Reads a PKCS#8 key.
    pub fn from_pem(pem: &str) -> Result<Self, CertificateError> {
        // The library's own text could quote the input; a key is not quoted.
        let pair = KeyPair::from_pem(pem)
            .map_err(|_| malformed("private key", "it is not a PKCS#8 key in PEM"))?;
        Ok(PrivateKey {
            pem: pair.serialize_pem().into(),
            pair: Arc::new(pair),
        })
    }

    /// The key as PKCS#8 in PEM. It is a secret.
    #[must_use]
    pub fn to_pem(&self) -> &str {
        &self.pem
    }

    /// A request (PKCS#10, PEM) to certify this key. It names nobody: the CA decides the name.
    pub fn certificate_request(&self) -> Result<String, CertificateError> {
        let mut parameters = rcgen::CertificateParams::default();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        parameters
            .serialize_request(&*self.pair)
            .and_then(|request| request.pem())
            .map_err(|source| CertificateError::Crypto {
                action: "make a request",
                source,
            })
    }

    pub(super) fn pair(&self) -> &KeyPair {
        &self.pair
    }

    /// A key for another purpose, derived from this one: the same for as long as this key lives.
    pub(crate) fn derive(&self, purpose: &str) -> [u8; 32] {
        blake3::derive_key(purpose, self.pair.serialized_der())
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

/// What a process shows to prove who it is: its certificate, the key to it, and the CA's
/// certificate. Cheap to clone.
#[derive(Clone)]
pub struct Credentials(Arc<Parts>);

struct Parts {
    identity: Identity,
    not_before: SystemTime,
    not_after: SystemTime,
    certificate_pem: String,
    ca_certificate_pem: String,
    certificate: CertificateDer<'static>,
    ca_certificate: CertificateDer<'static>,
    ca_key_hash: CaKeyHash,
    key: PrivateKey,
}

impl Credentials {
    /// Puts the three together after checking that they belong together.
    pub fn new(
        certificate_pem: &str,
        key: PrivateKey,
        ca_certificate_pem: &str,
    ) -> Result<Self, CertificateError> {
        let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|error| malformed("certificate", error))?;
        let ca_certificate = CertificateDer::from_pem_slice(ca_certificate_pem.as_bytes())
            .map_err(|error| malformed("CA certificate", error))?;
        let leaf = parse(&certificate)?;
        let ca = parse(&ca_certificate)?;
        let identity = identity_of(&leaf)?;
        if leaf.verify_signature(Some(ca.public_key())).is_err() {
            return Err(CertificateError::NotSignedByCa {
                identity: identity.to_string(),
            });
        }
        if leaf.public_key().raw != key.pair().subject_public_key_info() {
            return Err(CertificateError::KeyMismatch {
                identity: identity.to_string(),
            });
        }
        Ok(Credentials(Arc::new(Parts {
            identity,
            not_before: system_time(leaf.validity().not_before.timestamp()),
            not_after: system_time(leaf.validity().not_after.timestamp()),
            certificate_pem: certificate_pem.to_owned(),
            ca_certificate_pem: ca_certificate_pem.to_owned(),
            ca_key_hash: ca_key_hash(&ca_certificate)?,
            certificate,
            ca_certificate,
            key,
        })))
    }

    /// Reads what [`Credentials::save`] wrote.
    pub fn load(directory: &Path) -> Result<Self, CertificateError> {
        let text = files::read_secret(&directory.join(CREDENTIALS_FILE))?;
        let [certificate, ca_certificate] = pem_certificates(&text)?
            .try_into()
            .map_err(|_| malformed("credentials file", "expected two certificates in it"))?;
        Credentials::new(&certificate, PrivateKey::from_pem(&text)?, &ca_certificate)
    }

    /// Writes all of it to one file (mode 600) in `directory`: key and certificate are never out of
    /// step, whenever the machine stops.
    pub fn save(&self, directory: &Path) -> Result<(), CertificateError> {
        files::create_directory(directory)?;
        let text = [
            self.0.key.to_pem(),
            self.certificate_pem(),
            self.ca_certificate_pem(),
        ]
        .concat();
        Ok(files::write_secret(
            &directory.join(CREDENTIALS_FILE),
            &text,
        )?)
    }

    /// Who this is.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.0.identity
    }

    /// When the certificate ends.
    #[must_use]
    pub fn not_after(&self) -> SystemTime {
        self.0.not_after
    }

    /// When to ask for the next certificate: at half life, so that a long outage of the head costs
    /// nothing.
    #[must_use]
    pub fn renew_at(&self) -> SystemTime {
        let life = self
            .0
            .not_after
            .duration_since(self.0.not_before)
            .unwrap_or_default();
        self.0.not_before + life / 2
    }

    /// The same key and CA with the next certificate, which must be for the same name.
    pub fn renewed(&self, certificate_pem: &str) -> Result<Self, CertificateError> {
        let next = Credentials::new(
            certificate_pem,
            self.0.key.clone(),
            &self.0.ca_certificate_pem,
        )?;
        if next.0.identity != self.0.identity {
            return Err(malformed(
                "next certificate",
                "it is for another name than the one that it follows",
            ));
        }
        Ok(next)
    }

    /// The hash of the CA's key.
    #[must_use]
    pub fn ca_key_hash(&self) -> CaKeyHash {
        self.0.ca_key_hash
    }

    /// The certificate, in PEM.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.0.certificate_pem
    }

    /// The CA's certificate, in PEM.
    #[must_use]
    pub fn ca_certificate_pem(&self) -> &str {
        &self.0.ca_certificate_pem
    }

    /// The private key.
    #[must_use]
    pub fn private_key(&self) -> &PrivateKey {
        &self.0.key
    }

    pub(crate) fn ca_certificate(&self) -> &CertificateDer<'static> {
        &self.0.ca_certificate
    }

    /// What is sent in a handshake: also the CA's certificate, for those who only know its hash.
    pub(crate) fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.0.certificate.clone(), self.0.ca_certificate.clone()]
    }

    pub(crate) fn private_key_der(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.0.key.pair().serialize_der()).into()
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({})", self.0.identity)
    }
}

/// The certificates in a PEM text, each as a PEM text of its own.
pub(super) fn pem_certificates(text: &str) -> Result<Vec<String>, CertificateError> {
    const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
    const END: &str = "-----END CERTIFICATE-----";
    text.match_indices(BEGIN)
        .map(|(start, _)| {
            let rest = &text[start..];
            let end = rest
                .find(END)
                .ok_or_else(|| malformed("certificate", "it has no end"))?;
            Ok(format!("{}\n", &rest[..end + END.len()]))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{ClusterCa, Role, Validity};
    use std::os::unix::fs::PermissionsExt;

    fn credentials(ca: &ClusterCa) -> Credentials {
        let identity = Identity::new(ca.cluster_id(), Role::Host, "host-1", 3).with_job(8);
        ca.issue_with_new_key(&identity, Validity::for_ttl(Duration::from_secs(3600)))
            .unwrap()
    }

    #[test]
    fn credentials_survive_the_disk_and_their_file_is_private() {
        let directory = tempfile::tempdir().unwrap();
        let saved = credentials(&ClusterCa::create("demo").unwrap());
        saved.save(directory.path()).unwrap();
        let file = directory.path().join(CREDENTIALS_FILE);
        assert_eq!(
            std::fs::metadata(file).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let loaded = Credentials::load(directory.path()).unwrap();
        assert_eq!(loaded.identity(), saved.identity());
        assert_eq!(loaded.identity().job, Some(8));
        assert_eq!(loaded.ca_key_hash(), saved.ca_key_hash());
        assert_eq!(loaded.not_after(), saved.not_after());
        assert!(loaded.renew_at() < loaded.not_after());
    }

    #[test]
    fn what_does_not_belong_together_is_refused() {
        let (ours, theirs) = (
            ClusterCa::create("a").unwrap(),
            ClusterCa::create("b").unwrap(),
        );
        let good = credentials(&ours);
        assert!(matches!(
            Credentials::new(
                good.certificate_pem(),
                PrivateKey::generate().unwrap(),
                ours.certificate_pem()
            ),
            Err(CertificateError::KeyMismatch { .. })
        ));
        assert!(matches!(
            Credentials::new(
                good.certificate_pem(),
                good.private_key().clone(),
                theirs.certificate_pem()
            ),
            Err(CertificateError::NotSignedByCa { .. })
        ));
        assert!(matches!(
            Credentials::new(ours.certificate_pem(), PrivateKey::generate().unwrap(), ""),
            Err(CertificateError::Malformed { .. })
        ));
    }

    #[test]
    fn debug_shows_no_secret() {
        let credentials = credentials(&ClusterCa::create("demo").unwrap());
        let shown = format!("{credentials:?} {:?}", credentials.private_key());
        assert_eq!(
            shown,
            "Credentials(spiffe://demo/host/host-1/3/job/8) PrivateKey(..)"
        );
    }

    #[test]
    fn key_hashes_parse_what_they_print() {
        let hash = ClusterCa::create("demo").unwrap().key_hash();
        assert_eq!(hash.to_string().parse::<CaKeyHash>().unwrap(), hash);
        assert!("abc".parse::<CaKeyHash>().is_err());
    }
}
