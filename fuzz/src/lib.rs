//! What the fuzz targets share; see `README.md`.

pub mod decoders;
#[cfg(feature = "domains")]
pub mod domain_decoders;
#[cfg(feature = "head")]
pub mod head_decoders;
#[cfg(feature = "domains")]
mod replicated;
pub mod wire_decoders;

/// Feeds the decoder called `name`.
///
/// # Panics
/// If there is none, or if it breaks one of the invariants of [`decoders`].
pub fn run(name: &str, bytes: &[u8]) {
    let all = decoders::DECODERS.iter();
    let all = all.chain(wire_decoders::WIRE_DECODERS);
    #[cfg(feature = "domains")]
    let all = all.chain(domain_decoders::DOMAIN_DECODERS);
    #[cfg(feature = "head")]
    let all = all.chain(head_decoders::HEAD_DECODERS);
    let mut all = all;
    let decoder = all.find(|decoder| decoder.name == name);
    (decoder.expect("the name of a decoder").run)(bytes);
}
