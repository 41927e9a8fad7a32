//! Questions to a domain module, typed.

use mobula::Cluster;
use mobula_core::codec;
use mobula_core::control::ModuleId;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The largest answer of a module.
const ANSWER_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Asks a module.
pub(crate) async fn query<Q: Serialize, A: DeserializeOwned>(
    cluster: &Cluster,
    module: ModuleId,
    query: &Q,
) -> mobula::Result<A> {
    answer(&cluster.query(module, codec::encode_plain(query)).await?)
}

/// The value that a module's answer spells.
pub(crate) fn answer<A: DeserializeOwned>(bytes: &[u8]) -> mobula::Result<A> {
    codec::decode(bytes, ANSWER_BYTES_MAX)
        .map_err(|error| mobula::Error::User(format!("the head's answer: {error}")))
}
