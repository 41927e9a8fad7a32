//! `mobula tokens`.

use mobula_wire::control::CreateTokenRequest;

use crate::args::{Target, TokensCommand};
use crate::connect::connect;
use crate::output::print_json;

pub(crate) async fn run(target: &Target, command: TokensCommand) -> anyhow::Result<()> {
    let TokensCommand::Create {
        role,
        ttl,
        uses,
        format,
    } = command;
    let cluster = connect(target).await?;
    let reply = cluster
        .control()
        .mutate("create a token", |mut client, stamp| {
            let request = CreateTokenRequest {
                stamp: Some(stamp),
                role: role.clone(),
                ttl_ms: ttl,
                uses,
            };
            async move { client.create_token(request).await }
        })
        .await?;
    if format.json {
        return print_json(&reply);
    }
    println!("{}", reply.token);
    Ok(())
}
