//! `mobula tokens`.

use mobula::Cluster;
use mobula_core::clock::Clock;
use mobula_wire::control::{
    CreateTokenReply, CreateTokenRequest, ListTokensRequest, RevokeTokenRequest, TokenInfo,
};

use crate::args::{Format, Target, TokensCommand};
use crate::clock::SystemClock;
use crate::connect::connect;
use crate::output::{age, or_dash, print_json, print_table};

pub(crate) async fn run(target: &Target, command: TokensCommand) -> anyhow::Result<()> {
    let cluster = connect(target).await?;
    match command {
        TokensCommand::Create {
            role,
            ttl: ttl_ms,
            uses,
            principal,
            format,
        } => {
            let request = CreateTokenRequest {
                stamp: None,
                role,
                ttl_ms,
                uses,
                principal,
            };
            let made = create(&cluster, request).await?;
            if format.json {
                return print_json(&made);
            }
            println!("{}", made.token);
            Ok(())
        }
        TokensCommand::List(format) => list(&cluster, format).await,
        TokensCommand::Revoke { id, format } => revoke(&cluster, id, format).await,
    }
}

/// Makes a token; `request` needs no stamp.
pub(crate) async fn create(
    cluster: &Cluster,
    request: CreateTokenRequest,
) -> anyhow::Result<CreateTokenReply> {
    let reply = cluster
        .control()
        .mutate("create a token", |mut client, stamp| {
            let request = CreateTokenRequest {
                stamp: Some(stamp),
                ..request.clone()
            };
            async move { client.create_token(request).await }
        })
        .await?;
    Ok(reply)
}

async fn list(cluster: &Cluster, format: Format) -> anyhow::Result<()> {
    let reply = cluster
        .control()
        .read("list tokens", |mut client| async move {
            client.list_tokens(ListTokensRequest {}).await
        })
        .await?;
    if format.json {
        return print_json(&reply.tokens);
    }
    let now_ms = SystemClock.now_ms();
    let rows: Vec<Vec<String>> = reply
        .tokens
        .iter()
        .map(|token| row(token, now_ms))
        .collect();
    print_table(
        &[
            "ID",
            "ROLE",
            "PRINCIPAL",
            "EXPIRES",
            "USES LEFT",
            "ENDS WITH",
        ],
        &rows,
    );
    Ok(())
}

fn row(token: &TokenInfo, now_ms: u64) -> Vec<String> {
    let expires = if token.expired {
        "expired".to_owned()
    } else {
        format!("in {}", age(now_ms, token.expires_at_ms))
    };
    vec![
        token.id.clone(),
        token.role.clone(),
        or_dash(token.principal.as_ref()),
        expires,
        or_dash(token.uses_left),
        format!("…{}", token.ends_with),
    ]
}

async fn revoke(cluster: &Cluster, id: String, format: Format) -> anyhow::Result<()> {
    cluster
        .control()
        .mutate("revoke a token", |mut client, stamp| {
            let request = RevokeTokenRequest {
                stamp: Some(stamp),
                id: id.clone(),
            };
            async move { client.revoke_token(request).await }
        })
        .await?;
    if format.json {
        return print_json(&serde_json::json!({ "id": id }));
    }
    println!("{id} is revoked");
    Ok(())
}
