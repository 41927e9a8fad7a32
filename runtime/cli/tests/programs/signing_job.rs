//! The program of the test of the key holder: a job that asks it for signatures and decides with them.
//! `it/registry.rs` starts it, and judges.
//!
//! Arguments: the key's file, and the version of `digits` that becomes staging.

use mobula::prelude::*;
use mobula_actors::registry::client;
use mobula_actors::registry::decide::Decision;
use mobula_actors::registry::key_holder::{KeyHolder, KeyHolderCalls};
use mobula_actors::registry::search::Selector;
use mobula_actors::registry::stages::Stage;
use serde_json::{Value, json};

#[mobula::main]
async fn main(cluster: Cluster, args: Vec<String>) -> mobula::Result<Value> {
    let [file, version] = args.as_slice() else {
        return Err("give the key's file and a version".into());
    };
    let number = version.parse().map_err(failed)?;
    let holder = cluster.actor(KeyHolder::new(vec![file.clone()]));
    let holder = holder.isolated().spawn().await?;
    let key = holder.keys().await?.remove(0);
    let refused = holder.sign(key.clone(), b"anything".to_vec()).await;
    let refused = refused.err().map(|error| error.to_string());

    let view = client::view(&cluster, "digits", Selector::Number(number)).await?;
    let model = client::model(&cluster, "digits").await?;
    let mut decision = Decision::new(&model, &view, Stage::Staging, "by a job");
    let mut signatures = Vec::new();
    for statement in decision.statements() {
        let signed = holder.sign(key.clone(), statement.to_vec()).await;
        signatures.push(signed.map_err(failed)?);
    }
    decision.add_signatures(signatures);
    let shown = client::stage(&cluster, decision.into_change()).await?;
    let stage = shown.standing.stage.as_str();
    Ok(json!({ "key": key, "stage": stage, "refused": refused }))
}

fn failed(error: impl std::fmt::Display) -> mobula::Error {
    mobula::Error::User(error.to_string())
}
