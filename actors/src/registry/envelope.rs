//! Signed statements: DSSE envelopes (github.com/secure-systems-lab/dsse, v1.0.2) around in-toto statements.
//!
//! Invariants:
//! 1. What is signed is the statement that the registry itself would write: nothing of it is parsed to be
//!    believed, its bytes are compared.
//! 2. A key counts once, and only if it is known, not revoked, and has the role.
//! 3. One bad signature refuses the envelope: whoever sends it should know.

use std::collections::BTreeSet;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use mobula_core::error::{ErrorCode, Rejection};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::keys::{KeyRecord, Role};

/// The type of all statements here.
pub const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";

/// Signatures of one envelope: more people than decide about one model.
pub const SIGNATURES_MAX: usize = 16;

/// The largest statement: provenance with its hyperparameters.
pub const PAYLOAD_BYTES_MAX: usize = 64 * 1024;

/// The largest signature: ECDSA on P-256 in DER has up to 72 bytes.
const SIGNATURE_BYTES_MAX: usize = 128;

/// A signature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature {
    /// The key's name.
    pub key: String,
    /// Over [`pae`].
    pub bytes: Vec<u8>,
}

/// A statement and who signed it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope {
    /// The statement's bytes.
    pub payload: Vec<u8>,
    /// The signatures.
    pub signatures: Vec<Signature>,
}

/// What is signed of a payload: DSSE's pre-authentication encoding.
#[must_use]
pub fn pae(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let head = format!(
        "DSSEv1 {} {payload_type} {} ",
        payload_type.len(),
        payload.len()
    );
    [head.as_bytes(), payload].concat()
}

/// Why an envelope does not count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// Another statement was signed.
    #[error(
        "the {what} that was signed is not the one that this change needs: sign what \
         `mobula models promote` shows, and nothing else"
    )]
    OtherStatement {
        /// Which statement.
        what: &'static str,
    },
    /// Too many or too large signatures.
    #[error("an envelope has {found} signatures, the limit is {SIGNATURES_MAX}: leave some out")]
    TooMany {
        /// How many.
        found: usize,
    },
    /// No such key.
    #[error(
        "key {key} is not known: add it with `mobula keys add`, or sign with one of `mobula keys list`"
    )]
    UnknownKey {
        /// Its name.
        key: String,
    },
    /// The key was revoked.
    #[error("key {key} was revoked ({reason}): sign with another")]
    RevokedKey {
        /// Its name.
        key: String,
        /// Why.
        reason: String,
    },
    /// The key may not sign this.
    #[error("key {key} may not sign this: it lacks the role `{role}`")]
    WrongRole {
        /// Its name.
        key: String,
        /// The role that is needed.
        role: Role,
    },
    /// The key signed twice.
    #[error("key {key} signed more than once: {needed} different keys are needed")]
    RepeatedKey {
        /// Its name.
        key: String,
        /// How many are needed.
        needed: u32,
    },
    /// The signature is not that key's over this statement.
    #[error(
        "the signature of key {key} is not genuine: it was made with another key, or over something else"
    )]
    Forged {
        /// The key's name.
        key: String,
    },
    /// Not enough signatures.
    #[error(
        "{found} of the {needed} different keys that are needed have signed: have another one sign with \
         --envelope, or give --key more than once"
    )]
    TooFew {
        /// How many have signed.
        found: usize,
        /// How many are needed.
        needed: u32,
    },
}

impl From<SignatureError> for Rejection {
    fn from(error: SignatureError) -> Self {
        let code = match error {
            SignatureError::OtherStatement { .. } | SignatureError::TooMany { .. } => {
                ErrorCode::InvalidArgument
            }
            SignatureError::UnknownKey { .. } => ErrorCode::NotFound,
            SignatureError::TooFew { .. } => ErrorCode::FailedPrecondition,
            _ => ErrorCode::PermissionDenied,
        };
        Rejection::new(code, error.to_string())
    }
}

/// What an envelope is checked against.
#[derive(Debug, Clone, Copy)]
pub struct Demand<'a> {
    /// What the statement is, for errors.
    pub what: &'static str,
    /// The statement's bytes.
    pub statement: &'a [u8],
    /// The role that each key needs.
    pub role: Role,
    /// How many different keys.
    pub signatures: u32,
}

impl Envelope {
    /// Checks everything about it; the names of the keys that signed, in order of their names.
    pub fn check(
        &self,
        demand: Demand<'_>,
        find_key: impl Fn(&str) -> Option<KeyRecord>,
    ) -> Result<Vec<String>, SignatureError> {
        let Demand {
            what,
            statement,
            role,
            signatures: needed,
        } = demand;
        if self.payload != statement {
            return Err(SignatureError::OtherStatement { what });
        }
        if self.signatures.len() > SIGNATURES_MAX {
            let found = self.signatures.len();
            return Err(SignatureError::TooMany { found });
        }
        let message = pae(PAYLOAD_TYPE, &self.payload);
        let mut signers = BTreeSet::new();
        for signature in &self.signatures {
            let name = || signature.key.chars().take(80).collect::<String>();
            let Some(record) = find_key(&signature.key) else {
                return Err(SignatureError::UnknownKey { key: name() });
            };
            let key = record.id.clone();
            if let Some(revocation) = record.revoked {
                let reason = revocation.reason;
                return Err(SignatureError::RevokedKey { key, reason });
            }
            if !record.may(role) {
                return Err(SignatureError::WrongRole { key, role });
            }
            let is_genuine = signature.bytes.len() <= SIGNATURE_BYTES_MAX
                && record.public_key().verifies(&message, &signature.bytes);
            if !is_genuine {
                return Err(SignatureError::Forged { key });
            }
            if !signers.insert(key.clone()) {
                return Err(SignatureError::RepeatedKey { key, needed });
            }
        }
        if signers.len() < needed as usize {
            let found = signers.len();
            return Err(SignatureError::TooFew { found, needed });
        }
        Ok(signers.into_iter().collect())
    }

    /// As JSON, with DSSE's field names.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let signatures: Vec<Value> = self
            .signatures
            .iter()
            .map(|one| json!({ "keyid": one.key, "sig": STANDARD.encode(&one.bytes) }))
            .collect();
        json!({
            "payload": STANDARD.encode(&self.payload),
            "payloadType": PAYLOAD_TYPE,
            "signatures": signatures,
        })
    }

    /// What [`Envelope::to_json`] wrote.
    pub fn from_json(value: &Value) -> Result<Self, EnvelopeError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Json {
            payload: String,
            payload_type: String,
            signatures: Vec<SignatureJson>,
        }
        #[derive(Deserialize)]
        struct SignatureJson {
            #[serde(default)]
            keyid: String,
            sig: String,
        }
        let json = Json::deserialize(value).map_err(|error| EnvelopeError(error.to_string()))?;
        if json.payload_type != PAYLOAD_TYPE {
            let shown: String = json.payload_type.chars().take(80).collect();
            return Err(EnvelopeError(format!(
                "its payload is `{shown}`, not `{PAYLOAD_TYPE}`"
            )));
        }
        let decode = |text: &str| {
            STANDARD
                .decode(text)
                .map_err(|error| EnvelopeError(error.to_string()))
        };
        let signatures = json.signatures.iter().map(|one| {
            let bytes = decode(&one.sig)?;
            let key = one.keyid.clone();
            Ok(Signature { key, bytes })
        });
        Ok(Envelope {
            payload: decode(&json.payload)?,
            signatures: signatures.collect::<Result<_, EnvelopeError>>()?,
        })
    }
}

/// Why a text is no envelope.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a DSSE envelope with an in-toto statement: {0}")]
pub struct EnvelopeError(pub(super) String);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::signer::tests::{key, record_of};
    use crate::registry::signer::{Signer, sign};

    #[test]
    fn what_is_signed_is_that_of_the_specification() {
        // github.com/secure-systems-lab/dsse/blob/v1.0.2/protocol.md, "Test Vectors".
        let encoded = pae("http://example.com/HelloWorld", b"hello world");
        assert_eq!(
            encoded,
            b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
        );
    }

    #[test]
    fn each_way_to_be_wrong_has_an_error_of_its_own() {
        let (one, two, stage, stranger) = (key(), key(), key(), key());
        let revoked = key();
        let mut records = [
            record_of(&one, &[Role::Release]),
            record_of(&two, &[Role::Release]),
            record_of(&stage, &[Role::Stage]),
            record_of(&revoked, &[Role::Release]),
        ];
        records[3].revoked = Some(crate::registry::keys::Revocation {
            revoked_ms: 1,
            reason: "lost".to_owned(),
        });
        let find = |id: &str| records.iter().find(|record| record.id == id).cloned();
        let demand = Demand {
            what: "promotion",
            statement: b"{}",
            role: Role::Release,
            signatures: 2,
        };
        let signed = |keys: &[&dyn Signer]| {
            let mut envelope = Envelope {
                payload: b"{}".to_vec(),
                signatures: Vec::new(),
            };
            for key in keys {
                sign(*key, &mut envelope).unwrap();
            }
            envelope
        };
        let id = |key: &dyn Signer| key.public_key().id();
        let mut both = [id(&one), id(&two)];
        both.sort();
        assert_eq!(signed(&[&one, &two]).check(demand, find).unwrap(), both);
        let refused = |envelope: Envelope| envelope.check(demand, find).unwrap_err();

        let (found, needed) = (1, 2);
        assert_eq!(
            refused(signed(&[&one])),
            SignatureError::TooFew { found, needed }
        );
        let mut repeated = signed(&[&one, &two]);
        repeated.signatures.push(repeated.signatures[0].clone());
        let key = id(&one);
        assert_eq!(
            refused(repeated),
            SignatureError::RepeatedKey { key, needed }
        );
        let key = id(&stranger);
        assert_eq!(
            refused(signed(&[&one, &stranger])),
            SignatureError::UnknownKey { key }
        );
        let (key, reason) = (id(&revoked), "lost".to_owned());
        assert_eq!(
            refused(signed(&[&revoked])),
            SignatureError::RevokedKey { key, reason }
        );
        let (key, role) = (id(&stage), Role::Release);
        assert_eq!(
            refused(signed(&[&stage])),
            SignatureError::WrongRole { key, role }
        );
        let mut forged = signed(&[&one, &two]);
        forged.signatures[1].bytes = forged.signatures[0].bytes.clone();
        let key = id(&two);
        assert_eq!(refused(forged), SignatureError::Forged { key });
        let mut other = signed(&[&one, &two]);
        other.payload = b"{} ".to_vec();
        let what = "promotion";
        assert_eq!(refused(other), SignatureError::OtherStatement { what });
        let mut many = signed(&[&one]);
        many.signatures = vec![many.signatures[0].clone(); SIGNATURES_MAX + 1];
        let found = SIGNATURES_MAX + 1;
        assert_eq!(refused(many), SignatureError::TooMany { found });
    }

    #[test]
    fn an_envelope_survives_as_json() {
        let mut envelope = Envelope {
            payload: b"{\"a\":1}".to_vec(),
            signatures: Vec::new(),
        };
        sign(&key(), &mut envelope).unwrap();
        let json = envelope.to_json();
        assert_eq!(Envelope::from_json(&json).unwrap(), envelope);
        let mut other = json.clone();
        other["payloadType"] = "text/plain".into();
        assert!(Envelope::from_json(&other).is_err());
        other = json;
        other["payload"] = "?".into();
        assert!(Envelope::from_json(&other).is_err());
    }
}
