//! What a member does next, as far as it can without anybody's answer.
//!
//! [`Member::pump`] may be called at any time and as often as one likes: it looks at what is there, and orders
//! what is not ordered yet.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::buckets::BUCKET_BYTES_MAX;
use super::calls::Call;
use super::exchange::{Action, Ask, Contribution};
use super::gather::{Gather, maximal_subtrees};
use super::leader::StateDigest;
use super::member::{Known, Member};
use super::plan::MemberId;
use crate::training::reduction::{Partial, Subtree};

/// Sums under way to one member at once: as many bytes wait there and here.
const SENDS_PER_PEER_MAX: usize = 4;
/// Questions under way to one member at once.
const ASKS_PER_PEER_MAX: usize = 8;
/// Shards that are ordered at once: the shell computes one after the other, and need not ask between
/// two of them. What is ordered is computed whatever the next plan says, so they are few.
const COMPUTING_MAX: usize = 4;

impl Member {
    /// Does whatever can be done now.
    pub(super) fn pump(&mut self) {
        if self.is_applying {
            return;
        }
        self.hand_own_to_self();
        self.collect();
        self.answer_waiting();
        self.compute();
        self.send();
        self.ask_for_missing();
        self.apply();
    }

    /// The own sums for buckets that this member owns.
    fn hand_own_to_self(&mut self) {
        let ready = self.ready_subtrees();
        for bucket in 0..self.shape.buckets.count() {
            if self.plan.owner(bucket) != Some(self.me) || self.known.contains_key(&bucket) {
                continue;
            }
            let range = self.shape.buckets.range(bucket);
            for &subtree in &ready {
                let states = self.gathers.entry((self.step, bucket)).or_default();
                let gather = states
                    .entry(self.digest)
                    .or_insert_with(|| Gather::new(self.shape.tree, range.len()));
                if let Some(sums) = self.own.get(subtree)
                    && !gather.covers(subtree)
                {
                    gather
                        .offer(sums.slice(range.clone()))
                        .expect("the own sums fit, they were checked when they were computed");
                }
            }
        }
    }

    /// Buckets whose last sum has come.
    fn collect(&mut self) {
        for bucket in 0..self.shape.buckets.count() {
            if let Some(root) = self.gather_of(bucket).and_then(Gather::root) {
                let known = Known {
                    sum: Arc::new(root.clone()),
                    held_by: self.me,
                };
                self.known.entry(bucket).or_insert(known);
                self.gathers.remove(&(self.step, bucket));
            }
        }
    }

    fn answer_waiting(&mut self) {
        let (step, known) = (self.step, &self.known);
        let ready = self.waiting_asks.extract_if(.., |(_, ask)| {
            ask.step == step && known.contains_key(&ask.bucket)
        });
        for (token, ask) in ready {
            let answer = Ok(Arc::clone(&known[&ask.bucket].sum));
            self.actions.push_back(Action::Answer { token, answer });
        }
    }

    fn compute(&mut self) {
        let begun = !self.computed.is_empty();
        let may_begin = !self.plan.hold && self.step < self.plan.gate;
        if self.step >= self.shape.steps
            || !(begun || may_begin || self.is_step_begun())
            || self.known.len() == self.shape.buckets.count() as usize
        {
            return;
        }
        let step = self.step;
        let is_new = |shard: &u32| {
            !self.computed.contains(shard) && !self.computing.contains(&(step, *shard))
        };
        let free = COMPUTING_MAX.saturating_sub(self.computing.len());
        let own = self.plan.shards_of(self.me).filter(is_new).take(free);
        let mut next: Vec<u32> = own.collect();
        if next.is_empty() && self.computing.is_empty() {
            // What others may still bring comes last and one by one, so that little of it is computed in vain.
            next.extend(self.plan.backups_of(self.me, step).find(is_new));
        }
        for shard in next {
            self.computing.insert((step, shard));
            self.actions.push_back(Action::Compute { step, shard });
        }
    }

    /// Whether somebody has begun the present step: it is then finished, whoever is left.
    fn is_step_begun(&self) -> bool {
        let from = (self.step, 0);
        !self.known.is_empty()
            || self.ahead.is_some()
            || self.gathers.range(from..).next().is_some()
    }

    /// The largest subtrees of what this member computes, as far as they are done. What it computes beside others is
    /// apart: its own does not wait to become a part of a larger one.
    fn ready_subtrees(&self) -> BTreeSet<Subtree> {
        let backups: BTreeSet<u32> = self.plan.backups_of(self.me, self.step).collect();
        let mut own: BTreeSet<u32> = self.computed.difference(&backups).copied().collect();
        own.extend(self.plan.shards_of(self.me));
        let wanted = maximal_subtrees(own);
        let wanted = wanted.into_iter().chain(maximal_subtrees(backups));
        // Neighbours of both kinds that are done have become one.
        wanted
            .filter_map(|subtree| Some(self.own.covering(subtree)?.subtree))
            .collect()
    }

    fn send(&mut self) {
        if let Some(last) = self.finished.back() {
            // A new owner may lack what the one before had sent to some only.
            let (step, digest) = (last.step, last.digest);
            let sums = last.sums.clone();
            for (bucket, known) in sums {
                self.send_sum(step, digest, bucket, &known);
            }
        }
        let ready = self.ready_subtrees();
        for bucket in 0..self.shape.buckets.count() {
            if let Some(known) = self.known.get(&bucket).cloned() {
                self.send_sum(self.step, self.digest, bucket, &known);
                continue;
            }
            let Some(owner) = self.plan.owner(bucket).filter(|owner| *owner != self.me) else {
                continue;
            };
            self.send_own(owner, bucket, &ready);
        }
    }

    /// The own sums of a bucket, to its owner: the first at once, and those that get ready while it is
    /// under way in one message, at the latest with the last.
    fn send_own(&mut self, owner: MemberId, bucket: u32, ready: &BTreeSet<Subtree>) {
        let step = self.step;
        if !self.has_computed_all() && self.calls.is_sending(owner, (step, bucket)) {
            return;
        }
        let range = self.shape.buckets.range(bucket);
        let mut partials = Vec::new();
        let mut bytes = 0;
        for &subtree in ready {
            let call = Call::Contribute {
                to: owner,
                step,
                bucket,
                subtree,
            };
            if !self.calls.is_due(&call, SENDS_PER_PEER_MAX) {
                continue;
            }
            self.calls.begin(call);
            bytes += range.len() * 4;
            if bytes > BUCKET_BYTES_MAX && !partials.is_empty() {
                let full = std::mem::take(&mut partials);
                self.push_contribution(owner, step, self.digest, bucket, full);
                bytes = range.len() * 4;
            }
            let sums = self.own.get(subtree).expect("it is ready");
            partials.push(sums.slice(range.clone()));
        }
        if !partials.is_empty() {
            self.push_contribution(owner, step, self.digest, bucket, partials);
        }
    }

    /// Whether its own shards are computed; what it computes beside others does not count.
    pub(super) fn has_computed_all(&self) -> bool {
        self.plan
            .shards_of(self.me)
            .all(|shard| self.computed.contains(&shard))
    }

    /// A bucket's sum, to an owner that may not have it.
    fn send_sum(&mut self, step: u64, digest: StateDigest, bucket: u32, known: &Known) {
        let Some(owner) = self.plan.owner(bucket) else {
            return;
        };
        let call = Call::Contribute {
            to: owner,
            step,
            bucket,
            subtree: self.shape.tree.root(),
        };
        let has_it = owner == self.me || owner == known.held_by;
        if !has_it && self.calls.is_due(&call, SENDS_PER_PEER_MAX) {
            self.calls.begin(call);
            let partials = vec![Partial::clone(&known.sum)];
            self.push_contribution(owner, step, digest, bucket, partials);
        }
    }

    fn push_contribution(
        &mut self,
        to: MemberId,
        step: u64,
        digest: StateDigest,
        bucket: u32,
        partials: Vec<Partial>,
    ) {
        let contribution = Contribution {
            from: self.me,
            step,
            digest,
            bucket,
            partials,
        };
        self.actions
            .push_back(Action::Contribute { to, contribution });
    }

    fn ask_for_missing(&mut self) {
        // By a plan without seats nobody is there who could be asked.
        if self.step >= self.shape.steps || self.plan.seats.is_empty() {
            return;
        }
        for bucket in 0..self.shape.buckets.count() {
            if self.known.contains_key(&bucket) {
                continue;
            }
            let owner = self.plan.owner(bucket);
            // Who is ahead has every bucket of this step, also those that this member should add.
            let ahead = self.ahead.map(|(member, _)| member);
            let ahead = ahead.filter(|member| !member.is_driver());
            for to in [owner, ahead].into_iter().flatten() {
                let call = Call::Ask {
                    to,
                    step: self.step,
                    bucket,
                };
                if to == self.me || !self.calls.is_due(&call, ASKS_PER_PEER_MAX) {
                    continue;
                }
                self.calls.begin(call);
                let ask = Ask {
                    from: self.me,
                    step: self.step,
                    digest: self.digest,
                    bucket,
                    at_once: self.calls.is_silent(to),
                };
                self.actions.push_back(Action::Ask { to, ask });
            }
        }
    }

    fn apply(&mut self) {
        let count = self.shape.buckets.count();
        if self.known.len() < count as usize || self.step >= self.shape.steps {
            return;
        }
        self.is_applying = true;
        let mut grads = Vec::with_capacity(self.shape.buckets.value_count());
        for bucket in (0..count).rev() {
            grads.extend_from_slice(&self.known[&bucket].sum.grads);
        }
        let first = &self.known[&0].sum;
        let root = Arc::new(Partial {
            subtree: first.subtree,
            loss_sum: first.loss_sum,
            count: first.count,
            grads,
        });
        self.actions.push_back(Action::Apply { root });
    }
}

#[cfg(test)]
#[path = "next_tests.rs"]
mod tests;
