//! Tokens: the first ones of a cluster, and those that admins ask for. Only hashes are stored.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mobula_core::config::TokensConfig;
use mobula_core::id::SessionId;
use mobula_net::identity::{Role, Token};
use mobula_scheduler::limits::TOKEN_END_BYTES_MAX;
use mobula_scheduler::{Command, Role as TokenUse};

use crate::bootstrap::{CLIENT_TOKEN_FILE, WORKER_TOKEN_FILE, create_private_dir, write_private};
use crate::context::{CommandError, HeadContext};

const HOUR_MS: u64 = 3_600_000;

/// In whose name the bearer of the data directory's client token enters namespaces.
const FIRST_PRINCIPAL: &str = "operator";

/// How long to wait before trying again to store the first tokens.
const RETRY: Duration = Duration::from_millis(500);

/// Sees to it that the data directory holds a working token for each role.
pub(crate) async fn ensure(context: Arc<HeadContext>, data_dir: PathBuf, tokens: TokensConfig) {
    let wanted = [
        (WORKER_TOKEN_FILE, TokenUse::Worker, tokens.worker_ttl_hours),
        (CLIENT_TOKEN_FILE, TokenUse::Client, tokens.client_ttl_hours),
    ];
    for (file, role, ttl_hours) in wanted {
        let path = data_dir.join(file);
        while let Err(reason) = ensure_one(&context, &path, role, ttl_hours * HOUR_MS).await {
            tracing::warn!(path = %path.display(), %reason, "the first token cannot be made yet");
            tokio::time::sleep(RETRY).await;
        }
    }
}

async fn ensure_one(
    context: &HeadContext,
    path: &Path,
    role: TokenUse,
    ttl_ms: u64,
) -> Result<(), String> {
    if let Ok(text) = std::fs::read_to_string(path)
        && let Ok(token) = Token::parse(text.trim())
    {
        let reader = context
            .raft
            .read()
            .await
            .map_err(|error| error.to_string())?;
        let now_ms = context.clock.now_ms();
        if mobula_scheduler::check_token(&reader, &token.secret_hash(), now_ms).is_ok() {
            return Ok(());
        }
    }
    let wanted = Wanted {
        role,
        ttl_ms,
        uses: None,
        // The next one enters the same namespaces.
        principal: (role == TokenUse::Client).then(|| FIRST_PRINCIPAL.to_owned()),
    };
    let made = create(context, wanted)
        .await
        .map_err(|error| error.to_string())?;
    if let Some(parent) = path.parent() {
        create_private_dir(parent).map_err(|error| error.to_string())?;
    }
    write_private(path, &made.text).map_err(|error| error.to_string())
}

/// A token that was just made.
pub(crate) struct NewToken {
    /// Its name.
    pub(crate) id: String,
    /// What its bearer shows.
    pub(crate) text: String,
    pub(crate) expires_at_ms: u64,
}

/// A token as it is asked for.
pub(crate) struct Wanted {
    pub(crate) role: TokenUse,
    pub(crate) ttl_ms: u64,
    pub(crate) uses: Option<u32>,
    /// Whose namespaces its bearer enters, for a client's.
    pub(crate) principal: Option<String>,
}

/// Makes a token.
pub(crate) async fn create(
    context: &HeadContext,
    wanted: Wanted,
) -> Result<NewToken, CommandError> {
    let Wanted {
        role,
        ttl_ms,
        uses,
        principal,
    } = wanted;
    let token = Token::generate(shown_role(role), context.ca.key_hash());
    let text = token.to_text();
    let secret_hash = token.secret_hash();
    let expires_at_ms = context.clock.now_ms().saturating_add(ttl_ms);
    let id = format!("{role}-{}", hex_prefix(&secret_hash));
    let command = Command::CreateToken {
        id: id.clone(),
        secret_hash,
        role,
        expires_at_ms,
        uses,
        ends_with: end_of(&text).to_owned(),
        principal,
    };
    context
        .propose_scheduler(SessionId::INTERNAL, 0, &command)
        .await?;
    Ok(NewToken {
        id,
        text,
        expires_at_ms,
    })
}

/// The role that stands in a token's text, for whoever holds it; what it opens, the table says.
fn shown_role(role: TokenUse) -> Role {
    match role {
        TokenUse::Worker => Role::Node,
        TokenUse::Head => Role::Head,
        TokenUse::Client | TokenUse::Metrics => Role::Client,
    }
}

/// What lists show of a token's text, which is ASCII.
fn end_of(text: &str) -> &str {
    &text[text.len() - TOKEN_END_BYTES_MAX..]
}

/// Enough of the hash to tell tokens apart in a list; the hash is no secret.
fn hex_prefix(hash: &[u8; 32]) -> String {
    hash[..4].iter().map(|byte| format!("{byte:02x}")).collect()
}
