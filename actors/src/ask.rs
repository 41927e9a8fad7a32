//! Questions to a domain module, typed.

use mobula::Cluster;
use mobula_core::codec;
use mobula_core::control::ModuleId;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The largest answer of a module, which is what one message of the control API holds. Lists that
/// may be longer come in pages.
const ANSWER_BYTES_MAX: usize = 5 * 1024 * 1024;

/// Asks a module; `operation` says in errors what for.
pub(crate) async fn query<Q: Serialize, A: DeserializeOwned>(
    cluster: &Cluster,
    module: ModuleId,
    operation: &str,
    query: &Q,
) -> mobula::Result<A> {
    let asked = cluster.query(module, codec::encode_plain(query)).await;
    answer(&named(operation, asked)?)
}

/// Applies a module's command exactly once; `operation` says in errors what for.
pub(crate) async fn apply<C: Serialize>(
    cluster: &Cluster,
    module: ModuleId,
    operation: &str,
    command: &C,
) -> mobula::Result<Vec<u8>> {
    named(
        operation,
        cluster.apply(module, codec::encode_plain(command)).await,
    )
}

fn named<T>(operation: &str, result: mobula::Result<T>) -> mobula::Result<T> {
    result.map_err(|error| match error {
        mobula::Error::Control {
            code,
            message,
            executed,
            ..
        } => mobula::Error::Control {
            operation: operation.to_owned(),
            code,
            message,
            executed,
        },
        other => other,
    })
}

/// The value that a module's answer spells.
pub(crate) fn answer<A: DeserializeOwned>(bytes: &[u8]) -> mobula::Result<A> {
    codec::decode(bytes, ANSWER_BYTES_MAX)
        .map_err(|error| mobula::Error::User(format!("the head's answer: {error}")))
}
