//! A head's process: the production core, and around it what a process adds: an inbox, a disk, a
//! machine's clock, an end.
//!
//! The tasks that run in a leader's process are in `duties`; they ask the core as the real ones do.

mod outbox;

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use mobula_core::clock::Clock;
use mobula_core::config::RaftConfig;
use mobula_head::simulation::{CoreFault, CoreOptions, HeadCore};
use mobula_storage::engine::{DiskFault, MemoryEngine};
use raft::prelude::Message;
use rand::Rng;

use self::outbox::{Outbox, Sent};
use super::asked::Asked;
use super::duties::Duties;
use super::network::Place;
use super::operator::OperatorTask;
use super::options::{MILLISECOND, Micros, SECOND};
use super::packet::Packet;
use super::violation::Violation;
use super::world::{Event, Phase, World};

/// The first moment of simulated time, in milliseconds since the Unix epoch.
pub(crate) const EPOCH_MS: u64 = 1_700_000_000_000;

/// Ticks that a head makes up for after a pause, as its driver does.
const TICKS_MADE_UP_MAX: u32 = 4;

/// Inputs that may wait: as many as a head's own inbox takes of one kind.
const INBOX_MAX: usize = 4096;

/// What a head finds in its inbox.
#[derive(Debug)]
pub(crate) enum HeadInput {
    /// From the head with this id, or from 0.
    Packet(u64, Packet),
    Tick,
    Operator(OperatorTask, Micros),
}

/// A machine's own idea of time.
#[derive(Debug, Default)]
pub(crate) struct SimClock(AtomicU64);

impl Clock for SimClock {
    fn now_ms(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

pub(crate) struct HeadProcess {
    pub(crate) engine: MemoryEngine,
    pub(crate) core: Option<HeadCore>,
    sent: Arc<Mutex<Sent>>,
    pub(crate) clock: Arc<SimClock>,
    pub(crate) skew_ms: i64,
    founds_group: bool,
    had_log: bool,
    /// Its disk was lost, and it knows.
    pub(crate) is_refused: bool,
    /// It is not to be started again.
    pub(crate) is_retired: bool,
    pub(crate) life: u64,
    inbox: VecDeque<HeadInput>,
    pub(crate) busy_until: Micros,
    pub(crate) is_woken: bool,
    pub(crate) asked: Vec<Asked>,
    pub(crate) duties: Option<Duties>,
}

impl World {
    /// A machine for a head, not started yet.
    pub(crate) fn add_head(&mut self, raft_id: u64, founds_group: bool) {
        let process = HeadProcess {
            engine: MemoryEngine::new(),
            core: None,
            sent: Arc::default(),
            clock: Arc::default(),
            skew_ms: 0,
            founds_group,
            had_log: false,
            is_refused: false,
            is_retired: false,
            life: 0,
            inbox: VecDeque::new(),
            busy_until: 0,
            is_woken: false,
            asked: Vec::new(),
            duties: None,
        };
        self.heads.insert(raft_id, process);
    }

    pub(crate) fn is_up(&self, raft_id: u64) -> bool {
        self.heads
            .get(&raft_id)
            .is_some_and(|head| head.core.is_some())
    }

    /// Starts a head that is down.
    pub(crate) fn head_starts(&mut self, raft_id: u64) -> Result<(), Violation> {
        let now = self.instant();
        let (seed, compact_entries) = (self.seed, self.swarm.compact_entries);
        let modules = self.modules.clone();
        let next_life = self.lives + 1;
        let Some(head) = self.heads.get_mut(&raft_id) else {
            return Ok(());
        };
        let sleeps = self.asleep.contains(&raft_id);
        if head.core.is_some() || head.is_retired || head.is_refused || sleeps {
            return Ok(());
        }
        head.engine.mend();
        head.sent = Arc::default();
        let options = CoreOptions {
            raft_id,
            founds_group: head.founds_group,
            had_log: head.had_log,
            raft: RaftConfig {
                compact_entries,
                keep_entries: compact_entries / 4,
                ..RaftConfig::default()
            },
            clock: head.clock.clone(),
            modules,
            seed,
            life: next_life,
        };
        let outbox = Outbox {
            sent: head.sent.clone(),
            engine: head.engine.clone(),
        };
        self.lives = next_life;
        match HeadCore::start(head.engine.clone(), options, Box::new(outbox), now) {
            Ok(core) => {
                self.checker.restarted(raft_id, &core)?;
                head.had_log = true;
                head.life = next_life;
                head.core = Some(core);
                head.inbox.clear();
                head.asked.clear();
                head.is_woken = false;
                head.busy_until = self.now;
                self.after(25 * MILLISECOND, Event::HeadTick(raft_id, next_life));
                self.say(|| format!("head {raft_id} starts (life {next_life})"));
            }
            Err(reason) if reason.contains("its log is gone") => {
                head.is_refused = true;
                self.say(|| format!("head {raft_id} does not start: {reason}"));
            }
            Err(reason) => {
                return Err(Violation::new(
                    "what a crash leaves can be started on",
                    format!("head {raft_id}: {reason}"),
                ));
            }
        }
        Ok(())
    }

    /// Ends a head's process; what was not synced is lost, but for what happened to be written.
    pub(crate) fn crash_head(&mut self, raft_id: u64, why: &str) {
        let Some(head) = self.heads.get_mut(&raft_id) else {
            return;
        };
        if head.core.take().is_none() {
            return;
        }
        let unsynced = head.engine.unsynced_batches();
        let kept = self.rng.random_range(0..=unsynced);
        head.engine.crash_keeping(kept);
        let inbox = std::mem::take(&mut head.inbox);
        head.asked.clear();
        head.duties = None;
        self.counts.crashes += 1;
        self.counts.torn += u64::from(kept < unsynced);
        for input in inbox {
            if let HeadInput::Packet(from, Packet::Snapshot { life, .. }) = input {
                self.end_snapshot((raft_id, from, life), false, self.now + 300 * MILLISECOND);
            }
        }
        self.say(|| {
            format!("head {raft_id} ends: {why}; {kept} of {unsynced} unsynced writes kept")
        });
    }

    pub(crate) fn give_head(&mut self, raft_id: u64, input: HeadInput) {
        let now = self.now;
        let Some(head) = self.heads.get_mut(&raft_id) else {
            return;
        };
        if head.core.is_none() || head.inbox.len() >= INBOX_MAX {
            return;
        }
        head.inbox.push_back(input);
        if !head.is_woken {
            head.is_woken = true;
            let (at, life) = (head.busy_until.max(now + 20), head.life);
            self.at(at, Event::HeadWake(raft_id, life));
        }
    }

    pub(crate) fn head_ticks(&mut self, raft_id: u64, life: u64) {
        let Some(head) = self.heads.get(&raft_id) else {
            return;
        };
        if head.core.is_none() || head.life != life {
            return;
        }
        let waiting = head.inbox.iter().filter(|i| matches!(i, HeadInput::Tick));
        if waiting.count() < TICKS_MADE_UP_MAX as usize {
            self.give_head(raft_id, HeadInput::Tick);
        }
        self.after(25 * MILLISECOND, Event::HeadTick(raft_id, life));
    }

    /// A head takes all that waits, and carries out what follows.
    pub(crate) fn head_wakes(&mut self, raft_id: u64, life: u64) -> Result<(), Violation> {
        let Some(head) = self.heads.get_mut(&raft_id) else {
            return Ok(());
        };
        if head.core.is_none() || head.life != life {
            return Ok(());
        }
        head.is_woken = false;
        let own_ms = (EPOCH_MS + self.now / MILLISECOND).saturating_add_signed(head.skew_ms);
        head.clock.0.store(own_ms, Ordering::Relaxed);
        let inputs = std::mem::take(&mut head.inbox);
        let has_ticked = inputs.iter().any(|input| matches!(input, HeadInput::Tick));
        for input in inputs {
            if let Err(fault) = self.take_input(raft_id, input) {
                return self.fault_ends_head(raft_id, &fault);
            }
        }
        let Some(core) = self.core(raft_id) else {
            return Ok(());
        };
        if let Err(fault) = core.settle() {
            return self.fault_ends_head(raft_id, &fault);
        }
        self.after_step(raft_id, has_ticked)?;
        // Only now, for the checker wants to see every entry.
        let Some(core) = self.core(raft_id) else {
            return Ok(());
        };
        let before = core.status().truncated;
        let compacted = core.compact_if_due();
        let is_shorter = core.status().truncated > before;
        self.counts.compactions += u64::from(is_shorter);
        if let Err(fault) = compacted {
            return self.fault_ends_head(raft_id, &fault);
        }
        self.rest(raft_id);
        Ok(())
    }

    /// The disk takes its time.
    fn rest(&mut self, raft_id: u64) {
        let sync_max = self.swarm.sync_ms_max * MILLISECOND;
        let rough = self.phase == Phase::Safety && sync_max > 0;
        let pause = if rough {
            self.rng.random_range(50..=sync_max)
        } else {
            50
        };
        if let Some(head) = self.heads.get_mut(&raft_id) {
            head.busy_until = head.busy_until.max(self.now + pause);
        }
    }

    pub(crate) fn core(&mut self, raft_id: u64) -> Option<&mut HeadCore> {
        self.heads.get_mut(&raft_id)?.core.as_mut()
    }

    fn fault_ends_head(&mut self, raft_id: u64, fault: &CoreFault) -> Result<(), Violation> {
        if fault.is_divergence() {
            // All that a head holds was compared with what its entries make, at every step.
            let rule = "only a head that is wrong is called wrong (I12)";
            return Err(Violation::new(rule, format!("head {raft_id}: {fault}")));
        }
        // What was sent before the fault is on its way; what the disk holds is checked at the next
        // start.
        self.flush_outbox(raft_id);
        self.counts.disk_faults += 1;
        self.crash_head(raft_id, "its disk failed");
        let delay = self.rng.random_range(200..1_500) * MILLISECOND;
        self.after(delay, Event::HeadStart(raft_id));
        self.after_step(raft_id, false)
    }

    fn take_input(&mut self, raft_id: u64, input: HeadInput) -> Result<(), CoreFault> {
        let now = self.instant();
        match input {
            HeadInput::Tick => {
                if let Some(core) = self.core(raft_id) {
                    core.tick();
                }
            }
            HeadInput::Operator(task, since) => self.ask_for_operator(raft_id, task, since)?,
            HeadInput::Packet(from, packet) => match packet {
                Packet::Raft(message) => {
                    self.note_message(&message);
                    if let Some(core) = self.core(raft_id) {
                        core.step(*message, now)?;
                    }
                }
                Packet::Snapshot {
                    message,
                    frames,
                    life,
                } => self.take_snapshot(raft_id, (from, life), *message, &frames)?,
                Packet::Claim(claim) => {
                    if let Some(core) = self.core(raft_id) {
                        core.claim_arrived(from, claim, now)?;
                    }
                }
                Packet::SnapshotEnd { to, arrived, life } => {
                    let is_same = self.heads.get(&raft_id).is_some_and(|h| h.life == life);
                    if let (Some(core), true) = (self.core(raft_id), is_same) {
                        core.snapshot_sent(to, arrived, now)?;
                    }
                }
                Packet::Request(request) => self.take_request(raft_id, request)?,
                Packet::FromWorker {
                    worker,
                    session,
                    said,
                } => self.hear_worker(raft_id, worker, session, said)?,
                other => unreachable!("{other:?} is nothing for a head"),
            },
        }
        Ok(())
    }

    fn note_message(&mut self, message: &Message) {
        self.trace.note_all(&[
            message.from,
            message.to,
            message.term,
            message.index,
            message.commit,
            u64::from(message.msg_type.unsigned_abs()),
        ]);
    }

    fn take_snapshot(
        &mut self,
        raft_id: u64,
        (from, life): (u64, u64),
        message: Message,
        frames: &Rc<Vec<Vec<u8>>>,
    ) -> Result<(), CoreFault> {
        let now = self.instant();
        let mut frames = frames.as_ref().clone();
        let damage = self.swarm.damaged_snapshots;
        if self.phase == Phase::Safety && self.rng.random_range(0..1000) < damage {
            let frame = self.rng.random_range(0..frames.len());
            let at = self.rng.random_range(0..frames[frame].len());
            frames[frame][at] ^= 1 << self.rng.random_range(0..8);
        }
        let Some(core) = self.core(raft_id) else {
            return Ok(());
        };
        let taken = core.snapshot_arrived(message, &frames, now);
        let arrived = *taken.as_ref().unwrap_or(&false);
        self.counts.snapshots += u64::from(arrived);
        // The answer of the stream; when it is lost, the sender's transport gives up by itself.
        let (own, other) = (Place::Head(raft_id), Place::Head(from));
        let arrival = self.network.arrivals(own, other, self.now, &mut self.rng)[0];
        self.end_snapshot(
            (raft_id, from, life),
            arrived && arrival.is_some(),
            arrival.unwrap_or(self.now + SECOND),
        );
        taken.map(|_| ())
    }

    fn end_snapshot(&mut self, (to, from, life): (u64, u64, u64), arrived: bool, at: Micros) {
        self.counts.snapshots_lost += u64::from(!arrived);
        let end = Packet::SnapshotEnd { to, arrived, life };
        self.at(at, Event::Arrive(Place::Head(to), Place::Head(from), end));
    }

    /// Looks at a head that has made a step, and hands out what it answered.
    fn after_step(&mut self, raft_id: u64, has_ticked: bool) -> Result<(), Violation> {
        self.flush_outbox(raft_id);
        self.take_complaints()?;
        let Some(head) = self.heads.get_mut(&raft_id) else {
            return Ok(());
        };
        let Some(core) = head.core.as_mut() else {
            return Ok(());
        };
        self.checker.look(raft_id, core, &head.engine)?;
        let compared = core.peer_states().unwrap_or_default();
        if let Some(peer) = compared.iter().find(|peer| peer.differs) {
            let rule = "equal states are called equal (I12)";
            return Err(Violation::new(
                rule,
                format!("head {raft_id} says {peer:?}"),
            ));
        }
        self.counts.compared += compared.len() as u64;
        let (effects, are_lost) = core.take_effects();
        let leadership = core.leadership();
        self.follow_leadership(raft_id, leadership);
        self.carry_out(raft_id, effects, are_lost);
        self.check_revisions(raft_id)?;
        self.collect_answers(raft_id)?;
        if has_ticked {
            self.ask_reads_again(raft_id);
            self.do_duties(raft_id);
            // What the duties asked is taken up at once, as it would be by a driver that waits.
            self.give_head_a_turn(raft_id);
        }
        Ok(())
    }
}

/// Heads by id; the newest leader is the one of the highest term.
pub(crate) fn leader_of(heads: &BTreeMap<u64, HeadProcess>) -> Option<u64> {
    heads
        .iter()
        .filter_map(|(id, head)| Some((head.core.as_ref()?.leadership(), *id)))
        .filter(|(leadership, _)| leadership.is_leader)
        .max_by_key(|(leadership, _)| leadership.term)
        .map(|(_, id)| id)
}

impl HeadProcess {
    /// The disk fails after a few more writes.
    pub(crate) fn arm(&mut self, writes: usize, fault: DiskFault) {
        self.engine.fail_after(writes, fault);
    }

    /// The disk is lost, with everything on it.
    pub(crate) fn lose_disk(&mut self) {
        self.engine = MemoryEngine::new();
    }
}
