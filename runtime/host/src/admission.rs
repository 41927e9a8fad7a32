//! Which of an actor's waiting calls may begin: readers and writers in the order of admission.
//!
//! A function of what was pushed and what has finished; it starts nothing itself. After every
//! change ask [`Admission::begin_next`] until it has nothing more.
//!
//! Invariants:
//! 1. An exclusive call begins when all before it are over, and nothing begins before it is over.
//! 2. Shared calls of one group begin in the order in which they came, at most `limit` at once.
//! 3. A full group holds up its own calls and exclusive ones, no other group.

use std::collections::VecDeque;

use crate::actor::Access;

struct Group<T> {
    limit: u32,
    running: u32,
    waiting: VecDeque<(u64, T)>,
}

/// The calls of one actor.
pub(crate) struct Admission<T> {
    /// What comes next has this number: order between the queues.
    next_number: u64,
    exclusive: VecDeque<(u64, T)>,
    exclusive_runs: bool,
    groups: Vec<Group<T>>,
}

impl<T> Admission<T> {
    /// Nothing waits and nothing runs. A limit of nought counts as one, and there is one group at
    /// least: otherwise a call could wait for ever.
    pub(crate) fn new(limits: &[u32]) -> Self {
        let limits = if limits.is_empty() { &[1] } else { limits };
        let group = |limit: &u32| Group {
            limit: (*limit).max(1),
            running: 0,
            waiting: VecDeque::new(),
        };
        Admission {
            next_number: 0,
            exclusive: VecDeque::new(),
            exclusive_runs: false,
            groups: limits.iter().map(group).collect(),
        }
    }

    /// A call came in. A group that does not exist is the first one.
    pub(crate) fn push(&mut self, access: Access, call: T) {
        let entry = (self.next_number, call);
        self.next_number += 1;
        match access {
            Access::Exclusive => self.exclusive.push_back(entry),
            Access::Shared { group } => {
                let group = self.known(group);
                self.groups[group].waiting.push_back(entry);
            }
        }
    }

    /// A call that may begin now; it counts as running until [`Admission::finished`].
    pub(crate) fn begin_next(&mut self) -> Option<(Access, T)> {
        if self.exclusive_runs {
            return None;
        }
        let barrier = self
            .exclusive
            .front()
            .map_or(u64::MAX, |(number, _)| *number);
        let group = self.groups.iter().position(|group| {
            group.running < group.limit
                && group
                    .waiting
                    .front()
                    .is_some_and(|(number, _)| *number < barrier)
        });
        if let Some(index) = group {
            let group = &mut self.groups[index];
            let (_, call) = group.waiting.pop_front()?;
            group.running += 1;
            return Some((Access::Shared { group: index }, call));
        }
        // Those before it that wait for room in their group go first, although it could begin.
        let is_first = |group: &Group<T>| {
            group.running == 0
                && group
                    .waiting
                    .front()
                    .is_none_or(|(number, _)| *number > barrier)
        };
        if self.groups.iter().all(is_first) {
            let (_, call) = self.exclusive.pop_front()?;
            self.exclusive_runs = true;
            return Some((Access::Exclusive, call));
        }
        None
    }

    /// A running call is over.
    pub(crate) fn finished(&mut self, access: Access) {
        match access {
            Access::Exclusive => self.exclusive_runs = false,
            Access::Shared { group } => {
                let group = self.known(group);
                let running = &mut self.groups[group].running;
                *running = running.saturating_sub(1);
            }
        }
    }

    /// Counts as a running exclusive call, before anything was pushed: nothing begins until it is
    /// [`Admission::finished`].
    pub(crate) fn hold(&mut self) {
        self.exclusive_runs = true;
    }

    /// Takes out everything that waits.
    pub(crate) fn drain(&mut self) -> Vec<T> {
        let exclusive = std::mem::take(&mut self.exclusive);
        let shared = self
            .groups
            .iter_mut()
            .flat_map(|group| std::mem::take(&mut group.waiting));
        exclusive
            .into_iter()
            .chain(shared)
            .map(|(_, call)| call)
            .collect()
    }

    /// How many wait.
    pub(crate) fn waiting(&self) -> usize {
        let shared: usize = self.groups.iter().map(|group| group.waiting.len()).sum();
        shared + self.exclusive.len()
    }

    /// Whether nothing runs.
    pub(crate) fn is_idle(&self) -> bool {
        !self.exclusive_runs && self.groups.iter().all(|group| group.running == 0)
    }

    fn known(&self, group: usize) -> usize {
        if group < self.groups.len() { group } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn shared(group: usize) -> Access {
        Access::Shared { group }
    }

    fn begun(admission: &mut Admission<char>) -> String {
        std::iter::from_fn(|| admission.begin_next().map(|(_, call)| call)).collect()
    }

    fn with(limits: &[u32], calls: &[(Access, char)]) -> Admission<char> {
        let mut admission = Admission::new(limits);
        for (access, call) in calls {
            admission.push(*access, *call);
        }
        admission
    }

    #[test]
    fn shared_calls_run_together_up_to_the_limit() {
        let mut admission = with(
            &[2],
            &[(shared(0), 'a'), (shared(0), 'b'), (shared(0), 'c')],
        );
        assert_eq!(begun(&mut admission), "ab");
        assert_eq!(admission.waiting(), 1);
        admission.finished(shared(0));
        assert_eq!(begun(&mut admission), "c");
        admission.finished(shared(0));
        assert!(!admission.is_idle());
        admission.finished(shared(0));
        assert!(admission.is_idle());
    }

    #[test]
    fn an_exclusive_call_runs_alone_and_in_its_turn() {
        let exclusive = Access::Exclusive;
        let calls = [
            (shared(0), 'a'),
            (exclusive, 'B'),
            (shared(0), 'c'),
            (exclusive, 'D'),
        ];
        let mut admission = with(&[8], &calls);
        assert_eq!(begun(&mut admission), "a", "c came after B");
        admission.finished(shared(0));
        assert_eq!(begun(&mut admission), "B");
        admission.finished(exclusive);
        assert_eq!(begun(&mut admission), "c");
        admission.finished(shared(0));
        assert_eq!(begun(&mut admission), "D");
    }

    #[test]
    fn a_full_group_holds_up_itself_and_exclusive_calls_only() {
        let calls = [
            (shared(1), 'a'),
            (shared(1), 'b'),
            (shared(0), 'c'),
            (Access::Exclusive, 'D'),
            (shared(0), 'e'),
        ];
        let mut admission = with(&[4, 1], &calls);
        let mut first: Vec<char> = begun(&mut admission).chars().collect();
        first.sort_unstable();
        assert_eq!(first, ['a', 'c']);
        admission.finished(shared(0));
        assert_eq!(
            begun(&mut admission),
            "",
            "b is before D, and its group is full"
        );
        admission.finished(shared(1));
        assert_eq!(begun(&mut admission), "b");
        admission.finished(shared(1));
        assert_eq!(begun(&mut admission), "D");
        admission.finished(Access::Exclusive);
        assert_eq!(begun(&mut admission), "e");
    }

    #[test]
    fn what_is_held_begins_when_it_is_let_go() {
        let mut admission = Admission::new(&[]);
        admission.hold();
        admission.push(shared(7), 'a');
        admission.push(Access::Exclusive, 'B');
        assert_eq!(begun(&mut admission), "");
        admission.finished(Access::Exclusive);
        assert_eq!(begun(&mut admission), "a", "an unknown group is the first");
        assert_eq!(admission.drain(), ['B']);
        assert_eq!(admission.waiting(), 0);
    }

    /// Any interleaving of pushes and ends keeps the invariants, and everything runs in the end.
    #[test]
    fn random_schedules_keep_the_invariants() {
        for seed in 0..200_u64 {
            check_random_schedule(seed);
        }
    }

    fn check_random_schedule(seed: u64) {
        let mut state = seed;
        let mut random = |below: u64| {
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mixed = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            (mixed ^ (mixed >> 31)) % below
        };
        let limits = [1 + random(3) as u32, 1 + random(2) as u32];
        let mut admission = Admission::new(&limits);
        let (mut running, mut began) = (Vec::<(Access, u64)>::new(), Vec::new());
        let mut pushed = Vec::new();
        for step in 0..200_u64 {
            if random(2) == 0 && step < 150 {
                let access = match random(4) {
                    0 => Access::Exclusive,
                    other => shared((other % 2) as usize),
                };
                admission.push(access, step);
                pushed.push((access, step));
            } else if !running.is_empty() {
                let (access, _) = running.swap_remove(random(running.len() as u64) as usize);
                admission.finished(access);
            }
            while let Some((access, call)) = admission.begin_next() {
                running.push((access, call));
                began.push((access, call));
                let alone = running
                    .iter()
                    .any(|(access, _)| *access == Access::Exclusive);
                assert!(!alone || running.len() == 1, "seed {seed}: {running:?}");
                for (group, limit) in limits.iter().enumerate() {
                    let count = running.iter().filter(|(a, _)| *a == shared(group)).count();
                    assert!(count <= *limit as usize, "seed {seed}: {running:?}");
                }
            }
        }
        while let Some((access, _)) = running.pop() {
            admission.finished(access);
            while let Some((access, call)) = admission.begin_next() {
                running.push((access, call));
                began.push((access, call));
            }
        }
        assert_eq!(
            began.len(),
            pushed.len(),
            "seed {seed}: something never began"
        );
        // Order within a group, and across every exclusive call.
        for (place, (access, call)) in began.iter().enumerate() {
            for (later_access, later) in &began[place + 1..] {
                let ordered = access == later_access
                    || *access == Access::Exclusive
                    || *later_access == Access::Exclusive;
                assert!(
                    !ordered || call < later,
                    "seed {seed}: {call} before {later}"
                );
            }
        }
    }
}
