//! The cluster's certificate authority: one ECDSA key, made at the first start of the first head.

use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rand::TryRngCore;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::certificate::{CertificateError, malformed, pem_certificates};
use super::{AtRest, CaKeyHash, Credentials, Identity, PrivateKey, ca_key_hash, check_part, files};
use crate::tls::SERVER_NAME;

const CA_FILE: &str = "ca.pem";
/// How far two machines' clocks may differ before a fresh certificate looks not yet valid.
const CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);
/// The CA outlives any cluster we can plan for: replacing it means joining every process anew.
const CA_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// From when until when a certificate holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The first moment.
    pub not_before: SystemTime,
    /// The last moment.
    pub not_after: SystemTime,
}

impl Validity {
    /// From now (less five minutes, as clocks differ) for `ttl`.
    #[must_use]
    pub fn for_ttl(ttl: Duration) -> Self {
        let now = SystemTime::now();
        Validity {
            not_before: now - CLOCK_SKEW,
            not_after: now + ttl,
        }
    }
}

/// The authority that certifies every process of one cluster. Never prints its key.
pub struct ClusterCa {
    cluster_id: String,
    certificate_pem: String,
    key: PrivateKey,
    key_hash: CaKeyHash,
}

impl ClusterCa {
    /// A new authority for the cluster `cluster_id`, in memory only.
    pub fn create(cluster_id: &str) -> Result<Self, CertificateError> {
        check_part("cluster", cluster_id)?;
        let key = PrivateKey::generate()?;
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = DistinguishedName::new();
        parameters
            .distinguished_name
            .push(DnType::OrganizationName, "mobula");
        parameters
            .distinguished_name
            .push(DnType::CommonName, cluster_id);
        // Leaves only: nobody whom the CA certifies can certify others.
        parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        parameters.serial_number = Some(serial_number());
        set_validity(&mut parameters, Validity::for_ttl(CA_LIFE));
        let certificate =
            parameters
                .self_signed(key.pair())
                .map_err(|source| CertificateError::Crypto {
                    action: "certify the CA",
                    source,
                })?;
        ClusterCa::from_pem(&certificate.pem(), key.to_pem())
    }

    /// The authority whose certificate and private key these are.
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, CertificateError> {
        let key = PrivateKey::from_pem(key_pem)?;
        let der = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|error| malformed("CA certificate", error))?;
        let (_, parsed) =
            X509Certificate::from_der(&der).map_err(|error| malformed("CA certificate", error))?;
        let cluster_id = parsed
            .subject()
            .iter_common_name()
            .next()
            .and_then(|name| name.as_str().ok())
            .ok_or_else(|| malformed("CA certificate", "it names no cluster"))?
            .to_owned();
        check_part("cluster", &cluster_id)?;
        if !parsed.is_ca() {
            return Err(malformed("CA certificate", "it is not one of an authority"));
        }
        if parsed.public_key().raw != rcgen::PublicKeyData::subject_public_key_info(key.pair()) {
            return Err(CertificateError::KeyMismatch {
                identity: format!("CA of {cluster_id}"),
            });
        }
        let key_hash = ca_key_hash(&der)?;
        Ok(ClusterCa {
            cluster_id,
            certificate_pem: certificate_pem.to_owned(),
            key,
            key_hash,
        })
    }

    /// What seals secrets in the tables: every head of the cluster makes the same of its copy of the
    /// key.
    #[must_use]
    pub fn at_rest(&self) -> AtRest {
        AtRest::from_root(&self.key.pair().serialize_der())
    }

    /// Reads what [`ClusterCa::save`] wrote.
    pub fn load(directory: &Path) -> Result<Self, CertificateError> {
        let text = files::read_secret(&directory.join(CA_FILE))?;
        let [certificate] = pem_certificates(&text)?
            .try_into()
            .map_err(|_| malformed("CA file", "expected one certificate in it"))?;
        ClusterCa::from_pem(&certificate, &text)
    }

    /// Writes key and certificate to one file (mode 600) in `directory`.
    pub fn save(&self, directory: &Path) -> Result<(), CertificateError> {
        files::create_directory(directory)?;
        let text = [self.key.to_pem(), &self.certificate_pem].concat();
        Ok(files::write_secret(&directory.join(CA_FILE), &text)?)
    }

    /// The authority in `directory`, made and saved there if there is none. One that is there but
    /// cannot be read is an error: a second authority would lock out everybody.
    pub fn load_or_create(directory: &Path, cluster_id: &str) -> Result<Self, CertificateError> {
        match ClusterCa::load(directory) {
            Ok(ca) if ca.cluster_id == cluster_id => Ok(ca),
            Ok(ca) => Err(CertificateError::OtherCluster {
                ca: ca.cluster_id,
                requested: cluster_id.to_owned(),
            }),
            Err(CertificateError::File(error)) if error.is_not_found() => {
                let ca = ClusterCa::create(cluster_id)?;
                ca.save(directory)?;
                Ok(ca)
            }
            Err(error) => Err(error),
        }
    }

    /// The cluster it certifies.
    #[must_use]
    pub fn cluster_id(&self) -> &str {
        &self.cluster_id
    }

    /// Its certificate, in PEM.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Its private key, in PEM: the cluster's greatest secret.
    #[must_use]
    pub fn key_pem(&self) -> &str {
        self.key.to_pem()
    }

    /// What tokens pin.
    #[must_use]
    pub fn key_hash(&self) -> CaKeyHash {
        self.key_hash
    }

    /// Certifies the key of a request (PKCS#10, PEM) as `identity`'s; returns the certificate in
    /// PEM. Whether the asker may have that name is the caller's decision; whatever name the
    /// request itself suggests is ignored.
    pub fn issue(
        &self,
        request_pem: &str,
        identity: &Identity,
        validity: Validity,
    ) -> Result<String, CertificateError> {
        let request =
            CertificateSigningRequestParams::from_pem(request_pem).map_err(
                |error| match error {
                    rcgen::Error::InvalidCertificationRequestSignature => {
                        CertificateError::RequestSignature
                    }
                    error => malformed("certificate request", error),
                },
            )?;
        self.sign(&request.public_key, identity, validity)
    }

    /// Certifies a key that is made here, for processes that this one starts itself.
    pub fn issue_with_new_key(
        &self,
        identity: &Identity,
        validity: Validity,
    ) -> Result<Credentials, CertificateError> {
        let key = PrivateKey::generate()?;
        let certificate = self.sign(key.pair(), identity, validity)?;
        Credentials::new(&certificate, key, &self.certificate_pem)
    }

    fn sign(
        &self,
        public_key: &impl rcgen::PublicKeyData,
        identity: &Identity,
        validity: Validity,
    ) -> Result<String, CertificateError> {
        if identity.cluster != self.cluster_id {
            return Err(CertificateError::OtherCluster {
                ca: self.cluster_id.clone(),
                requested: identity.cluster.clone(),
            });
        }
        let failed = |source| CertificateError::Crypto {
            action: "issue a certificate",
            source,
        };
        let uri = identity.to_uri()?.as_str().try_into().map_err(failed)?;
        let server_name = SERVER_NAME.try_into().map_err(failed)?;
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = DistinguishedName::new();
        parameters
            .distinguished_name
            .push(DnType::CommonName, identity.id.as_str());
        parameters.subject_alt_names = vec![SanType::URI(uri)];
        if let Some(namespace) = identity.namespace_uri()? {
            let namespace = namespace.as_str().try_into().map_err(failed)?;
            parameters.subject_alt_names.push(SanType::URI(namespace));
        }
        let server_name = SanType::DnsName(server_name);
        parameters.subject_alt_names.push(server_name);
        parameters.is_ca = IsCa::ExplicitNoCa;
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        parameters.use_authority_key_identifier_extension = true;
        // The default serial is a hash of the key, which a renewed certificate shares.
        parameters.serial_number = Some(serial_number());
        set_validity(&mut parameters, validity);
        let issuer =
            Issuer::from_ca_cert_pem(&self.certificate_pem, self.key.pair()).map_err(failed)?;
        parameters
            .signed_by(public_key, &issuer)
            .map(|certificate| certificate.pem())
            .map_err(failed)
    }
}

impl fmt::Debug for ClusterCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterCa({})", self.cluster_id)
    }
}

fn set_validity(parameters: &mut CertificateParams, validity: Validity) {
    parameters.not_before = validity.not_before.into();
    parameters.not_after = validity.not_after.into();
}

fn serial_number() -> SerialNumber {
    let mut bytes = [0; 16];
    rand::rngs::OsRng
        .try_fill_bytes(&mut bytes)
        .expect("the system's random source works; without it no certificate can be made");
    // A serial number is a positive integer.
    bytes[0] &= 0x7f;
    bytes[0] |= 0x40;
    SerialNumber::from_slice(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Role;
    use mobula_core::id::Incarnation;
    use mobula_core::namespace::Namespace;
    use std::os::unix::fs::PermissionsExt;

    fn validity() -> Validity {
        Validity::for_ttl(Duration::from_secs(3600))
    }

    #[test]
    fn the_authority_survives_the_disk_and_its_file_is_private() {
        let directory = tempfile::tempdir().unwrap();
        let created = ClusterCa::load_or_create(directory.path(), "demo").unwrap();
        let file = directory.path().join(CA_FILE);
        assert_eq!(
            std::fs::metadata(&file).unwrap().permissions().mode() & 0o777,
            0o600
        );
        let loaded = ClusterCa::load_or_create(directory.path(), "demo").unwrap();
        assert_eq!(loaded.key_hash(), created.key_hash());
        assert_eq!(loaded.cluster_id(), "demo");
        assert!(matches!(
            ClusterCa::load_or_create(directory.path(), "other"),
            Err(CertificateError::OtherCluster { .. })
        ));
        std::fs::write(&file, "damaged").unwrap();
        assert!(ClusterCa::load_or_create(directory.path(), "demo").is_err());
    }

    #[test]
    fn a_joiner_gets_the_name_that_the_ca_decides() {
        let ca = ClusterCa::create("demo").unwrap();
        let key = PrivateKey::generate().unwrap();
        let node = Identity::new("demo", Role::Node, "node-1", 5);
        let certificate = ca
            .issue(&key.certificate_request().unwrap(), &node, validity())
            .unwrap();
        let credentials = Credentials::new(&certificate, key, ca.certificate_pem()).unwrap();
        assert_eq!(credentials.identity(), &node);
        assert_eq!(credentials.ca_key_hash(), ca.key_hash());
    }

    #[test]
    fn a_namespace_stands_beside_the_name_and_is_signed_too() {
        let ca = ClusterCa::create("demo").unwrap();
        let namespace = |incarnation| {
            Some(Namespace {
                name: "shop".to_owned(),
                incarnation: Incarnation(incarnation),
            })
        };
        let host = Identity::new("demo", Role::Host, "node-1.host-1", 5).with_job(3);
        let inside = host.clone().with_namespace(namespace(7));
        let credentials = ca.issue_with_new_key(&inside, validity()).unwrap();
        assert_eq!(credentials.identity(), &inside);
        let found = crate::identity::peer_identity(&credentials.chain()).unwrap();
        assert_eq!(found, inside);

        // The next certificate must be for the same life of the same namespace.
        let request = credentials.private_key().certificate_request().unwrap();
        for other in [host.clone(), host.with_namespace(namespace(8))] {
            let next = ca.issue(&request, &other, validity()).unwrap();
            assert!(credentials.renewed(&next).is_err(), "{other:?}");
        }
        let next = ca.issue(&request, &inside, validity()).unwrap();
        credentials.renewed(&next).unwrap();
        // Nobody but a job's process is in one.
        let node = Identity::new("demo", Role::Node, "node-1", 5).with_namespace(namespace(7));
        assert!(ca.issue_with_new_key(&node, validity()).is_err());
    }

    #[test]
    fn a_request_signed_by_another_key_is_refused() {
        let ca = ClusterCa::create("demo").unwrap();
        let request = PrivateKey::generate()
            .unwrap()
            .certificate_request()
            .unwrap();
        // Flip a bit at the very end, where the signature stands.
        let mut der =
            rustls_pki_types::CertificateSigningRequestDer::from_pem_slice(request.as_bytes())
                .unwrap()
                .to_vec();
        *der.last_mut().unwrap() ^= 1;
        use base64::Engine;
        let forged = format!(
            "-----BEGIN CERTIFICATE REQUEST-----\n{}\n-----END CERTIFICATE REQUEST-----\n",
            base64::engine::general_purpose::STANDARD.encode(der)
        );
        let node = Identity::new("demo", Role::Node, "node-1", 5);
        assert!(matches!(
            ca.issue(&forged, &node, validity()),
            Err(CertificateError::RequestSignature)
        ));
        assert!(ca.issue("nonsense", &node, validity()).is_err());
    }

    #[test]
    fn other_clusters_are_not_certified() {
        let ca = ClusterCa::create("demo").unwrap();
        let stranger = Identity::new("other", Role::Head, "head-1", 1);
        assert!(matches!(
            ca.issue_with_new_key(&stranger, validity()),
            Err(CertificateError::OtherCluster { .. })
        ));
        assert!(ClusterCa::create("Not A Name").is_err());
    }

    #[test]
    fn renewed_certificates_differ_in_their_serial_number() {
        let ca = ClusterCa::create("demo").unwrap();
        let request = PrivateKey::generate()
            .unwrap()
            .certificate_request()
            .unwrap();
        let node = Identity::new("demo", Role::Node, "node-1", 5);
        let serial = || {
            let pem = ca.issue(&request, &node, validity()).unwrap();
            let der = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
            X509Certificate::from_der(&der)
                .unwrap()
                .1
                .raw_serial()
                .to_vec()
        };
        assert_ne!(serial(), serial());
    }
}
