//! A member: what one copy of the model does from step to step.
//!
//! Its shell calls in with what happened and then carries out what [`Member::poll_action`] gives, until
//! there is nothing more. A member without a seat follows: it takes the sums of every step and computes
//! none; that is how a trainer joins, and how the driver keeps its own copy.
//!
//! Invariants:
//! 1. The state changes only by the sums of all shards of its step (`Apply`).
//! 2. What was computed for the present step is kept until the step is over, whatever the plans say.
//! 3. A sum is taken only from a sender with the same state at the same step.
//! 4. What could not be sent, or was not answered, is sent again after [`Member::retry`], to whoever is
//!    the owner then.
//! 5. Everything kept is bounded: sums of this step and two ahead, of as many steps back as
//!    [`MemberShape::history`] says, [`ASKS_MAX`] waiting questions.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::buckets::Buckets;
use super::calls::{Call, Calls};
use super::exchange::{Action, Ask, Content, Contribution, Refusal, Report};
use super::gather::{Gather, TreeShape};
use super::leader::StateDigest;
use super::plan::{MemberId, Plan};
use crate::training::messages::Epoch;
use crate::training::reduction::{Partial, ReductionError};

/// Steps ahead of its own for which a member takes sums. Members are one step apart; one more for those
/// that join.
const AHEAD_MAX: u64 = 2;
/// Different states whose sums are kept for one bucket: the right one and those of a few wrong members.
const DIGESTS_MAX: usize = 4;
/// Questions that wait for a sum; each is a few bytes here and a call at the asking member.
pub const ASKS_MAX: usize = 4096;
/// What a member has to know of the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemberShape {
    /// The tree of a step.
    pub tree: TreeShape,
    /// How a gradient is cut.
    pub buckets: Buckets,
    /// Steps of the job.
    pub steps: u64,
    /// Finished steps whose sums are kept for those who are behind; at least one.
    pub history: usize,
}

/// The sum of a bucket over all shards, and who is known to have it.
#[derive(Debug, Clone)]
pub(super) struct Known {
    pub(super) sum: Arc<Partial>,
    pub(super) held_by: MemberId,
}

/// A step that is over.
#[derive(Debug)]
pub(super) struct Finished {
    pub(super) step: u64,
    pub(super) digest: StateDigest,
    pub(super) sums: BTreeMap<u32, Known>,
}

/// One copy of the model, from step to step.
#[derive(Debug)]
pub struct Member {
    pub(super) me: MemberId,
    pub(super) shape: MemberShape,
    pub(super) plan: Plan,
    pub(super) step: u64,
    /// The state before `step`.
    pub(super) digest: StateDigest,
    /// Shards that were ordered, with their step.
    pub(super) computing: BTreeSet<(u64, u32)>,
    /// Sums of what was computed for this step, whole vectors.
    pub(super) own: Gather,
    pub(super) computed: BTreeSet<u32>,
    /// Sums of buckets as they come in, by the sender's state.
    pub(super) gathers: BTreeMap<(u64, u32), BTreeMap<StateDigest, Gather>>,
    /// Buckets of this step that are complete.
    pub(super) known: BTreeMap<u32, Known>,
    pub(super) is_applying: bool,
    pub(super) finished: VecDeque<Finished>,
    pub(super) calls: Calls,
    pub(super) waiting_asks: Vec<(u64, Ask)>,
    /// Somebody who is further, and where.
    pub(super) ahead: Option<(MemberId, u64)>,
    pub(super) actions: VecDeque<Action>,
}

impl Member {
    /// A member that holds the state with `digest` before `step`.
    #[must_use]
    pub fn new(me: MemberId, shape: MemberShape, step: u64, digest: StateDigest) -> Self {
        Member {
            me,
            shape,
            plan: Plan::default(),
            step,
            digest,
            computing: BTreeSet::new(),
            own: Gather::new(shape.tree, shape.buckets.value_count()),
            computed: BTreeSet::new(),
            gathers: BTreeMap::new(),
            known: BTreeMap::new(),
            is_applying: false,
            finished: VecDeque::new(),
            calls: Calls::default(),
            waiting_asks: Vec::new(),
            ahead: None,
            actions: VecDeque::new(),
        }
    }

    /// The next step; also the number of steps taken.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The state before that step.
    #[must_use]
    pub fn digest(&self) -> StateDigest {
        self.digest
    }

    /// The epoch of the plan that it follows.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.plan.epoch
    }

    /// The state that it had before `step`, if it is known still.
    #[must_use]
    pub fn digest_before(&self, step: u64) -> Option<StateDigest> {
        if step == self.step {
            return Some(self.digest);
        }
        let finished = self.finished.iter().find(|one| one.step == step);
        finished.map(|one| one.digest)
    }

    /// Where it stands, in a line for whoever looks into a run that does not go on.
    #[must_use]
    pub fn describe(&self) -> String {
        let gathers = self.gathers.iter().map(|((step, bucket), states)| {
            let missing = states.get(&self.digest).map(Gather::missing);
            format!(
                "{step}/{bucket} of {} states lacks {missing:?}",
                states.len()
            )
        });
        let gathers: Vec<String> = gathers.collect();
        format!(
            "{} at step {} in epoch {:?}, gate {}, hold {}: shards {:?}, computed {:?}, computing {:?}, \
             applying {}, buckets {:?}, ahead {:?}, {:?} calls under way and resting, {} asked; {}",
            self.me,
            self.step,
            self.plan.epoch,
            self.plan.gate,
            self.plan.hold,
            self.plan.shards_of(self.me).collect::<Vec<_>>(),
            self.computed,
            self.computing,
            self.is_applying,
            self.known.keys().collect::<Vec<_>>(),
            self.ahead,
            self.calls.counts(),
            self.waiting_asks.len(),
            gathers.join(", ")
        )
    }

    /// Whether it has computed its shards, and waits for the sums of others.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.plan.shards_of(self.me).next().is_some()
            && self.has_computed_all()
            && self.known.len() < self.shape.buckets.count() as usize
    }

    /// Other members without whose sums this one's buckets cannot be completed.
    #[must_use]
    pub fn awaited(&self) -> Vec<MemberId> {
        let missing = self.missing_shards();
        let seats = self.plan.seats.iter();
        let awaited = seats.filter(|seat| !seat.shards.is_disjoint(&missing));
        let others = awaited.filter(|seat| seat.member != self.me);
        others.map(|seat| seat.member).collect()
    }

    fn missing_shards(&self) -> BTreeSet<u32> {
        let mut missing = BTreeSet::new();
        for bucket in 0..self.shape.buckets.count() {
            if self.plan.owner(bucket) != Some(self.me) || self.known.contains_key(&bucket) {
                continue;
            }
            match self.gather_of(bucket) {
                Some(gather) => missing.extend(gather.missing()),
                None => missing.extend(0..self.shape.tree.shard_count),
            }
        }
        missing
    }

    /// Follows `plan` from now on; refuses one of an earlier epoch, naming its own.
    pub fn adopt(&mut self, mut plan: Plan) -> Result<(), Epoch> {
        if plan.epoch < self.plan.epoch {
            return Err(self.plan.epoch);
        }
        if plan.epoch == self.plan.epoch {
            // The same plan with its gate moved: that came late does not close it again.
            plan.gate = plan.gate.max(self.plan.gate);
        }
        self.plan = plan;
        self.calls.follow(&self.plan);
        self.pump();
        Ok(())
    }

    /// A shard is computed. What comes for another step than the present one is dropped.
    pub fn computed(&mut self, step: u64, sums: Partial) -> Result<(), ReductionError> {
        self.computing.remove(&(step, sums.subtree.index));
        if step == self.step && self.known.len() < self.shape.buckets.count() as usize {
            let shard = sums.subtree.index;
            self.own.offer(sums)?;
            self.computed.insert(shard);
        }
        self.pump();
        Ok(())
    }

    /// A shard is not computed any more: its step is over.
    pub fn superseded(&mut self, step: u64, shard: u32) {
        self.computing.remove(&(step, shard));
        self.pump();
    }

    /// Another member's sums.
    pub fn contribute(&mut self, contribution: Contribution) -> Result<(), Refusal> {
        let Contribution {
            from,
            step,
            digest,
            bucket,
            partials,
        } = contribution;
        self.check(from, step, digest, bucket)?;
        if step >= self.step && !(step == self.step && self.known.contains_key(&bucket)) {
            let values = self.shape.buckets.range(bucket).len();
            let states = self.gathers.entry((step, bucket)).or_default();
            if states.len() >= DIGESTS_MAX && !states.contains_key(&digest) {
                return Err(Refusal::Misfit);
            }
            let gather = states
                .entry(digest)
                .or_insert_with(|| Gather::new(self.shape.tree, values));
            for sums in partials {
                gather.offer(sums).map_err(|_| Refusal::Misfit)?;
            }
        }
        self.pump();
        Ok(())
    }

    /// Another member asks for a sum. Without an answer now, there will be an `Answer` with `token`.
    pub fn ask(&mut self, token: u64, ask: Ask) -> Option<Result<Arc<Partial>, Refusal>> {
        if let Err(refusal) = self.check(ask.from, ask.step, ask.digest, ask.bucket) {
            return Some(Err(refusal));
        }
        self.pump();
        if let Some(known) = self.known_at(ask.step, ask.bucket) {
            return Some(Ok(Arc::clone(&known.sum)));
        }
        if ask.at_once {
            return Some(Err(Refusal::NotYet));
        }
        // The same question again: nobody waits for an answer to the one before.
        let same = |other: &Ask| {
            (other.from, other.step, other.bucket) == (ask.from, ask.step, ask.bucket)
        };
        if let Some(place) = self.waiting_asks.iter().position(|(_, other)| same(other)) {
            let (token, _) = self.waiting_asks.swap_remove(place);
            let answer = Err(Refusal::Misfit);
            self.actions.push_back(Action::Answer { token, answer });
        }
        if self.waiting_asks.len() >= ASKS_MAX {
            return Some(Err(Refusal::Misfit));
        }
        self.waiting_asks.push((token, ask));
        None
    }

    /// What became of a contribution; `None` if the call failed.
    pub fn contributed(
        &mut self,
        to: MemberId,
        content: &Content,
        outcome: Option<Result<(), Refusal>>,
    ) {
        for &subtree in &content.subtrees {
            let call = Call::Contribute {
                to,
                step: content.step,
                bucket: content.bucket,
                subtree,
            };
            let news = self.calls.end(&call, outcome.is_some());
            self.actions.extend(news.map(Action::Report));
            match outcome {
                // Whoever is past the step has its sums.
                Some(Ok(()) | Err(Refusal::Late { .. })) => {
                    self.calls.deliver(call);
                }
                Some(Err(refusal)) => self.refused(call, refusal),
                None => self.failed(call),
            }
        }
        self.pump();
    }

    /// What became of a question; `None` if the call failed.
    pub fn answered(
        &mut self,
        to: MemberId,
        step: u64,
        bucket: u32,
        outcome: Option<Result<Partial, Refusal>>,
    ) {
        let call = Call::Ask { to, step, bucket };
        let news = self.calls.end(&call, outcome.is_some());
        self.actions.extend(news.map(Action::Report));
        match outcome {
            Some(Ok(sum)) => self.learn(to, step, bucket, sum),
            // It is asked again at once, if it is the owner still.
            Some(Err(Refusal::NotYet)) => {}
            Some(Err(Refusal::Late { at })) if step == self.step => {
                self.actions
                    .push_back(Action::Report(Report::Behind { at }));
                self.calls.rest(call);
            }
            Some(Err(refusal)) => self.refused(call, refusal),
            None => self.failed(call),
        }
        self.pump();
    }

    /// The update of the present step is made; `digest` is that of the new state.
    pub fn applied(&mut self, digest: StateDigest) {
        self.is_applying = false;
        let finished = Finished {
            step: self.step,
            digest: self.digest,
            sums: std::mem::take(&mut self.known),
        };
        self.finished.push_back(finished);
        while self.finished.len() > self.shape.history.max(1) {
            self.finished.pop_front();
        }
        self.step += 1;
        self.digest = digest;
        self.own = Gather::new(self.shape.tree, self.shape.buckets.value_count());
        self.computed.clear();
        self.ahead = self.ahead.filter(|(_, step)| *step > self.step);
        let oldest = self.step - 1;
        self.gathers.retain(|(step, _), _| *step >= self.step);
        self.calls.forget_before(oldest);
        self.check_early();
        self.refuse_late();
        self.pump();
    }

    /// Whether something failed or was refused and waits for [`Member::retry`].
    #[must_use]
    pub fn is_resting(&self) -> bool {
        self.calls.is_resting()
    }

    /// What failed or was refused may be sent again.
    pub fn retry(&mut self) {
        self.calls.retry();
        self.pump();
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Checks what comes from `from` against the own state.
    fn check(
        &mut self,
        from: MemberId,
        step: u64,
        digest: StateDigest,
        bucket: u32,
    ) -> Result<(), Refusal> {
        if bucket >= self.shape.buckets.count() {
            return Err(Refusal::Misfit);
        }
        if step > self.step {
            // That the driver's copy is further says that the step was begun, and does not help to finish it.
            if self.ahead.is_none() || !from.is_driver() {
                self.ahead = Some((from, step));
            }
            if step > self.step + AHEAD_MAX {
                self.pump();
                return Err(Refusal::Early { at: self.step });
            }
            return Ok(());
        }
        match self.digest_before(step) {
            None => Err(Refusal::Late { at: self.step }),
            Some(mine) if mine == digest => Ok(()),
            Some(mine) => {
                let report = Report::Dissent { step, peer: from };
                self.actions.push_back(Action::Report(report));
                Err(Refusal::Dissent { mine })
            }
        }
    }

    /// Looks at what came before this member was at its step.
    fn check_early(&mut self) {
        let wrong = self
            .gathers
            .range((self.step, 0)..(self.step + 1, 0))
            .any(|(_, states)| states.keys().any(|digest| *digest != self.digest));
        if wrong {
            // Whose they are the senders' next messages tell; these sums are not used.
            let (step, digest) = (self.step, self.digest);
            for (_, states) in self.gathers.range_mut((step, 0)..(step + 1, 0)) {
                states.retain(|other, _| *other == digest);
            }
        }
        let (step, digest) = (self.step, self.digest);
        let wrong = self
            .waiting_asks
            .extract_if(.., |(_, ask)| ask.step == step && ask.digest != digest);
        for (token, ask) in wrong {
            let peer = ask.from;
            self.actions
                .push_back(Action::Report(Report::Dissent { step, peer }));
            let answer = Err(Refusal::Dissent { mine: digest });
            self.actions.push_back(Action::Answer { token, answer });
        }
    }

    fn refuse_late(&mut self) {
        let at = self.step;
        let first = self.finished.front().map_or(at, |one| one.step);
        for (token, _) in self
            .waiting_asks
            .extract_if(.., |(_, ask)| ask.step < first)
        {
            let answer = Err(Refusal::Late { at });
            self.actions.push_back(Action::Answer { token, answer });
        }
    }

    fn refused(&mut self, call: Call, refusal: Refusal) {
        if let (Refusal::Dissent { .. }, step) = (refusal, call.step()) {
            let peer = call.to();
            self.actions
                .push_back(Action::Report(Report::Dissent { step, peer }));
        }
        self.calls.rest(call);
    }

    fn failed(&mut self, call: Call) {
        let peer = call.to();
        self.ahead = self.ahead.filter(|(member, _)| *member != peer);
        let news = self.calls.fail(call);
        self.actions.push_back(Action::Report(news));
    }

    fn learn(&mut self, from: MemberId, step: u64, bucket: u32, sum: Partial) {
        let fits = sum.subtree == self.shape.tree.root()
            && sum.grads.len() == self.shape.buckets.range(bucket).len();
        if step == self.step && fits {
            let known = Known {
                sum: Arc::new(sum),
                held_by: from,
            };
            self.known.entry(bucket).or_insert(known);
        }
    }

    pub(super) fn known_at(&self, step: u64, bucket: u32) -> Option<&Known> {
        if step == self.step {
            return self.known.get(&bucket);
        }
        let finished = self.finished.iter().find(|one| one.step == step)?;
        finished.sums.get(&bucket)
    }

    pub(super) fn gather_of(&self, bucket: u32) -> Option<&Gather> {
        self.gathers.get(&(self.step, bucket))?.get(&self.digest)
    }
}
