//! `mobula serve tokens`.

use std::time::Duration;

use mobula::Cluster;
use mobula_actors::serving::access::state::{Access, Command, Token};
use mobula_actors::serving::client;
use mobula_core::clock::Clock;
use serde::Serialize;

use crate::args::{Format, ServeTokensCommand};
use crate::clock::SystemClock;
use crate::output::{age, or_dash, print_json, print_table};

/// A token as `--json` prints it.
#[derive(Serialize)]
struct TokenJson<'a> {
    name: &'a str,
    created_ms: u64,
    expires_ms: Option<u64>,
    expired: bool,
    rate_limit: Option<u32>,
}

impl<'a> TokenJson<'a> {
    fn of(token: &'a Token, now_ms: u64) -> Self {
        TokenJson {
            name: &token.name,
            created_ms: token.created_ms,
            expires_ms: token.expires_ms,
            expired: token.is_expired(now_ms),
            rate_limit: token.per_second,
        }
    }
}

/// A new token as `--json` prints it.
#[derive(Serialize)]
struct NewTokenJson<'a> {
    endpoint: &'a str,
    name: &'a str,
    token: &'a str,
    expires_ms: Option<u64>,
    rate_limit: Option<u32>,
}

pub(super) async fn run(cluster: &Cluster, command: ServeTokensCommand) -> anyhow::Result<()> {
    match command {
        ServeTokensCommand::Add {
            endpoint,
            name,
            ttl,
            rate_limit,
            format,
        } => {
            let ttl = ttl.map(Duration::from_millis);
            let added = client::add_token(cluster, &endpoint, &name, ttl, rate_limit).await?;
            let (token, access) = added;
            let made = access.tokens.iter().find(|token| token.name == name);
            if format.json {
                return print_json(&NewTokenJson {
                    endpoint: &endpoint,
                    name: &name,
                    token: &token,
                    expires_ms: made.and_then(|token| token.expires_ms),
                    rate_limit,
                });
            }
            println!("{token}");
            Ok(())
        }
        ServeTokensCommand::List { endpoint, format } => {
            let access = client::access(cluster, &endpoint).await?;
            print(&access, format)
        }
        ServeTokensCommand::Revoke {
            endpoint,
            name,
            format,
        } => {
            let command = Command::RevokeToken {
                endpoint: endpoint.clone(),
                name: name.clone(),
            };
            let access = client::change_access(cluster, command).await?;
            if format.json {
                return print(&access, format);
            }
            println!("{name} is revoked");
            if access.tokens.is_empty() {
                println!(
                    "{endpoint} has no token left: make one with `mobula serve tokens add {endpoint} NAME`"
                );
            }
            Ok(())
        }
    }
}

fn print(access: &Access, format: Format) -> anyhow::Result<()> {
    let now_ms = SystemClock.now_ms();
    if format.json {
        let tokens = access.tokens.iter();
        let tokens: Vec<TokenJson<'_>> = tokens.map(|token| TokenJson::of(token, now_ms)).collect();
        return print_json(&tokens);
    }
    let rows: Vec<Vec<String>> = access
        .tokens
        .iter()
        .map(|token| {
            let expires = match token.expires_ms {
                None => "never".to_owned(),
                Some(_) if token.is_expired(now_ms) => "expired".to_owned(),
                Some(expires_ms) => format!("in {}", age(now_ms, expires_ms)),
            };
            vec![
                token.name.clone(),
                age(token.created_ms, now_ms),
                expires,
                or_dash(token.per_second.map(|rate| format!("{rate} a second"))),
            ]
        })
        .collect();
    print_table(&["NAME", "AGE", "EXPIRES", "RATE LIMIT"], &rows);
    Ok(())
}
