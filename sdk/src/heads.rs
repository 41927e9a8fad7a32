//! Where the heads are, as far as this process knows, and which of them to ask.
//!
//! Invariants:
//! 1. It never becomes empty, and is bounded.
//! 2. Whoever is named as leader is asked next; without a name, each head is asked in turn.

use std::net::SocketAddr;

/// Addresses that are remembered: those of a group, and of the one before.
const ADDRESSES_MAX: usize = 16;

/// The heads' control APIs.
#[derive(Debug, Clone)]
pub(crate) struct Heads {
    addresses: Vec<SocketAddr>,
    position: usize,
}

impl Heads {
    /// Begins with these; there must be one.
    pub(crate) fn new(addresses: Vec<SocketAddr>) -> Option<Self> {
        (!addresses.is_empty()).then_some(Heads {
            addresses,
            position: 0,
        })
    }

    pub(crate) fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The one to ask.
    pub(crate) fn current(&self) -> SocketAddr {
        self.addresses[self.position % self.addresses.len()]
    }

    /// The one to ask did not answer: another may.
    pub(crate) fn next(&mut self) {
        self.position = (self.position + 1) % self.addresses.len();
    }

    /// This one leads: it is asked next.
    pub(crate) fn prefer(&mut self, address: SocketAddr) {
        self.learn(&[address]);
        let position = self.addresses.iter().position(|known| *known == address);
        self.position = position.unwrap_or(0);
    }

    /// Takes in who else is there; those known before stay behind, and the one to ask is the same.
    pub(crate) fn learn(&mut self, addresses: &[SocketAddr]) {
        let current = self.current();
        let before = std::mem::take(&mut self.addresses);
        for address in addresses.iter().copied().chain(before) {
            if self.addresses.len() < ADDRESSES_MAX && !self.addresses.contains(&address) {
                self.addresses.push(address);
            }
        }
        let position = self.addresses.iter().position(|known| *known == current);
        self.position = position.unwrap_or(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(port: u16) -> SocketAddr {
        ([127, 0, 0, 1], port).into()
    }

    #[test]
    fn each_is_asked_in_turn_and_a_named_leader_next() {
        assert!(Heads::new(Vec::new()).is_none());
        let mut heads = Heads::new(vec![address(1), address(2)]).unwrap();
        assert_eq!(heads.current(), address(1));
        heads.next();
        assert_eq!(heads.current(), address(2));
        heads.next();
        assert_eq!(heads.current(), address(1));
        heads.prefer(address(7));
        assert_eq!(heads.current(), address(7));
        assert_eq!(heads.addresses(), [address(7), address(1), address(2)]);
    }

    #[test]
    fn new_heads_come_first_and_the_list_stays_bounded() {
        let mut heads = Heads::new(vec![address(1)]).unwrap();
        heads.learn(&[address(2), address(1), address(3)]);
        assert_eq!(heads.addresses(), [address(2), address(1), address(3)]);
        assert_eq!(
            heads.current(),
            address(1),
            "a connection that stands is kept"
        );
        for port in 100..200 {
            heads.learn(&[address(port)]);
        }
        assert_eq!(heads.addresses().len(), ADDRESSES_MAX);
        assert_eq!(heads.addresses()[0], address(199));
    }
}
