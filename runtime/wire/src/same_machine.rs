//! Changing over from a QUIC connection to a Unix socket, where both processes are on one machine.
//!
//! The caller opens a stream of the lane [`SameMachine`](crate::hello::Lane::SameMachine), the host
//! answers with an [`Offer`], the caller connects to the socket and shows the ticket, and the host
//! shows the proof. Everything that proves something was said on the QUIC connection before.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Random bytes that only the two ends of one QUIC connection know.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub [u8; 32]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// A place at a host's Unix socket, good once and for a moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The socket's name in the abstract namespace.
    pub socket: String,
    /// The first bytes that the caller sends there: whom it was given to.
    pub ticket: Secret,
    /// The first bytes that the host sends there: that it is the one who offered.
    pub proof: Secret,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec;
    use crate::frame::FrameLimits;

    #[test]
    fn an_offer_survives_the_wire_and_shows_no_secret() {
        let offer = Offer {
            socket: "mobula/0123".into(),
            ticket: Secret([1; 32]),
            proof: Secret([2; 32]),
        };
        let bytes = codec::encode_plain(&offer);
        let limit_bytes = FrameLimits::HELLO.payload_bytes_max as usize;
        assert_eq!(codec::decode::<Offer>(&bytes, limit_bytes).unwrap(), offer);
        assert!(!format!("{offer:?}").contains("1, 1"));
    }
}
