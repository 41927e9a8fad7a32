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

use serde::{Deserialize, Serialize};

use super::buckets::Buckets;
use super::gather::{Gather, TreeShape, maximal_subtrees};
use super::leader::StateDigest;
use super::plan::{MemberId, Plan};
use crate::training::messages::Epoch;
use crate::training::reduction::{Partial, ReductionError, ShardFolder, Subtree};

/// Steps ahead of its own for which a member takes sums. Members are one step apart; one more for those
/// that join.
const AHEAD_MAX: u64 = 2;
/// Different states whose sums are kept for one bucket: the right one and those of a few wrong members.
const DIGESTS_MAX: usize = 4;
/// Questions that wait for a sum; each is a few bytes here and a call at the asking member.
pub const ASKS_MAX: usize = 4096;
/// Sums under way to one member at once: as many bytes wait there and here.
const SENDS_PER_PEER_MAX: usize = 4;
/// Questions under way to one member at once.
const ASKS_PER_PEER_MAX: usize = 8;

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

/// Sums on their way to a bucket's owner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Contribution {
    /// Who sends.
    pub from: MemberId,
    /// The step.
    pub step: u64,
    /// The sender's state before that step.
    pub digest: StateDigest,
    /// The bucket.
    pub bucket: u32,
    /// The sums of one subtree, the bucket's values only.
    pub partial: Partial,
}

/// A question for the sum of a bucket over all shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// Who asks.
    pub from: MemberId,
    /// The step.
    pub step: u64,
    /// Its state before that step.
    pub digest: StateDigest,
    /// The bucket.
    pub bucket: u32,
}

/// Why a member does not take a sum, or does not give one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The step is over for so long that its sums are gone.
    #[error("the step is over: this member stands at step {at}")]
    Late {
        /// Where it stands.
        at: u64,
    },
    /// The step is too far ahead.
    #[error("the step is too far ahead: this member stands at step {at}")]
    Early {
        /// Where it stands.
        at: u64,
    },
    /// The states before the step differ.
    #[error("this member holds other bits before that step")]
    Dissent {
        /// What it holds.
        mine: StateDigest,
    },
    /// Not a sum of this job's shards, or too many questions.
    #[error("it does not fit this job, or too many wait")]
    Misfit,
}

/// What a member should know of another, from its answers or its silence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// A call to it failed.
    Unreachable {
        /// Which member.
        peer: MemberId,
    },
    /// It holds other bits.
    Dissent {
        /// The step before which the states differ.
        step: u64,
        /// Which member.
        peer: MemberId,
    },
    /// Its shards take much longer than a step usually does.
    Slow {
        /// Which member.
        peer: MemberId,
    },
    /// This member is too far behind to catch up with sums: it needs a state.
    Behind {
        /// Where another member stands.
        at: u64,
    },
}

/// What a member's shell has to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Compute a shard, then call [`Member::computed`].
    Compute {
        /// The step.
        step: u64,
        /// The shard.
        shard: u32,
    },
    /// Send sums, then call [`Member::contributed`].
    Contribute {
        /// The owner.
        to: MemberId,
        /// What to send.
        contribution: Contribution,
    },
    /// Ask for a sum, then call [`Member::answered`].
    Ask {
        /// The owner.
        to: MemberId,
        /// The question.
        ask: Ask,
    },
    /// Answer a question that waited.
    Answer {
        /// Which one: what [`Member::ask`] was given.
        token: u64,
        /// The answer.
        answer: Result<Arc<Partial>, Refusal>,
    },
    /// Update the state with the sums of the whole step, then call [`Member::applied`].
    Apply {
        /// The sums.
        root: Arc<Partial>,
    },
    /// Tell the leader.
    Report(Report),
}

/// A call under way, or one that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Call {
    Contribute {
        to: MemberId,
        step: u64,
        bucket: u32,
        subtree: Subtree,
    },
    Ask {
        to: MemberId,
        step: u64,
        bucket: u32,
    },
}

impl Call {
    fn to(&self) -> MemberId {
        match self {
            Call::Contribute { to, .. } | Call::Ask { to, .. } => *to,
        }
    }

    fn step(&self) -> u64 {
        match self {
            Call::Contribute { step, .. } | Call::Ask { step, .. } => *step,
        }
    }
}

/// The sum of a bucket over all shards, and who is known to have it.
#[derive(Debug, Clone)]
struct Known {
    sum: Arc<Partial>,
    held_by: MemberId,
}

/// A step that is over.
#[derive(Debug)]
struct Finished {
    step: u64,
    digest: StateDigest,
    sums: BTreeMap<u32, Known>,
}

/// One copy of the model, from step to step.
#[derive(Debug)]
pub struct Member {
    me: MemberId,
    shape: MemberShape,
    plan: Plan,
    step: u64,
    /// The state before `step`.
    digest: StateDigest,
    computing: Option<(u64, u32)>,
    /// Sums of what was computed for this step, whole vectors.
    own: Gather,
    computed: BTreeSet<u32>,
    /// Sums of buckets as they come in, by the sender's state.
    gathers: BTreeMap<(u64, u32), BTreeMap<StateDigest, Gather>>,
    /// Buckets of this step that are complete.
    known: BTreeMap<u32, Known>,
    is_applying: bool,
    finished: VecDeque<Finished>,
    calls: BTreeSet<Call>,
    /// Failed or refused; sent again after [`Member::retry`].
    resting: BTreeSet<Call>,
    /// Contributions that were taken.
    delivered: BTreeSet<Call>,
    waiting_asks: Vec<(u64, Ask)>,
    /// Somebody who is further, and where.
    ahead: Option<(MemberId, u64)>,
    actions: VecDeque<Action>,
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
            computing: None,
            own: Gather::new(shape.tree, shape.buckets.value_count()),
            computed: BTreeSet::new(),
            gathers: BTreeMap::new(),
            known: BTreeMap::new(),
            is_applying: false,
            finished: VecDeque::new(),
            calls: BTreeSet::new(),
            resting: BTreeSet::new(),
            delivered: BTreeSet::new(),
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
             applying {}, buckets {:?}, ahead {:?}, {} calls, {} resting, {} asked; {}",
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
            self.calls.len(),
            self.resting.len(),
            self.waiting_asks.len(),
            gathers.join(", ")
        )
    }

    /// Whether it has computed its shards, and waits for the sums of others.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        let mut own = self.plan.shards_of(self.me).peekable();
        own.peek().is_some()
            && own.all(|shard| self.computed.contains(&shard))
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
        // Questions to those who own nothing any more may wait for ever; a late answer still counts.
        let plan = &self.plan;
        self.calls.retain(|call| match call {
            Call::Ask { to, bucket, .. } => plan.owner(*bucket) == Some(*to),
            Call::Contribute { to, .. } => plan.seat(*to).is_some(),
        });
        self.resting.clear();
        self.pump();
        Ok(())
    }

    /// A shard is computed. What comes for another step than the present one is dropped.
    pub fn computed(&mut self, step: u64, sums: Partial) -> Result<(), ReductionError> {
        if self.computing == Some((step, sums.subtree.index)) {
            self.computing = None;
        }
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
        if self.computing == Some((step, shard)) {
            self.computing = None;
        }
        self.pump();
    }

    /// Another member's sums.
    pub fn contribute(&mut self, contribution: Contribution) -> Result<(), Refusal> {
        let Contribution {
            from,
            step,
            digest,
            bucket,
            partial,
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
            gather.offer(partial).map_err(|_| Refusal::Misfit)?;
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
        step: u64,
        bucket: u32,
        subtree: Subtree,
        outcome: Option<Result<(), Refusal>>,
    ) {
        let call = Call::Contribute {
            to,
            step,
            bucket,
            subtree,
        };
        self.calls.remove(&call);
        match outcome {
            // Whoever is past the step has its sums.
            Some(Ok(()) | Err(Refusal::Late { .. })) => {
                self.delivered.insert(call);
            }
            Some(Err(refusal)) => self.refused(call, refusal),
            None => self.failed(call),
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
        self.calls.remove(&call);
        match outcome {
            Some(Ok(sum)) => self.learn(to, step, bucket, sum),
            Some(Err(Refusal::Late { at })) if step == self.step => {
                self.actions
                    .push_back(Action::Report(Report::Behind { at }));
                self.resting.insert(call);
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
        for calls in [&mut self.calls, &mut self.resting, &mut self.delivered] {
            calls.retain(|call| call.step() >= oldest);
        }
        self.check_early();
        self.refuse_late();
        self.pump();
    }

    /// Whether something failed or was refused and waits for [`Member::retry`].
    #[must_use]
    pub fn is_resting(&self) -> bool {
        !self.resting.is_empty()
    }

    /// What failed or was refused may be sent again.
    pub fn retry(&mut self) {
        self.resting.clear();
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
            self.ahead = Some((from, step));
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
        self.resting.insert(call);
    }

    fn failed(&mut self, call: Call) {
        let peer = call.to();
        self.ahead = self.ahead.filter(|(member, _)| *member != peer);
        self.actions
            .push_back(Action::Report(Report::Unreachable { peer }));
        self.resting.insert(call);
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

    fn known_at(&self, step: u64, bucket: u32) -> Option<&Known> {
        if step == self.step {
            return self.known.get(&bucket);
        }
        let finished = self.finished.iter().find(|one| one.step == step)?;
        finished.sums.get(&bucket)
    }

    fn gather_of(&self, bucket: u32) -> Option<&Gather> {
        self.gathers.get(&(self.step, bucket))?.get(&self.digest)
    }

    /// Does whatever can be done now.
    fn pump(&mut self) {
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
        if self.computing.is_some()
            || self.step >= self.shape.steps
            || !(begun || may_begin || self.is_step_begun())
            || self.known.len() == self.shape.buckets.count() as usize
        {
            return;
        }
        let is_new = |shard: &u32| !self.computed.contains(shard);
        let next = self.plan.shards_of(self.me).find(is_new);
        if let Some(shard) = next {
            self.computing = Some((self.step, shard));
            let step = self.step;
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

    /// The largest subtrees of what this member computes, as far as they are done.
    fn ready_subtrees(&self) -> Vec<Subtree> {
        let mut wanted = self.computed.clone();
        wanted.extend(self.plan.shards_of(self.me));
        let mut subtrees = maximal_subtrees(wanted);
        subtrees.retain(|subtree| self.own.get(*subtree).is_some());
        subtrees
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
            for &subtree in &ready {
                let call = Call::Contribute {
                    to: owner,
                    step: self.step,
                    bucket,
                    subtree,
                };
                if !self.may_send(&call, SENDS_PER_PEER_MAX) {
                    continue;
                }
                let sums = self.own.get(subtree).expect("it is ready");
                let partial = sums.slice(self.shape.buckets.range(bucket));
                self.push_contribution(call, self.digest, partial);
            }
        }
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
        if !has_it && self.may_send(&call, SENDS_PER_PEER_MAX) {
            self.push_contribution(call, digest, Partial::clone(&known.sum));
        }
    }

    fn push_contribution(&mut self, call: Call, digest: StateDigest, partial: Partial) {
        let Call::Contribute {
            to, step, bucket, ..
        } = call
        else {
            return;
        };
        self.calls.insert(call);
        let contribution = Contribution {
            from: self.me,
            step,
            digest,
            bucket,
            partial,
        };
        self.actions
            .push_back(Action::Contribute { to, contribution });
    }

    fn may_send(&self, call: &Call, limit: usize) -> bool {
        let is_ask = |call: &Call| matches!(call, Call::Ask { .. });
        let like = |other: &&Call| other.to() == call.to() && is_ask(other) == is_ask(call);
        !self.calls.contains(call)
            && !self.resting.contains(call)
            && !self.delivered.contains(call)
            && self.calls.iter().filter(like).count() < limit
    }

    fn ask_for_missing(&mut self) {
        if self.step >= self.shape.steps {
            return;
        }
        for bucket in 0..self.shape.buckets.count() {
            if self.known.contains_key(&bucket) {
                continue;
            }
            let owner = self.plan.owner(bucket);
            // Who is ahead has every bucket of this step, also those that this member should add.
            let ahead = self.ahead.map(|(member, _)| member);
            for to in [owner, ahead].into_iter().flatten() {
                let call = Call::Ask {
                    to,
                    step: self.step,
                    bucket,
                };
                if to == self.me || !self.may_send(&call, ASKS_PER_PEER_MAX) {
                    continue;
                }
                self.calls.insert(call);
                let ask = Ask {
                    from: self.me,
                    step: self.step,
                    digest: self.digest,
                    bucket,
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

/// One computed shard's sums.
pub fn shard_sums(shard: u32, loss_sum: f64, count: u64, grads: Vec<f32>) -> Partial {
    let mut folder = ShardFolder::new();
    folder
        .feed(shard, loss_sum, count, grads)
        .expect("a first shard is in order");
    let mut partials = folder.finish();
    partials.pop().expect("one shard gives one partial")
}
