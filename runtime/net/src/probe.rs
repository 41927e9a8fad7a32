//! Whether anybody listens at a UDP port, as far as its machine says.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::net::UdpSocket;

/// Longer than a round trip anywhere; a machine that says nothing costs no more than this.
const PATIENCE: Duration = Duration::from_millis(250);

/// Sends an empty datagram, which QUIC ignores, and waits for the answer of the machine behind
/// `address` that nobody takes datagrams there. False where nothing is heard: somebody listens, or
/// the answer or the machine is lost.
///
/// The answer is not authenticated. Act on it only together with another sign of the same.
pub async fn nobody_listens(address: SocketAddr) -> bool {
    let any: SocketAddr = match address {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let asking = async {
        let socket = UdpSocket::bind(any).await?;
        socket.connect(address).await?;
        socket.send(&[]).await?;
        socket.recv(&mut [0; 1]).await
    };
    let heard = tokio::time::timeout(PATIENCE, asking).await;
    matches!(heard, Ok(Err(error)) if error.kind() == std::io::ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_closed_port_is_told_from_an_open_one() {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = socket.local_addr().unwrap();
        assert!(!nobody_listens(address).await);
        drop(socket);
        assert!(nobody_listens(address).await);
    }
}
