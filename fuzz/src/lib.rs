//! What the fuzz targets share; see `README.md`.

pub mod decoders;
#[cfg(feature = "head")]
pub mod head_decoders;
mod replicated;
pub mod wire_decoders;

/// Feeds the decoder called `name`.
///
/// # Panics
/// If there is none, or if it breaks one of the invariants of [`decoders`].
pub fn run(name: &str, bytes: &[u8]) {
    let all = decoders::DECODERS.iter();
    let all = all.chain(wire_decoders::WIRE_DECODERS);
    #[cfg(feature = "head")]
    let all = all.chain(head_decoders::HEAD_DECODERS);
    let decoder = all.into_iter().find(|decoder| decoder.name == name);
    (decoder.expect("the name of a decoder").run)(bytes);
}
