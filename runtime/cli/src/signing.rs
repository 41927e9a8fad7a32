//! What signs for the command line: a key in a file that it reads itself, or the key holder, an actor that gives
//! signatures and no keys.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, bail};
use mobula::Cluster;
use mobula_actors::registry::envelope::{Envelope, Signature};
use mobula_actors::registry::key_holder::{self, KeyHolderCalls};
use mobula_actors::registry::signer::{self, PrivateKey};

/// How a key is named that the key holder has.
const HELD: &str = "holder:";

/// The fewest digits that name a key: nobody types all 64.
pub(crate) const PREFIX_MIN: usize = 8;

/// What signs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum KeySource {
    /// The private key in this file.
    File(PathBuf),
    /// The key holder, with the key whose name begins so.
    Held(String),
}

impl FromStr for KeySource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(key) = text.strip_prefix(HELD) else {
            return Ok(KeySource::File(PathBuf::from(text)));
        };
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if key.len() < PREFIX_MIN || !key.bytes().all(is_digit) {
            return Err(format!(
                "write `{HELD}` and {PREFIX_MIN} hexadecimal digits or more of the key's name"
            ));
        }
        Ok(KeySource::Held(key.to_owned()))
    }
}

impl KeySource {
    /// One signature of each of `statements`.
    pub(crate) async fn sign(
        &self,
        cluster: &Cluster,
        statements: &[&[u8]],
    ) -> anyhow::Result<Vec<Signature>> {
        match self {
            KeySource::File(path) => sign_with_file(path, statements),
            KeySource::Held(prefix) => sign_with_holder(cluster, prefix, statements).await,
        }
    }

    /// `statement` with its signature.
    pub(crate) async fn envelope(
        &self,
        cluster: &Cluster,
        statement: Vec<u8>,
    ) -> anyhow::Result<Envelope> {
        let signatures = self.sign(cluster, &[&statement]).await?;
        Ok(Envelope {
            payload: statement,
            signatures,
        })
    }
}

fn sign_with_file(path: &Path, statements: &[&[u8]]) -> anyhow::Result<Vec<Signature>> {
    let key = PrivateKey::open(path)?;
    let mut signatures = Vec::new();
    for statement in statements {
        let mut envelope = Envelope {
            payload: statement.to_vec(),
            signatures: Vec::new(),
        };
        signer::sign(&key, &mut envelope)?;
        signatures.append(&mut envelope.signatures);
    }
    Ok(signatures)
}

async fn sign_with_holder(
    cluster: &Cluster,
    prefix: &str,
    statements: &[&[u8]],
) -> anyhow::Result<Vec<Signature>> {
    let holder = key_holder::find(cluster).await.context(
        "no key holder runs: start one with `mobula keys hold FILE`, or name a key's file",
    )?;
    let keys = holder.keys().await?;
    let mut found = keys.into_iter().filter(|key| key.starts_with(prefix));
    let Some(key) = found.next() else {
        bail!("the key holder has no key that begins with `{prefix}`: see `mobula keys list`");
    };
    if found.next().is_some() {
        bail!("the key holder has more than one key that begins with `{prefix}`: give more digits");
    }
    let mut signatures = Vec::new();
    for statement in statements {
        signatures.push(holder.sign(key.clone(), statement.to_vec()).await?);
    }
    Ok(signatures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_a_file_or_one_that_is_held() {
        let parse = |text: &str| text.parse::<KeySource>();
        assert_eq!(parse("ann"), Ok(KeySource::File(PathBuf::from("ann"))));
        let held = KeySource::Held("3f9a01bc".to_owned());
        assert_eq!(parse("holder:3f9a01bc"), Ok(held));
        for wrong in ["holder:", "holder:3f9a01b", "holder:3F9A01BC"] {
            assert!(
                parse(wrong).unwrap_err().contains("8 hexadecimal"),
                "{wrong}"
            );
        }
    }
}
