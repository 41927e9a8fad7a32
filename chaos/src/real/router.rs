//! The network between isolated machines: one thread that carries every packet, or does not.
//!
//! Because it sits under TCP and UDP alike, a fault here hits Raft, sessions, calls and the control
//! API in the same way, and silently: no sender ever gets an error.
//!
//! Invariants:
//! 1. A packet from A to B is subject to what was set for the way from A to B, and to nothing else:
//!    the way back may differ.
//! 2. Whether a packet is lost or doubled, and how late it is, is drawn from the seed, the way and
//!    the packet's place on it.
//! 3. At most 10 000 packets are held back.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

/// As a router's queue: what does not fit is dropped. 15 MB at 1500 bytes.
const PACKETS_DELAYED_MAX: usize = 10_000;

/// The largest packet of a device with the default MTU of 1500, and room.
const PACKET_BYTES_MAX: usize = 2_048;

/// A time that cannot be expressed is one to look at once.
const NO_TIME: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 0,
};

/// Packets of one machine that are carried before the others get their turn.
const PACKETS_IN_A_ROW_MAX: usize = 64;

/// What may befall packets on one way.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Disturbance {
    /// Share of packets that are lost, from 0 to 1.
    pub loss: f64,
    /// Share of packets that arrive twice.
    pub duplicate: f64,
    /// How late they are, from and up to, in milliseconds: later ones overtake.
    pub delay_ms: (u64, u64),
}

/// What the router did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Carried {
    /// Packets that were delivered.
    pub delivered: u64,
    /// Packets that a cut swallowed.
    pub cut: u64,
    /// Packets that were lost by chance.
    pub lost: u64,
    /// Packets that were delivered twice.
    pub doubled: u64,
    /// Packets that were held back.
    pub delayed: u64,
}

type Way = (Ipv4Addr, Ipv4Addr);

/// After how many milliseconds each copy of a packet arrives, and what is counted of it.
type Fate = ([Option<u64>; 2], Option<fn(&mut Carried)>);

/// One way, as it is now.
struct WayState {
    /// How many faults cut it.
    cuts: u32,
    disturbance: Option<Disturbance>,
    rng: ChaCha8Rng,
}

struct Ways {
    seed: u64,
    ways: BTreeMap<Way, WayState>,
    carried: Carried,
}

impl Ways {
    fn way(&mut self, way: Way) -> &mut WayState {
        let seed = self.seed;
        self.ways.entry(way).or_insert_with(|| {
            let place = (u64::from(u32::from(way.0)) << 32) | u64::from(u32::from(way.1));
            WayState {
                cuts: 0,
                disturbance: None,
                rng: ChaCha8Rng::seed_from_u64(seed ^ place),
            }
        })
    }

    /// What becomes of the next packet on a way.
    fn fate(&mut self, way: Way) -> Fate {
        let state = self.way(way);
        if state.cuts > 0 {
            return ([None, None], Some(|carried| carried.cut += 1));
        }
        let Some(disturbance) = state.disturbance.clone() else {
            return ([Some(0), None], None);
        };
        let rng = &mut state.rng;
        if rng.random_bool(disturbance.loss) {
            return ([None, None], Some(|carried| carried.lost += 1));
        }
        let (least, most) = disturbance.delay_ms;
        let late = rng.random_range(least..=most);
        if rng.random_bool(disturbance.duplicate) {
            let again = rng.random_range(least..=most);
            return (
                [Some(late), Some(again)],
                Some(|carried| carried.doubled += 1),
            );
        }
        ([Some(late), None], None)
    }
}

/// The network of a run.
pub struct Router {
    ways: Arc<Mutex<Ways>>,
    /// Closed to end the thread.
    stop: Option<PipeWriter>,
    thread: Option<JoinHandle<()>>,
}

impl Router {
    /// Carries packets between these machines' network cards.
    pub fn start(seed: u64, cards: BTreeMap<Ipv4Addr, File>) -> io::Result<Router> {
        let ways = Arc::new(Mutex::new(Ways {
            seed,
            ways: BTreeMap::new(),
            carried: Carried::default(),
        }));
        let (stopped, stop) = io::pipe()?;
        let carrier = Carrier {
            ways: Arc::clone(&ways),
            cards: cards.into_iter().collect(),
            late: BinaryHeap::new(),
            sequence: 0,
        };
        let thread = std::thread::Builder::new()
            .name("router".to_owned())
            .spawn(move || carrier.carry(&stopped))?;
        Ok(Router {
            ways,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// Swallows everything from `source` to `target` until it is healed as often as it was cut.
    pub fn cut(&self, source: Ipv4Addr, target: Ipv4Addr) {
        self.ways.lock().way((source, target)).cuts += 1;
    }

    /// Takes back one [`Router::cut`].
    pub fn heal(&self, source: Ipv4Addr, target: Ipv4Addr) {
        let mut ways = self.ways.lock();
        let way = ways.way((source, target));
        way.cuts = way.cuts.saturating_sub(1);
    }

    /// Disturbs what goes from `source` to `target`, or lets it go as it should.
    pub fn disturb(&self, source: Ipv4Addr, target: Ipv4Addr, how: Option<Disturbance>) {
        self.ways.lock().way((source, target)).disturbance = how;
    }

    /// Everything goes as it should again.
    pub fn heal_all(&self) {
        for way in self.ways.lock().ways.values_mut() {
            way.cuts = 0;
            way.disturbance = None;
        }
    }

    /// What was done so far.
    #[must_use]
    pub fn carried(&self) -> Carried {
        self.ways.lock().carried
    }
}

impl std::fmt::Debug for Router {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Router").finish_non_exhaustive()
    }
}

impl Drop for Router {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A packet that is held back: when it is due, its place among all, its card, its bytes.
type Late = Reverse<(Instant, u64, usize, Vec<u8>)>;

struct Carrier {
    ways: Arc<Mutex<Ways>>,
    cards: Vec<(Ipv4Addr, File)>,
    late: BinaryHeap<Late>,
    sequence: u64,
}

impl Carrier {
    fn carry(mut self, stopped: &PipeReader) {
        loop {
            let wait = self.late.peek().map(|Reverse((due, ..))| {
                let left = due.saturating_duration_since(Instant::now());
                // Not a moment too early, or this would spin until the packet is due.
                Timespec::try_from(left + Duration::from_micros(50)).unwrap_or(NO_TIME)
            });
            let mut watched: Vec<PollFd<'_>> = vec![PollFd::new(stopped, PollFlags::IN)];
            let cards = self.cards.iter();
            watched.extend(cards.map(|(_, card)| PollFd::new(card, PollFlags::IN)));
            match poll(&mut watched, wait.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
            // The other end of the pipe is closed: the run is over.
            if !watched[0].revents().is_empty() {
                return;
            }
            let ready: Vec<usize> = (0..self.cards.len())
                .filter(|card| watched[card + 1].revents().contains(PollFlags::IN))
                .collect();
            drop(watched);
            for card in ready {
                self.take_from(card);
            }
            self.deliver_due();
        }
    }

    fn take_from(&mut self, card: usize) {
        let mut buffer = [0; PACKET_BYTES_MAX];
        for _ in 0..PACKETS_IN_A_ROW_MAX {
            let Ok(length) = (&self.cards[card].1).read(&mut buffer) else {
                return;
            };
            self.route(&buffer[..length]);
        }
    }

    fn route(&mut self, packet: &[u8]) {
        let Some(way) = way_of(packet) else {
            return;
        };
        let Some(target) = self.cards.iter().position(|(address, _)| *address == way.1) else {
            return;
        };
        let copies = {
            let mut ways = self.ways.lock();
            let (copies, count) = ways.fate(way);
            if let Some(count) = count {
                count(&mut ways.carried);
            }
            let carried = &mut ways.carried;
            carried.delivered += u64::from(copies[0].is_some());
            carried.delayed += u64::from(copies[0].is_some_and(|late| late > 0));
            copies
        };
        for late_ms in copies.into_iter().flatten() {
            if late_ms == 0 {
                self.deliver(target, packet);
            } else if self.late.len() < PACKETS_DELAYED_MAX {
                let due = Instant::now() + Duration::from_millis(late_ms);
                self.sequence += 1;
                let late = (due, self.sequence, target, packet.to_vec());
                self.late.push(Reverse(late));
            }
        }
    }

    fn deliver_due(&mut self) {
        let now = Instant::now();
        let is_due = |Reverse((due, ..)): &Late| *due <= now;
        while self.late.peek().is_some_and(is_due) {
            if let Some(Reverse((_, _, target, packet))) = self.late.pop() {
                self.deliver(target, &packet);
            }
        }
    }

    fn deliver(&self, target: usize, packet: &[u8]) {
        // A machine whose queue is full loses packets, as any does.
        let _ = (&self.cards[target].1).write(packet);
    }
}

/// Where an IPv4 packet comes from and goes to (RFC 791, 3.1); others are not carried.
fn way_of(packet: &[u8]) -> Option<Way> {
    let is_ipv4 = packet.first()? >> 4 == 4;
    let address = |at: usize| -> Option<Ipv4Addr> {
        let bytes: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
        Some(bytes.into())
    };
    is_ipv4.then_some((address(12)?, address(16)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::real::machine::{Machine, MachineError};
    use std::net::UdpSocket;

    const NEAR: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
    const FAR: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 2);

    /// What is sent and heard, one word after the other, with a bound on each.
    const LIMIT: Duration = Duration::from_secs(10);

    struct Pair {
        router: Router,
        near: UdpSocket,
        far: UdpSocket,
        _machines: [Machine; 2],
    }

    /// Two machines with a socket on each; `None` where this user may not make any.
    fn pair(seed: u64) -> Option<Pair> {
        let make = |address| match Machine::isolated(address) {
            Ok(made) => Some(made),
            Err(MachineError::Refused { what, reason }) => {
                eprintln!("not tested, {what}: {reason}");
                None
            }
            Err(error) => panic!("{error}"),
        };
        let ((near, near_card), (far, far_card)) = (make(NEAR)?, make(FAR)?);
        let cards = BTreeMap::from([(NEAR, near_card), (FAR, far_card)]);
        let bind = |machine: &Machine| {
            let address = machine.address();
            let socket = machine.run(move || UdpSocket::bind((address, 7))).unwrap();
            socket.set_read_timeout(Some(LIMIT)).unwrap();
            socket
        };
        let (near_socket, far_socket) = (bind(&near), bind(&far));
        near_socket.connect((FAR, 7)).unwrap();
        far_socket.connect((NEAR, 7)).unwrap();
        Some(Pair {
            router: Router::start(seed, cards).unwrap(),
            near: near_socket,
            far: far_socket,
            _machines: [near, far],
        })
    }

    fn hear(socket: &UdpSocket) -> u8 {
        let mut byte = [0];
        socket.recv(&mut byte).unwrap();
        byte[0]
    }

    #[test]
    fn a_cut_is_silent_and_has_one_direction() {
        let Some(pair) = pair(1) else { return };
        pair.near.send(&[1]).unwrap();
        assert_eq!(hear(&pair.far), 1);
        pair.router.cut(NEAR, FAR);
        pair.near.send(&[2]).unwrap();
        // The way back is as it was.
        pair.far.send(&[3]).unwrap();
        assert_eq!(hear(&pair.near), 3);
        while pair.router.carried().cut == 0 {
            std::thread::yield_now();
        }
        pair.router.heal(NEAR, FAR);
        pair.near.send(&[4]).unwrap();
        assert_eq!(hear(&pair.far), 4, "the second was swallowed, not kept");
    }

    #[test]
    fn packets_are_lost_doubled_and_late_by_the_seed() {
        let sent = 200_u8;
        let run = |seed| {
            let pair = pair(seed)?;
            pair.router.disturb(
                NEAR,
                FAR,
                Some(Disturbance {
                    loss: 0.2,
                    duplicate: 0.2,
                    delay_ms: (0, 3),
                }),
            );
            for number in 0..sent {
                pair.near.send(&[number]).unwrap();
            }
            let settled = || {
                let carried = pair.router.carried();
                (carried.delivered + carried.lost == u64::from(sent)).then_some(carried)
            };
            let carried = loop {
                match settled() {
                    Some(carried) => break carried,
                    None => std::thread::yield_now(),
                }
            };
            let expected = carried.delivered + carried.doubled;
            let heard: Vec<u8> = (0..expected).map(|_| hear(&pair.far)).collect();
            assert!(!heard.is_sorted(), "later ones overtake");
            Some(carried)
        };
        let Some(first) = run(7) else { return };
        assert!(first.lost > 10 && first.doubled > 10 && first.delayed > 50);
        assert_eq!(run(7), Some(first), "the same seed");
        assert_ne!(run(8), Some(first), "another seed");
    }

    #[test]
    fn what_is_no_ipv4_packet_goes_nowhere() {
        assert_eq!(way_of(&[]), None);
        assert_eq!(way_of(&[0x60; 40]), None);
        assert_eq!(way_of(&[0x45; 19]), None);
        let mut packet = [0; 20];
        packet[0] = 0x45;
        packet[12..20].copy_from_slice(&[10, 77, 0, 1, 10, 77, 0, 2]);
        assert_eq!(way_of(&packet), Some((NEAR, FAR)));
    }
}
