//! TLS as Mobula uses it: 1.3 only, and names of roles instead of names of machines.
//!
//! Invariants:
//! 1. Both sides of every QUIC connection are certified by the cluster's CA. On the gRPC port the
//!    client may come without a certificate (it brings a token then); one that it does show must be
//!    good.
//! 2. A client checks the server's role, cluster and CA *within* the handshake: it never speaks to
//!    the wrong peer, not even a first message.
//! 3. Nothing is resumed and nothing is sent early, so every connection proves its certificates.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, OtherError, PeerIncompatible,
    RootCertStore, ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::identity::{self, CaKeyHash, Credentials, Role, ca_key_hash, peer_identity};

/// The DNS name in every certificate. Who a peer is stands in its URI name; this one only satisfies
/// the rules of TLS.
pub(crate) const SERVER_NAME: &str = "mobula";
/// Protocol name of control, Raft and call lanes.
pub(crate) const ALPN_CONTROL: &[u8] = b"mobula/1";
/// Protocol name of bulk lanes.
pub(crate) const ALPN_BULK: &[u8] = b"mobula-bulk/1";
/// Protocol name of the gRPC API.
pub(crate) const ALPN_API: &[u8] = b"h2";

/// Credentials that TLS cannot use. [`Credentials::new`] has checked them, so this is a defect.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TlsError {
    /// The TLS library refused.
    #[error("tls cannot use the credentials: {0}")]
    Library(#[from] Error),
    /// The CA's certificate cannot be a root of trust.
    #[error("tls cannot use the CA certificate: {0}")]
    Verifier(String),
}

/// Why a server is not the one we want to talk to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerRejection {
    /// Certified by somebody else than our cluster's CA.
    #[error(
        "the peer is certified by another CA than {expected}: this is another cluster, or a cluster \
         that was created anew; use a token of the cluster at this address"
    )]
    OtherCa {
        /// The CA that we trust.
        expected: CaKeyHash,
    },
    /// Its certificate has ended or not begun.
    #[error(
        "the peer's certificate is not valid now ({reason}); check the clocks of both machines"
    )]
    NotValidNow {
        /// What the library found.
        reason: String,
    },
    /// Of our cluster, but another kind of process.
    #[error("the peer is a {found}, expected a {expected}; check the address")]
    OtherRole {
        /// Whom we wanted.
        expected: Role,
        /// Whom we met.
        found: Role,
    },
    /// Its certificate carries the name of another cluster.
    #[error("the peer belongs to cluster `{found}`, expected `{expected}`")]
    OtherCluster {
        /// Our cluster.
        expected: String,
        /// The peer's.
        found: String,
    },
    /// Its certificate is of our CA, but names nobody we know.
    #[error("the peer's certificate has no usable name: {reason}")]
    NoName {
        /// What was found.
        reason: String,
    },
}

impl From<PeerRejection> for Error {
    fn from(rejection: PeerRejection) -> Error {
        Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(rejection))))
    }
}

/// Where a verifier leaves its verdict: transports flatten TLS errors to text on their way up.
#[derive(Debug, Clone, Default)]
pub(crate) struct RejectionSlot(Arc<Mutex<Option<PeerRejection>>>);

impl RejectionSlot {
    pub(crate) fn take(&self) -> Option<PeerRejection> {
        self.0.lock().take()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn roots(credentials: &Credentials) -> Result<Arc<RootCertStore>, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(credentials.ca_certificate().clone())?;
    Ok(Arc::new(roots))
}

/// For QUIC listeners: who connects must be certified by our CA.
pub(crate) fn server_config_mtls(
    credentials: &Credentials,
    alpn: &[u8],
) -> Result<ServerConfig, TlsError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(credentials)?, provider())
        .build()
        .map_err(|error| TlsError::Verifier(error.to_string()))?;
    server_config(credentials, verifier, alpn)
}

/// For the gRPC listener: who connects may show a certificate.
pub(crate) fn server_config_api(credentials: &Credentials) -> Result<ServerConfig, TlsError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(credentials)?, provider())
        .allow_unauthenticated()
        .build()
        .map_err(|error| TlsError::Verifier(error.to_string()))?;
    server_config(credentials, verifier, ALPN_API)
}

fn server_config(
    credentials: &Credentials,
    verifier: Arc<dyn rustls::server::danger::ClientCertVerifier>,
    alpn: &[u8],
) -> Result<ServerConfig, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(credentials.chain(), credentials.private_key_der())?;
    config.alpn_protocols = vec![alpn.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(config)
}

/// For members of the cluster: shows our certificate, accepts a server of `expected` role.
pub(crate) fn client_config_mtls(
    credentials: &Credentials,
    expected: Role,
    alpn: &[u8],
    slot: &RejectionSlot,
) -> Result<ClientConfig, TlsError> {
    let inner = WebPkiServerVerifier::builder_with_provider(roots(credentials)?, provider())
        .build()
        .map_err(|error| TlsError::Verifier(error.to_string()))?;
    let trust = Trust::Ca {
        inner,
        key_hash: credentials.ca_key_hash(),
        cluster: credentials.identity().cluster.clone(),
    };
    let config = client_builder(trust, expected, slot)?
        .with_client_auth_cert(credentials.chain(), credentials.private_key_der())?;
    Ok(finish_client(config, alpn))
}

/// For newcomers: shows nothing, accepts a server of `expected` role whose CA has this key hash.
pub(crate) fn client_config_pinned(
    ca_key_hash: CaKeyHash,
    expected: Role,
    alpn: &[u8],
    slot: &RejectionSlot,
) -> Result<ClientConfig, TlsError> {
    let trust = Trust::Pinned {
        key_hash: ca_key_hash,
    };
    let config = client_builder(trust, expected, slot)?.with_no_client_auth();
    Ok(finish_client(config, alpn))
}

fn client_builder(
    trust: Trust,
    expected: Role,
    slot: &RejectionSlot,
) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>, TlsError> {
    let provider = provider();
    let verifier = Verifier {
        trust,
        expected,
        slot: slot.clone(),
        provider: provider.clone(),
    };
    Ok(ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier)))
}

fn finish_client(mut config: ClientConfig, alpn: &[u8]) -> ClientConfig {
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config
}

/// What makes a server's certificate ours.
#[derive(Debug)]
enum Trust {
    /// It is signed by this CA.
    Ca {
        inner: Arc<WebPkiServerVerifier>,
        key_hash: CaKeyHash,
        cluster: String,
    },
    /// It is signed by the CA with this key, whose certificate the server must send along.
    Pinned { key_hash: CaKeyHash },
}

/// Standard chain checks of webpki against our one root, then our own on the name.
struct Verifier {
    trust: Trust,
    expected: Role,
    slot: RejectionSlot,
    provider: Arc<CryptoProvider>,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier")
            .field("trust", &self.trust)
            .field("expected", &self.expected)
            .finish_non_exhaustive()
    }
}

impl Verifier {
    /// The CA certificate with the pinned key, out of what the server sent. Anyone can send it: it
    /// proves nothing by itself, but once it is the only root the chain must lead to its key.
    fn pinned_root(
        &self,
        key_hash: CaKeyHash,
        intermediates: &[CertificateDer<'_>],
    ) -> Result<Arc<WebPkiServerVerifier>, Error> {
        let certificate = intermediates
            .iter()
            .find(|certificate| ca_key_hash(certificate).is_ok_and(|hash| hash == key_hash))
            .ok_or(PeerRejection::OtherCa { expected: key_hash })?;
        let mut roots = RootCertStore::empty();
        roots.add(certificate.clone().into_owned())?;
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|error| Error::General(error.to_string()))
    }

    fn verify(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        now: UnixTime,
    ) -> Result<(), Error> {
        let (inner, key_hash, cluster) = match &self.trust {
            Trust::Ca {
                inner,
                key_hash,
                cluster,
            } => (inner.clone(), *key_hash, Some(cluster)),
            Trust::Pinned { key_hash } => {
                (self.pinned_root(*key_hash, intermediates)?, *key_hash, None)
            }
        };
        inner
            .verify_server_cert(end_entity, intermediates, server_name, &[], now)
            .map_err(|error| explain(error, key_hash))?;
        let identity = peer_identity(std::slice::from_ref(end_entity)).map_err(|error| {
            PeerRejection::NoName {
                reason: error.to_string(),
            }
        })?;
        check_role_and_cluster(&identity, self.expected, cluster.map(String::as_str))?;
        Ok(())
    }
}

fn check_role_and_cluster(
    identity: &identity::Identity,
    expected: Role,
    cluster: Option<&str>,
) -> Result<(), PeerRejection> {
    if let Some(cluster) = cluster.filter(|cluster| *cluster != identity.cluster) {
        return Err(PeerRejection::OtherCluster {
            expected: cluster.to_owned(),
            found: identity.cluster.clone(),
        });
    }
    if identity.role != expected {
        return Err(PeerRejection::OtherRole {
            expected,
            found: identity.role,
        });
    }
    Ok(())
}

/// Our words for what webpki found, where we have some.
fn explain(error: Error, expected: CaKeyHash) -> Error {
    use CertificateError as Found;
    match error {
        // A CA of the same name with another key shows as a bad signature.
        Error::InvalidCertificate(Found::UnknownIssuer | Found::BadSignature) => {
            PeerRejection::OtherCa { expected }.into()
        }
        Error::InvalidCertificate(
            found @ (Found::Expired
            | Found::ExpiredContext { .. }
            | Found::NotValidYet
            | Found::NotValidYetContext { .. }),
        ) => PeerRejection::NotValidNow {
            reason: found.to_string(),
        }
        .into(),
        error => error,
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match self.verify(end_entity, intermediates, server_name, now) {
            Ok(()) => Ok(ServerCertVerified::assertion()),
            Err(error) => {
                if let Error::InvalidCertificate(CertificateError::Other(OtherError(inner))) =
                    &error
                {
                    *self.slot.0.lock() = inner.downcast_ref::<PeerRejection>().cloned();
                }
                Err(error)
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{ClusterCa, Identity, Validity};
    use std::time::Duration;

    fn credentials(ca: &ClusterCa, role: Role) -> Credentials {
        let identity = Identity::new(ca.cluster_id(), role, "one", 1);
        ca.issue_with_new_key(&identity, Validity::for_ttl(Duration::from_secs(3600)))
            .unwrap()
    }

    /// Both ends of a handshake in memory; returns the client's error.
    fn handshake(client: ClientConfig, server: ServerConfig) -> Result<(), Error> {
        let name = ServerName::try_from(SERVER_NAME).unwrap();
        let mut client = rustls::ClientConnection::new(Arc::new(client), name).unwrap();
        let mut server = rustls::ServerConnection::new(Arc::new(server)).unwrap();
        while client.is_handshaking() || server.is_handshaking() {
            let mut bytes = Vec::new();
            while client.wants_write() {
                client.write_tls(&mut bytes).unwrap();
            }
            server.read_tls(&mut &bytes[..]).unwrap();
            let server_result = server.process_new_packets();
            let mut bytes = Vec::new();
            while server.wants_write() {
                server.write_tls(&mut bytes).unwrap();
            }
            client.read_tls(&mut &bytes[..]).unwrap();
            client.process_new_packets()?;
            server_result?;
        }
        Ok(())
    }

    fn pinned(hash: CaKeyHash, role: Role) -> (ClientConfig, RejectionSlot) {
        let slot = RejectionSlot::default();
        (
            client_config_pinned(hash, role, ALPN_API, &slot).unwrap(),
            slot,
        )
    }

    #[test]
    fn a_pin_accepts_its_own_ca_only() {
        let (ours, theirs) = (
            ClusterCa::create("demo").unwrap(),
            ClusterCa::create("demo").unwrap(),
        );
        let server = || server_config_api(&credentials(&ours, Role::Head)).unwrap();
        let (client, _) = pinned(ours.key_hash(), Role::Head);
        handshake(client, server()).unwrap();
        let (client, slot) = pinned(theirs.key_hash(), Role::Head);
        handshake(client, server()).unwrap_err();
        let expected = theirs.key_hash();
        assert_eq!(slot.take(), Some(PeerRejection::OtherCa { expected }));
    }

    #[test]
    fn an_impostor_who_sends_our_ca_along_is_refused() {
        // Same cluster name, own CA; the chain shows our CA's certificate, which is public.
        let (ours, theirs) = (
            ClusterCa::create("demo").unwrap(),
            ClusterCa::create("demo").unwrap(),
        );
        let impostor = credentials(&theirs, Role::Head);
        let chain = vec![
            impostor.chain()[0].clone(),
            credentials(&ours, Role::Head).ca_certificate().clone(),
        ];
        let config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, impostor.private_key_der())
            .unwrap();
        let (mut client, slot) = pinned(ours.key_hash(), Role::Head);
        client.alpn_protocols.clear();
        handshake(client, config).unwrap_err();
        assert_eq!(
            slot.take(),
            Some(PeerRejection::OtherCa {
                expected: ours.key_hash()
            })
        );
    }

    #[test]
    fn a_server_of_another_role_is_refused() {
        let ca = ClusterCa::create("demo").unwrap();
        let server = server_config_api(&credentials(&ca, Role::Host)).unwrap();
        let (client, slot) = pinned(ca.key_hash(), Role::Head);
        handshake(client, server).unwrap_err();
        let expected = PeerRejection::OtherRole {
            expected: Role::Head,
            found: Role::Host,
        };
        assert_eq!(slot.take(), Some(expected));
    }

    #[test]
    fn tls_1_2_is_refused() {
        let ca = ClusterCa::create("demo").unwrap();
        let mut roots = RootCertStore::empty();
        let head = credentials(&ca, Role::Head);
        roots.add(head.ca_certificate().clone()).unwrap();
        let mut client = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS12])
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        client.alpn_protocols = vec![ALPN_API.to_vec()];
        let error = handshake(client, server_config_api(&head).unwrap()).unwrap_err();
        assert!(matches!(error, Error::AlertReceived(_)), "{error}");
    }
}
