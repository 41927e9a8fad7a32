//! What goes wrong, and how it becomes well again.

use mobula_storage::engine::DiskFault;
use rand::Rng;

use super::duties::LEASE;
use super::head::leader_of;
use super::network::Place;
use super::options::{MILLISECOND, Micros};
use super::world::{Event, Phase, World};

impl World {
    /// One fault out of those that this run may have, and the moment of the next.
    pub(crate) fn fault(&mut self) {
        if self.phase != Phase::Safety {
            return;
        }
        let pause = self.rng.random_range(30..400) * MILLISECOND;
        self.after(pause, Event::Fault);
        let swarm = self.swarm.clone();
        match self.rng.random_range(0..12) {
            0 if swarm.cuts => self.cut_something(),
            1 if swarm.cuts => self.cut_leader_off(),
            2 if swarm.clogs => {
                let (from, to) = (self.any_place(), self.any_place());
                let until = self.now + self.rng.random_range(50..1_500) * MILLISECOND;
                self.network.clog(from, to, until);
                self.counts.cuts += 1;
            }
            3 if swarm.crashes => {
                let target = self.any_machine();
                self.crash_and_restart(target, "it is killed");
            }
            4 if swarm.crashes => {
                if let Some(leader) = leader_of(&self.heads) {
                    self.crash_and_restart(leader, "it is killed while it leads");
                }
            }
            5 if swarm.torn_writes => {
                let fault = [DiskFault::SyncLost, DiskFault::SyncKept][self.rng.random_range(0..2)];
                self.break_disk(fault);
            }
            6 if swarm.full_disks => self.break_disk(DiskFault::Full),
            7 if swarm.pauses => self.pause_something(),
            8 if swarm.clock_jumps => self.jump_clock(),
            9 | 10 if swarm.worker_faults => self.hurt_worker(),
            11 if swarm.lost_disks => self.lose_disk(),
            _ => {}
        }
    }

    fn any_machine(&mut self) -> u64 {
        let ids: Vec<u64> = self.heads.keys().copied().collect();
        ids[self.rng.random_range(0..ids.len())]
    }

    fn any_place(&mut self) -> Place {
        match self.rng.random_range(0..6) {
            0 => Place::Client(self.rng.random_range(0..self.clients.len())),
            1 => Place::Worker(self.rng.random_range(0..self.workers.len())),
            _ => Place::Head(self.any_machine()),
        }
    }

    fn cut_something(&mut self) {
        let (from, to) = (self.any_place(), self.any_place());
        let until = self.now + self.rng.random_range(100..3_000) * MILLISECOND;
        self.network.cut(from, to, until);
        self.counts.cuts += 1;
        if self.rng.random_bool(0.5) {
            self.network.cut(to, from, until);
        }
    }

    /// A leader that hears and tells no other head; clients and workers still reach it.
    fn cut_leader_off(&mut self) {
        let Some(leader) = leader_of(&self.heads) else {
            return;
        };
        let until = self.now + self.rng.random_range(300..3_000) * MILLISECOND;
        let others: Vec<u64> = self
            .heads
            .keys()
            .copied()
            .filter(|id| *id != leader)
            .collect();
        let is_one_way = self.rng.random_bool(0.3);
        self.counts.cuts += 1;
        for other in others {
            let (one, two) = (Place::Head(leader), Place::Head(other));
            self.network.cut(one, two, until);
            if !is_one_way {
                self.network.cut(two, one, until);
            }
        }
        self.say(|| format!("head {leader} is cut off until {} ms", until / MILLISECOND));
    }

    pub(crate) fn crash_and_restart(&mut self, raft_id: u64, why: &str) {
        if !self.is_up(raft_id) {
            return;
        }
        self.crash_head(raft_id, why);
        let delay = self.rng.random_range(20..2_000) * MILLISECOND;
        self.after(delay, Event::HeadStart(raft_id));
    }

    fn break_disk(&mut self, fault: DiskFault) {
        let target = self.any_machine();
        let writes = self.rng.random_range(0..6);
        if self.is_up(target)
            && let Some(head) = self.heads.get_mut(&target)
            && !head.engine.is_failing()
        {
            head.arm(writes, fault);
            self.say(|| format!("head {target}: its disk fails after {writes} writes: {fault:?}"));
        }
    }

    fn pause_something(&mut self) {
        let leader = leader_of(&self.heads);
        let target = match leader {
            Some(leader) if self.rng.random_bool(0.6) => leader,
            _ => self.any_machine(),
        };
        let pause = self.rng.random_range(100..3_000) * MILLISECOND;
        let until = self.now + pause;
        if let Some(head) = self.heads.get_mut(&target) {
            head.busy_until = head.busy_until.max(until);
        }
        self.counts.pauses += 1;
        self.say(|| format!("head {target} is stopped for {} ms", pause / MILLISECOND));
    }

    fn jump_clock(&mut self) {
        let target = self.any_machine();
        let range: i64 = [200, 10_000, 2 * 3_600_000][self.rng.random_range(0..3)];
        let skew_ms = self.rng.random_range(-range..=range);
        if let Some(head) = self.heads.get_mut(&target) {
            head.skew_ms = skew_ms;
        }
        self.counts.clock_jumps += 1;
        self.say(|| format!("head {target}: its clock is {skew_ms} ms off"));
    }

    fn hurt_worker(&mut self) {
        let index = self.rng.random_range(0..self.workers.len());
        match self.rng.random_range(0..5) {
            3 | 4 => {
                // Half of the time for longer than its lease: it goes on as if nothing had been, and
                // what it says is that of a node which is lost.
                let lease_ms = LEASE / MILLISECOND;
                let pause_ms = if self.rng.random_bool(0.5) {
                    self.rng.random_range(200..lease_ms)
                } else {
                    self.rng.random_range(lease_ms..3 * lease_ms)
                };
                let pause = pause_ms * MILLISECOND;
                self.workers[index].stopped_until = self.now + pause;
                self.say(|| format!("worker {index} is stopped for {} ms", pause / MILLISECOND));
            }
            0 => {
                self.workers[index].crash();
                self.say(|| format!("worker {index} loses power"));
            }
            1 => self.workers[index].is_up = true,
            _ => self.workers[index].drop_session(),
        }
    }

    /// One voter loses everything. The others must be able to do without it, so this happens when
    /// nobody else is on the way out or in.
    fn lose_disk(&mut self) {
        if !self.operator.is_content() {
            return;
        }
        let voters = self.checker.reference().members().voters.clone();
        let target = voters[self.rng.random_range(0..voters.len())];
        self.crash_head(target, "its disk is lost");
        if let Some(head) = self.heads.get_mut(&target) {
            head.lose_disk();
        }
        self.counts.lost_disks += 1;
        self.operator.leaving = Some(target);
        let delay: Micros = self.rng.random_range(20..1_000) * MILLISECOND;
        self.after(delay, Event::HeadStart(target));
    }

    /// In half of the runs a minority stays down.
    fn leave_some_asleep(&mut self) {
        let voters = self.checker.reference().members().voters.clone();
        // Those that stay up must know that they are enough: raft goes by the membership that a
        // head has applied.
        let knows = |id: &u64| {
            let core = self.heads.get(id).and_then(|head| head.core.as_ref());
            core.is_some_and(|core| core.group().voters == voters)
        };
        if !self.operator.is_content() || !voters.iter().all(knows) || self.rng.random_bool(0.5) {
            return;
        }
        for _ in 0..(voters.len().saturating_sub(1)) / 2 {
            let id = voters[self.rng.random_range(0..voters.len())];
            self.crash_head(id, "it stays down");
            self.asleep.insert(id);
        }
    }

    /// Everything is well again: the network, the clocks, the disks, and all machines that are
    /// members, or only a majority of them.
    pub(crate) fn heal(&mut self) {
        self.phase = Phase::Liveness;
        self.say(|| "everything is well again".to_owned());
        self.network.heal();
        self.leave_some_asleep();
        let ids: Vec<u64> = self.heads.keys().copied().collect();
        for id in ids {
            if self.asleep.contains(&id) {
                continue;
            }
            if let Some(head) = self.heads.get_mut(&id) {
                head.skew_ms = 0;
                head.engine.mend();
                head.busy_until = self.now;
            }
            if !self.is_up(id) {
                self.after(10 * MILLISECOND, Event::HeadStart(id));
            }
        }
        for worker in &mut self.workers {
            worker.is_up = true;
            worker.stopped_until = worker.stopped_until.min(self.now);
        }
    }
}
