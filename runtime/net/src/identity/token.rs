//! Tokens: the one thing a newcomer must be given. A token carries the secret that lets it in *and*
//! the hash of the CA's key, so that already the first contact knows whom it talks to.
//!
//! ```text
//! mbl1.<role>.<BLAKE3 of the CA's public key, base64url>.<secret, 256 bits, base64url>
//! ```
//!
//! Scope, expiry and uses are the head's record under [`Token::secret_hash`]; the text has none of
//! them, so nothing in it can be altered to gain anything.

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::TryRngCore;

use super::{CaKeyHash, Role};

const PREFIX: &str = "mbl1";
/// Prefix, role, two times 43 characters and three dots are 100; the rest is room for white space.
const TEXT_BYTES_MAX: usize = 128;

/// A join or client token. Whoever knows its text may use it: it is never printed by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    role: Role,
    ca_key_hash: CaKeyHash,
    secret: [u8; 32],
}

/// Why a text is not a token. None of these repeats the text, which may be nearly a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not of our form at all.
    #[error(
        "this is not a mobula token: expected `mbl1.<role>.<ca hash>.<secret>`, as `mobula tokens \
         create` prints it; check that it was copied whole"
    )]
    Form,
    /// Of a later release.
    #[error("the token is of format `{prefix}`, this release reads `{PREFIX}`: upgrade this side")]
    Version {
        /// The format it names.
        prefix: String,
    },
    /// Not a role that joins with a token.
    #[error("the token names the role `{role}`: expected head, node or client")]
    Role {
        /// What it names.
        role: String,
    },
    /// A part is damaged.
    #[error("the token's {part} is damaged: expected 43 base64url characters; copy it again")]
    Damaged {
        /// Which part.
        part: &'static str,
    },
}

impl Token {
    /// A new token with a secret from the system's random source. Hosts join through their agent and
    /// have no tokens: one made for them would not parse.
    ///
    /// # Panics
    /// If the system has no randomness to give: nothing secure can go on then.
    #[must_use]
    pub fn generate(role: Role, ca_key_hash: CaKeyHash) -> Self {
        let mut secret = [0; 32];
        rand::rngs::OsRng
            .try_fill_bytes(&mut secret)
            .expect("the system's random source works; without it no secret can be made");
        Token {
            role,
            ca_key_hash,
            secret,
        }
    }

    /// Reads what [`Token::to_text`] wrote; white space around it is forgiven.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        if text.len() > TEXT_BYTES_MAX {
            return Err(TokenError::Form);
        }
        let (prefix, rest) = text.split_once('.').ok_or(TokenError::Form)?;
        if prefix != PREFIX {
            let ours_later = prefix.strip_prefix("mbl").is_some_and(|version| {
                !version.is_empty() && version.bytes().all(|byte| byte.is_ascii_digit())
            });
            return Err(match ours_later {
                true => TokenError::Version {
                    prefix: prefix.to_owned(),
                },
                false => TokenError::Form,
            });
        }
        let [role, hash, secret] = rest
            .split('.')
            .collect::<Vec<_>>()
            .try_into()
            .map_err(|_: Vec<&str>| TokenError::Form)?;
        let role = match role.parse() {
            Ok(role @ (Role::Head | Role::Node | Role::Client)) => role,
            // A host gets its certificate through its agent.
            Ok(Role::Host) | Err(_) => {
                return Err(TokenError::Role {
                    role: role.to_owned(),
                });
            }
        };
        Ok(Token {
            role,
            ca_key_hash: CaKeyHash(decode_part("CA hash", hash)?),
            secret: decode_part("secret", secret)?,
        })
    }

    /// The text to hand over. It is a secret.
    #[must_use]
    pub fn to_text(&self) -> String {
        let hash = URL_SAFE_NO_PAD.encode(self.ca_key_hash.0);
        let secret = URL_SAFE_NO_PAD.encode(self.secret);
        format!("{PREFIX}.{}.{hash}.{secret}", self.role)
    }

    /// The role it lets its bearer take. What counts is the head's record, not this.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// The CA that the head must prove to be certified by.
    #[must_use]
    pub fn ca_key_hash(&self) -> CaKeyHash {
        self.ca_key_hash
    }

    /// What the head stores and looks up: BLAKE3 over role and secret, so that a stolen table opens
    /// no doors. The secret has 256 random bits, hence no salt and no slow hash.
    #[must_use]
    pub fn secret_hash(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("mobula 2026-01 token secret");
        hasher
            .update(self.role.as_str().as_bytes())
            .update(&[0])
            .update(&self.secret);
        *hasher.finalize().as_bytes()
    }
}

fn decode_part(part: &'static str, text: &str) -> Result<[u8; 32], TokenError> {
    URL_SAFE_NO_PAD
        .decode(text)
        .ok()
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or(TokenError::Damaged { part })
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Token")
            .field("role", &self.role)
            .field("ca_key_hash", &self.ca_key_hash)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token() -> Token {
        Token::generate(Role::Node, CaKeyHash([7; 32]))
    }

    #[test]
    fn tokens_parse_what_they_print() {
        let token = token();
        let text = token.to_text();
        assert!(text.starts_with("mbl1.node."));
        let parsed = Token::parse(&format!("  {text}\n")).unwrap();
        assert_eq!(parsed, token);
        assert_eq!(parsed.secret_hash(), token.secret_hash());
        assert_ne!(Token::generate(Role::Node, CaKeyHash([7; 32])), token);
    }

    #[test]
    fn a_token_for_one_role_is_not_one_for_another() {
        let text = token().to_text().replace(".node.", ".head.");
        assert_ne!(
            Token::parse(&text).unwrap().secret_hash(),
            token().secret_hash()
        );
    }

    #[test]
    fn errors_say_what_is_wrong() {
        let text = token().to_text();
        let damaged = &text[..text.len() - 1];
        let cases = [
            ("", TokenError::Form),
            ("hunter2", TokenError::Form),
            ("mbl1.node", TokenError::Form),
            (
                "mbl2.node.x.y",
                TokenError::Version {
                    prefix: "mbl2".into(),
                },
            ),
            (
                "mbl1.host.x.y",
                TokenError::Role {
                    role: "host".into(),
                },
            ),
            (
                "mbl1.king.x.y",
                TokenError::Role {
                    role: "king".into(),
                },
            ),
            ("mbl1.node.x.y", TokenError::Damaged { part: "CA hash" }),
            (damaged, TokenError::Damaged { part: "secret" }),
        ];
        for (text, expected) in cases {
            assert_eq!(Token::parse(text).unwrap_err(), expected, "{text}");
        }
    }

    #[test]
    fn debug_shows_no_secret() {
        let token = token();
        let secret = URL_SAFE_NO_PAD.encode(token.secret);
        let shown = format!("{token:?}");
        assert!(
            !shown.contains(&secret) && !shown.contains("secret"),
            "{shown}"
        );
    }

    proptest! {
        #[test]
        fn any_text_parses_or_is_refused(text in "\\PC*") {
            let _ = Token::parse(&text);
            let _ = Token::parse(&format!("mbl1.{text}"));
        }
    }
}
