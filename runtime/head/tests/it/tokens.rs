//! Tokens from their making to their end.

use mobula_wire::control as api;

use crate::one_head::{Api, OneHead, code, open_session};

async fn create(client: &mut Api, role: &str) -> api::CreateTokenReply {
    let request = api::CreateTokenRequest {
        stamp: None,
        role: role.into(),
        ttl_ms: 60_000,
        uses: 0,
        principal: None,
    };
    client.create_token(request).await.unwrap().into_inner()
}

async fn list(client: &mut Api) -> Vec<api::TokenInfo> {
    let request = api::ListTokensRequest {};
    client
        .list_tokens(request)
        .await
        .unwrap()
        .into_inner()
        .tokens
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_token_opens_nothing_from_then_on() {
    let head = OneHead::start().await;
    let mut admin = head.client().await;
    let session = open_session(&mut admin).await;
    let made = create(&mut admin, "client").await;
    let mut bearer = head.client_with(&made.token).await;
    list(&mut bearer).await;
    let (certificate, _) = head.join(made.token.clone(), "laptop").await.unwrap();

    let listed = list(&mut admin).await;
    let shown = listed.iter().find(|token| token.id == made.id).unwrap();
    assert_eq!(shown.role, "client");
    assert_eq!(shown.expires_at_ms, made.expires_at_ms);
    assert!(!shown.expired);
    assert_eq!(shown.ends_with.len(), 4);
    assert!(made.token.ends_with(&shown.ends_with));

    let revoke = api::RevokeTokenRequest {
        stamp: Some(api::Stamp {
            session,
            sequence: 1,
        }),
        id: made.id.clone(),
    };
    admin.revoke_token(revoke.clone()).await.unwrap();
    // Sent again it has the first answer; a new one finds nothing to revoke.
    admin.revoke_token(revoke.clone()).await.unwrap();
    let fresh = api::RevokeTokenRequest {
        stamp: None,
        ..revoke
    };
    let refused = admin.revoke_token(fresh).await.unwrap_err();
    assert_eq!(code(&refused), "not_found", "{refused}");

    // The connection that it opened is still there, and is of no use any more.
    let request = api::ListTokensRequest {};
    let refused = bearer.list_tokens(request).await.unwrap_err();
    assert_eq!(code(&refused), "unauthenticated", "{refused}");
    let refused = head.join(made.token, "laptop").await.unwrap_err();
    assert_eq!(code(&refused), "unauthenticated", "{refused}");
    // Nor is the certificate that it was exchanged for, here.
    let mut certified = head.with_certificate(certificate).await;
    let request = api::ListTokensRequest {};
    let refused = certified.list_tokens(request).await.unwrap_err();
    assert_eq!(code(&refused), "permission_denied", "{refused}");
    let remaining = list(&mut admin).await;
    assert!(remaining.iter().all(|token| token.id != made.id));
    head.stop().await;
}
