//! What one seed is about: each seed draws its own subset of faults and their rates, so that some
//! runs are rough in one way only and find what a bit of everything would hide (swarm testing,
//! Groce et al. 2012).

use std::fmt;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Microseconds of virtual time.
pub(crate) type Micros = u64;

pub(crate) const MILLISECOND: Micros = 1_000;
pub(crate) const SECOND: Micros = 1_000_000;

/// The options of one run, drawn from its seed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Swarm {
    /// Heads that vote when the faults begin: 1, 3 or 5.
    pub heads: usize,
    /// Workers.
    pub workers: usize,
    /// Clients.
    pub clients: usize,
    /// How long faults may happen, in milliseconds of virtual time.
    pub safety_ms: u64,
    /// Messages of a thousand that are lost.
    pub loss: u32,
    /// Messages of a thousand that arrive twice.
    pub duplication: u32,
    /// How long a message takes at the most, in milliseconds. Each takes its own time, so that they
    /// overtake each other.
    pub delay_ms_max: u64,
    /// Whether ways between two processes are cut, in one direction or both.
    pub cuts: bool,
    /// Whether ways are clogged: what is sent arrives late, all at once.
    pub clogs: bool,
    /// Whether heads crash and lose what was not synced.
    pub crashes: bool,
    /// Whether heads crash between two writes, or in the middle of one.
    pub torn_writes: bool,
    /// Whether disks fill up.
    pub full_disks: bool,
    /// How long a sync takes at the most, in milliseconds.
    pub sync_ms_max: u64,
    /// Whether heads are stopped for a while and go on.
    pub pauses: bool,
    /// Whether the clocks of machines jump.
    pub clock_jumps: bool,
    /// Whether disks are lost.
    pub lost_disks: bool,
    /// Whether heads are removed, and others come in their place.
    pub churn: bool,
    /// Whether leadership is handed over now and then.
    pub transfers: bool,
    /// Whether workers crash, restart and lose their heads.
    pub worker_faults: bool,
    /// Whether endpoints are deployed, which are actors that never end by themselves.
    pub endpoints: bool,
    /// Whether their versions are compared, and not only rolled out: an endpoint has one of both at a time.
    pub experiments: bool,
    /// Entries after which a log is compacted; small ones lead to snapshots.
    pub compact_entries: u64,
    /// Snapshots of a thousand that are damaged on their way.
    pub damaged_snapshots: u32,
}

impl Swarm {
    /// What `rng` says.
    pub(crate) fn draw(rng: &mut ChaCha8Rng) -> Swarm {
        let heads = [1, 3, 3, 3, 3, 5][rng.random_range(0..6)];
        // Half of the faults are off in a common run.
        let mut swarm = Swarm {
            heads,
            workers: rng.random_range(1..=3),
            clients: rng.random_range(1..=3),
            safety_ms: rng.random_range(3_000..9_000),
            loss: [0, 0, 10, 50, 150][rng.random_range(0..5)],
            duplication: [0, 0, 20, 200][rng.random_range(0..4)],
            delay_ms_max: [1, 2, 5, 20, 80][rng.random_range(0..5)],
            cuts: rng.random_bool(0.5),
            clogs: rng.random_bool(0.3),
            crashes: rng.random_bool(0.6),
            torn_writes: rng.random_bool(0.5),
            full_disks: rng.random_bool(0.2),
            sync_ms_max: [0, 1, 5, 40][rng.random_range(0..4)],
            pauses: rng.random_bool(0.3),
            clock_jumps: rng.random_bool(0.3),
            lost_disks: heads > 1 && rng.random_bool(0.25),
            churn: heads > 1 && rng.random_bool(0.35),
            transfers: heads > 1 && rng.random_bool(0.3),
            worker_faults: rng.random_bool(0.5),
            endpoints: rng.random_bool(0.6),
            experiments: false,
            compact_entries: [15, 40, 10_000][rng.random_range(0..3)],
            damaged_snapshots: [0, 0, 300, 900][rng.random_range(0..4)],
        };
        swarm.experiments = swarm.endpoints && rng.random_bool(0.6);
        swarm
    }
}

impl fmt::Display for Swarm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} heads, {} workers, {} clients, {} ms of faults; loss {}/1000, duplication {}/1000, \
             delay <= {} ms, sync <= {} ms, compaction at {} entries, snapshots damaged {}/1000",
            self.heads,
            self.workers,
            self.clients,
            self.safety_ms,
            self.loss,
            self.duplication,
            self.delay_ms_max,
            self.sync_ms_max,
            self.compact_entries,
            self.damaged_snapshots
        )?;
        let faults = [
            ("cuts", self.cuts),
            ("clogs", self.clogs),
            ("crashes", self.crashes),
            ("torn writes", self.torn_writes),
            ("full disks", self.full_disks),
            ("pauses", self.pauses),
            ("clock jumps", self.clock_jumps),
            ("lost disks", self.lost_disks),
            ("churn", self.churn),
            ("transfers", self.transfers),
            ("worker faults", self.worker_faults),
            ("endpoints", self.endpoints),
            ("experiments", self.experiments),
        ];
        for (name, _) in faults.iter().filter(|(_, is_on)| *is_on) {
            write!(f, ", {name}")?;
        }
        Ok(())
    }
}
